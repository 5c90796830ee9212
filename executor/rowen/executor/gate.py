"""The step gate: a vLLM scheduler class that makes rollouts wait while the gate is closed.

vLLM loads it by ``--scheduler-cls rowen.executor.gate.GatedScheduler`` in the rollout engine.
While closed it returns empty steps: the engine goes on to answer aborts, pauses, weight updates
and health checks, with the state vLLM itself would have, and its requests keep their KV blocks.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from rowen.executor import layer_gate
from rowen.executor.admission import Admission
from rowen.executor.gate_state import Gate
from rowen.executor.lane_config import read_lane_config

WAIT_S = 0.02
"""Longest wait inside one empty step: bounds the delay of an abort or a pause while closed, and
keeps the cost of a closed gate near 2 % of a core."""

POLL_S = 0.002
"""Pace of looking at the lane between steps."""


class GatedScheduler(Scheduler):
    """vLLM's scheduler behind a gate."""

    # vLLM's own attributes, which mypy cannot see.
    running: list[Any]
    max_num_scheduled_tokens: int
    max_num_active_reqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = read_lane_config(self.vllm_config)
        if config is None:
            raise ValueError(
                'GatedScheduler needs the lane: --additional-config \'{"rowen": {"lane": PATH}}\''
            )
        self._own_token_limit = self.max_num_scheduled_tokens
        self._own_sequence_limit = self.max_num_active_reqs
        self._gate = Gate(config)
        self._gate.start()
        layer_gate.use(self._gate)
        _release_on_sigterm(self._gate)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step inside the grant, or an empty one while closed."""
        admission = self._await_open()
        parked = self._limit(admission)
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.running.extend(parked)
        if output.total_num_scheduled_tokens > 0:
            self._gate.step_started(output.total_num_scheduled_tokens)
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """Take the step's tokens; the engine is between steps from here on."""
        self._gate.step_ended()
        return super().update_from_output(*args, **kwargs)

    def shutdown(self) -> None:
        """Leave the lane, then shut down."""
        layer_gate.use(None)
        self._gate.close()
        super().shutdown()

    def _await_open(self) -> Admission:
        """Wait a bounded time for the gate; at once back when there is something to tell vLLM."""
        admission = self._gate.check()
        if self.has_finished_requests() or not self.has_unfinished_requests():
            return admission
        deadline_s = time.monotonic() + WAIT_S
        while not admission.allowed and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
            admission = self._gate.check()
        if self.running and not admission.allowed:
            self._gate.step_refused(admission)
        return admission

    def _limit(self, admission: Admission) -> list[Any]:
        """Set vLLM's own limits for this step; return the running requests to leave out of it.

        Requests above the cap keep their blocks and continue when it rises; the oldest run.
        """
        if not admission.allowed:
            self.max_num_scheduled_tokens = 0
            return []
        self.max_num_scheduled_tokens = min(self._own_token_limit, self._gate.token_budget)
        cap = min(self._own_sequence_limit, self._gate.sequence_cap)
        self.max_num_active_reqs = cap
        parked = self.running[cap:]
        del self.running[cap:]
        return parked


class AsyncGatedScheduler(GatedScheduler, AsyncScheduler):
    """The same for engines with asynchronous scheduling (GPU)."""


def _release_on_sigterm(gate: Gate) -> None:
    """Let a held step end when vLLM is told to stop, before vLLM's own handler runs.

    Outside the main thread no handler can be set; then the bound of a hold is what ends it.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        previous = signal.getsignal(number)

        def released(got: int, frame: FrameType | None, previous: Any = previous) -> None:
            gate.end()
            if callable(previous):
                previous(got, frame)
            elif previous == signal.SIG_DFL:
                signal.signal(got, signal.SIG_DFL)
                signal.raise_signal(got)

        signal.signal(number, released)
