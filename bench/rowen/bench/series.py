"""What happened over time in a run: the input of the report's plots, kept beside ``result.json``.

All ``at_s`` count from the start of the harvested replay on one clock (CLOCK_MONOTONIC minus its
value at that start); records count from the start of their own arm, so that both arms lie on top of
each other.  Points are sorted by ``at_s``.  Any series may be empty.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rowen.bench.errors import RequestsError
from rowen.bench.records import ServingRecord, record_from


@dataclass(frozen=True, slots=True)
class Point:
    """Something at a moment of the harvested replay."""

    at_s: float


@dataclass(frozen=True, slots=True)
class EnginePoint(Point):
    """Something of one rollout engine."""

    engine: str


@dataclass(frozen=True, slots=True)
class GatePoint(Point):
    """The daemon's word from ``at_s`` on: gate, rung of the reclaim ladder, and why."""

    gate_open: bool
    rung: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RatePoint(EnginePoint):
    """Rollout tokens per second of one engine over the interval that ends at ``at_s``.

    An interval reaches back to the engine's point before, so write a 0 where it makes none.
    """

    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class VersionPoint(EnginePoint):
    """An engine generates with this weight version from ``at_s`` on."""

    version: int


@dataclass(frozen=True, slots=True)
class StepPoint(Point):
    """A training step that ended at ``at_s``."""

    step: int
    reward: float


@dataclass(frozen=True, slots=True)
class EventPoint(Point):
    """Something worth a mark, such as an engine killed or reclaimed."""

    label: str


@dataclass(frozen=True, slots=True)
class Series:
    """Everything that the report draws."""

    duration_s: float
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    alone: Sequence[ServingRecord] = ()
    harvested: Sequence[ServingRecord] = ()
    gate: Sequence[GatePoint] = ()
    rollout: Sequence[RatePoint] = ()
    versions: Sequence[VersionPoint] = ()
    steps: Sequence[StepPoint] = ()
    events: Sequence[EventPoint] = ()

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), separators=(",", ":")), encoding="utf-8")


_POINTS: dict[str, Any] = {
    "gate": GatePoint,
    "rollout": RatePoint,
    "versions": VersionPoint,
    "steps": StepPoint,
    "events": EventPoint,
}


def read_series(path: Path) -> Series:
    """Read what ``Series.write`` wrote.

    Raises:
        RequestsError: the file is missing or not one of ours.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        unknown = set(document) - {one.name for one in fields(Series)}
        if unknown:
            raise TypeError(f"unknown field {min(unknown)}")
        for name, point in _POINTS.items():
            document[name] = [point(**one) for one in document.get(name, ())]
        for name in ("alone", "harvested"):
            document[name] = [record_from(one) for one in document.get(name, ())]
        return Series(**document)
    except (OSError, ValueError, TypeError) as error:
        raise RequestsError(
            f"{path} is not a file of series ({error}); run the demo again"
        ) from None
