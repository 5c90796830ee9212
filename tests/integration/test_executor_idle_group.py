"""Standing last: an idle process beside a normal one of another session gets next to nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rowen.executor import idle_group

BURN_S = 2.0
"""Processor seconds that the normal process takes; both run at once on one core."""

NORMAL = f"""
import os, time
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
os.setsid()
print("ready", flush=True)
input()
while time.process_time() < {BURN_S}: pass
"""

IDLE = """
import os, sys, time
from pathlib import Path
from rowen.executor import idle_group
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
group = Path(sys.argv[1]) if sys.argv[1] else None
print(idle_group.enter(group), flush=True)
input()
while True: pass
"""


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_beside(group: Path | None) -> tuple[str, float]:
    """(means, processor seconds of the idle process while the normal one took BURN_S)."""

    def start(code: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    with start(NORMAL) as normal, start(IDLE, str(group or "")) as idle:
        assert normal.stdin
        assert normal.stdout
        assert idle.stdin
        assert idle.stdout
        try:
            assert normal.stdout.readline().strip() == "ready"
            means = idle.stdout.readline().strip()
            for process in (idle, normal):
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            assert normal.wait(timeout=60) == 0
            return means, cpu_s(idle.pid)
        finally:
            idle.kill()
            normal.kill()


def test_an_idle_cgroup_yields_the_core() -> None:
    group = idle_group.make(f"rowen-test-{os.getpid()}")
    if group is None:
        pytest.skip("no CPU cgroup can be made here: cgroup isolation is NOT tested")
    try:
        means, took_s = run_beside(group)
    finally:
        assert idle_group.remove(group)
    assert means == "cgroup"
    assert took_s < 0.1 * BURN_S


def test_without_a_cgroup_the_autogroup_yields_the_core() -> None:
    switch = idle_group.AUTOGROUP_SWITCH
    if not switch.exists() or switch.read_text().strip() != "1":
        pytest.skip("autogroup is off here: autogroup isolation is NOT tested")
    means, took_s = run_beside(None)
    assert means == "autogroup"
    assert took_s < 0.25 * BURN_S


def test_a_group_that_cannot_be_made_is_none_and_leaves_nothing() -> None:
    assert idle_group.make("no/such/parent") is None


def test_the_empty_group_of_a_dead_keeper_is_removed() -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    stale = idle_group.make(f"{idle_group.PREFIX}{dead.pid}")
    if stale is None:
        pytest.skip("no CPU cgroup can be made here: cgroup isolation is NOT tested")
    own = idle_group.make(f"{idle_group.PREFIX}{os.getpid()}")
    other = idle_group.make(f"rowen-test-other-{os.getpid()}")
    assert own is not None
    assert other is not None
    left = (stale.exists(), own.exists())
    assert idle_group.remove(own)
    assert idle_group.remove(other)
    assert left == (False, True)


def test_removing_a_group_twice_is_fine() -> None:
    group = idle_group.make(f"rowen-test-twice-{os.getpid()}")
    if group is None:
        pytest.skip("no CPU cgroup can be made here: cgroup isolation is NOT tested")
    assert idle_group.remove(group)
    assert idle_group.remove(group)
    assert not group.exists()
