"""Does the rollout engine show a living gate that does as it is told?  Pure."""

from __future__ import annotations

from rowen.executor.lane import GateReading

SILENT_AFTER_MS = 5000
"""The gate beats every 50 ms.  Silence alone is no harm (what does not run does not compute), so
this bound only has to find engines that hang."""


def is_obedient(
    gate: GateReading | None, now_ns: int, closed_since_ns: int | None, *, is_serving_busy: bool
) -> bool:
    """Judge the gate's record of a ready engine.

    Args:
        gate: its record; None when the lane cannot be read.
        now_ns: monotonic time of the look.
        closed_since_ns: when the daemon told the gate to close; None while it is told to be open.
        is_serving_busy: production runs or waits.  In the idle class the kernel then keeps the
            engine off the core, in the middle of a step and of Python, and no thread of it can
            write: silence proves nothing, and ending the engine would punish it for yielding.

    Returns:
        False when the gate is silent though it could run, or says it is open in a heartbeat made
        after the closing.  An older heartbeat proves nothing either way.
    """
    if gate is None:
        return False
    if now_ns - gate.heartbeat_ns > SILENT_AFTER_MS * 1_000_000:
        return is_serving_busy
    has_seen_closing = closed_since_ns is not None and gate.heartbeat_ns > closed_since_ns
    return not (has_seen_closing and gate.is_open)
