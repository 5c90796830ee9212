"""Standing last on the CPU: what SCHED_IDLE alone does not give across sessions and cgroups.

The kernel first divides a core between *groups* and only then between the threads of a group.
Under autogroup every session is a group of its own, so an idle-class process of another session
still gets half of the core: beside such a process, 10 ms of work took 18 ms (two spinning
sessions, kernel 6.18).  What helps, best first, measured the same way:

- ``cgroup``: a CPU cgroup with ``cpu.idle`` 1: 10.0 ms, P99 10.1 ms.
- ``autogroup``: the session's autogroup at nice 19: 10.0 ms, P99 14.0 ms (one tick now and then).
- ``class``: SCHED_IDLE only; right where production shares the group, or has more weight by its own
  cgroup (a pod of a higher QoS class).

Standard library only: the keeper, which runs isolated from all packages, loads this file by path.
"""

import contextlib
import os
from pathlib import Path
from typing import Literal

Means = Literal["cgroup", "autogroup", "class"]

AUTOGROUP = Path("/proc/self/autogroup")
AUTOGROUP_SWITCH = Path("/proc/sys/kernel/sched_autogroup_enabled")
LOWEST_NICE = "19"

PREFIX = "rowen-idle-"
"""A keeper's group is called this plus its process id."""


def cpu_cgroup() -> Path | None:
    """The folder of our own CPU cgroup; None where no CPU controller is mounted."""
    own = dict(_own_groups())
    for mount, root, controllers in _cgroup_mounts():
        name = "cpu" if "cpu" in controllers else "" if controllers == {""} else None
        path = own.get(name) if name is not None else None
        if path is not None:
            inside = path.removeprefix(root) if root != "/" else path
            return Path(mount) / inside.lstrip("/")
    return None


def make(name: str) -> Path | None:
    """Make a group that only gets what all others leave; None where that is not permitted.

    Nothing is left behind on failure.  Groups of keepers that were killed go first.
    """
    parent = cpu_cgroup()
    if parent is None:
        return None
    _remove_stale(parent)
    group = parent / name
    try:
        if (parent / "cgroup.subtree_control").exists():
            (parent / "cgroup.subtree_control").write_text("+cpu")
        group.mkdir(exist_ok=True)
        (group / "cpu.idle").write_text("1")
    except OSError:
        remove(group)
        return None
    return group


def remove(group: Path) -> bool:
    """Remove an empty group; False while a process is still in it."""
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _remove_stale(parent: Path) -> None:
    """Remove the empty groups of dead keepers: one ended by SIGKILL cannot remove its own."""
    with contextlib.suppress(OSError):
        for group in list(parent.glob(f"{PREFIX}*")):
            pid = group.name.removeprefix(PREFIX)
            if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                remove(group)  # refused by the kernel while a process is in it


def enter(group: Path | None) -> Means:
    """Put the calling process last, in ``group`` or by what else there is.

    Without a group it becomes the leader of a session of its own.

    Raises:
        PermissionError: the kernel refuses SCHED_IDLE.
    """
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    if group is not None:
        with contextlib.suppress(OSError):
            (group / "cgroup.procs").write_text("0")
            return "cgroup"
    if _autogroup_is_on():
        with contextlib.suppress(OSError):
            os.setsid()
            AUTOGROUP.write_text(LOWEST_NICE)
            return "autogroup"
    return "class"


def _autogroup_is_on() -> bool:
    try:
        return AUTOGROUP_SWITCH.read_text().strip() == "1"
    except OSError:
        return False


def _own_groups() -> list[tuple[str, str]]:
    """(controller, path) of this process; the controller of the unified hierarchy is ''."""
    found: list[tuple[str, str]] = []
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        found += [(controller, path) for controller in controllers.split(",")]
    return found


def _cgroup_mounts() -> list[tuple[str, str, set[str]]]:
    """(folder, root inside the hierarchy, controllers); those of version 1 come first."""
    found: list[tuple[str, str, set[str]]] = []
    for line in _lines("/proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        root, mount = left.split(" ")[3:5]
        if kind == "cgroup":
            found.append((mount, root, set(options.split(","))))
        elif kind == "cgroup2":
            found.append((mount, root, {""}))
    return sorted(found, key=lambda one: one[2] == {""})


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
