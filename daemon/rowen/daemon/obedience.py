"""Does the rollout engine show a living gate that does as it is told?  Pure."""

from __future__ import annotations

from rowen.executor.lane import GateReading

SILENT_AFTER_MS = 5000
"""The gate beats every 50 ms, but in the idle class beside a fully busy engine its threads get
about 3/1027 of a core: seconds may pass.  Silence alone is no harm (what does not run does not
compute), so this bound only has to find engines that hang."""


def is_obedient(gate: GateReading | None, now_ns: int, closed_since_ns: int | None) -> bool:
    """Judge the gate's record of a ready engine.

    Args:
        gate: its record; None when the lane cannot be read.
        now_ns: monotonic time of the look.
        closed_since_ns: when the daemon told the gate to close; None while it is told to be open.

    Returns:
        False when the gate is silent, or says it is open in a heartbeat made after the closing.
        An older heartbeat proves nothing either way.
    """
    if gate is None or now_ns - gate.heartbeat_ns > SILENT_AFTER_MS * 1_000_000:
        return False
    has_seen_closing = closed_since_ns is not None and gate.heartbeat_ns > closed_since_ns
    return not (has_seen_closing and gate.is_open)
