"""The probe's word on a real lane: true counts, and no fault of the lane ever reaches serving."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rowen.executor.lane import Lane, ProbeReading
from rowen.executor.probe_state import Probe

DEADLINE_S = 5.0


def until(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < end_s, "the condition did not come true in time"
        time.sleep(0.001)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Lane.create(tmp_path / "node.lane")
    return tmp_path / "node.lane"


@pytest.fixture
def probe(path: Path) -> Iterator[Probe]:
    probe = Probe(path)
    yield probe
    probe.stop()


def read(path: Path) -> ProbeReading:
    reader = Lane.open(path, role="reader")
    try:
        return reader.read_probe()
    finally:
        reader.close()


def test_the_heartbeat_needs_no_steps(path: Path, probe: Probe) -> None:
    until(lambda: read(path).heartbeat_ns > 0)
    first = read(path)
    until(lambda: read(path).heartbeat_ns > first.heartbeat_ns)
    assert read(path)._replace(heartbeat_ns=0) == first._replace(heartbeat_ns=0)
    assert first.writer_pid == os.getpid()


def test_a_request_is_waiting_until_its_first_step(path: Path, probe: Probe) -> None:
    probe.arrived("a", 100)
    probe.arrived("b", 7)
    probe.publish(running=0, waiting=2)
    waiting = read(path)
    assert (waiting.requests_waiting, waiting.prefill_tokens_waiting) == (2, 107)
    assert waiting.oldest_waiting_age_ms > 0
    probe.left_queue(["a", "unknown"])
    probe.step_started(time.monotonic_ns(), 100)
    probe.publish(running=1, waiting=1)
    stepping = read(path)
    assert (stepping.requests_running, stepping.prefill_tokens_waiting) == (1, 7)
    assert stepping.step_started_ns > 0
    probe.left_queue(["b"])
    probe.step_ended(kv_used_ratio=0.5)
    probe.publish(running=2, waiting=0)
    between = read(path)
    assert (between.oldest_waiting_age_ms, between.prefill_tokens_waiting) == (0.0, 0)
    assert (between.step_started_ns, between.steps_total, between.kv_used_ratio) == (0, 1, 0.5)


def test_a_prediction_comes_with_the_second_step(path: Path, probe: Probe) -> None:
    for expected in (False, True):
        probe.step_started(time.monotonic_ns(), 4)
        probe.publish(running=1, waiting=0)
        assert (read(path).step_predicted_ms > 0) == expected
        probe.step_ended(0.0)


def test_busy_time_counts_only_while_there_are_requests(path: Path, probe: Probe) -> None:
    probe.publish(running=0, waiting=0)
    idle = read(path)
    probe.publish(running=0, waiting=1)
    busy = read(path)
    until(lambda: read(path).busy_ns_total > 0)  # the heartbeat counts on
    probe.publish(running=1, waiting=0)
    still = read(path)
    probe.publish(running=0, waiting=0)
    after = read(path)
    assert idle.busy_ns_total == 0
    assert busy.busy_ns_total == busy.heartbeat_ns - busy.changed_ns
    assert idle.changed_ns < busy.changed_ns == still.changed_ns < after.changed_ns
    assert after.busy_ns_total == after.changed_ns - busy.changed_ns
    probe.publish(running=0, waiting=0)
    assert read(path).busy_ns_total == after.busy_ns_total


@pytest.mark.parametrize("fault", ["missing", "foreign", "taken"])
def test_an_unusable_lane_is_said_once_and_found_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    path = tmp_path / "late.lane"
    if fault == "foreign":
        path.write_bytes(b"x" * 4096)
    elif fault == "taken":
        Lane.create(path)
        taken = Lane.open(path, role="probe")
    with caplog.at_level(logging.WARNING):
        probe = Probe(path)
        for waiting in (1, 2, 3):
            probe.publish(running=0, waiting=waiting)
    assert len(caplog.records) == 1
    assert "serving is not affected" in caplog.text
    if fault == "taken":
        taken.close()
    else:
        path.unlink(missing_ok=True)
        Lane.create(path)
    until(lambda: read(path).requests_waiting == 3)
    probe.stop()


def test_a_deleted_lane_is_followed_to_its_successor(path: Path, probe: Probe) -> None:
    path.unlink()
    probe.publish(running=1, waiting=0)
    Lane.create(path)
    until(lambda: read(path).requests_running == 1)


def test_a_truncated_lane_harms_nothing(path: Path, probe: Probe) -> None:
    os.truncate(path, 0)
    probe.publish(running=1, waiting=0)
    path.unlink()
    Lane.create(path)
    until(lambda: read(path).requests_running == 1)


def test_the_scheduler_never_waits_for_the_heartbeat_and_loses_nothing(
    path: Path, probe: Probe
) -> None:
    with probe._lock:  # as while the heartbeat writes
        probe.publish(running=3, waiting=0)
        assert read(path).requests_running == 0
    until(lambda: read(path).requests_running == 3)


def test_a_failing_heartbeat_is_said_once_and_goes_on(
    path: Path, probe: Probe, caplog: pytest.LogCaptureFixture
) -> None:
    probe._step_predicted_ms = "no number"  # type: ignore[assignment]
    until(lambda: bool(caplog.records))
    until(lambda: not probe._is_due)
    probe._step_predicted_ms = 0.0
    failed = read(path).heartbeat_ns
    until(lambda: read(path).heartbeat_ns > failed)
    assert len(caplog.records) == 1
    assert "a heartbeat failed" in caplog.text
