"""The lane: what is written is read, and nothing damaged is ever read."""

from __future__ import annotations

import errno
import os
import struct
import threading
from pathlib import Path

import pytest

from rowen.executor.lane import (
    CLOSE_SAMPLES,
    LANE_BYTES,
    UNLIMITED,
    DaemonReading,
    GateReading,
    Lane,
    LaneError,
    LaneTorn,
    ProbeReading,
)

PROBE = ProbeReading(11, 2, 3, 4.5, 500, 0.25, 77, 12.5, 99, 123456789, 10, 4242)
GATE = GateReading(
    heartbeat_ns=1,
    is_open=True,
    is_computing=False,
    closings_total=7,
    close_to_idle_us=30,
    close_to_idle_max_us=90,
    steps_total=5,
    tokens_total=6,
    samples_total=2,
    close_to_idle_ring_us=(20, 30),
    close_to_idle_wall_ring_us=(25, 35),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    lane = tmp_path / "node.lane"
    Lane.create(lane)
    return lane


def test_a_new_lane_is_one_page_and_says_nothing_yet(path: Path) -> None:
    reader = Lane.open(path, role="reader")
    assert path.stat().st_size == LANE_BYTES
    assert reader.read_probe().heartbeat_ns == 0
    assert reader.read_daemon() == DaemonReading(0, False, 0, 0, 0, 0)
    assert reader.read_gate().close_to_idle_ring_us == ()


def test_all_bytes_are_allocated_so_that_a_full_disk_cannot_fail_a_write(path: Path) -> None:
    assert path.stat().st_blocks * 512 >= LANE_BYTES


def test_each_record_is_read_as_it_was_written(path: Path) -> None:
    reader = Lane.open(path, role="reader")
    Lane.open(path, role="probe").write_probe(PROBE)
    Lane.open(path, role="gate").write_gate(GATE)
    daemon = Lane.open(path, role="daemon")
    daemon.write_daemon(gate_open=True, sequence_cap=4, epoch=9)
    said = reader.read_daemon()
    assert reader.read_probe() == PROBE
    assert reader.read_gate() == GATE
    assert (said.gate_open, said.token_budget, said.sequence_cap, said.block_cap, said.epoch) == (
        True,
        UNLIMITED,
        4,
        UNLIMITED,
        9,
    )
    assert reader.read_probe_and_daemon() == (PROBE, said)
    assert reader.read_probe_and_daemon() == (PROBE, said)


def test_a_full_ring_of_closings_is_kept(path: Path) -> None:
    ring = tuple(range(CLOSE_SAMPLES))
    full = GATE._replace(
        samples_total=1000, close_to_idle_ring_us=ring, close_to_idle_wall_ring_us=ring
    )
    Lane.open(path, role="gate").write_gate(full)
    assert Lane.open(path, role="reader").read_gate() == full


def test_the_daemon_record_says_when_the_gate_flipped(path: Path) -> None:
    daemon = Lane.open(path, role="daemon")
    said = []
    for is_open in (False, False, True, True):
        daemon.write_daemon(gate_open=is_open, epoch=1)
        said.append(daemon.read_daemon())
    assert said[0].changed_ns == said[1].changed_ns < said[2].changed_ns == said[3].changed_ns
    assert said[3].heartbeat_ns > said[3].changed_ns


@pytest.mark.parametrize("role", ["probe", "daemon", "gate"])
def test_a_record_has_one_living_writer(path: Path, role: str) -> None:
    first = Lane.open(path, role=role)
    with pytest.raises(LaneError, match="already has a living"):
        Lane.open(path, role=role)
    first.close()
    Lane.open(path, role=role).close()


def test_creating_again_keeps_a_valid_lane(path: Path) -> None:
    Lane.open(path, role="probe").write_probe(PROBE)
    Lane.create(path)
    assert Lane.open(path, role="reader").read_probe() == PROBE


@pytest.mark.parametrize("size", [0, 8, 40, 512, LANE_BYTES - 1, LANE_BYTES + 1])
def test_a_lane_of_wrong_size_is_refused_and_made_anew(path: Path, size: int) -> None:
    os.truncate(path, size)
    with pytest.raises(LaneError):
        Lane.open(path, role="reader")
    Lane.create(path)
    assert Lane.open(path, role="reader").read_probe().heartbeat_ns == 0


@pytest.mark.parametrize("size", [0, 64, 700])
def test_a_lane_truncated_under_a_reader_is_an_error_not_a_signal(path: Path, size: int) -> None:
    reader = Lane.open(path, role="reader")
    os.truncate(path, size)
    with pytest.raises(LaneError, match="truncated"):
        reader.read_probe_and_daemon()


def test_a_writer_of_a_truncated_lane_is_not_harmed(path: Path) -> None:
    probe = Lane.open(path, role="probe")
    os.truncate(path, 0)
    probe.write_probe(PROBE)
    assert probe.is_current()


def test_an_older_lane_is_refused_naming_both_versions(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(8)
        file.write(struct.pack("<I", 0))
    with pytest.raises(LaneError, match="version 0, this Rowen reads 1"):
        Lane.open(path, role="gate")


def test_a_foreign_file_is_refused_and_never_overwritten(tmp_path: Path) -> None:
    foreign = tmp_path / "notes.txt"
    foreign.write_bytes(b"dear diary" * 1000)
    with pytest.raises(LaneError, match="is no Rowen lane"):
        Lane.open(foreign, role="reader")
    with pytest.raises(LaneError, match="is no Rowen lane"):
        Lane.create(foreign)
    assert foreign.read_bytes().startswith(b"dear diary")


def test_a_missing_lane_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(LaneError, match=r"gone\.lane cannot be opened: No such file"):
        Lane.open(tmp_path / "gone.lane", role="reader")
    with pytest.raises(LaneError, match="cannot be made"):
        Lane.create(tmp_path / "no" / "node.lane")


def test_a_full_disk_fails_the_making_and_leaves_nothing() -> None:
    full = Path("/dev/full")  # every write to it fails with ENOSPC
    probe = Lane(full, "probe", os.open(full, os.O_RDWR))
    with pytest.raises(LaneError, match=os.strerror(errno.ENOSPC)):
        probe.write_probe(PROBE)
    probe.close()


def test_a_deleted_or_replaced_lane_is_noticed(path: Path) -> None:
    reader = Lane.open(path, role="reader")
    assert reader.is_current()
    path.unlink()
    assert not reader.is_current()
    Lane.create(path)
    assert not reader.is_current()


@pytest.mark.parametrize("damaged_at", [0, 9, 60, 96, 108])
def test_a_half_written_record_is_torn_never_returned(path: Path, damaged_at: int) -> None:
    Lane.open(path, role="probe").write_probe(PROBE)
    with path.open("r+b") as file:
        file.seek(512 + damaged_at)
        byte = file.read(1)
        file.seek(512 + damaged_at)
        file.write(bytes([byte[0] ^ 0xFF]))
    reader = Lane.open(path, role="reader")
    with pytest.raises(LaneTorn, match="probe"):
        reader.read_probe()
    with pytest.raises(LaneTorn, match="probe"):
        reader.read_probe_and_daemon()


def test_a_reader_beside_a_busy_writer_sees_only_whole_records(path: Path) -> None:
    probe = Lane.open(path, role="probe")
    reader = Lane.open(path, role="reader")
    probe.write_probe(PROBE._replace(heartbeat_ns=0, steps_total=0, busy_ns_total=0))
    is_done = threading.Event()

    def write() -> None:
        for number in range(1, 5000):
            probe.write_probe(
                PROBE._replace(heartbeat_ns=number, steps_total=number, busy_ns_total=number)
            )
        is_done.set()

    writer = threading.Thread(target=write)
    writer.start()
    newest = 0
    while not is_done.is_set():
        seen = reader.read_probe()
        assert seen.heartbeat_ns == seen.steps_total == seen.busy_ns_total >= newest
        newest = seen.heartbeat_ns
    writer.join()
    assert reader.read_probe().steps_total == 4999
