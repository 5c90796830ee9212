"""The reclaim ladder: what happens to the rollout engine while its gate is, or has to be, closed.

RUN → GATE → DRAIN → TERMINATE → KILL → STOPPED, each rung with a deadline for the next:

* RUN: the engine computes.  GATE: its gate is closed for the moment; its requests wait.
* DRAIN: the gate has been closed for too long, or will be; its trajectories move to other engines.
* TERMINATE and KILL: SIGTERM, then SIGKILL; only when memory is short, the kill switch is on, or
  the engine does not obey its gate.  There is no way back from here but through STOPPED.
* STOPPED: no engine, and none is wanted until the guard opens again.

Pure, like the guard: no clock, no log, no I/O; elapsed time is in the readings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from rowen.policies.guard import Gate
from rowen.policies.lease import Grant
from rowen.policies.schema import HarvestPolicy, Reclaim


class Rung(StrEnum):
    """Steps of the ladder, from harvesting to nothing left."""

    RUN = "run"
    GATE = "gate"
    DRAIN = "drain"
    TERMINATE = "terminate"
    KILL = "kill"
    STOPPED = "stopped"


SEVERITY: dict[Rung, int] = {rung: place for place, rung in enumerate(Rung)}
"""Place on the ladder; a higher one harvests less."""

GRANTS: dict[Rung, Grant] = {
    Rung.RUN: Grant.RUN,
    Rung.GATE: Grant.THROTTLED,
    Rung.DRAIN: Grant.DRAINING,
    Rung.TERMINATE: Grant.DRAINING,
    Rung.KILL: Grant.DRAINING,
    Rung.STOPPED: Grant.DRAINING,
}
"""What the scheduler is told on each rung."""


class EnginePhase(StrEnum):
    """What the process of the rollout engine is doing."""

    ABSENT = "absent"
    STARTING = "starting"
    READY = "ready"


class Cause(StrEnum):
    """Why the ladder stands where it stands."""

    OPEN = "open"
    GUARD_CLOSED = "guard_closed"
    SERVING_BUSY = "serving_busy"
    CLOSED_TOO_LONG = "closed_too_long"
    KILL_SWITCH = "kill_switch"
    MEMORY_SHORT = "memory_short"
    GATE_IGNORED = "gate_ignored"
    DEADLINE_PASSED = "deadline_passed"
    ENGINE_GONE = "engine_gone"
    NOT_YET_STEADY = "not_yet_steady"


@dataclass(frozen=True, slots=True)
class ReclaimSeen:
    """What the ladder looks at."""

    elapsed_ms: float
    """Time since the previous decision."""
    gate: Gate
    """The guard's word."""
    is_admitted: bool
    """May the engine compute by the fast path too (nothing of production runs or waits)?"""
    is_killed: bool
    """The kill switch is on, or its state unknown."""
    is_memory_short: bool
    engine: EnginePhase
    is_obedient: bool
    """The engine's gate record is fresh, and it does not compute while it must not."""


@dataclass(frozen=True, slots=True)
class ReclaimState:
    """What the ladder remembers."""

    rung: Rung
    rung_ms: float
    """Time on this rung."""
    closed_ms: float
    """Continuous time in which the engine might not compute."""
    open_ms: float
    """Continuous time in which it might."""
    disobedient_ms: float
    """Continuous time without a living, obedient gate of a ready engine."""
    must_go_ms: float
    """Continuous time with a reason to end the engine."""


START = ReclaimState(Rung.STOPPED, 0.0, 0.0, 0.0, 0.0, 0.0)
"""No engine until there is evidence that one may run."""


@dataclass(frozen=True, slots=True)
class ReclaimDecision:
    """The rung to be on, why, and what to remember."""

    action: Rung
    reason: Cause
    state: ReclaimState

    @property
    def is_engine_wanted(self) -> bool:
        """Should the supervisor keep the engine running (and start it when it is absent)?"""
        return self.action in (Rung.RUN, Rung.GATE, Rung.DRAIN)


def decide(previous: ReclaimState, seen: ReclaimSeen, policy: HarvestPolicy) -> ReclaimDecision:
    """Take the ladder's next step; never raises, and never goes back up from TERMINATE or KILL."""
    deadlines = policy.spec.reclaim
    # A nonsensical clock must not hasten a resumption; the guard closes on it (tick_late) anyway.
    elapsed_ms = seen.elapsed_ms
    if not math.isfinite(elapsed_ms) or elapsed_ms < 0:
        elapsed_ms = 0.0
    is_open = _is_open(seen)
    is_ignoring = seen.engine is EnginePhase.READY and not seen.is_obedient
    disobedient_ms = previous.disobedient_ms + elapsed_ms if is_ignoring else 0.0
    must_go = _why_it_must_go(seen, is_ignored=disobedient_ms >= deadlines.acknowledge_ms)
    times = ReclaimState(
        rung=previous.rung,
        rung_ms=previous.rung_ms + elapsed_ms,
        closed_ms=0.0 if is_open else previous.closed_ms + elapsed_ms,
        open_ms=previous.open_ms + elapsed_ms if is_open else 0.0,
        disobedient_ms=disobedient_ms,
        must_go_ms=previous.must_go_ms + elapsed_ms if must_go is not None else 0.0,
    )
    rung, cause = _next_rung(times, seen, must_go, deadlines)
    rung_ms = times.rung_ms if rung is previous.rung else 0.0
    return ReclaimDecision(rung, cause, replace(times, rung=rung, rung_ms=rung_ms))


def _is_open(seen: ReclaimSeen) -> bool:
    return seen.gate is Gate.OPEN and seen.is_admitted


def _next_rung(
    times: ReclaimState, seen: ReclaimSeen, must_go: Cause | None, deadlines: Reclaim
) -> tuple[Rung, Cause]:
    if times.rung in (Rung.TERMINATE, Rung.KILL):
        return _finish_stopping(times, seen, deadlines)
    if times.rung is Rung.STOPPED:
        return _consider_starting(times, must_go, deadlines)
    if must_go is not None:
        return _reclaim(times, seen, must_go, deadlines)
    return _follow_gate(times, seen, deadlines)


def _why_it_must_go(seen: ReclaimSeen, *, is_ignored: bool) -> Cause | None:
    if seen.is_killed:
        return Cause.KILL_SWITCH
    if seen.is_memory_short:
        return Cause.MEMORY_SHORT
    return Cause.GATE_IGNORED if is_ignored else None


def _finish_stopping(
    times: ReclaimState, seen: ReclaimSeen, deadlines: Reclaim
) -> tuple[Rung, Cause]:
    if seen.engine is EnginePhase.ABSENT:
        return Rung.STOPPED, Cause.ENGINE_GONE
    if times.rung is Rung.KILL or times.rung_ms >= deadlines.kill_after_ms:
        return Rung.KILL, Cause.DEADLINE_PASSED
    return Rung.TERMINATE, Cause.DEADLINE_PASSED


def _consider_starting(
    times: ReclaimState, must_go: Cause | None, deadlines: Reclaim
) -> tuple[Rung, Cause]:
    if must_go is not None:
        return Rung.STOPPED, must_go
    if times.open_ms < deadlines.resume_after_ms:
        return Rung.STOPPED, Cause.NOT_YET_STEADY
    return Rung.RUN, Cause.OPEN


def _reclaim(
    times: ReclaimState, seen: ReclaimSeen, cause: Cause, deadlines: Reclaim
) -> tuple[Rung, Cause]:
    if seen.engine is EnginePhase.ABSENT:
        return Rung.STOPPED, cause
    if seen.engine is EnginePhase.STARTING:
        return Rung.TERMINATE, cause  # it has no trajectories that could move
    if times.rung is not Rung.DRAIN:
        return Rung.DRAIN, cause
    # Counted from the cause, not from the drain: the engine may have been drained long before.
    if times.must_go_ms >= deadlines.terminate_after_ms:
        return Rung.TERMINATE, cause
    return Rung.DRAIN, cause


def _follow_gate(times: ReclaimState, seen: ReclaimSeen, deadlines: Reclaim) -> tuple[Rung, Cause]:
    if _is_open(seen):
        if times.rung is Rung.DRAIN and times.open_ms < deadlines.resume_after_ms:
            return Rung.DRAIN, Cause.NOT_YET_STEADY
        return Rung.RUN, Cause.OPEN
    cause = Cause.GUARD_CLOSED if seen.gate is Gate.CLOSED else Cause.SERVING_BUSY
    if times.rung is Rung.DRAIN:
        return Rung.DRAIN, cause
    if times.closed_ms >= deadlines.drain_after_ms:
        return Rung.DRAIN, Cause.CLOSED_TOO_LONG
    return Rung.GATE, cause
