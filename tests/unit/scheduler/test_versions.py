"""Who takes a new version when: never everyone at once where it can be helped, never nobody."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from rowen.scheduler.versions import Candidate, choose_updates

SERVING = Candidate("a", 1, True, True, False, 0.0, 0)

candidates = st.lists(
    st.builds(
        Candidate,
        engine_id=st.sampled_from("abcdefgh"),
        version=st.none() | st.integers(1, 2),
        is_reachable=st.booleans(),
        is_serving=st.booleans(),
        is_updating=st.booleans(),
        retry_in_s=st.sampled_from([-1.0, 0.0, 3.0]),
        running=st.integers(0, 4),
    ).filter(lambda c: not (c.is_serving and (c.is_updating or not c.is_reachable))),
    max_size=8,
    unique_by=lambda c: c.engine_id,
)


@given(candidates)
def test_only_engines_that_need_and_can_are_chosen(engines) -> None:
    chosen = choose_updates(engines, 2)
    assert len(set(chosen)) == len(chosen)
    for engine in engines:
        if engine.engine_id in chosen:
            assert engine.version != 2
            assert engine.is_reachable
            assert not engine.is_updating
            assert engine.retry_in_s <= 0


@given(candidates)
def test_somebody_keeps_serving_unless_there_is_only_one(engines) -> None:
    chosen = choose_updates(engines, 2)
    serving = [e.engine_id for e in engines if e.is_serving]
    if len(serving) > 1:
        assert set(serving) - set(chosen)


@given(candidates)
def test_without_an_update_under_way_whoever_is_due_leads_to_one(engines) -> None:
    due = [e for e in engines if e.is_reachable and e.version != 2 and e.retry_in_s <= 0]
    if due and not any(e.is_updating for e in engines):
        assert choose_updates(engines, 2)


def test_the_only_engine_goes_at_once() -> None:
    assert choose_updates([SERVING], 2) == ["a"]


def test_the_only_serving_engine_waits_for_the_others_to_come_back() -> None:
    updating = replace(SERVING, engine_id="b", is_serving=False, is_updating=True)
    assert choose_updates([SERVING, updating], 2) == []
    failed = replace(updating, is_updating=False, version=None, retry_in_s=2.0)
    assert choose_updates([SERVING, failed], 2) == ["a"]


def test_of_two_serving_engines_the_emptier_goes_first() -> None:
    assert choose_updates([replace(SERVING, running=3), replace(SERVING, engine_id="b")], 2) == [
        "b"
    ]


def test_engines_out_of_service_go_together() -> None:
    stale = [replace(SERVING, engine_id=name, is_serving=False, version=None) for name in "bcd"]
    assert choose_updates([SERVING, *stale], 2) == ["b", "c", "d"]


def test_the_last_serving_engine_stays_while_another_fails_on_the_same_source() -> None:
    failed = replace(
        SERVING, engine_id="b", is_serving=False, version=None, retry_in_s=2.0, has_failed=True
    )
    assert choose_updates([SERVING, failed], 2) == []
    assert choose_updates([SERVING, replace(failed, retry_in_s=0.0)], 2) == ["b"]
    assert choose_updates([SERVING, replace(failed, is_reachable=False)], 2) == ["a"]
