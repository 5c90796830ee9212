"""Start, watch, restart and stop one engine, and leave nothing of it behind.

Used by the daemon for the rollout engine and by ``rowen up`` and the demo for the others.  The
engine runs under a keeper process (``keeper.py``), so it ends with its owner whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import aiohttp

from rowen.executor import identity, keeper, restart
from rowen.executor.endpoint import check_port, free_port, is_healthy
from rowen.executor.engine import EngineSpec
from rowen.executor.engine_life import (
    EngineCrashLoopError,
    EngineError,
    EngineExit,
    EngineStartError,
    EngineState,
    say_how,
)
from rowen.executor.isolation import CpuIsolation, Isolation, missing_cores, process_tree
from rowen.executor.restart import RestartPolicy

__all__ = [
    "EngineCrashLoopError",
    "EngineError",
    "EngineExit",
    "EngineStartError",
    "EngineState",
    "EngineSupervisor",
    "RestartPolicy",
]

logger = logging.getLogger(__name__)

LAST_LINES = 20
"""How much of an engine's log an error message shows."""

GRACE_S = 5.0
"""What the keeper gives an engine between SIGTERM and SIGKILL when its owner has died."""

POLL_S = 0.2
"""Pace of readiness checks and of placement while an engine starts."""

SWEEP_DEADLINE_S = 10.0
"""For processes that were sent SIGKILL to disappear."""


class EngineSupervisor:
    """Owns one engine.  All methods belong to one event loop."""

    def __init__(
        self,
        spec: EngineSpec,
        *,
        run_dir: Path,
        restart: RestartPolicy | None = None,
        on_change: Callable[[EngineState], None] | None = None,
        isolation: Isolation | None = None,
        argv: Callable[[int], list[str]] | None = None,
    ) -> None:
        """Prepare; nothing is started.

        Args:
            spec: the engine.
            run_dir: folder for its log and its record; made when missing.
            restart: back-off of ``keep_running``.
            on_change: called with each new state, on the event loop; must not block.
            isolation: placement; by default cores and class of the spec.
            argv: command line for a port instead of the spec's.
        """
        self.spec = spec
        self.state = EngineState.STOPPED
        self.generation = 0
        """Number of starts; a new one is a new process (raise the fencing epoch)."""
        self.restarts_total = 0
        self.last_exit: EngineExit | None = None
        self._run_dir = run_dir
        self._restart = restart or RestartPolicy()
        self._on_change = on_change
        self._isolation = isolation or CpuIsolation(
            frozenset(spec.engine_cores), frozenset(spec.front_cores), spec.idle_class
        )
        self._argv = argv or spec.argv
        self._record = run_dir / f"{spec.name}.processes.json"
        self._log = spec.log or run_dir / f"{spec.name}.log"
        self._port = spec.port
        self._keeper: asyncio.subprocess.Process | None = None
        self._life_fd = -1
        self._started_s = 0.0
        self._was_ready = self._was_asked = False
        self._ended: asyncio.Task[EngineExit] | None = None
        self._asked = asyncio.Event()
        self._turn = asyncio.Lock()
        """Held while starting and while stopping: a stop meets a whole start or none."""
        self._known: set[identity.ProcessIdentity] = set()

    @property
    def url(self) -> str:
        """Address of the present start; the port is 0 before the first if it is to be chosen."""
        return f"http://{self.spec.host}:{self._port}"

    @property
    def port(self) -> int:
        """Port of the present start."""
        return self._port

    @property
    def log(self) -> Path:
        """The file with the engine's output; the start before is kept beside it as ``.1``."""
        return self._log

    @property
    def pids(self) -> list[int]:
        """The engine's living processes without the keeper: the API server first."""
        keeper_pid = self.keeper_pid
        return [] if keeper_pid is None else process_tree(keeper_pid)[1:]

    @property
    def keeper_pid(self) -> int | None:
        """The keeper's process id; None while nothing runs."""
        return self._keeper.pid if self._keeper is not None and self._is_running() else None

    @property
    def pid(self) -> int | None:
        """The API server's process id; None while nothing runs."""
        return next(iter(self.pids), None)

    async def end_leftovers(self) -> None:
        """End what an earlier owner left of this engine, also when none is to be started.

        Raises:
            EngineStartError: another living owner runs it here (nothing was ended), or it does
                not end.
        """
        async with self._turn:
            if not self._is_running():
                await self._end_orphan()

    async def start(self) -> None:
        """End an orphan of an earlier owner, choose the port, start the engine.

        Raises:
            EngineStartError: wrong model or cores, the port is taken, another living owner runs
                this engine here, or it cannot be spawned or recorded.  Nothing of it runs.
        """
        self._asked.clear()
        await self._start()

    async def _start(self) -> None:
        async with self._turn:
            await self._start_in_turn()

    async def _start_in_turn(self) -> None:
        assert not self._is_running(), "started twice"
        self._check()
        await self._end_orphan()
        self._port = self.spec.port or free_port(self.spec.host)
        check_port(self.spec)
        self._was_ready = self._was_asked = False
        self._started_s = time.monotonic()
        try:
            await self._spawn()
        except OSError as error:
            raise EngineStartError(f"engine {self.spec.name} cannot be spawned: {error}") from error
        self._ended = asyncio.create_task(self._await_end(), name=f"engine-{self.spec.name}")
        self.generation += 1
        self._change(EngineState.STARTING)
        try:
            self._remember()
        except Exception as error:
            await self._give_up_start(error)

    async def wait_ready(self, deadline_s: float = 180.0) -> None:
        """Wait until /health answers 200; meanwhile place each new thread.

        Raises:
            EngineStartError: it ended first, was not ready within ``deadline_s``, or cannot be
                placed or recorded (it is then stopped); the message holds the last lines of its
                log.
        """
        assert self._ended is not None, "not started"
        try:
            await self._wait_ready(deadline_s)
        except EngineError:
            raise
        except Exception as error:
            await self._give_up_start(error)

    async def _give_up_start(self, error: Exception) -> NoReturn:
        """End a start that met a problem of ours: nothing may run without record or placement."""
        await self._end(deadline_s=1.0)
        raise EngineStartError(
            f"engine {self.spec.name} was ended: it cannot be placed or recorded in "
            f"{self._run_dir} ({type(error).__name__}: {error})"
        ) from error

    async def _wait_ready(self, deadline_s: float) -> None:
        assert self._ended is not None, "not started"
        until_s = time.monotonic() + deadline_s
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            while not self._ended.done():
                await self._place()
                if await is_healthy(session, self.url):
                    break
                if time.monotonic() > until_s:
                    await self._end(deadline_s=1.0)
                    raise EngineStartError(
                        f"engine {self.spec.name} was not ready within {deadline_s:.0f} s; "
                        f"the end of its log {self._log}:\n{self._tail()}"
                    )
                await asyncio.wait([self._ended], timeout=POLL_S)
        if self._ended.done():
            code = self._ended.result().returncode
            raise EngineStartError(
                f"engine {self.spec.name} ended while starting ({say_how(code)}); "
                f"the end of its log {self._log}:\n{self._tail()}"
            )
        await self._place()
        self._was_ready = True
        self._change(EngineState.READY)

    async def wait_exit(self) -> EngineExit:
        """Wait until the engine has ended, for whatever reason, and nothing of it is left."""
        assert self._ended is not None, "not started"
        return await asyncio.shield(self._ended)

    async def keep_running(self, *, ready_deadline_s: float = 180.0) -> None:
        """Start, wait for the end, start again with back-off; returns after ``stop``.

        Raises:
            EngineStartError: as ``start``.
            EngineCrashLoopError: it crashed too often; nothing runs.
        """
        crashes_s: list[float] = []
        self._asked.clear()
        while not self._asked.is_set():
            await self._start()
            problem = ""
            try:
                await self.wait_ready(ready_deadline_s)
            except EngineStartError as error:
                problem = str(error)
            ended = await self.wait_exit()
            if self._asked.is_set():
                return
            problem = problem or f"engine {self.spec.name} ended ({say_how(ended.returncode)})"
            now_s = time.monotonic()
            crashes_s.append(now_s)
            decision = restart.decide([now_s - at_s for at_s in crashes_s], self._restart)
            logger.warning("%s action=restart reason=%s", problem, decision.reason)
            if decision.delay_s is None:
                raise EngineCrashLoopError(
                    f"engine {self.spec.name} is not started again after {decision.reason}: "
                    f"{problem}"
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), decision.delay_s)
                return
            self.restarts_total += 1

    async def stop(self, deadline_s: float = 10.0) -> EngineExit | None:
        """SIGTERM, at the deadline SIGKILL of the whole tree.

        Returns:
            How it ended; None if nothing ran.  Nothing of the engine is left.
        """
        self._asked.set()
        async with self._turn:
            ended = await self._end(deadline_s)
            self._change(EngineState.STOPPED)
            return ended

    async def _end(self, deadline_s: float) -> EngineExit | None:
        if self._keeper is None or self._ended is None or self._ended.done():
            return None
        self._was_asked = True
        self._change(EngineState.STOPPING)
        _send(self._keeper.pid, signal.SIGTERM)
        await asyncio.wait([self._ended], timeout=deadline_s)
        if not self._ended.done():
            with contextlib.suppress(BrokenPipeError):
                os.write(self._life_fd, keeper.KILL_NOW)
            await asyncio.wait([self._ended], timeout=keeper.SWEEP_S + 1.0)
        if not self._ended.done():  # the keeper itself hangs or is stopped
            _send(self._keeper.pid, signal.SIGKILL)
        return await self.wait_exit()

    def _is_running(self) -> bool:
        return self._ended is not None and not self._ended.done()

    def _check(self) -> None:
        for field in ("engine_cores", "front_cores"):
            if missing := missing_cores(getattr(self.spec, field)):
                raise EngineStartError(
                    f"{field} of engine {self.spec.name} names core {missing[0]}, this machine "
                    f"lets us use {sorted(os.sched_getaffinity(0))}"
                )
        try:
            self.spec.check_model()
        except ValueError as error:
            raise EngineStartError(str(error)) from None

    async def _spawn(self) -> None:
        for folder in (self._run_dir, self._log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._log, f"{self._log}.1")
        self._known = set()
        command = [sys.executable, "-I", "-S", str(Path(keeper.__file__))]
        cores = sorted({*self.spec.engine_cores, *self.spec.front_cores})
        engine = [",".join(map(str, cores)) or "-", *self._argv(self._port)]
        life_end, self._life_fd = os.pipe2(os.O_CLOEXEC)
        command += [str(life_end), str(GRACE_S), str(int(self.spec.idle_class)), *engine]
        try:
            with self._log.open("wb") as output:
                self._keeper = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=asyncio.subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(life_end,),
                    env={**os.environ, **self.spec.environment()},
                )
        except BaseException:
            os.close(self._life_fd)  # a keeper that was started already ends with this
            raise
        finally:
            os.close(life_end)

    async def _await_end(self) -> EngineExit:
        """The keeper ends last; only if it was killed itself is anything left to end here."""
        assert self._keeper is not None
        returncode = await self._keeper.wait()
        try:
            await asyncio.to_thread(
                identity.end_processes, self._known, deadline_s=SWEEP_DEADLINE_S
            )
            self._record.unlink(missing_ok=True)
        except Exception as error:
            # The record stays: no start succeeds before these processes are gone.
            logger.error("engine=%s action=end_rest problem=%s", self.spec.name, error)
        finally:
            os.close(self._life_fd)
        self.last_exit = EngineExit(
            returncode=returncode,
            lived_s=time.monotonic() - self._started_s,
            was_ready=self._was_ready,
            was_asked=self._was_asked,
            last_lines=tuple(self._tail().splitlines()),
        )
        self._change(EngineState.EXITED)
        return self.last_exit

    async def _end_orphan(self) -> None:
        record = identity.read_record(self._record)
        if record is None:
            return
        if record.is_owned_by_another():
            raise EngineStartError(
                f"another owner (process {record.owner.pid}) runs engine {self.spec.name} in "
                f"run_dir {self._run_dir}; name another run_dir, or end that process"
            )
        try:
            ended = await asyncio.to_thread(
                identity.end_processes, record.members, deadline_s=SWEEP_DEADLINE_S
            )
            self._record.unlink(missing_ok=True)
        except OSError as error:
            raise EngineStartError(
                f"engine {self.spec.name} of an earlier life cannot be ended: {error}"
            ) from error
        if ended:
            logger.warning("engine=%s action=end_orphan pids=%s", self.spec.name, ended)

    async def _place(self) -> None:
        """Place the engine's threads; not the keeper, which must be able to act at once."""
        if self.pid is not None:
            await asyncio.to_thread(self._isolation.place, self.pid)
            self._remember()

    def _remember(self) -> None:
        """Record processes that are new; the record never shrinks during one life."""
        assert self._keeper is not None
        owner, keeper_itself = identity.identify(os.getpid()), identity.identify(self._keeper.pid)
        if owner is None or keeper_itself is None:
            return  # the keeper has ended: nothing new comes
        tree = process_tree(self._keeper.pid)
        known = {found for pid in tree if (found := identity.identify(pid))}
        if not known <= self._known:
            self._known |= known
            members = tuple(sorted(self._known, key=lambda one: one.pid))
            identity.write_record(self._record, identity.Record(owner, keeper_itself, members))

    def _tail(self) -> str:
        try:
            with self._log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return "(no log)"
        return "\n".join(lines[-LAST_LINES:])

    def _change(self, state: EngineState) -> None:
        if state != self.state:
            self.state = state
            if self._on_change is not None:
                self._on_change(state)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
