"""Which cores and which scheduling class the threads of an engine get.

One small interface (``Isolation``) with the implementation for the CPU.  The supervisor calls
``place`` again and again while an engine starts, since new threads appear, and once after.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

ENGINE_PROCESS = "EngineCore"
"""vLLM titles the process that computes ``VLLM::EngineCore``."""

OWN_THREADS = "rowen-"
"""Our heartbeat threads have names that begin so.  They stay off the engine cores: where serving
fills the core, an idle-class thread may wait for seconds, and a late heartbeat looks like death."""

_PR_SET_NAME = 15


class Isolation(Protocol):
    """How one engine is kept from disturbing another on this platform."""

    def place(self, pid: int) -> int:
        """Place all threads of the process tree under ``pid``; return how many were changed."""
        ...


@dataclass(frozen=True)
class CpuIsolation:
    """Cores by affinity, and for opportunistic work the class that only gets what is left."""

    engine_cores: frozenset[int]
    front_cores: frozenset[int]
    idle_class: bool

    def place(self, pid: int) -> int:
        """Place all threads; threads that end meanwhile are left out.

        Raises:
            PermissionError: the kernel refuses (a core outside our cgroup's set).
        """
        changed = 0
        for process in process_tree(pid):
            computes = ENGINE_PROCESS in command_line(process)
            for thread in threads_of(process):
                is_ours = thread_name(process, thread).startswith(OWN_THREADS)
                cores = self.engine_cores if computes and not is_ours else self.front_cores
                changed += self._place_thread(thread, cores)
        return changed

    def _place_thread(self, thread: int, cores: frozenset[int]) -> bool:
        try:
            is_changed = False
            if cores and os.sched_getaffinity(thread) != cores:
                os.sched_setaffinity(thread, cores)
                is_changed = True
            if self.idle_class and os.sched_getscheduler(thread) != os.SCHED_IDLE:
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
                is_changed = True
            return is_changed
        except ProcessLookupError:
            return False


def process_tree(pid: int) -> list[int]:
    """``pid`` and all its living descendants."""
    found = [pid]
    for parent in found:
        for thread in threads_of(parent):
            children = _read(Path(f"/proc/{parent}/task/{thread}/children"))
            found += [int(child) for child in children.split() if int(child) not in found]
    return found


def threads_of(pid: int) -> list[int]:
    """Thread ids of a process; empty once it is gone."""
    try:
        return [int(entry) for entry in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def command_line(pid: int) -> str:
    """Command line or title of a process; empty once it is gone."""
    return _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ")


def thread_name(pid: int, thread: int) -> str:
    """Name of a thread (15 characters at most); empty once it is gone."""
    return _read(Path(f"/proc/{pid}/task/{thread}/comm")).strip()


def name_this_thread(name: str) -> None:
    """Give the calling thread a name that ``place`` and ``top -H`` can see."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def missing_cores(cores: Iterable[int]) -> list[int]:
    """Those of the cores that this process may not use."""
    return sorted(set(cores) - os.sched_getaffinity(0))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
