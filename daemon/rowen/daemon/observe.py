"""Observe: one look at everything the decisions need, as plain values with their ages.

Nothing here blocks: the metrics are the scraper's last reading, the rest comes from files in
memory.  A source that fails gives None, which the guard takes for the worst case.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from rowen.daemon.link import LaneLink
from rowen.daemon.scrape import Scraper
from rowen.executor.lane import GateReading, LaneError, ProbeReading
from rowen.policies.guard import GuardSeen, ObjectiveReading
from rowen.policies.schema import Mode

MODE_STRICTNESS = {Mode.ENFORCE: 0, Mode.PREVIEW: 1, Mode.OFF: 2}


def stricter(one: Mode, other: Mode) -> Mode:
    """Of the policy's mode and the operator's, the one that harvests less."""
    return max(one, other, key=MODE_STRICTNESS.__getitem__)


@dataclass(frozen=True, slots=True)
class Observation:
    """One look.  None means that a source could not be read or has never spoken."""

    now_ns: int
    kill_switch: bool | None
    probe: ProbeReading | None
    gate: GateReading | None
    metrics_read_at_ns: int | None
    ttft: ObjectiveReading | None
    tpot: ObjectiveReading | None
    available_memory_bytes: int | None
    problems: dict[str, str]
    """Why a source gave nothing, by source."""

    def age_ms(self, stamp_ns: int | None) -> float | None:
        """Age of a time stamp at this look; None for one that was never made."""
        return None if not stamp_ns else (self.now_ns - stamp_ns) / 1e6

    @property
    def probe_age_ms(self) -> float | None:
        """Age of the serving engine's heartbeat."""
        return self.age_ms(self.probe.heartbeat_ns if self.probe is not None else None)

    @property
    def gate_age_ms(self) -> float | None:
        """Age of the rollout engine's heartbeat."""
        return self.age_ms(self.gate.heartbeat_ns if self.gate is not None else None)

    def for_guard(self, elapsed_ms: float, mode: Mode) -> GuardSeen:
        """What the guard gets to see."""
        return GuardSeen(
            elapsed_ms=elapsed_ms,
            kill_switch=self.kill_switch,
            mode=mode,
            probe_age_ms=self.probe_age_ms,
            metrics_age_ms=self.age_ms(self.metrics_read_at_ns),
            ttft=self.ttft,
            tpot=self.tpot,
            available_memory_bytes=self.available_memory_bytes,
        )


class Observer:
    """Reads all sources."""

    def __init__(
        self,
        link: LaneLink,
        scraper: Scraper,
        kill_file: Path,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._link = link
        self._scraper = scraper
        self._kill_file = kill_file
        self._clock = clock

    def look(self) -> Observation:
        """Take one look; never raises."""
        problems: dict[str, str] = {}
        kill_switch = self._read_kill_switch(problems)
        probe, gate = self._read_lane(problems)
        metrics = self._scraper.reading
        if self._scraper.problem is not None:
            problems["metrics"] = self._scraper.problem
        return Observation(
            # After all reads: the probe writes while we look, and a heartbeat newer than "now"
            # would have a negative age (seen: -0.03 ms, which closed the gate for a cool-down).
            now_ns=self._clock(),
            kill_switch=kill_switch,
            probe=probe,
            gate=gate,
            metrics_read_at_ns=metrics.read_at_ns if metrics is not None else None,
            ttft=metrics.ttft if metrics is not None else None,
            tpot=metrics.tpot if metrics is not None else None,
            available_memory_bytes=_read_memory(problems),
            problems=problems,
        )

    def _read_kill_switch(self, problems: dict[str, str]) -> bool | None:
        """On while the name exists, whatever it is (a dangling link counts)."""
        try:
            os.lstat(self._kill_file)
        except FileNotFoundError:
            # Without its folder nobody could set the switch, so its state is unknown.
            if self._kill_file.parent.is_dir():
                return False
            problems["kill_switch"] = f"the folder of {self._kill_file} is gone"
            return None
        except OSError as error:
            problems["kill_switch"] = f"{self._kill_file}: {error.strerror}"
            return None
        return True

    def _read_lane(
        self, problems: dict[str, str]
    ) -> tuple[ProbeReading | None, GateReading | None]:
        probe: ProbeReading | None = None
        gate: GateReading | None = None
        try:
            probe = self._link.lane.read_probe()
        except LaneError as error:
            problems["probe"] = str(error)
        try:
            gate = self._link.lane.read_gate()
        except LaneError as error:
            problems["gate"] = str(error)
        return probe, gate


def _read_memory(problems: dict[str, str]) -> int | None:
    try:
        return int(psutil.virtual_memory().available)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        problems["memory"] = f"{type(error).__name__}: {error}"
        return None
