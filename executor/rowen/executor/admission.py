"""Whether the rollout engine may compute now: the gate's decision, pure.

Called by the gate before each step and between layers, and by anyone who wants to explain the
gate's state.  It must never open on a missing, silent or contradictory reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from rowen.executor.readings import DaemonReading, ProbeReading


class GateReason(StrEnum):
    """Why the gate is as it is, from the most to the least severe."""

    PROBE_UNREADABLE = "probe_unreadable"
    DAEMON_UNREADABLE = "daemon_unreadable"
    PROBE_SILENT = "probe_silent"
    DAEMON_SILENT = "daemon_silent"
    DAEMON_CLOSED = "daemon_closed"
    NO_BUDGET = "no_budget"
    SERVING_BUSY = "serving_busy"
    OPEN = "open"


@dataclass(frozen=True)
class AdmissionBounds:
    """How old a heartbeat may be.  Invariant: closed within 1 s of the last sign of life."""

    probe_silent_ms: int = 500
    daemon_silent_ms: int = 500

    def __post_init__(self) -> None:
        for name in ("probe_silent_ms", "daemon_silent_ms"):
            value = getattr(self, name)
            if not 0 < value <= 1000:
                raise ValueError(
                    f"{name} is {value}, it must be 1 to 1000: the gate closes within one second "
                    "of the last sign of life"
                )


class Admission(NamedTuple):
    """The decision.  ``closed_since_ns`` is the first moment a gate could have seen it; 0: open."""

    allowed: bool
    reason: GateReason
    closed_since_ns: int = 0


_OPEN = Admission(True, GateReason.OPEN)
_AHEAD_NS = 50_000_000
"""A heartbeat may be this much newer than ``now_ns`` (stamped between two looks at the clock);
one further ahead is from before a reboot, and counts as silence."""


def may_compute(
    probe: ProbeReading | None, daemon: DaemonReading | None, now_ns: int, bounds: AdmissionBounds
) -> Admission:
    """Decide whether rollouts may compute.

    Args:
        probe: the serving engine's word; None when it cannot be read.
        daemon: the daemon's word; None when it cannot be read.
        now_ns: monotonic time, taken after both were read.
        bounds: ages from which a word is no longer believed.

    Returns:
        Allowed only if both are fresh, the daemon's gate is open with a budget, and the serving
        engine has no request running or waiting.  A worse reading never allows more.
    """
    if probe is None:
        return Admission(False, GateReason.PROBE_UNREADABLE, now_ns)
    if daemon is None:
        return Admission(False, GateReason.DAEMON_UNREADABLE, now_ns)
    silent_ns = bounds.probe_silent_ms * 1_000_000
    if not -_AHEAD_NS <= now_ns - probe.heartbeat_ns <= silent_ns:
        since_ns = min(now_ns, probe.heartbeat_ns + silent_ns)
        return Admission(False, GateReason.PROBE_SILENT, since_ns)
    silent_ns = bounds.daemon_silent_ms * 1_000_000
    if not -_AHEAD_NS <= now_ns - daemon.heartbeat_ns <= silent_ns:
        since_ns = min(now_ns, daemon.heartbeat_ns + silent_ns)
        return Admission(False, GateReason.DAEMON_SILENT, since_ns)
    busy_since_ns = probe.changed_ns if probe.is_busy else now_ns
    if not daemon.gate_open:
        since_ns = min(daemon.changed_ns, busy_since_ns)
        return Admission(False, GateReason.DAEMON_CLOSED, since_ns)
    if daemon.token_budget <= 0 or daemon.sequence_cap <= 0:
        since_ns = min(daemon.heartbeat_ns, busy_since_ns)
        return Admission(False, GateReason.NO_BUDGET, since_ns)
    if probe.is_busy:
        return Admission(False, GateReason.SERVING_BUSY, busy_since_ns)
    return _OPEN
