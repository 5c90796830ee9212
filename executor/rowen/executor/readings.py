"""What the three writers of the lane say.  Values only; ``lane.py`` has the bytes.

All times are ``time.monotonic_ns()``, which all processes of a machine share.
"""

from __future__ import annotations

from typing import Final, NamedTuple

UNLIMITED: Final = 2**31 - 1
"""A cap or budget that does not bind."""

CLOSE_SAMPLES: Final = 64
"""How many of the newest close-to-idle times the gate record holds."""


class ProbeReading(NamedTuple):
    """What the serving engine last said.  A never-written record has ``heartbeat_ns`` 0."""

    heartbeat_ns: int
    requests_waiting: int
    requests_running: int
    oldest_waiting_age_ms: float
    """Age, at the heartbeat, of the oldest request that was never scheduled; 0 without one."""
    prefill_tokens_waiting: int
    kv_used_ratio: float
    step_started_ns: int
    """When the step in flight began; 0 between steps."""
    step_predicted_ms: float
    """Predicted time of the step in flight (of the last one, between steps); 0 before a fit."""
    steps_total: int
    busy_ns_total: int
    """Time with any request running or waiting since the engine started."""
    changed_ns: int = 0
    """When the engine last went from idle to busy or back."""
    writer_pid: int = 0

    @property
    def is_busy(self) -> bool:
        """Whether any request runs or waits."""
        return self.requests_running + self.requests_waiting > 0


class DaemonReading(NamedTuple):
    """What the daemon last decided.  A never-written record has ``heartbeat_ns`` 0."""

    heartbeat_ns: int
    gate_open: bool
    token_budget: int
    """Tokens per step of the rollout engine; UNLIMITED does not bind, 0 closes."""
    sequence_cap: int
    """Sequences in a step of the rollout engine; UNLIMITED does not bind, 0 closes."""
    block_cap: int
    """KV blocks the rollout engine may hold; UNLIMITED does not bind."""
    epoch: int
    changed_ns: int = 0
    """When ``gate_open`` last flipped."""
    writer_pid: int = 0


class GateReading(NamedTuple):
    """What the rollout engine last did.  A never-written record has ``heartbeat_ns`` 0."""

    heartbeat_ns: int
    is_open: bool
    is_computing: bool
    """A step is being computed and not held: closed and computing means a layer still runs."""
    closings_total: int
    close_to_idle_us: int
    """The last close-to-idle time, and the largest since the engine started; see README."""
    close_to_idle_max_us: int
    steps_total: int
    tokens_total: int
    """Tokens (prompt and new) that went through the model."""
    samples_total: int = 0
    """Closings that met running sequences; each gave one sample."""
    epoch_seen: int = 0
    """The daemon's epoch that the gate last read."""
    open_ns_total: int = 0
    """Time the gate was open since the engine started."""
    overruns_total: int = 0
    """Steps that were finished while closed, because a hold reached its bound or the end came."""
    writer_pid: int = 0
    close_to_idle_ring_us: tuple[int, ...] = ()
    """The newest close-to-idle times, at most CLOSE_SAMPLES, oldest first."""
    close_to_idle_wall_ring_us: tuple[int, ...] = ()
    """The same closings by the clock on the wall, time off the core included."""
