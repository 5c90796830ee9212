"""The guard: order of severity, bands, growth, and its invariants on random histories."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rowen.policies import guard
from rowen.policies.guard import (
    START,
    Action,
    Gate,
    GuardDecision,
    GuardSeen,
    GuardState,
    ObjectiveReading,
    Reason,
)
from rowen.policies.load import library_policy, load_policy
from rowen.policies.schema import HarvestPolicy, Mode

MIB = 2**20


def make_policy(**growth: Any) -> HarvestPolicy:
    document = load_policy(library_policy("demo")).model_dump()
    objective = {"percentile": 99, "window_s": 20, "min_samples": 10}
    document["spec"] |= {
        "objectives": {
            "ttft": objective | {"threshold_ms": 1000},
            "tpot": objective | {"threshold_ms": 100},
        },
        "growth": {"initial_sequences": 2, "step_factor": 2, "every_ms": 300, "cool_down_ms": 500}
        | growth,
        "resources": {"max_sequences": 10, "min_available_memory_bytes": 512 * MIB},
    }
    return HarvestPolicy.model_validate(document)


POLICY = make_policy()
OPEN = GuardState(Gate.OPEN, 8, 0.0)
GOOD = GuardSeen(
    elapsed_ms=100.0,
    kill_switch=False,
    mode=Mode.ENFORCE,
    probe_age_ms=20.0,
    metrics_age_ms=700.0,
    ttft=ObjectiveReading(200.0, 50),
    tpot=ObjectiveReading(40.0, 50),
    available_memory_bytes=2048 * MIB,
)


def follow(state: GuardState, *history: GuardSeen) -> list[GuardDecision]:
    decisions = []
    for seen in history:
        decisions.append(guard.decide(state, seen, POLICY))
        state = decisions[-1].state
    return decisions


FROM_MOST_TO_LEAST_SEVERE: list[tuple[Reason, dict[str, Any]]] = [
    (Reason.KILL_SWITCH, {"kill_switch": True}),
    (Reason.MODE_OFF, {"mode": Mode.OFF}),
    (Reason.TICK_LATE, {"elapsed_ms": 501.0}),
    (Reason.PROBE_MISSING, {"probe_age_ms": None}),
    (Reason.METRICS_STALE, {"metrics_age_ms": 5001.0}),
    (Reason.MEMORY_SHORT, {"available_memory_bytes": 512 * MIB - 1}),
    (Reason.TTFT_BREACHED, {"ttft": ObjectiveReading(1000.1, 10)}),
    (Reason.TPOT_BREACHED, {"tpot": ObjectiveReading(100.1, 10)}),
]


@pytest.mark.parametrize("place", range(len(FROM_MOST_TO_LEAST_SEVERE)))
def test_the_most_severe_of_all_reasons_is_named(place: int) -> None:
    changes: dict[str, Any] = {}
    for _, worse in reversed(FROM_MOST_TO_LEAST_SEVERE[place:]):
        changes |= worse
    decision = guard.decide(OPEN, replace(GOOD, **changes), POLICY)
    assert (decision.gate, decision.sequence_cap) == (Gate.CLOSED, 0)
    assert decision.reason is FROM_MOST_TO_LEAST_SEVERE[place][0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kill_switch": None}, Reason.KILL_SWITCH_UNKNOWN),
        ({"probe_age_ms": 800.1}, Reason.PROBE_STALE),
        ({"probe_age_ms": -1.0}, Reason.READING_INVALID),
        ({"probe_age_ms": math.nan}, Reason.READING_INVALID),
        ({"metrics_age_ms": None}, Reason.METRICS_MISSING),
        ({"ttft": None}, Reason.METRICS_MISSING),
        ({"tpot": None}, Reason.METRICS_MISSING),
        ({"tpot": ObjectiveReading(math.nan, 50)}, Reason.READING_INVALID),
        ({"tpot": ObjectiveReading(math.inf, 50)}, Reason.READING_INVALID),
        ({"ttft": ObjectiveReading(-1.0, 50)}, Reason.READING_INVALID),
        ({"ttft": ObjectiveReading(None, 3)}, Reason.READING_INVALID),
        ({"available_memory_bytes": None}, Reason.MEMORY_UNKNOWN),
        ({"elapsed_ms": -0.1}, Reason.TICK_LATE),
        ({"elapsed_ms": math.nan}, Reason.TICK_LATE),
    ],
)
def test_a_missing_stale_or_nonsensical_reading_closes(
    changes: dict[str, Any], reason: Reason
) -> None:
    decision = guard.decide(OPEN, replace(GOOD, **changes), POLICY)
    assert decision.gate is Gate.CLOSED
    assert decision.reason is reason


@pytest.mark.parametrize(
    "changes",
    [
        {"elapsed_ms": 500.0},
        {"probe_age_ms": 800.0},
        {"metrics_age_ms": 5000.0},
        {"available_memory_bytes": 512 * MIB},
        {"ttft": ObjectiveReading(1000.0, 10)},
        {"ttft": ObjectiveReading(None, 0)},
    ],
)
def test_a_reading_on_its_bound_is_still_good(changes: dict[str, Any]) -> None:
    assert guard.decide(OPEN, replace(GOOD, **changes), POLICY).gate is Gate.OPEN


def test_a_breach_needs_the_minimum_of_samples_but_few_samples_stop_growth() -> None:
    seen = replace(GOOD, ttft=ObjectiveReading(5000.0, 9))
    almost_grown = GuardState(Gate.OPEN, 4, 299.0)
    decision = guard.decide(almost_grown, seen, POLICY)
    assert (decision.gate, decision.action, decision.sequence_cap) == (Gate.OPEN, Action.HOLD, 4)
    assert decision.state.steady_ms == 0


def test_the_cut_band_cuts_at_once_to_the_initial_concurrency() -> None:
    decision = guard.decide(OPEN, replace(GOOD, tpot=ObjectiveReading(95.0, 10)), POLICY)
    assert (decision.action, decision.sequence_cap) == (Action.CUT, 2)
    assert decision.reason is Reason.TPOT_NEAR


def test_the_recovery_band_holds() -> None:
    decision = guard.decide(OPEN, replace(GOOD, tpot=ObjectiveReading(90.0, 10)), POLICY)
    assert (decision.action, decision.sequence_cap) == (Action.HOLD, 8)


def test_it_opens_after_a_cool_down_and_then_grows_step_by_step_to_the_maximum() -> None:
    decisions = follow(START, *[GOOD] * 16)
    caps = [decision.sequence_cap for decision in decisions]
    assert caps == [0, 0, 0, 0, 2, 2, 2, 4, 4, 4, 8, 8, 8, 10, 10, 10]
    assert decisions[0].reason is Reason.COOL_DOWN
    assert decisions[-1].reason is Reason.AT_MAXIMUM


def test_one_bad_reading_during_the_cool_down_begins_it_anew() -> None:
    bad = replace(GOOD, ttft=ObjectiveReading(900.0, 10))
    decisions = follow(START, *[GOOD] * 4, bad, *[GOOD] * 4)
    assert all(decision.gate is Gate.CLOSED for decision in decisions)
    assert decisions[4].reason is Reason.TTFT_NEAR


def test_preview_says_what_it_would_do_and_opens_nothing() -> None:
    seen = replace(GOOD, mode=Mode.PREVIEW)
    decisions = follow(START, *[seen] * 8)
    assert {decision.gate for decision in decisions} == {Gate.CLOSED}
    assert decisions[-1].reason is Reason.PREVIEW
    assert "from 2 to 4" in decisions[-1].detail
    enforced = follow(decisions[-1].state, GOOD)[0]
    assert (enforced.gate, enforced.reason) == (Gate.CLOSED, Reason.COOL_DOWN)


def test_a_lowered_maximum_holds_at_once() -> None:
    decision = guard.decide(GuardState(Gate.OPEN, 64, 0.0), GOOD, POLICY)
    assert decision.sequence_cap == 10


def test_the_detail_names_the_value_and_the_bound() -> None:
    decision = guard.decide(OPEN, replace(GOOD, ttft=ObjectiveReading(1320.4, 10)), POLICY)
    assert decision.detail == "ttft p99 is 1320 ms, bound 1000 ms"


# --- random histories -----------------------------------------------------------------------

AGES_MS = st.one_of(
    st.none(), st.just(math.nan), st.floats(-10, 10_000), st.sampled_from([0.0, 800.0, 800.5])
)
READINGS = st.one_of(
    st.none(),
    st.just(ObjectiveReading(None, 0)),
    st.builds(
        ObjectiveReading,
        st.one_of(st.floats(0, 2000), st.sampled_from([90.0, 95.0, 100.0, 900.0, 1000.0])),
        st.integers(1, 30),
    ),
)
ANY_SEEN = st.builds(
    GuardSeen,
    elapsed_ms=st.one_of(st.floats(0, 700), st.just(math.nan)),
    kill_switch=st.sampled_from([False, False, False, True, None]),
    mode=st.sampled_from([Mode.ENFORCE, Mode.ENFORCE, Mode.PREVIEW, Mode.OFF]),
    probe_age_ms=AGES_MS,
    metrics_age_ms=AGES_MS,
    ttft=READINGS,
    tpot=READINGS,
    available_memory_bytes=st.one_of(st.none(), st.integers(0, 1024 * MIB)),
)
MOSTLY_GOOD_SEEN = st.one_of(st.just(GOOD), st.just(GOOD), st.just(GOOD), ANY_SEEN)
HISTORIES = st.lists(MOSTLY_GOOD_SEEN, max_size=40)


@st.composite
def worse(draw: st.DrawFn, seen: GuardSeen) -> GuardSeen:
    """The same moment with some readings worse (or all of them equal)."""
    changes: dict[str, Any] = {}
    if draw(st.booleans()):
        changes["kill_switch"] = draw(st.sampled_from([seen.kill_switch, True, None]))
        if seen.kill_switch is not False:
            changes["kill_switch"] = seen.kill_switch
    strictness = [Mode.ENFORCE, Mode.PREVIEW, Mode.OFF]
    changes["mode"] = draw(st.sampled_from(strictness[strictness.index(seen.mode) :]))
    for name in ("probe_age_ms", "metrics_age_ms"):
        age_ms = getattr(seen, name)
        if age_ms is not None and age_ms >= 0 and draw(st.booleans()):
            changes[name] = draw(st.one_of(st.none(), st.floats(age_ms, 20_000)))
    for name in ("ttft", "tpot"):
        reading = getattr(seen, name)
        if reading is None or not draw(st.booleans()):
            continue
        if reading.value_ms is None:
            changes[name] = draw(READINGS)  # any latency is worse than nobody to serve
        else:
            value_ms = draw(st.floats(reading.value_ms, 3000))
            changes[name] = draw(
                st.one_of(st.none(), st.just(ObjectiveReading(value_ms, reading.samples)))
            )
    memory_bytes = seen.available_memory_bytes
    if memory_bytes is not None and draw(st.booleans()):
        changes["available_memory_bytes"] = draw(st.one_of(st.none(), st.integers(0, memory_bytes)))
    return replace(seen, **changes)


@given(st.data(), HISTORIES)
@settings(deadline=None, max_examples=80)
def test_a_history_that_is_worse_anywhere_never_harvests_more(
    data: st.DataObject, history: list[GuardSeen]
) -> None:
    better_state, worse_state = START, START
    for seen in history:
        better = guard.decide(better_state, seen, POLICY)
        poorer = guard.decide(worse_state, data.draw(worse(seen)), POLICY)
        assert poorer.sequence_cap <= better.sequence_cap
        assert not (poorer.gate is Gate.OPEN and better.gate is Gate.CLOSED)
        better_state, worse_state = better.state, poorer.state


@given(HISTORIES, ANY_SEEN)
@settings(deadline=None, max_examples=200)
def test_it_is_open_only_when_everything_is_known_fresh_and_within_bounds(
    history: list[GuardSeen], seen: GuardSeen
) -> None:
    decision = follow(START, *history, *[GOOD] * 6, seen)[-1]
    if decision.gate is Gate.OPEN:
        assert seen.kill_switch is False
        assert seen.mode is Mode.ENFORCE
        assert seen.probe_age_ms is not None
        assert 0 <= seen.probe_age_ms <= 800
        assert seen.metrics_age_ms is not None
        assert 0 <= seen.metrics_age_ms <= 5000
        assert seen.ttft is not None
        assert seen.tpot is not None
        assert seen.available_memory_bytes is not None
        assert seen.available_memory_bytes >= 512 * MIB
        assert 1 <= decision.sequence_cap <= 10
    else:
        assert decision.sequence_cap == 0


@given(HISTORIES, ANY_SEEN, st.sampled_from([True, None]))
@settings(deadline=None)
def test_the_kill_switch_wins_over_everything(
    history: list[GuardSeen], seen: GuardSeen, switch: bool | None
) -> None:
    decision = follow(START, *history, replace(seen, kill_switch=switch))[-1]
    assert decision.gate is Gate.CLOSED
    assert decision.reason in (Reason.KILL_SWITCH, Reason.KILL_SWITCH_UNKNOWN)


@given(HISTORIES)
@settings(deadline=None, max_examples=150)
def test_growth_is_slow_and_a_closing_costs_a_whole_cool_down(history: list[GuardSeen]) -> None:
    since_closed_ms = 0.0
    since_growth_ms = math.inf
    cap = 0
    state = START
    for seen in history:
        decision = guard.decide(state, seen, POLICY)
        state = decision.state
        elapsed_ms = seen.elapsed_ms
        if decision.gate is Gate.OPEN:
            since_closed_ms += elapsed_ms
            since_growth_ms += elapsed_ms
            if cap == 0:
                assert since_closed_ms >= 500
                assert decision.sequence_cap == 2
                since_growth_ms = 0.0
            elif decision.sequence_cap > cap:
                assert since_growth_ms >= 300
                assert decision.sequence_cap <= 2 * cap
                since_growth_ms = 0.0
        elif decision.reason in (Reason.COOL_DOWN, Reason.PREVIEW):
            since_closed_ms += elapsed_ms
        else:
            since_closed_ms = 0.0
        cap = decision.sequence_cap
