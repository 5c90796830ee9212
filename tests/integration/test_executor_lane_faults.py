"""Writers of the lane that die or sleep: the gate closes within a second, and opens again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rowen.executor.admission import AdmissionBounds, GateReason
from rowen.executor.gate_state import Gate
from rowen.executor.lane import Lane, LaneError
from rowen.executor.lane_config import LaneConfig

DEADLINE_S = 10.0

WRITER = """
import sys, time
from rowen.executor.lane import Lane, ProbeReading
role, path = sys.argv[1:]
lane = Lane.open(path, role=role)
print("writing", flush=True)
while True:
    now_ns = time.monotonic_ns()
    if role == "daemon":
        lane.write_daemon(gate_open=True, epoch=1)
    else:
        lane.write_probe(ProbeReading(now_ns, 0, 0, 0.0, 0, 0.0, 0, 0.0, 1, 0, 1))
    time.sleep(0.02)
"""


def start(role: str, path: Path) -> subprocess.Popen[str]:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, role, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    return writer


def end(writer: subprocess.Popen[str]) -> None:
    writer.kill()
    writer.wait()
    assert writer.stdout is not None
    writer.stdout.close()


def until(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < end_s, "the condition did not come true in time"
        time.sleep(0.002)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Lane.create(tmp_path / "node.lane")
    return tmp_path / "node.lane"


@pytest.fixture
def writers(path: Path) -> Iterator[dict[str, subprocess.Popen[str]]]:
    both = {role: start(role, path) for role in ("probe", "daemon")}
    yield both
    for writer in both.values():
        end(writer)


@pytest.fixture
def gate(path: Path) -> Iterator[Gate]:
    gate = Gate(LaneConfig(path, AdmissionBounds(500, 500)))
    yield gate
    gate.close()


SILENT = {"probe": GateReason.PROBE_SILENT, "daemon": GateReason.DAEMON_SILENT}


@pytest.mark.parametrize("role", ["probe", "daemon"])
def test_a_killed_writer_closes_the_gate_and_its_successor_opens_it(
    path: Path, writers: dict[str, subprocess.Popen[str]], gate: Gate, role: str
) -> None:
    until(lambda: gate.check().allowed)
    end(writers[role])
    until(lambda: gate.check().reason is SILENT[role])
    closed = gate.check()
    last_ns = getattr(Lane.open(path, role="reader"), f"read_{role}")().heartbeat_ns
    assert closed.closed_since_ns - last_ns == 500_000_000
    writers[role] = start(role, path)  # the kernel has freed the dead one's lock
    until(lambda: gate.check().allowed)


@pytest.mark.parametrize("role", ["probe", "daemon"])
def test_a_stopped_writer_closes_the_gate_until_it_goes_on(
    path: Path, writers: dict[str, subprocess.Popen[str]], gate: Gate, role: str
) -> None:
    until(lambda: gate.check().allowed)
    os.kill(writers[role].pid, signal.SIGSTOP)
    until(lambda: gate.check().reason is SILENT[role])
    with pytest.raises(LaneError, match="already has a living"):
        Lane.open(path, role=role)  # type: ignore[arg-type]  # a parametrized literal
    os.kill(writers[role].pid, signal.SIGCONT)
    until(lambda: gate.check().allowed)
