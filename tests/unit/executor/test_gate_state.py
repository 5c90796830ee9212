"""The gate against a real lane: holds, releases, counts, and survives every fault of the lane."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rowen.executor.admission import AdmissionBounds, GateReason
from rowen.executor.gate_state import Gate
from rowen.executor.lane import GateReading, Lane, ProbeReading
from rowen.executor.lane_config import LaneConfig

DEADLINE_S = 5.0


def until(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < end_s, "the condition did not come true in time"
        time.sleep(0.001)


class Node:
    """Both writers that a gate listens to, and the gate."""

    def __init__(self, path: Path, *, hold_ms: int = 60_000, silent_ms: int = 1000) -> None:
        Lane.create(path)
        self.path = path
        self.probe = Lane.open(path, role="probe")
        self.daemon = Lane.open(path, role="daemon")
        self.reader = Lane.open(path, role="reader")
        bounds = AdmissionBounds(silent_ms, silent_ms)
        self.gate = Gate(LaneConfig(path, bounds, hold_ms))

    def say(self, *, running: int = 0, is_open: bool = True, sequences: int = 8) -> None:
        now_ns = time.monotonic_ns()
        self.probe.write_probe(ProbeReading(now_ns, 0, running, 0.0, 0, 0.0, 0, 0.0, 1, 0, now_ns))
        self.daemon.write_daemon(gate_open=is_open, sequence_cap=sequences, epoch=5)

    def read(self) -> GateReading:
        return self.reader.read_gate()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "node.lane")
    yield node
    node.gate.close()


def test_nothing_said_yet_is_closed(node: Node) -> None:
    assert node.gate.check().reason is GateReason.PROBE_SILENT


def test_an_open_gate_lets_layers_pass_and_carries_the_grant(node: Node) -> None:
    node.say(sequences=3)
    assert node.gate.check().allowed
    assert node.gate.sequence_cap == 3
    node.gate.step_started(7)
    node.gate.between_layers()
    node.gate.step_ended()
    node.gate.start()
    until(lambda: node.read().steps_total == 1)
    seen = node.read()
    assert (seen.tokens_total, seen.samples_total, seen.epoch_seen) == (7, 0, 5)


def test_a_layer_is_held_while_serving_works_and_released_after(node: Node) -> None:
    node.say()
    node.gate.start()
    node.gate.check()
    node.gate.step_started(1)
    node.say(running=1)
    layer = threading.Thread(target=node.gate.between_layers)
    layer.start()
    until(lambda: node.read().samples_total == 1 and not node.read().is_computing)
    assert layer.is_alive()
    assert node.read().closings_total == 1
    node.say()
    layer.join(DEADLINE_S)
    assert not layer.is_alive()
    until(lambda: node.read().is_computing and node.read().is_open)
    seen = node.read()
    assert len(seen.close_to_idle_ring_us) == 1
    assert 0 <= seen.close_to_idle_ring_us[0] <= seen.close_to_idle_wall_ring_us[0]
    assert seen.close_to_idle_max_us == seen.close_to_idle_us == seen.close_to_idle_ring_us[0]
    assert seen.overruns_total == 0


def test_a_hold_ends_at_its_bound_and_the_step_then_runs_through(tmp_path: Path) -> None:
    node = Node(tmp_path / "node.lane", hold_ms=20)
    node.say()
    node.gate.check()
    node.gate.step_started(1)
    node.say(is_open=False)
    node.gate.start()
    node.gate.between_layers()
    node.gate.between_layers()  # no second hold in the same step
    until(lambda: node.read().overruns_total == 1)
    assert node.read().is_computing
    node.gate.step_ended()
    until(lambda: not node.read().is_computing)
    assert not node.gate.check().allowed
    node.gate.close()


def test_the_end_of_the_engine_releases_a_held_layer(node: Node) -> None:
    node.say()
    node.gate.check()
    node.gate.step_started(1)
    node.say(is_open=False)
    layer = threading.Thread(target=node.gate.between_layers)
    layer.start()
    node.gate.end()
    layer.join(DEADLINE_S)
    assert not layer.is_alive()


def test_layers_outside_a_step_are_never_held(node: Node) -> None:
    assert not node.gate.check().allowed
    node.gate.between_layers()  # returns; warm-up and profiling come this way
    assert node.gate.check().reason is GateReason.PROBE_SILENT


def test_a_closing_that_meets_the_end_of_a_step_gives_a_sample(node: Node) -> None:
    node.say()
    node.gate.check()
    node.gate.step_started(1)
    node.say(running=1)
    node.gate.step_ended()
    node.gate.start()
    until(lambda: node.read().samples_total == 1)
    assert node.read().closings_total == 1


def test_a_closing_between_two_steps_took_no_time(node: Node) -> None:
    node.say()
    node.gate.check()
    node.gate.step_started(1)
    node.gate.step_ended()
    node.say(running=1)
    node.gate.step_refused(node.gate.check())
    node.gate.step_refused(node.gate.check())
    node.gate.start()
    until(lambda: node.read().samples_total == 1)
    assert node.read().close_to_idle_wall_ring_us == (0,)


def test_silence_closes_within_the_bound(tmp_path: Path) -> None:
    node = Node(tmp_path / "node.lane", silent_ms=20)
    node.say()
    assert node.gate.check().allowed
    until(lambda: node.gate.check().reason is GateReason.PROBE_SILENT)


@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_a_damaged_lane_closes_and_a_new_one_is_followed(node: Node, damage: str) -> None:
    node.say()
    assert node.gate.check().allowed
    if damage == "truncated":
        os.truncate(node.path, 600)
    else:
        node.path.write_bytes(b"\xff" * 4096)
    assert node.gate.check().reason is GateReason.PROBE_UNREADABLE
    node.path.unlink()
    fresh = Node(node.path)

    def is_followed() -> bool:
        fresh.say()
        return node.gate.check().allowed

    until(is_followed)
    fresh.gate.close()


def test_a_deleted_lane_closes(node: Node) -> None:
    node.say()
    assert node.gate.check().allowed
    node.path.unlink()

    def is_closed() -> bool:
        node.say()  # both writers still write to the file that has no name any more
        return node.gate.check().reason is GateReason.PROBE_UNREADABLE

    until(is_closed)


def test_a_thousand_closings_keep_handles_and_counts_straight(node: Node) -> None:
    node.gate.check()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(1000):
        node.say()
        assert node.gate.check().allowed
        node.gate.step_started(1)
        node.say(is_open=False)
        node.gate.step_ended()
    node.gate.start()
    until(lambda: node.read().samples_total == 1000)
    seen = node.read()
    assert seen.closings_total == 1000
    assert len(seen.close_to_idle_ring_us) == 64
    assert len(os.listdir("/proc/self/fd")) == before
