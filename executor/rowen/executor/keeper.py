"""The keeper: a small parent process that no part of an engine can outlive.

The supervisor runs this file (standard library only) with the engine's command line.  The keeper
- adopts every orphan among the engine's processes (child subreaper),
- ends them all when the engine's first process ends, when it is told to (SIGTERM), and when its
  owner dies: it holds the reading end of a pipe whose writing end only the owner has,
- removes what they left in /dev/shm,
- puts an idle-class engine into a group that only gets what others leave (``idle_group.py``),
- then ends as the engine ended: with its exit code or by its signal.

Should the keeper itself be killed, the engine's first process goes with it (PR_SET_PDEATHSIG),
and the owner ends the rest from its record (``identity.py``).

Usage: keeper.py LIFE_FD GRACE_S IDLE(0|1) CORES(comma list or -) COMMAND...
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path

if not __package__:  # run as a script, isolated from all packages: make the neighbour findable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rowen.executor import idle_group  # only after the path is set

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
KILL_NOW = b"K"
"""One byte down the pipe: the owner's patience is over."""

SWEEP_S = 5.0
"""How long killed processes may take to disappear (they may be inside a long system call)."""

TRACKER_S = 1.0
"""What Python's resource trackers get to unlink semaphores once their users are dead; they then
end by themselves.  Nobody else knows the names of semaphores whose users are gone already."""

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option} failed")


def descendants() -> list[int]:
    """Process ids of all living descendants, by one look through /proc."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    own: set[int] = {os.getpid()}
    found: list[int] = []
    while fresh := [pid for pid, parent in parents.items() if parent in own and pid not in own]:
        own.update(fresh)
        found += fresh
    return found


def shared_memory_of(pids: list[int]) -> set[int]:
    """Inodes in /dev/shm that these processes have mapped.

    Not paths: glibc makes a named semaphore under a passing name, which is what the map shows (as
    deleted), and links the lasting name to it.
    """
    inodes: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                if "/dev/shm/" in line:
                    inodes.add(int(line.split()[4]))
    return inodes


def remove_shared_memory(inodes: set[int]) -> None:
    """Unlink these inodes' names in /dev/shm, except what any living process has mapped."""
    left = inodes - shared_memory_of(_everyone())
    for entry in list(os.scandir("/dev/shm")) if left else []:
        if entry.inode() in left:
            Path(entry.path).unlink(missing_ok=True)


def is_tracker(pid: int) -> bool:
    """Whether this is a resource tracker of Python's multiprocessing."""
    with contextlib.suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _everyone() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


class Keeper:
    """One engine's life."""

    def __init__(self, life_fd: int, grace_s: float) -> None:
        self.life_fd = life_fd
        self.grace_s = grace_s
        self.child = 0
        self.status: int | None = None
        self.is_told_to_end = False
        self.kill_at_s: float | None = None
        self.group: Path | None = None
        """The CPU cgroup of an idle-class engine, where one could be made."""
        self.shared_memory: set[int] = set()

    def spawn(self, command: list[str], cores: set[int], is_idle: bool) -> None:
        """Start the engine's first process, placed before it runs its first instruction."""
        keeper = os.getpid()
        if is_idle:
            self.group = idle_group.make(f"{idle_group.PREFIX}{keeper}")
        self.child = os.fork()
        if self.child:
            return
        try:
            _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != keeper:
                os._exit(1)
            for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            if cores:
                os.sched_setaffinity(0, cores)
            if is_idle:
                means = idle_group.enter(self.group)
                print(f"keeper: idle by {means}", file=sys.stderr, flush=True)
            os.execvp(command[0], command)
        except OSError as error:
            print(f"keeper: {command[0]} cannot be started: {error}", file=sys.stderr, flush=True)
        os._exit(127)

    def run(self) -> int:
        """Wait for the end of the engine, sweep, and return its wait status."""
        read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_end)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._told_to_end)
        watched = [self.life_fd, read_end]
        while self._reap() is None:
            if self.is_told_to_end and self.kill_at_s is None:
                self._ask_to_end()
            wait_s = None if self.kill_at_s is None else max(0.0, self.kill_at_s - time.monotonic())
            ready, _, _ = select.select(watched, [], [], wait_s)
            if read_end in ready:
                os.read(read_end, 4096)
            if self.life_fd in ready:
                word = os.read(self.life_fd, 1)
                self.is_told_to_end = True
                if word == KILL_NOW:
                    self.kill_at_s = 0.0
                else:
                    watched.remove(self.life_fd)
            if self.kill_at_s is not None and time.monotonic() >= self.kill_at_s:
                break
        self._sweep()
        return self.status if self.status is not None else signal.SIGKILL

    def _told_to_end(self, *_: object) -> None:
        self.is_told_to_end = True

    def _ask_to_end(self) -> None:
        self.kill_at_s = time.monotonic() + self.grace_s
        self.shared_memory |= shared_memory_of(descendants())
        _signal(self.child, signal.SIGTERM)

    def _reap(self) -> int | None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return self.status
            if pid == 0:
                return self.status
            if pid == self.child:
                self.status = status

    def _sweep(self) -> None:
        """Kill what is left until nothing is, then unlink its shared memory."""
        began_s = time.monotonic()
        while (left := descendants()) and (now_s := time.monotonic()) < began_s + SWEEP_S:
            self.shared_memory |= shared_memory_of(left)
            for pid in left:
                if not (is_tracker(pid) and now_s < began_s + TRACKER_S):
                    _signal(pid, signal.SIGKILL)
                    _unbind(pid)
            self._reap()
            time.sleep(0.01)
        remove_shared_memory(self.shared_memory)
        while self.group is not None and time.monotonic() < began_s + SWEEP_S:
            if idle_group.remove(self.group):
                break
            time.sleep(0.01)  # the last process is dead, the kernel has not let go of it yet


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _unbind(pid: int) -> None:
    """Let a process that was sent SIGKILL end on any core, in the class that it has.

    Tearing down two gigabytes takes up to a second of processor time.  An idle-class process must
    not take that from production (in the normal class it did: a gap of 1.0 s in every answer), so
    it only gets whatever core has something left.
    """
    threads: list[str] = []
    with contextlib.suppress(OSError):
        threads = os.listdir(f"/proc/{pid}/task")
    for thread in threads:  # each by itself: threads end while we look
        with contextlib.suppress(OSError):
            os.sched_setaffinity(int(thread), range(os.cpu_count() or 1))


def main(arguments: list[str]) -> None:
    """Keep one engine; never returns."""
    life_fd, grace_s, is_idle, cores = arguments[:4]
    os.set_inheritable(int(life_fd), False)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    chosen = {int(core) for core in cores.split(",")} if cores != "-" else set()
    if chosen:
        os.sched_setaffinity(0, chosen)
    keeper = Keeper(int(life_fd), float(grace_s))
    # A terminal's Ctrl-C is the owner's to handle: it stops its engines in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    keeper.spawn(arguments[4:], chosen, is_idle == "1")
    status = keeper.run()
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(sys.argv[1:])
