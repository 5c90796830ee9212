"""Routing: filters, scores in [0, 1], and the reasons."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from rowen.policies.lease import EngineKind
from rowen.scheduler.route import (
    DEFAULT_POLICY,
    Action,
    EngineView,
    Reason,
    RouteSeen,
    decide,
    reclaim_risk,
    score,
)

DEDICATED = EngineView("a", EngineKind.DEDICATED, 3, 0, 8, True)
OPPORTUNISTIC = EngineView("b", EngineKind.OPPORTUNISTIC, 3, 0, 8, True)

views = st.builds(
    EngineView,
    engine_id=st.sampled_from("abcdef"),
    kind=st.sampled_from(EngineKind),
    version=st.integers(0, 5),
    running=st.integers(0, 20),
    capacity=st.integers(0, 20),
    is_routable=st.booleans(),
    disturbed_age_s=st.none() | st.floats(0, 1e6),
)


def seen(*engines: EngineView, **asked) -> RouteSeen:
    return RouteSeen(engines=engines, target_version=5, **asked)


@given(
    st.lists(views, max_size=6, unique_by=lambda v: v.engine_id),
    st.none() | st.integers(0, 5),
    st.none() | st.sampled_from("abcdef"),
    st.none() | st.sampled_from("abcdef"),
)
def test_only_an_engine_that_may_and_can_is_ever_picked(engines, staleness, previous, turn) -> None:
    asked = seen(*engines, max_staleness=staleness, trajectory_engine=turn)
    decision = decide(previous, asked)
    usable = [
        e
        for e in engines
        if e.is_routable
        and e.running < e.capacity
        and (staleness is None or e.version >= 5 - staleness)
    ]
    assert (decision.action is Action.SEND) == bool(usable)
    if decision.action is Action.SEND:
        assert decision.engine_id in {e.engine_id for e in usable}
        assert 0.0 <= decision.score <= 1.0
        if len(usable) > 1:
            assert decision.engine_id != previous
    for engine in engines:
        assert 0.0 <= score(engine, asked, DEFAULT_POLICY) <= 1.0
        assert 0.0 <= reclaim_risk(engine, DEFAULT_POLICY) <= 1.0


def test_idle_dedicated_is_preferred_to_idle_opportunistic() -> None:
    assert decide(None, seen(OPPORTUNISTIC, DEDICATED)).engine_id == "a"


def test_load_moves_work_to_the_opportunistic_engine() -> None:
    busy = replace(DEDICATED, running=4)
    assert decide(None, seen(busy, OPPORTUNISTIC)).engine_id == "b"


def test_a_turn_goes_where_its_prefix_is_cached_while_load_is_alike() -> None:
    other = replace(DEDICATED, engine_id="c", running=1)
    assert decide(None, seen(DEDICATED, other, trajectory_engine="c")).engine_id == "c"
    assert decide(None, seen(DEDICATED, other, group_engines=frozenset("c"))).engine_id == "c"
    full = replace(other, running=8)
    assert decide(None, seen(DEDICATED, full, trajectory_engine="c")).engine_id == "a"


def test_a_disturbed_engine_is_riskier_and_calms_down() -> None:
    risks = [
        reclaim_risk(replace(OPPORTUNISTIC, disturbed_age_s=age), DEFAULT_POLICY)
        for age in (0.0, 10.0, 100.0, 1e9)
    ]
    assert risks == sorted(risks, reverse=True)
    assert risks[0] == 1.0
    assert abs(risks[-1] - DEFAULT_POLICY.base_risk_ratio) < 1e-3


def test_staleness_bound_is_inclusive() -> None:
    assert decide(None, seen(DEDICATED, max_staleness=2)).action is Action.SEND
    assert decide(None, seen(DEDICATED, max_staleness=1)).reason is Reason.TOO_STALE


def test_reasons_for_waiting() -> None:
    assert decide(None, seen()).reason is Reason.NO_ENGINE
    assert decide(None, seen(replace(DEDICATED, is_routable=False))).reason is Reason.NO_ENGINE
    assert decide(None, seen(replace(DEDICATED, running=8))).reason is Reason.NO_ROOM
    assert decide(None, seen(replace(DEDICATED, capacity=0))).reason is Reason.NO_ROOM


def test_the_engine_left_by_a_fault_is_taken_only_when_no_other_has_room() -> None:
    assert decide("a", seen(DEDICATED, OPPORTUNISTIC)).engine_id == "b"
    assert decide("a", seen(DEDICATED, replace(OPPORTUNISTIC, running=8))).engine_id == "a"
