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
from typing import NamedTuple

from rowen.executor.isolation import name_this_thread
from rowen.executor.lane import Lane, LaneError, ProbeReading
from rowen.executor.step_time import StepTime

logger = logging.getLogger("vllm.rowen.probe")  # under vllm's logger, whose handler is set up

HEARTBEAT_S = 0.1
"""An idle engine makes no steps, so a thread repeats the last word at this pace."""

LOOK_AGAIN_S = 1.0
"""How often a missing, deleted or replaced lane is looked for."""


class _Load(NamedTuple):
    """What serving has to do, since when; replaced whole, so any thread may read it."""

    running: int
    waiting: int
    busy_ns_total: int
    """Up to ``changed_ns``."""
    changed_ns: int
    """When it last became busy or idle."""

    @property
    def is_busy(self) -> bool:
        return self.running + self.waiting > 0

    def busy_ns_at(self, now_ns: int) -> int:
        return self.busy_ns_total + (now_ns - self.changed_ns if self.is_busy else 0)


class Probe:
    """Keeps the serving engine's counts and writes them to the lane.

    The scheduler's thread tells it what happened; a heartbeat thread repeats it.  No method
    raises on account of the lane, and none that the scheduler calls waits for the heartbeat.
    What both threads use is replaced whole.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._lane: Lane | None = None
        self._said = ""
        self._waiting_since: dict[str, tuple[int, int]] = {}  # id -> (arrival ns, prompt tokens)
        self._oldest_ns = 0  # arrival of the oldest of them; 0: none waits
        self._prefill_tokens_waiting = 0
        self._kv_used_ratio = 0.0
        self._step_time = StepTime()
        self._step_started_ns = 0
        self._step_tokens = 0
        self._step_predicted_ms = 0.0
        self._steps_total = 0
        self._load = _Load(0, 0, 0, time.monotonic_ns())
        self._is_due = False
        self._stopping = threading.Event()
        self._look_for_lane()
        self._thread = threading.Thread(target=self._beat, name="rowen-probe", daemon=True)
        self._thread.start()

    def arrived(self, request_id: str, prompt_tokens: int) -> None:
        """A request was queued."""
        self._waiting_since[request_id] = (time.monotonic_ns(), prompt_tokens)
        self._prefill_tokens_waiting += prompt_tokens
        self._find_oldest()

    def left_queue(self, request_ids: Iterable[str]) -> None:
        """Requests were scheduled for the first time, or ended before that."""
        for request_id in request_ids:
            known = self._waiting_since.pop(request_id, None)
            if known is not None:
                self._prefill_tokens_waiting -= known[1]
        self._find_oldest()

    def _find_oldest(self) -> None:
        """On the scheduler's thread: the heartbeat must not walk a dict that changes."""
        self._oldest_ns = next(iter(self._waiting_since.values()), (0, 0))[0]

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
        """Write the present state with these counts to the lane.

        Never waits: while the heartbeat writes, it is left to write this state as well.
        """
        now_ns = time.monotonic_ns()
        old = self._load
        changed_ns, busy_ns_total = old.changed_ns, old.busy_ns_total
        if old.is_busy != (running + waiting > 0):
            changed_ns, busy_ns_total = now_ns, old.busy_ns_at(now_ns)
        self._load = _Load(running, waiting, busy_ns_total, changed_ns)
        self._is_due = True  # before the attempt: who holds the lock looks at it after letting go
        if self._lock.acquire(blocking=False):
            try:
                self._is_due = False
                self._write()
            finally:
                self._lock.release()

    def stop(self) -> None:
        """End the heartbeat and leave the lane, at the latest with the next beat."""
        self._stopping.set()
        if self._lock.acquire(blocking=False):
            try:
                self._drop_lane()
            finally:
                self._lock.release()

    def _write(self) -> None:
        if self._lane is None:
            return
        load, now_ns = self._load, time.monotonic_ns()
        oldest_ns = self._oldest_ns or now_ns
        reading = ProbeReading(
            heartbeat_ns=now_ns,
            requests_waiting=load.waiting,
            requests_running=load.running,
            oldest_waiting_age_ms=max(0, now_ns - oldest_ns) / 1e6,
            prefill_tokens_waiting=self._prefill_tokens_waiting,
            kv_used_ratio=self._kv_used_ratio,
            step_started_ns=self._step_started_ns,
            step_predicted_ms=self._step_predicted_ms,
            steps_total=self._steps_total,
            busy_ns_total=load.busy_ns_at(now_ns),
            changed_ns=load.changed_ns,
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
            try:
                if time.monotonic() - looked_s >= LOOK_AGAIN_S:
                    looked_s = time.monotonic()
                    self._look_for_lane()
                self._repeat()
            except Exception as error:  # without a heartbeat the gate would stay closed for good
                self._say(f"a heartbeat failed ({type(error).__name__}: {error})")
        with self._lock:
            self._drop_lane()

    def _repeat(self) -> None:
        """Write the state, and again while ``publish`` met the lock taken."""
        self._is_due = True
        while self._is_due and not self._stopping.is_set():
            with self._lock:
                self._is_due = False
                self._write()

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
