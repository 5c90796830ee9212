"""Obedience: an open gate after the closing, or silence without an excuse."""

from __future__ import annotations

import pytest

from rowen.daemon.obedience import SILENT_AFTER_MS, is_obedient
from rowen.executor.readings import GateReading

NOW_NS = 10**12
MS_NS = 10**6


def gate(age_ms: float, *, is_open: bool) -> GateReading:
    return GateReading(int(NOW_NS - age_ms * MS_NS), is_open, False, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("is_serving_busy", [False, True])
def test_a_lane_without_a_gate_is_disobedient(is_serving_busy: bool) -> None:
    assert not is_obedient(None, NOW_NS, None, is_serving_busy=is_serving_busy)


@pytest.mark.parametrize("is_serving_busy", [False, True])
@pytest.mark.parametrize(
    ("age_ms", "is_open", "closed_ms_ago", "expected"),
    [
        (50, True, None, True),  # told to be open
        (50, False, 100, True),  # has seen the closing and obeys
        (50, True, 100, False),  # has seen it and does not
        (50, True, 10, True),  # cannot have seen it yet
    ],
)
def test_only_a_heartbeat_after_the_closing_proves_anything(
    age_ms: float, is_open: bool, closed_ms_ago: int | None, expected: bool, is_serving_busy: bool
) -> None:
    closed_ns = None if closed_ms_ago is None else NOW_NS - closed_ms_ago * MS_NS
    reading = gate(age_ms, is_open=is_open)
    assert is_obedient(reading, NOW_NS, closed_ns, is_serving_busy=is_serving_busy) is expected


def test_silence_is_excused_only_while_production_takes_the_core() -> None:
    silent = gate(SILENT_AFTER_MS + 1, is_open=True)
    assert is_obedient(silent, NOW_NS, NOW_NS - 100 * MS_NS, is_serving_busy=True)
    assert not is_obedient(silent, NOW_NS, NOW_NS - 100 * MS_NS, is_serving_busy=False)
    assert not is_obedient(silent, NOW_NS, None, is_serving_busy=False)
