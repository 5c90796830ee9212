"""The reclaim ladder: each rung, its deadline and its way back."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rowen.policies import reclaim
from rowen.policies.guard import Gate
from rowen.policies.lease import Grant
from rowen.policies.load import library_policy, load_policy
from rowen.policies.reclaim import (
    GRANTS,
    START,
    Cause,
    EnginePhase,
    ReclaimDecision,
    ReclaimSeen,
    ReclaimState,
    Rung,
)
from rowen.policies.schema import HarvestPolicy

DOCUMENT = load_policy(library_policy("demo")).model_dump()
DOCUMENT["spec"]["reclaim"] = {
    "acknowledge_ms": 400,
    "drain_after_ms": 1000,
    "resume_after_ms": 300,
    "terminate_after_ms": 2000,
    "kill_after_ms": 800,
}
POLICY = HarvestPolicy.model_validate(DOCUMENT)
RUNNING = ReclaimState(Rung.RUN, 0.0, 0.0, 5000.0, 0.0, 0.0)
OPEN = ReclaimSeen(
    elapsed_ms=100.0,
    gate=Gate.OPEN,
    is_admitted=True,
    is_killed=False,
    is_memory_short=False,
    engine=EnginePhase.READY,
    is_obedient=True,
)
CLOSED = replace(OPEN, gate=Gate.CLOSED)
BUSY = replace(OPEN, is_admitted=False)
KILLED = replace(CLOSED, is_killed=True)


def climb(state: ReclaimState, *history: ReclaimSeen) -> list[ReclaimDecision]:
    decisions = []
    for seen in history:
        decisions.append(reclaim.decide(state, seen, POLICY))
        state = decisions[-1].state
    return decisions


def rungs(decisions: list[ReclaimDecision]) -> list[tuple[Rung, int]]:
    """Rungs in order, each with the number of ticks spent on it."""
    found: list[tuple[Rung, int]] = []
    for decision in decisions:
        if found and found[-1][0] is decision.action:
            found[-1] = (decision.action, found[-1][1] + 1)
        else:
            found.append((decision.action, 1))
    return found


def test_no_engine_is_wanted_before_the_gate_has_been_open_for_a_while() -> None:
    absent = replace(OPEN, engine=EnginePhase.ABSENT)
    decisions = climb(START, absent, absent, absent)
    assert [decision.is_engine_wanted for decision in decisions] == [False, False, True]
    assert [decision.action for decision in decisions] == [Rung.STOPPED, Rung.STOPPED, Rung.RUN]


def test_a_busy_production_only_gates_and_opens_at_once_when_it_is_idle() -> None:
    decisions = climb(RUNNING, BUSY, BUSY, OPEN)
    assert [decision.action for decision in decisions] == [Rung.GATE, Rung.GATE, Rung.RUN]
    assert decisions[0].reason is Cause.SERVING_BUSY


@pytest.mark.parametrize("closed", [BUSY, CLOSED])
def test_a_gate_closed_for_too_long_drains_but_never_ends_the_engine(closed: ReclaimSeen) -> None:
    decisions = climb(RUNNING, *[closed] * 200)
    assert rungs(decisions) == [(Rung.GATE, 9), (Rung.DRAIN, 191)]


def test_a_single_open_moment_begins_the_drain_deadline_anew() -> None:
    decisions = climb(RUNNING, *[BUSY] * 9, OPEN, *[BUSY] * 9)
    assert Rung.DRAIN not in {decision.action for decision in decisions}


def test_a_drained_engine_is_granted_again_only_after_a_steady_opening() -> None:
    drained = climb(RUNNING, *[BUSY] * 10)[-1].state
    decisions = climb(drained, OPEN, OPEN, BUSY, OPEN, OPEN, OPEN)
    assert [decision.action for decision in decisions] == [*[Rung.DRAIN] * 5, Rung.RUN]


def test_the_kill_switch_drains_at_once_then_terminates_then_kills_then_stops() -> None:
    decisions = climb(RUNNING, *[KILLED] * 40, replace(KILLED, engine=EnginePhase.ABSENT))
    assert rungs(decisions) == [
        (Rung.DRAIN, 19),
        (Rung.TERMINATE, 8),
        (Rung.KILL, 13),
        (Rung.STOPPED, 1),
    ]


def test_short_memory_takes_the_same_way() -> None:
    short = replace(CLOSED, is_memory_short=True)
    decisions = climb(RUNNING, *[short] * 20)
    assert rungs(decisions) == [(Rung.DRAIN, 19), (Rung.TERMINATE, 1)]
    assert decisions[0].reason is Cause.MEMORY_SHORT


def test_a_long_drained_engine_still_gets_the_whole_deadline_from_the_kill_switch_on() -> None:
    drained = climb(RUNNING, *[CLOSED] * 300)[-1].state
    decisions = climb(drained, *[KILLED] * 20)
    assert rungs(decisions) == [(Rung.DRAIN, 19), (Rung.TERMINATE, 1)]


def test_a_starting_engine_is_terminated_at_once_by_the_kill_switch() -> None:
    decision = climb(RUNNING, replace(KILLED, engine=EnginePhase.STARTING))[0]
    assert decision.action is Rung.TERMINATE


def test_a_starting_engine_survives_a_closed_gate() -> None:
    decisions = climb(RUNNING, *[replace(CLOSED, engine=EnginePhase.STARTING)] * 100)
    assert all(decision.is_engine_wanted for decision in decisions)


def test_an_engine_that_ignores_its_gate_is_drained_and_ended_even_while_open() -> None:
    decisions = climb(RUNNING, *[replace(OPEN, is_obedient=False)] * 30)
    assert rungs(decisions) == [(Rung.RUN, 3), (Rung.DRAIN, 19), (Rung.TERMINATE, 8)]
    assert decisions[3].reason is Cause.GATE_IGNORED


def test_there_is_no_way_back_from_terminate_but_through_stopped() -> None:
    terminating = climb(RUNNING, *[KILLED] * 20)[-1].state
    decisions = climb(terminating, OPEN, OPEN, OPEN, OPEN, replace(OPEN, engine=EnginePhase.ABSENT))
    assert rungs(decisions) == [(Rung.TERMINATE, 4), (Rung.STOPPED, 1)]


def test_a_crashed_engine_is_still_wanted() -> None:
    decision = climb(RUNNING, replace(OPEN, engine=EnginePhase.ABSENT))[0]
    assert decision.is_engine_wanted


def test_the_kill_switch_with_no_engine_there_is_simply_stopped() -> None:
    decision = climb(RUNNING, replace(KILLED, engine=EnginePhase.ABSENT))[0]
    assert (decision.action, decision.is_engine_wanted) == (Rung.STOPPED, False)


def test_every_rung_has_a_grant_and_only_the_first_two_allow_use() -> None:
    usable = {rung for rung in Rung if GRANTS[rung] is not Grant.DRAINING}
    assert usable == {Rung.RUN, Rung.GATE}


ANY_SEEN = st.builds(
    ReclaimSeen,
    elapsed_ms=st.one_of(st.floats(0, 700), st.sampled_from([math.nan, -5.0, math.inf])),
    gate=st.sampled_from(Gate),
    is_admitted=st.booleans(),
    is_killed=st.sampled_from([False, False, False, True]),
    is_memory_short=st.sampled_from([False, False, False, True]),
    engine=st.sampled_from(EnginePhase),
    is_obedient=st.sampled_from([True, True, False]),
)
NEXT: dict[Rung, set[Rung]] = {
    Rung.RUN: {Rung.RUN, Rung.GATE, Rung.DRAIN, Rung.TERMINATE, Rung.STOPPED},
    Rung.GATE: {Rung.RUN, Rung.GATE, Rung.DRAIN, Rung.TERMINATE, Rung.STOPPED},
    Rung.DRAIN: {Rung.RUN, Rung.DRAIN, Rung.TERMINATE, Rung.STOPPED},
    Rung.TERMINATE: {Rung.TERMINATE, Rung.KILL, Rung.STOPPED},
    Rung.KILL: {Rung.KILL, Rung.STOPPED},
    Rung.STOPPED: {Rung.STOPPED, Rung.RUN},
}


@given(st.lists(ANY_SEEN, max_size=60))
@settings(deadline=None, max_examples=150)
def test_any_history_moves_only_along_the_ladder(history: list[ReclaimSeen]) -> None:
    state = START
    for seen in history:
        decision = reclaim.decide(state, seen, POLICY)
        assert decision.action in NEXT[state.rung]
        if decision.action is Rung.RUN:
            assert seen.gate is Gate.OPEN
            assert seen.is_admitted
        if seen.is_killed or seen.is_memory_short:
            assert decision.action not in (Rung.RUN, Rung.GATE)
        if decision.action in (Rung.TERMINATE, Rung.KILL) and state.rung is Rung.DRAIN:
            assert seen.is_killed or seen.is_memory_short or not seen.is_obedient
        state = decision.state


@given(st.lists(ANY_SEEN, max_size=40))
@settings(deadline=None)
def test_the_kill_switch_leaves_no_engine_within_its_deadlines(
    history: list[ReclaimSeen],
) -> None:
    state = climb(START, *history)[-1].state if history else START
    ticks = math.ceil((2000 + 800) / 100) + 1
    asked = climb(state, *[KILLED] * ticks)
    assert asked[-1].action in (Rung.KILL, Rung.STOPPED)
