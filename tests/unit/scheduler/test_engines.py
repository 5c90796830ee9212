"""Engine states: order of the rules, and that worse readings never admit more."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rowen.policies.lease import EngineKind, Grant
from rowen.scheduler.engines import EnginePolicy, EngineSeen, EngineState, Reason, decide

POLICY = EnginePolicy(health_failures=3)
GOOD = EngineSeen(
    kind=EngineKind.OPPORTUNISTIC,
    has_lease=True,
    is_lease_verified=True,
    grant=Grant.RUN,
    sequence_cap=4,
    was_seen=True,
    is_refused=False,
    failed_checks=0,
    is_backing_off=False,
    is_updating=False,
    version=7,
    target_version=7,
)


def test_an_engine_in_order_takes_its_cap() -> None:
    decision = decide(EngineState.WARMING, GOOD, POLICY)
    assert (decision.action, decision.capacity) == (EngineState.READY, 4)
    assert decision.keeps_running


@pytest.mark.parametrize(
    ("change", "state", "reason", "keeps_running"),
    [
        ({"has_lease": False}, EngineState.LOST, Reason.NO_LEASE, False),
        ({"grant": Grant.DRAINING}, EngineState.DRAINING, Reason.DRAINING, False),
        ({"was_seen": False}, EngineState.WARMING, Reason.NOT_SEEN_YET, False),
        ({"is_refused": True}, EngineState.LOST, Reason.REFUSED, False),
        ({"failed_checks": 3}, EngineState.LOST, Reason.NO_ANSWER, False),
        ({"is_backing_off": True}, EngineState.LOST, Reason.BACKING_OFF, True),
        ({"is_updating": True}, EngineState.STALE, Reason.UPDATING, True),
        ({"version": None}, EngineState.STALE, Reason.VERSION_UNKNOWN, True),
        ({"version": 8}, EngineState.STALE, Reason.VERSION_AHEAD, True),
        ({"version": 5}, EngineState.STALE, Reason.VERSION_BEHIND, True),
        ({"is_lease_verified": False}, EngineState.THROTTLED, Reason.LEASE_UNVERIFIED, True),
    ],
)
def test_each_rule_closes_the_engine_to_new_work(change, state, reason, keeps_running) -> None:
    decision = decide(EngineState.READY, replace(GOOD, **change), POLICY)
    assert (decision.action, decision.reason, decision.capacity) == (state, reason, 0)
    assert decision.keeps_running is keeps_running


def test_an_engine_waiting_for_its_turn_serves_one_version_behind() -> None:
    decision = decide(EngineState.READY, replace(GOOD, version=6), POLICY)
    assert decision.action is EngineState.READY


def test_two_failed_checks_are_forgiven() -> None:
    decision = decide(EngineState.READY, replace(GOOD, failed_checks=2), POLICY)
    assert decision.action is EngineState.READY


def test_a_closed_gate_keeps_what_runs_and_a_throttled_engine_takes_its_cap() -> None:
    closed = decide(EngineState.READY, replace(GOOD, sequence_cap=0), POLICY)
    assert (closed.action, closed.capacity) == (EngineState.THROTTLED, 0)
    assert closed.keeps_running
    throttled = decide(EngineState.READY, replace(GOOD, grant=Grant.THROTTLED), POLICY)
    assert (throttled.action, throttled.capacity) == (EngineState.THROTTLED, 4)


def test_a_dedicated_engine_outlives_a_silent_redis() -> None:
    dedicated = replace(GOOD, kind=EngineKind.DEDICATED, is_lease_verified=False)
    assert decide(EngineState.READY, dedicated, POLICY).action is EngineState.READY


def test_no_lease_yet_is_cold_and_no_lease_any_more_is_lost() -> None:
    without = replace(GOOD, has_lease=False)
    assert decide(EngineState.COLD, without, POLICY).action is EngineState.COLD
    assert decide(EngineState.READY, without, POLICY).action is EngineState.LOST


WORSE = {
    "has_lease": (True, False),
    "is_lease_verified": (True, False),
    "was_seen": (True, False),
    "is_refused": (False, True),
    "is_backing_off": (False, True),
    "is_updating": (False, True),
    "grant": (Grant.RUN, Grant.THROTTLED, Grant.DRAINING),
    "sequence_cap": (9, 4, 1, 0),
    "failed_checks": (0, 2, 3, 50),
    "version": (7, 6, 5, None),
}
"""Readings from good to bad."""


@given(
    st.fixed_dictionaries({n: st.integers(0, len(v) - 1) for n, v in WORSE.items()}),
    st.sampled_from(sorted(WORSE)),
    st.sampled_from(EngineState),
    st.sampled_from(EngineKind),
)
def test_a_worse_reading_never_admits_more(places, worsened, previous, kind) -> None:
    def reading(at):
        return replace(GOOD, kind=kind, **{n: WORSE[n][at[n]] for n in WORSE})

    worse = dict(places)
    worse[worsened] = min(worse[worsened] + 1, len(WORSE[worsened]) - 1)
    before = decide(previous, reading(places), POLICY)
    after = decide(previous, reading(worse), POLICY)
    assert after.capacity <= before.capacity
