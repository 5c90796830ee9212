"""Start, watch, restart and stop one engine.  (signatures; body follows)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rowen.executor.engine import EngineSpec


class EngineState(StrEnum):
    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    EXITED = "exited"
    STOPPING = "stopping"


class EngineError(Exception):
    """Base of all below."""


class EngineStartError(EngineError):
    """Could not be started or died while starting; the message holds its last log lines."""


class EngineCrashLoopError(EngineError):
    """Died too often in a row; it is not started again."""


@dataclass(frozen=True)
class EngineExit:
    returncode: int  # negative: killed by that signal
    lived_s: float
    was_ready: bool
    was_asked: bool  # stop() ended it
    last_lines: tuple[str, ...]


@dataclass(frozen=True)
class RestartPolicy:
    first_delay_s: float = 0.5
    longest_delay_s: float = 15.0
    crashes_in_window: int = 5
    window_s: float = 300.0


class EngineSupervisor:
    """Owns one engine.  All methods belong to one event loop."""

    state: EngineState
    generation: int  # number of starts so far; a new one means a new process (raise the lease epoch)
    restarts_total: int

    def __init__(
        self,
        spec: EngineSpec,
        *,
        run_dir: Path,
        restart: RestartPolicy | None = None,
        on_change: Callable[[EngineState], None] | None = None,
    ) -> None:
        raise NotImplementedError

    @property
    def url(self) -> str:  # http://127.0.0.1:PORT of the present generation
        raise NotImplementedError

    @property
    def pid(self) -> int | None:  # of the API server
        raise NotImplementedError

    @property
    def last_exit(self) -> EngineExit | None:
        raise NotImplementedError

    async def start(self) -> None:
        """End an orphan of an earlier life, choose the port, spawn.  EngineStartError."""

    async def wait_ready(self, deadline_s: float = 180.0) -> None:
        """EngineStartError (with last log lines) when it dies or is not ready in time."""

    async def wait_exit(self) -> EngineExit:
        """Wait until the engine has ended (for whatever reason) and nothing of it is left."""
        raise NotImplementedError

    async def keep_running(self, *, ready_deadline_s: float = 180.0) -> None:
        """start + wait_ready + wait_exit, again and again with back-off, until stop() is called.

        Run it as a task.  EngineCrashLoopError / EngineStartError (port taken) end it.
        """

    async def stop(self, deadline_s: float = 10.0) -> EngineExit | None:
        """SIGTERM, at the deadline SIGKILL of the whole tree; nothing of it is left afterwards."""
        raise NotImplementedError
