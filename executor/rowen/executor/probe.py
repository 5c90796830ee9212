"""The probe: a vLLM scheduler class for the serving engine that says on the lane what it does.

vLLM loads it by ``--scheduler-cls rowen.executor.probe.ProbeScheduler``.  It schedules exactly as
its parent class; around that it publishes counts.  It must never harm serving: every failure of
the lane is swallowed after one log line, and a missing lane is looked for again in the
background.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from rowen.executor.lane_config import read_lane_config
from rowen.executor.probe_state import Probe

logger = logging.getLogger("vllm.rowen.probe")  # under vllm's logger, whose handler is set up


class ProbeScheduler(Scheduler):
    """vLLM's scheduler, observed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._probe: Probe | None = None
        try:
            config = read_lane_config(self.vllm_config)
            if config is None:
                logger.warning("rowen probe: no additional-config rowen.lane; nothing is published")
            else:
                self._probe = Probe(config.lane)
        except Exception as error:
            self._give_up(error)

    def add_request(self, request: Any) -> None:
        """Queue the request, then say so."""
        super().add_request(request)
        if self._probe is not None:
            try:
                self._probe.arrived(request.request_id, request.num_prompt_tokens)
                self._probe.publish(*self.get_request_counts())
            except Exception as error:
                self._give_up(error)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, then say what is in it."""
        started_ns = time.monotonic_ns()
        output = super().schedule(*args, **kwargs)
        if self._probe is not None and output.total_num_scheduled_tokens > 0:
            try:
                self._probe.left_queue(new.req_id for new in output.scheduled_new_reqs)
                self._probe.step_started(started_ns, output.total_num_scheduled_tokens)
                self._probe.publish(*self.get_request_counts())
            except Exception as error:
                self._give_up(error)
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """Take the step's tokens, then say what is left to do."""
        outputs = super().update_from_output(*args, **kwargs)
        if self._probe is not None:
            try:
                self._probe.step_ended(self.get_kv_cache_usage())
                self._probe.publish(*self.get_request_counts())
            except Exception as error:
                self._give_up(error)
        return outputs

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        """End requests from outside (aborts), then say so."""
        finished = super().finish_requests(*args, **kwargs)
        if self._probe is not None and finished:
            try:
                self._probe.left_queue(request.request_id for request in finished)
                self._probe.publish(*self.get_request_counts())
            except Exception as error:
                self._give_up(error)
        return finished

    def shutdown(self) -> None:
        """Stop publishing, then shut down."""
        if self._probe is not None:
            self._probe.stop()
        super().shutdown()

    def _give_up(self, error: Exception) -> None:
        """After an error that is not the lane's: be the parent class from now on.

        The record goes stale within the gate's bound, which closes it.
        """
        logger.error(
            "rowen probe: stopped by an error of its own; serving is not affected", exc_info=error
        )
        probe, self._probe = self._probe, None
        if probe is not None:
            probe.stop()


class AsyncProbeScheduler(ProbeScheduler, AsyncScheduler):
    """The same for engines with asynchronous scheduling (GPU)."""
