"""The gate's decision: open only on fresh, agreeing evidence, and worse never allows more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rowen.executor.admission import AdmissionBounds, GateReason, may_compute
from rowen.executor.lane import UNLIMITED, DaemonReading, ProbeReading

NOW_NS = 1_000_000_000_000
MS = 1_000_000
BOUNDS = AdmissionBounds()
IDLE = ProbeReading(NOW_NS - 10 * MS, 0, 0, 0.0, 0, 0.0, 0, 0.0, 1, 0, NOW_NS - 900 * MS)
OPEN = DaemonReading(NOW_NS - 10 * MS, True, UNLIMITED, UNLIMITED, UNLIMITED, 1, NOW_NS - 800 * MS)


def reason(probe: ProbeReading | None, daemon: DaemonReading | None) -> GateReason:
    admission = may_compute(probe, daemon, NOW_NS, BOUNDS)
    assert admission.allowed == (admission.reason is GateReason.OPEN)
    return admission.reason


def test_fresh_idle_and_granted_is_open() -> None:
    assert may_compute(IDLE, OPEN, NOW_NS, BOUNDS) == (True, GateReason.OPEN, 0)


@pytest.mark.parametrize(
    ("probe", "daemon", "expected"),
    [
        (None, OPEN, GateReason.PROBE_UNREADABLE),
        (IDLE, None, GateReason.DAEMON_UNREADABLE),
        (IDLE._replace(heartbeat_ns=NOW_NS - 501 * MS), OPEN, GateReason.PROBE_SILENT),
        (IDLE._replace(heartbeat_ns=0), OPEN, GateReason.PROBE_SILENT),
        (IDLE, OPEN._replace(heartbeat_ns=NOW_NS - 501 * MS), GateReason.DAEMON_SILENT),
        (IDLE, OPEN._replace(heartbeat_ns=NOW_NS + 51 * MS), GateReason.DAEMON_SILENT),
        (IDLE._replace(heartbeat_ns=NOW_NS + 51 * MS), OPEN, GateReason.PROBE_SILENT),
        (IDLE, OPEN._replace(gate_open=False), GateReason.DAEMON_CLOSED),
        (IDLE, OPEN._replace(token_budget=0), GateReason.NO_BUDGET),
        (IDLE, OPEN._replace(sequence_cap=0), GateReason.NO_BUDGET),
        (IDLE._replace(requests_waiting=1), OPEN, GateReason.SERVING_BUSY),
        (IDLE._replace(requests_running=1), OPEN, GateReason.SERVING_BUSY),
        (IDLE._replace(heartbeat_ns=NOW_NS - 500 * MS), OPEN, GateReason.OPEN),
        (IDLE, OPEN._replace(heartbeat_ns=NOW_NS - 500 * MS), GateReason.OPEN),
        (IDLE._replace(heartbeat_ns=NOW_NS + MS), OPEN, GateReason.OPEN),
    ],
)
def test_each_reason_on_both_sides_of_its_bound(
    probe: ProbeReading | None, daemon: DaemonReading | None, expected: GateReason
) -> None:
    assert reason(probe, daemon) is expected


def test_the_severest_reason_is_given() -> None:
    busy = IDLE._replace(requests_running=1)
    silent = busy._replace(heartbeat_ns=0)
    closed = OPEN._replace(gate_open=False)
    assert reason(silent, None) is GateReason.DAEMON_UNREADABLE
    assert reason(silent, closed) is GateReason.PROBE_SILENT
    assert reason(busy, closed) is GateReason.DAEMON_CLOSED


def test_closed_since_is_the_first_moment_it_could_be_seen() -> None:
    busy = IDLE._replace(requests_running=1, changed_ns=NOW_NS - 3 * MS)
    closed = OPEN._replace(gate_open=False, changed_ns=NOW_NS - 5 * MS)
    silent = IDLE._replace(heartbeat_ns=NOW_NS - 700 * MS)
    assert may_compute(busy, OPEN, NOW_NS, BOUNDS).closed_since_ns == NOW_NS - 3 * MS
    assert may_compute(IDLE, closed, NOW_NS, BOUNDS).closed_since_ns == NOW_NS - 5 * MS
    assert may_compute(busy, closed, NOW_NS, BOUNDS).closed_since_ns == NOW_NS - 5 * MS
    assert may_compute(silent, OPEN, NOW_NS, BOUNDS).closed_since_ns == NOW_NS - 200 * MS


@given(
    older_ms=st.integers(0, 3000),
    more_waiting=st.integers(0, 3),
    more_running=st.integers(0, 3),
    older_daemon_ms=st.integers(0, 3000),
    is_granted=st.booleans(),
    budget=st.integers(0, 8),
    cap=st.integers(0, 8),
)
def test_a_worse_reading_never_allows_more(
    older_ms: int,
    more_waiting: int,
    more_running: int,
    older_daemon_ms: int,
    is_granted: bool,
    budget: int,
    cap: int,
) -> None:
    daemon = OPEN._replace(gate_open=is_granted, token_budget=budget, sequence_cap=cap)
    before = may_compute(IDLE, daemon, NOW_NS, BOUNDS).allowed
    worse_probe = IDLE._replace(
        heartbeat_ns=IDLE.heartbeat_ns - older_ms * MS,
        requests_waiting=more_waiting,
        requests_running=more_running,
    )
    worse_daemon = daemon._replace(heartbeat_ns=daemon.heartbeat_ns - older_daemon_ms * MS)
    assert may_compute(worse_probe, worse_daemon, NOW_NS, BOUNDS).allowed <= before


@pytest.mark.parametrize("silent_ms", [0, -1, 1001])
def test_bounds_beyond_one_second_are_refused(silent_ms: int) -> None:
    with pytest.raises(ValueError, match=rf"daemon_silent_ms is {silent_ms}, it must be 1 to 1000"):
        AdmissionBounds(daemon_silent_ms=silent_ms)
