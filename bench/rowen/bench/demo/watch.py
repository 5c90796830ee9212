"""Looks at the running parts once per second and remembers what it saw; never changes anything."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rowen.cli.pages import PageError, read_page
from rowen.executor.lane import CLOSE_SAMPLES, Lane, LaneError
from rowen.policies.guard import Gate, Reason
from rowen.policies.reclaim import SEVERITY, Cause, Rung

PERIOD_S = 1.0

BREACHES = (Reason.TTFT_BREACHED, Reason.TPOT_BREACHED)
"""Reasons for which the guard closes because of traffic; without them an open guard means that the
fast path held the engine, which only traffic does."""

COUNTS = ("finished", "lost", "migrated")
"""Counts of trajectories that are added up over all lives of the endpoint."""


@dataclass(frozen=True)
class EngineSample:
    """One rollout engine at a moment, as the scheduler sees it."""

    engine_id: str
    kind: str
    state: str
    version: int | None
    tokens_total: int


@dataclass(frozen=True)
class Sample:
    """Everything seen at one moment of CLOCK_MONOTONIC."""

    monotonic_s: float
    engines: tuple[EngineSample, ...] = ()
    busy_ns_total: int | None = None
    """Time the serving engine was busy so far; None when the lane could not be read."""
    closings_total: int | None = None
    steal_s: float | None = None
    """Time that the host took from the accelerator's core so far (0 on bare metal)."""


@dataclass
class Watch:
    """Collects samples, the daemon's decisions and close-to-idle times until cancelled."""

    endpoint: str
    admin: str
    lane_path: Path
    accelerator_core: int = 0
    samples: list[Sample] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    """Changes of the daemon's decision, oldest first, over all its lives."""
    close_to_idle_ms: list[float] = field(default_factory=list)
    """Compute time of the rollout engine from each closing to its stop."""
    close_to_idle_wall_ms: list[float] = field(default_factory=list)
    closings: int = 0
    trajectories: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    syncs: dict[tuple[str, int, float], dict[str, Any]] = field(default_factory=dict)
    """Every weight update of every engine that ended well."""
    _counts_seen: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    _next_decision: int = 0
    _close_samples: int = 0
    _gate_writer: int = 0
    _closings_seen: int = 0

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(PERIOD_S)

    async def look(self) -> Sample:
        """Take one sample now."""
        engines, decisions, trajectories, versions = await asyncio.gather(
            asyncio.to_thread(page, f"{self.endpoint}/rowen/v1/engines"),
            asyncio.to_thread(page, f"{self.admin}/history?since={self._next_decision}"),
            asyncio.to_thread(page, f"{self.endpoint}/rowen/v1/trajectories"),
            asyncio.to_thread(page, f"{self.endpoint}/rowen/v1/versions"),
        )
        self._take_decisions(decisions)
        self._take_counts(trajectories)
        for sync in (versions or {}).get("syncs", ()):
            self.syncs[sync["engine_id"], sync["version"], sync["finished_monotonic_s"]] = sync
        busy_ns, closings = self._read_lane()
        sample = Sample(
            monotonic_s=time.monotonic(),
            engines=tuple(_engine(one) for one in (engines or {}).get("engines", ())),
            busy_ns_total=busy_ns,
            closings_total=closings,
            steal_s=psutil.cpu_times(percpu=True)[self.accelerator_core].steal,
        )
        self.samples.append(sample)
        return sample

    def _take_decisions(self, answer: Mapping[str, Any] | None) -> None:
        if answer is None:
            return
        entries = answer["entries"]
        if not entries and answer["next"] < self._next_decision:
            self._next_decision = 0  # a new life of the daemon counts anew
            return
        self.decisions += entries
        self._next_decision = answer["next"]

    def _take_counts(self, answer: Mapping[str, Any] | None) -> None:
        if answer is None:
            return
        for name in COUNTS:
            # A new life of the endpoint counts anew.
            grown = answer[name] - self._counts_seen[name]
            self.trajectories[name] += grown if grown >= 0 else answer[name]
            self._counts_seen[name] = answer[name]

    def _read_lane(self) -> tuple[int | None, int | None]:
        try:
            lane = Lane.open(self.lane_path, role="reader")
        except LaneError:
            return None, None
        try:
            gate = lane.read_gate()
            busy_ns = lane.read_probe().busy_ns_total
        except LaneError:
            return None, None
        finally:
            lane.close()
        if gate.writer_pid != self._gate_writer:  # a new life of the rollout engine counts anew
            self._gate_writer = gate.writer_pid
            self._close_samples = self._closings_seen = 0
        fresh = min(gate.samples_total - self._close_samples, CLOSE_SAMPLES)
        if fresh > 0:
            self.close_to_idle_ms += [us / 1000 for us in gate.close_to_idle_ring_us[-fresh:]]
            wall = gate.close_to_idle_wall_ring_us[-fresh:]
            self.close_to_idle_wall_ms += [us / 1000 for us in wall]
        self._close_samples = gate.samples_total
        self.closings += gate.closings_total - self._closings_seen
        self._closings_seen = gate.closings_total
        return busy_ns, gate.closings_total

    def reclaims_since(self, monotonic_s: float) -> int:
        """How often since then serving traffic had the engine's trajectories moved away."""
        rungs = [one["rung"] for one in self.decisions]
        return sum(
            SEVERITY[Rung(before)] < SEVERITY[Rung.DRAIN] <= SEVERITY[Rung(one["rung"])]
            and one["cause"] == Cause.CLOSED_TOO_LONG
            and (one["gate"] == Gate.OPEN or one["reason"] in BREACHES)
            and one["monotonic_ms"] / 1000 >= monotonic_s
            for before, one in zip(rungs, self.decisions[1:], strict=False)
        )


def page(url: str) -> dict[str, Any] | None:
    """A JSON page; None when it does not answer (its process may be restarting)."""
    try:
        return read_page(url)
    except PageError:
        return None


def _engine(document: Mapping[str, Any]) -> EngineSample:
    return EngineSample(
        engine_id=document["engine_id"],
        kind=document["kind"],
        state=document["state"],
        version=document["version"],
        tokens_total=document["tokens_total"],
    )
