"""The states of an engine's life, how it can end, and what can go wrong with it."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import StrEnum


class EngineState(StrEnum):
    """Where an engine is in its life."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    EXITED = "exited"


class EngineError(Exception):
    """Base of all below.  Nothing that this owner started runs when one is raised."""


class EngineStartError(EngineError):
    """The engine could not be started, or ended or was not ready in time while starting."""


class EngineCrashLoopError(EngineError):
    """The engine ended too often in a row and is not started again."""


@dataclass(frozen=True)
class EngineExit:
    """How an engine ended."""

    returncode: int
    """Exit code, or minus the signal that killed it."""
    lived_s: float
    was_ready: bool
    was_asked: bool
    """``stop`` ended it."""
    last_lines: tuple[str, ...]


def say_how(returncode: int) -> str:
    """How a process ended, in words."""
    if returncode >= 0:
        return f"exit code {returncode}"
    return f"killed by {signal.Signals(-returncode).name}"
