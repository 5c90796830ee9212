"""The gate of one rollout engine: what the lane allows now, and what the gate did.

One object per engine process, shared by the step gate (``gate.py``) and the layer gate
(``layer_gate.py``).  A heartbeat thread publishes it, so that a gate whose engine is held or idle
still shows life.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque

from rowen.executor.admission import Admission, may_compute
from rowen.executor.isolation import name_this_thread
from rowen.executor.lane import CLOSE_SAMPLES, GateReading, Lane, LaneError
from rowen.executor.lane_config import LaneConfig

logger = logging.getLogger("vllm.rowen.gate")  # under vllm's logger, whose handler is set up

HEARTBEAT_S = 0.05
"""Pace at which the gate looks at the lane and publishes itself besides its steps."""

POLL_S = 0.001
"""Pace of looking at the lane while held."""

LOOK_AGAIN_NS = 1_000_000_000
"""How often a missing, deleted or replaced lane is looked for."""

_LARGEST_US = 2**32 - 1


class Gate:
    """Reads the lane, decides by ``may_compute``, keeps the counts of contract 1.

    ``check`` may be called from any thread; the ``step_`` methods and ``between_layers`` belong
    to the thread that computes.
    """

    def __init__(self, config: LaneConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._lane: Lane | None = None
        self._looked_ns = 0
        self._said = ""
        self._token_budget = self._sequence_cap = 0
        self._is_open = False
        self._opened_ns = 0
        self._open_ns_total = 0
        self._closings_total = 0
        self._epoch_seen = 0
        self._in_step = self._is_held = False
        self._held_ns_in_step = 0
        self._step_started_ns = self._step_ended_ns = 0
        self._seen_open_cpu_ns = 0
        self._closing_has_sample = False
        self._steps_total = self._tokens_total = 0
        self._samples_total = self._overruns_total = self._largest_us = 0
        self._ring_us: deque[int] = deque(maxlen=CLOSE_SAMPLES)
        self._wall_us: deque[int] = deque(maxlen=CLOSE_SAMPLES)
        self._is_ending = False
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def token_budget(self) -> int:
        """Tokens that the daemon last granted per step."""
        return self._token_budget

    @property
    def sequence_cap(self) -> int:
        """Sequences that the daemon last granted per step."""
        return self._sequence_cap

    def start(self) -> None:
        """Begin to publish."""
        self._thread = threading.Thread(target=self._beat, name="rowen-gate", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Release every hold for good: the engine shuts down.  Safe in a signal handler."""
        self._is_ending = True

    def close(self) -> None:
        """Release every hold, stop publishing and leave the lane."""
        self._is_ending = True
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)
        with self._lock:
            self._drop_lane()

    def check(self) -> Admission:
        """What the lane allows at this moment; unreadable means closed."""
        with self._lock:
            return self._check()

    def step_started(self, tokens: int) -> None:
        """A step goes to the model."""
        with self._lock:
            self._in_step = True
            self._held_ns_in_step = 0
            self._step_started_ns = time.monotonic_ns()
            self._seen_open_cpu_ns = time.process_time_ns()
            self._steps_total += 1
            self._tokens_total += tokens

    def step_ended(self) -> None:
        """The step came back; nothing computes until the next."""
        with self._lock:
            if self._in_step:
                admission = self._check()
                self._step_ended_ns = time.monotonic_ns()
                if not admission.allowed:
                    self._take_sample(admission, self._step_ended_ns)
                self._in_step = False

    def step_refused(self, admission: Admission) -> None:
        """Running sequences got no step: their last one ended before or after the closing."""
        with self._lock:
            self._take_sample(admission, self._step_ended_ns)

    def between_layers(self) -> None:
        """Hold while closed, for at most the configured time per step; at once back when open."""
        if not self._in_step or self._is_ending:
            return
        with self._lock:
            admission = self._check()
            if admission.allowed:
                self._seen_open_cpu_ns = time.process_time_ns()
                return
            limit_ns = self._config.layer_hold_ms * 1_000_000 - self._held_ns_in_step
            if limit_ns <= 0:
                return
            self._take_sample(admission, time.monotonic_ns())
            self._is_held = True
            self._publish(time.monotonic_ns())
        self._hold(limit_ns)

    def _hold(self, limit_ns: int) -> None:
        began_ns = time.monotonic_ns()
        held_ns = 0
        is_open = False
        while not is_open and held_ns < limit_ns and not self._is_ending:
            time.sleep(POLL_S)
            is_open = self.check().allowed
            held_ns = time.monotonic_ns() - began_ns
        with self._lock:
            self._is_held = False
            self._held_ns_in_step += held_ns
            self._seen_open_cpu_ns = time.process_time_ns()
            if not is_open:
                self._held_ns_in_step = self._config.layer_hold_ms * 1_000_000
                self._overruns_total += 1

    def _check(self) -> Admission:
        now_ns = time.monotonic_ns()
        if now_ns - self._looked_ns >= LOOK_AGAIN_NS:
            self._looked_ns = now_ns
            self._look_for_lane()
        probe = daemon = None
        if self._lane is not None:
            try:
                probe, daemon = self._lane.read_probe_and_daemon()
            except LaneError as error:
                self._say(str(error))
        now_ns = time.monotonic_ns()
        admission = may_compute(probe, daemon, now_ns, self._config.bounds)
        if daemon is not None:
            self._token_budget, self._sequence_cap = daemon.token_budget, daemon.sequence_cap
            self._epoch_seen = daemon.epoch
        if admission.allowed != self._is_open:
            self._flip(admission, now_ns)
        return admission

    def _flip(self, admission: Admission, now_ns: int) -> None:
        self._is_open = admission.allowed
        if admission.allowed:
            self._opened_ns = now_ns
            self._closing_has_sample = False
        else:
            self._open_ns_total += now_ns - self._opened_ns
            self._closings_total += 1

    def _take_sample(self, admission: Admission, stopped_ns: int) -> None:
        """Note how long compute outlived this closing; once per closing."""
        if self._closing_has_sample:
            return
        self._closing_has_sample = True
        wall_ns = max(0, stopped_ns - max(admission.closed_since_ns, self._step_started_ns))
        # In the idle class the kernel takes the core away before the gate can look, so the wall
        # runs on while nothing computes.  Processor time since the gate was last seen open bounds
        # from above what was really computed.
        used_ns = min(wall_ns, time.process_time_ns() - self._seen_open_cpu_ns)
        self._ring_us.append(min(_LARGEST_US, used_ns // 1000))
        self._wall_us.append(min(_LARGEST_US, wall_ns // 1000))
        self._largest_us = max(self._largest_us, self._ring_us[-1])
        self._samples_total += 1

    def _beat(self) -> None:
        name_this_thread("rowen-gate")
        while not self._closing.wait(HEARTBEAT_S):
            with self._lock:
                self._check()
                self._publish(time.monotonic_ns())

    def _publish(self, now_ns: int) -> None:
        if self._lane is None:
            return
        reading = GateReading(
            heartbeat_ns=now_ns,
            is_open=self._is_open,
            is_computing=self._in_step and not self._is_held,
            closings_total=self._closings_total,
            close_to_idle_us=self._ring_us[-1] if self._ring_us else 0,
            close_to_idle_max_us=self._largest_us,
            steps_total=self._steps_total,
            tokens_total=self._tokens_total,
            samples_total=self._samples_total,
            epoch_seen=self._epoch_seen,
            open_ns_total=self._open_ns_total + (now_ns - self._opened_ns if self._is_open else 0),
            overruns_total=self._overruns_total,
            writer_pid=os.getpid(),
            close_to_idle_ring_us=tuple(self._ring_us),
            close_to_idle_wall_ring_us=tuple(self._wall_us),
        )
        try:
            self._lane.write_gate(reading)
        except LaneError as error:
            self._say(str(error))
            self._drop_lane()

    def _look_for_lane(self) -> None:
        if self._lane is not None and self._lane.is_current():
            return
        self._drop_lane()
        try:
            self._lane = Lane.open(self._config.lane, role="gate")
            self._said = ""
        except LaneError as error:
            self._say(str(error))

    def _drop_lane(self) -> None:
        if self._lane is not None:
            self._lane.close()
            self._lane = None

    def _say(self, sentence: str) -> None:
        if sentence != self._said:
            self._said = sentence
            logger.warning("rowen gate: %s; the gate is closed", sentence)
