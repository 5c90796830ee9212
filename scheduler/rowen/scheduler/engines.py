"""The state of an engine as the scheduler sees it, from lease, health and weight version.  Pure.

``COLD → WARMING → STALE → READY ⇄ THROTTLED → DRAINING | LOST``.  Only READY and THROTTLED engines
get requests, and only within the number of sequences that the decision admits.  Rules run from the
most to the least severe and the first match wins; what is unknown is never good.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from rowen.policies.lease import EngineKind, Grant

WAITING_TURN_VERSIONS = 1
"""An engine may serve one version behind the newest while others are being updated before it."""


class EngineState(StrEnum):
    COLD = "cold"
    WARMING = "warming"
    STALE = "stale"
    READY = "ready"
    THROTTLED = "throttled"
    DRAINING = "draining"
    LOST = "lost"


class Reason(StrEnum):
    """Why; the same word is logged, exported as a label and shown by status."""

    NO_LEASE = "no_lease"
    DRAINING = "draining"
    NOT_SEEN_YET = "not_seen_yet"
    REFUSED = "refused"
    NO_ANSWER = "no_answer"
    BACKING_OFF = "backing_off"
    UPDATING = "updating"
    VERSION_UNKNOWN = "version_unknown"
    OTHER_RUN = "other_run"
    VERSION_BEHIND = "version_behind"
    VERSION_AHEAD = "version_ahead"
    LEASE_UNVERIFIED = "lease_unverified"
    GATE_CLOSED = "gate_closed"
    RUNNING = "running"


@dataclass(frozen=True, slots=True)
class EngineSeen:
    """Readings of one incarnation (fencing epoch) of an engine; ages are in the readings."""

    kind: EngineKind
    has_lease: bool
    """A lease stands in Redis, or the engine needs none."""
    is_lease_verified: bool
    """Redis answered within the life of the lease."""
    grant: Grant
    sequence_cap: int
    was_seen: bool
    """This incarnation answered at least once."""
    is_refused: bool
    """The last attempt was refused outright: nobody listens there."""
    failed_checks: int
    """Checks without an answer, in a row, with no token in between."""
    is_backing_off: bool
    """It rests after a fault."""
    is_updating: bool
    version: int | None
    """Verified weight version; None before verification and after a failed update."""
    target_version: int
    is_of_run: bool = True
    """Its version is one of the announced training run."""


@dataclass(frozen=True, slots=True)
class EnginePolicy:
    health_failures: int = 3


@dataclass(frozen=True, slots=True)
class EngineDecision:
    """``action`` is the state to be in."""

    action: EngineState
    reason: Reason
    capacity: int
    """Most requests at once; 0 takes no new ones."""
    keeps_running: bool
    """False: what runs there moves elsewhere now."""


def decide(previous: EngineState, seen: EngineSeen, policy: EnginePolicy) -> EngineDecision:
    """Derive the state; ``previous`` tells an engine never seen (COLD) from one that went."""
    state = EngineState
    if not seen.has_lease:
        is_new = previous is state.COLD
        return _without_work(state.COLD if is_new else state.LOST, Reason.NO_LEASE)
    if seen.grant is Grant.DRAINING:
        return _without_work(state.DRAINING, Reason.DRAINING)
    if not seen.was_seen:
        return _without_work(state.WARMING, Reason.NOT_SEEN_YET)
    if seen.is_refused:
        return _without_work(state.LOST, Reason.REFUSED)
    if seen.failed_checks >= policy.health_failures:
        return _without_work(state.LOST, Reason.NO_ANSWER)
    if seen.is_backing_off:
        # Streams that still deliver may: a fault of one request is no proof against the others.
        return EngineDecision(state.LOST, Reason.BACKING_OFF, 0, True)
    if seen.is_updating:
        return EngineDecision(state.STALE, Reason.UPDATING, 0, True)
    if seen.version is None:
        return EngineDecision(state.STALE, Reason.VERSION_UNKNOWN, 0, True)
    if not seen.is_of_run:
        return EngineDecision(state.STALE, Reason.OTHER_RUN, 0, True)
    if seen.version > seen.target_version:
        return EngineDecision(state.STALE, Reason.VERSION_AHEAD, 0, True)
    if seen.target_version - seen.version > WAITING_TURN_VERSIONS:
        return EngineDecision(state.STALE, Reason.VERSION_BEHIND, 0, True)
    if not seen.is_lease_verified and seen.kind is EngineKind.OPPORTUNISTIC:
        return EngineDecision(state.THROTTLED, Reason.LEASE_UNVERIFIED, 0, True)
    if seen.grant is Grant.THROTTLED or seen.sequence_cap == 0:
        return EngineDecision(state.THROTTLED, Reason.GATE_CLOSED, seen.sequence_cap, True)
    return EngineDecision(state.READY, Reason.RUNNING, seen.sequence_cap, True)


def _without_work(state: EngineState, reason: Reason) -> EngineDecision:
    return EngineDecision(state, reason, 0, False)
