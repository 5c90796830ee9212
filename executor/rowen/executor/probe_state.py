"""What the serving engine's probe knows, and how it gets to the lane.

Free of vLLM: ``probe.py`` tells it what the scheduler did.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from rowen.executor.isolation import name_this_thread
from rowen.executor.lane import Lane, LaneError, ProbeReading
from rowen.executor.step_time import StepTime

logger = logging.getLogger("vllm.rowen.probe")  # under vllm's logger, whose handler is set up

HEARTBEAT_S = 0.1
"""An idle engine makes no steps, so a thread repeats the last word at this pace."""

LOOK_AGAIN_S = 1.0
"""How often a missing, deleted or replaced lane is looked for."""


class Probe:
    """Keeps the serving engine's counts and writes them to the lane.

    The scheduler's thread tells it what happened; a heartbeat thread repeats it.  No method
    raises on account of the lane.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._lane: Lane | None = None
        self._said = ""
        self._waiting_since: dict[str, tuple[int, int]] = {}  # id -> (arrival ns, prompt tokens)
        self._prefill_tokens_waiting = 0
        self._waiting = self._running = 0
        self._kv_used_ratio = 0.0
        self._step_time = StepTime()
        self._step_started_ns = 0
        self._step_tokens = 0
        self._step_predicted_ms = 0.0
        self._steps_total = 0
        self._busy_ns_total = 0
        self._changed_ns = time.monotonic_ns()
        self._stopping = threading.Event()
        self._look_for_lane()
        self._thread = threading.Thread(target=self._beat, name="rowen-probe", daemon=True)
        self._thread.start()

    def arrived(self, request_id: str, prompt_tokens: int) -> None:
        """A request was queued."""
        self._waiting_since[request_id] = (time.monotonic_ns(), prompt_tokens)
        self._prefill_tokens_waiting += prompt_tokens

    def left_queue(self, request_ids: Iterable[str]) -> None:
        """Requests were scheduled for the first time, or ended before that."""
        for request_id in request_ids:
            known = self._waiting_since.pop(request_id, None)
            if known is not None:
                self._prefill_tokens_waiting -= known[1]

    def step_started(self, started_ns: int, tokens: int) -> None:
        """A step with this many tokens goes to the model."""
        self._step_started_ns, self._step_tokens = started_ns, tokens
        self._step_predicted_ms = self._step_time.predict_ms(tokens)

    def step_ended(self, kv_used_ratio: float) -> None:
        """The step came back."""
        self._kv_used_ratio = kv_used_ratio
        if self._step_started_ns:
            took_ms = (time.monotonic_ns() - self._step_started_ns) / 1e6
            self._step_time.learn(self._step_tokens, took_ms)
            self._steps_total += 1
            self._step_started_ns = 0

    def publish(self, running: int, waiting: int) -> None:
        """Write the present state with these counts to the lane."""
        with self._lock:
            now_ns = time.monotonic_ns()
            was_busy = self._running + self._waiting > 0
            if was_busy != (running + waiting > 0):
                if was_busy:
                    self._busy_ns_total += now_ns - self._changed_ns
                self._changed_ns = now_ns
            self._running, self._waiting = running, waiting
            self._write(now_ns)

    def stop(self) -> None:
        """End the heartbeat and leave the lane."""
        self._stopping.set()
        with self._lock:
            self._drop_lane()

    def _write(self, now_ns: int) -> None:
        if self._lane is None:
            return
        is_busy = self._running + self._waiting > 0
        oldest_ns = next(iter(self._waiting_since.values()), (now_ns, 0))[0]
        reading = ProbeReading(
            heartbeat_ns=now_ns,
            requests_waiting=self._waiting,
            requests_running=self._running,
            oldest_waiting_age_ms=(now_ns - oldest_ns) / 1e6,
            prefill_tokens_waiting=self._prefill_tokens_waiting,
            kv_used_ratio=self._kv_used_ratio,
            step_started_ns=self._step_started_ns,
            step_predicted_ms=self._step_predicted_ms,
            steps_total=self._steps_total,
            busy_ns_total=self._busy_ns_total + (now_ns - self._changed_ns if is_busy else 0),
            changed_ns=self._changed_ns,
            writer_pid=os.getpid(),
        )
        try:
            self._lane.write_probe(reading)
        except LaneError as error:
            self._say(str(error))
            self._drop_lane()

    def _beat(self) -> None:
        name_this_thread("rowen-probe")
        looked_s = time.monotonic()
        while not self._stopping.wait(HEARTBEAT_S):
            if time.monotonic() - looked_s >= LOOK_AGAIN_S:
                looked_s = time.monotonic()
                self._look_for_lane()
            with self._lock:
                self._write(time.monotonic_ns())

    def _look_for_lane(self) -> None:
        """Follow the path to a new lane file; the slow calls stay outside the lock."""
        lane = self._lane
        if lane is not None and lane.is_current():
            return
        try:
            fresh = Lane.open(self._path, role="probe")
        except LaneError as error:
            self._say(str(error))
            fresh = None
        with self._lock:
            self._drop_lane()
            self._lane = fresh
        if fresh is not None:
            self._said = ""
            logger.info("rowen probe: writing to the lane %s", self._path)

    def _drop_lane(self) -> None:
        if self._lane is not None:
            self._lane.close()
            self._lane = None

    def _say(self, sentence: str) -> None:
        if sentence != self._said:
            self._said = sentence
            logger.warning("rowen probe: %s; serving is not affected", sentence)
