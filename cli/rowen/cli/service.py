"""One of Rowen's own processes (scheduler, daemon, trainer), kept by the stack that started it.

It runs under the executor's keeper, so nothing of it outlives its owner, not even a SIGKILL of
the owner.  Engines have a supervisor of their own (``rowen.executor.supervisor``), which knows
ports, readiness by steps and orphans; a service is only a command line and a page that answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rowen.cli.pages import answers
from rowen.executor import keeper, restart
from rowen.executor.restart import RestartPolicy

logger = logging.getLogger(__name__)

GRACE_S = 10.0
"""What a service gets between SIGTERM and SIGKILL when its owner has died."""

LAST_LINES = 12
POLL_S = 0.1
PAGE_DEADLINE_S = 2.0


class ServiceError(Exception):
    """A service could not be started or ended early.  Nothing of it runs."""


@dataclass(frozen=True)
class ServiceSpec:
    """What to run."""

    name: str
    argv: Sequence[str]
    log: Path
    cores: tuple[int, ...] = ()
    idle_class: bool = False
    folder: Path | None = None
    """Working folder; None: that of the owner."""
    ready_url: str | None = None
    """A page that answers 200 once the service can be used; None: as soon as it runs."""


class Service:
    """Owns one process.  All methods belong to one event loop."""

    def __init__(self, spec: ServiceSpec) -> None:
        self.spec = spec
        self.restarts_total = 0
        self._keeper: asyncio.subprocess.Process | None = None
        self._life_fd = -1
        self._stopping = asyncio.Event()

    @property
    def returncode(self) -> int | None:
        """Exit code, or minus the signal; None while it runs."""
        return self._keeper.returncode if self._keeper is not None else None

    @property
    def pid(self) -> int | None:
        """Id of the service's process (not of its keeper); None while nothing runs."""
        if self._keeper is None or self._keeper.returncode is not None:
            return None
        children = Path(f"/proc/{self._keeper.pid}/task/{self._keeper.pid}/children")
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                return int(child)
        return None

    async def start(self) -> None:
        """Start the process; its output goes to the log, the log of the run before to ``.1``.

        Cancelled in between, nothing runs: the keeper ends when its life pipe is closed.
        """
        spec = self.spec
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            spec.log.replace(spec.log.with_name(spec.log.name + ".1"))
        self._stopping.clear()
        life_end, self._life_fd = os.pipe2(os.O_CLOEXEC)
        command = [sys.executable, "-I", "-S", str(Path(keeper.__file__)), str(life_end)]
        command += [str(GRACE_S), str(int(spec.idle_class))]
        command += [",".join(map(str, spec.cores)) or "-", *spec.argv]
        try:
            with spec.log.open("wb") as output:
                self._keeper = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=asyncio.subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(life_end,),
                    cwd=spec.folder,
                )
        except BaseException:
            self._close_life()
            raise
        finally:
            os.close(life_end)

    def _close_life(self) -> None:
        if self._life_fd >= 0:
            os.close(self._life_fd)
            self._life_fd = -1

    async def wait_ready(self, deadline_s: float) -> None:
        """Wait until the ready page answers.

        Raises:
            ServiceError: it ended first or did not answer in time (it is then stopped); the message
                holds the last lines of its log.
        """
        until_s = time.monotonic() + deadline_s
        while self.spec.ready_url is not None:
            if self.returncode is not None:
                raise ServiceError(
                    f"{self.spec.name} ended while starting (status {self.returncode}); "
                    f"the end of its log {self.spec.log}:\n{self.tail()}"
                )
            if await asyncio.to_thread(answers, self.spec.ready_url, deadline_s=PAGE_DEADLINE_S):
                return
            if time.monotonic() > until_s:
                await self.stop()
                raise ServiceError(
                    f"{self.spec.name} did not answer on {self.spec.ready_url} within "
                    f"{deadline_s:.0f} s; the end of its log {self.spec.log}:\n{self.tail()}"
                )
            await asyncio.sleep(POLL_S)

    async def wait_exit(self) -> int:
        """Wait until it has ended; nothing of it is left then."""
        assert self._keeper is not None, "not started"
        status = await self._keeper.wait()
        self._close_life()
        return status

    async def keep_running(self) -> None:
        """Start it anew with back-off whenever it ends; returns after ``stop``.

        Raises:
            ServiceError: it ended too often in a row and is not started again.
        """
        crashes_s: list[float] = []
        while True:
            status = await self.wait_exit()
            if self._stopping.is_set():
                return
            now_s = time.monotonic()
            crashes_s.append(now_s)
            decision = restart.decide([now_s - at_s for at_s in crashes_s], RestartPolicy())
            if decision.delay_s is None:
                raise ServiceError(
                    f"{self.spec.name} is not started again after {decision.reason} (last status "
                    f"{status}); the end of its log {self.spec.log}:\n{self.tail()}"
                )
            logger.warning(
                "service=%s ended status=%s action=restart reason=%s",
                self.spec.name,
                status,
                decision.reason,
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), decision.delay_s)
                return
            self.restarts_total += 1
            await self.start()

    async def stop(self, deadline_s: float = GRACE_S) -> None:
        """SIGTERM, at the deadline SIGKILL of the whole tree; nothing of it is left afterwards."""
        self._stopping.set()
        if self._keeper is None:
            return
        if self._keeper.returncode is None:
            self.ask_to_end()
            try:
                await asyncio.wait_for(self._keeper.wait(), deadline_s)
            except TimeoutError:
                with contextlib.suppress(BrokenPipeError):
                    os.write(self._life_fd, keeper.KILL_NOW)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._keeper.wait(), keeper.SWEEP_S + 1.0)
            if self._keeper.returncode is None:  # the keeper itself hangs or is stopped
                with contextlib.suppress(ProcessLookupError):
                    self._keeper.kill()
        await self.wait_exit()

    def ask_to_end(self) -> None:
        """SIGTERM without waiting; the keeper sends SIGKILL after GRACE_S."""
        if self._keeper is not None and self._keeper.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._keeper.send_signal(signal.SIGTERM)

    def signal(self, number: int) -> None:
        """Send a signal to the process itself; nothing happens once it has ended."""
        pid = self.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def tail(self) -> str:
        """The last lines of its log."""
        try:
            lines = self.spec.log.read_text(errors="replace").splitlines()
        except OSError:
            return "(no log)"
        return "\n".join(lines[-LAST_LINES:])
