"""Who an engine's processes are, kept on disk so that a later owner can end an orphan.

A process is known by its id *and* its start time: ids are reused, names are anybody's.  The
supervisor writes the record while the engine runs and removes it when nothing is left of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class ProcessIdentity:
    """One process of one boot.  ``started_ticks`` are clock ticks since boot, from /proc/PID/stat:
    unlike a wall-clock time they do not move when the clock is set."""

    pid: int
    started_ticks: int
    boot_id: str

    def is_alive(self) -> bool:
        """Whether exactly this process still runs (a zombie does not)."""
        return self.boot_id == boot_id() and _started_ticks(self.pid) == self.started_ticks


def boot_id() -> str:
    """The kernel's name of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def identify(pid: int) -> ProcessIdentity | None:
    """The identity of a living process; None when it is gone."""
    ticks = _started_ticks(pid)
    return None if ticks is None else ProcessIdentity(pid, ticks, boot_id())


@dataclass(frozen=True)
class Record:
    """One engine's processes and whose they are."""

    owner: ProcessIdentity
    """The process whose supervisor started the engine."""
    keeper: ProcessIdentity
    members: tuple[ProcessIdentity, ...]
    """All processes, the keeper included."""

    def is_owned_by_another(self) -> bool:
        """Whether keeper and owner both live, and the owner is not this process."""
        return self.owner.pid != os.getpid() and self.owner.is_alive() and self.keeper.is_alive()


def write_record(path: Path, record: Record) -> None:
    """Replace the record, whole or not at all.

    Raises:
        OSError: the record is as it was, and no other file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(asdict(record)))
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_record(path: Path) -> Record | None:
    """The record; None without one or with one that cannot be understood."""
    try:
        found = json.loads(path.read_text())
        return Record(
            owner=ProcessIdentity(**found["owner"]),
            keeper=ProcessIdentity(**found["keeper"]),
            members=tuple(ProcessIdentity(**member) for member in found["members"]),
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def end_processes(members: Iterable[ProcessIdentity], *, deadline_s: float) -> list[int]:
    """SIGKILL these processes and their descendants, and wait until they are gone.

    Blocks for at most ``deadline_s``.

    Returns:
        The ids of those that were alive.

    Raises:
        TimeoutError: some still are; the message names them.
    """
    alive = {member for member in members if member.is_alive()}
    for member in list(alive):
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(member.pid).children(recursive=True)
            alive |= {found for child in children if (found := identify(child.pid))}
    ended = sorted(member.pid for member in alive)
    deadline = time.monotonic() + deadline_s
    while alive := {member for member in alive if member.is_alive()}:
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {sorted(member.pid for member in alive)} do not end")
        for member in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member.pid, 9)
        time.sleep(0.01)
    return ended


def _started_ticks(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
