"""The trainer takes the freshest groups within its bound, and every group is accounted for."""

from __future__ import annotations

from itertools import combinations
from statistics import pvariance

import pytest
from examples.grpo_arithmetic.buffer import Group, Sample, choose, most_telling
from examples.grpo_arithmetic.endpoint import Completion, Span
from examples.grpo_arithmetic.task import Grade, Problem
from hypothesis import given
from hypothesis import strategies as st


def sample(reward: float, *versions: int) -> Sample:
    spans = tuple(Span(version, i, i + 1) for i, version in enumerate(versions))
    count = len(versions)
    completion = Completion("id", (5,) * count, (-1.0,) * count, spans, "stop", 1)
    return Sample(completion, Grade(reward, reward == 1.0))


def group(name: str, version: int, rewards: tuple[float, ...] = (0.0, 1.0)) -> Group:
    samples = tuple(sample(reward, version) for reward in rewards)
    return Group(name, Problem(11, 22), (1, 2, 3), samples)


def names(groups: tuple[Group, ...]) -> list[str]:
    return [g.group_id for g in groups]


def test_the_age_of_a_group_is_that_of_its_oldest_token() -> None:
    mixed = Group("g", Problem(11, 22), (1,), (sample(0.0, 7), sample(1.0, 4, 6)))
    assert mixed.oldest_version == 4


def test_groups_on_the_bound_are_taken_and_older_ones_are_dropped() -> None:
    groups = [group("old", 2), group("bound", 3), group("new", 5)]
    choice = choose(groups, version=5, max_staleness=2, count=2, capacity=2)
    assert names(choice.taken) == ["bound", "new"]
    assert choice.dropped.stale == 1


def test_too_few_groups_are_kept_until_there_are_enough() -> None:
    groups = [group("a", 5), group("flat", 5, (0.5, 0.5))]
    choice = choose(groups, version=5, max_staleness=0, count=2, capacity=2)
    assert choice.taken == ()
    assert names(choice.kept) == ["a"]
    assert choice.dropped.flat == 1


def test_fresher_groups_go_first_and_the_rest_waits_up_to_capacity() -> None:
    groups = [group("d", 4), group("a", 5), group("c", 4), group("b", 5), group("e", 3)]
    choice = choose(groups, version=5, max_staleness=9, count=2, capacity=2)
    assert names(choice.taken) == ["a", "b"]
    assert names(choice.kept) == ["d", "c"]
    assert choice.dropped.surplus == 1


@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=20),
    st.integers(0, 9),
    st.integers(1, 4),
    st.integers(4, 8),
)
def test_every_group_is_taken_kept_or_dropped_once(
    seen: list[tuple[int, bool]], max_staleness: int, count: int, capacity: int
) -> None:
    groups = [
        group(str(i), version, (0.5, 0.5) if flat else (0.0, 1.0))
        for i, (version, flat) in enumerate(seen)
    ]
    choice = choose(groups, version=9, max_staleness=max_staleness, count=count, capacity=capacity)
    dropped = choice.dropped.stale + choice.dropped.flat + choice.dropped.surplus
    assert len(choice.taken) + len(choice.kept) + dropped == len(groups)
    assert not set(names(choice.taken)) & set(names(choice.kept))
    assert len(choice.taken) in (0, count)
    assert all(9 - g.oldest_version <= max_staleness for g in choice.taken + choice.kept)
    if choice.taken and choice.kept:
        oldest_taken = min(g.oldest_version for g in choice.taken)
        assert all(g.oldest_version <= oldest_taken for g in choice.kept)


@given(st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0]), min_size=2, max_size=7), st.integers(2, 5))
def test_the_most_telling_samples_have_the_greatest_variance_of_all_subsets(
    rewards: list[float], count: int
) -> None:
    whole = group("g", 1, tuple(rewards))
    kept = most_telling(whole, count)
    if len(rewards) <= count:
        assert kept is whole
        return
    assert len(kept.samples) == count
    best = max(pvariance(subset) for subset in combinations(rewards, count))
    assert pvariance(kept.rewards) == pytest.approx(best)
    assert kept.prompt_ids == whole.prompt_ids
