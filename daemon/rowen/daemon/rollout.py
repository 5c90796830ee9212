"""The rollout engine as the daemon drives it: wanted or not, and what became of it.

Everything slow (starting, waiting, stopping) happens in tasks; the loop only states what it wants
and reads a phase.  Restarts, back-off and leftovers are the executor's business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

from rowen.executor.engine import EngineSpec
from rowen.executor.supervisor import EngineError, EngineState, EngineSupervisor
from rowen.policies.reclaim import EnginePhase

log = logging.getLogger(__name__)

READY_DEADLINE_S = 300.0
"""A start takes 35 to 50 s on two idle cores; in the idle class beside busy serving far more."""

RETRY_AFTER_S = 120.0
"""Pause after the executor gave up on an engine that dies again and again."""

_PHASES = {
    EngineState.STOPPED: EnginePhase.ABSENT,
    EngineState.EXITED: EnginePhase.ABSENT,
    EngineState.STARTING: EnginePhase.STARTING,
    EngineState.READY: EnginePhase.READY,
    EngineState.STOPPING: EnginePhase.READY,  # it may hold memory and compute until it is gone
}


class RolloutEngine:
    """One supervised rollout engine.  All methods belong to one event loop and never block."""

    def __init__(self, spec: EngineSpec, run_dir: Path) -> None:
        self._supervisor = EngineSupervisor(spec, run_dir=run_dir)
        self._running: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._is_killed = False
        self._retry_at_s = 0.0
        self._error: str | None = None

    @property
    def phase(self) -> EnginePhase:
        """What its process is doing."""
        return _PHASES[self._supervisor.state]

    @property
    def generation(self) -> int:
        """Number of starts so far."""
        return self._supervisor.generation

    @property
    def url(self) -> str:
        """Root of its HTTP server in the present generation."""
        return self._supervisor.url

    @property
    def problem(self) -> str | None:
        """Why it does not run although it should; None while it does, or was asked to end."""
        last_exit = self._supervisor.last_exit
        if self.phase is EnginePhase.READY:
            return None
        if self._error is not None:
            return self._error
        if last_exit is None or last_exit.was_asked:
            return None
        when = "after it was ready" if last_exit.was_ready else "while starting"
        return f"the engine ended {when} (status {last_exit.returncode}); see last_exit"

    async def end_leftovers(self) -> None:
        """End what an earlier daemon left of the engine; raises as the supervisor's."""
        await self._supervisor.end_leftovers()

    def want(self) -> None:
        """Keep it running; starts it when it is absent and no pause after failures is on."""
        if self._running is not None or self._stopping is not None:
            return
        if time.monotonic() < self._retry_at_s:
            return
        self._running = asyncio.create_task(self._keep_running(), name="rollout-engine")

    async def _keep_running(self) -> None:
        try:
            await self._supervisor.keep_running(ready_deadline_s=READY_DEADLINE_S)
            self._error = None
        except EngineError as error:
            self._pause(str(error))
        except Exception as error:  # a bug of ours must not start engines at the loop's pace
            log.exception("engine=failed unexpectedly")
            self._pause(f"{type(error).__name__}: {error}")
        finally:
            self._running = None

    def _pause(self, problem: str) -> None:
        self._error = problem
        self._retry_at_s = time.monotonic() + RETRY_AFTER_S
        log.error("engine=failed retry_in_s=%.0f problem=%s", RETRY_AFTER_S, problem)

    def terminate(self, deadline_s: float) -> None:
        """Ask it to end: SIGTERM, and SIGKILL at the deadline."""
        if self._stopping is None and self.phase is not EnginePhase.ABSENT:
            self._is_killed = deadline_s == 0
            self._stopping = asyncio.create_task(self._stop(deadline_s), name="rollout-stop")

    def kill(self) -> None:
        """End it at once; the escalation of a ``terminate`` whose deadline has passed."""
        if self._stopping is not None and not self._is_killed:
            self._stopping.cancel()
            self._stopping = None
        self.terminate(0.0)

    async def _stop(self, deadline_s: float) -> None:
        this = asyncio.current_task()
        try:
            await self._supervisor.stop(deadline_s)
        except EngineError as error:
            self._error = str(error)
            log.error("engine=stop_failed problem=%s", error)
        finally:
            if self._stopping is this:
                self._stopping = None

    async def close(self, deadline_s: float) -> None:
        """End it for good and wait until nothing of it is left."""
        await self._supervisor.stop(deadline_s)
        while self._running is not None:
            # A stop that comes while a start is being prepared is not noticed by that start.
            await asyncio.wait([self._running], timeout=0.1)
            await self._supervisor.stop(0.0)

    def describe(self) -> dict[str, Any]:
        """For the status page."""
        last_exit = self._supervisor.last_exit
        return {
            "phase": self.phase.value,
            "state": self._supervisor.state.value,
            "url": self.url if self.phase is not EnginePhase.ABSENT else None,
            "pid": self._supervisor.pid,
            "generation": self.generation,
            "restarts_total": self._supervisor.restarts_total,
            "problem": self.problem,
            "retry_in_s": max(0.0, self._retry_at_s - time.monotonic()),
            "last_exit": None
            if last_exit is None
            else {
                "returncode": last_exit.returncode,
                "lived_s": last_exit.lived_s,
                "was_ready": last_exit.was_ready,
                "was_asked": last_exit.was_asked,
                "last_lines": list(last_exit.last_lines),
            },
        }
