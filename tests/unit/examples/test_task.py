"""The reward of the arithmetic example says what an answer is worth, and the split is honest."""

from __future__ import annotations

import itertools

import pytest
from examples.grpo_arithmetic.task import Problem, endless, grade, split
from hypothesis import given
from hypothesis import strategies as st

two_digits = st.integers(10, 99)
problems = st.builds(Problem, two_digits, two_digits)


@given(problems)
def test_the_right_sum_alone_earns_everything(problem: Problem) -> None:
    assert grade(f"{problem.answer}\n", problem).reward == 1.0
    assert grade(f" {problem.answer}\n", problem).is_right


@given(problems, st.text(max_size=12))
def test_only_the_right_sum_earns_everything(problem: Problem, text: str) -> None:
    result = grade(text, problem)
    assert 0.0 <= result.reward <= 1.0
    assert result.is_right == (result.reward == 1.0) == (text.lstrip() == f"{problem.answer}\n")


@given(problems, st.integers(0, 9999))
def test_a_wrong_number_earns_less_than_half(problem: Problem, number: int) -> None:
    result = grade(f"{number}\n", problem)
    if number != problem.answer:
        assert 0.1 <= result.reward < 0.5


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("109\n", 1.0),
        ("108\n", 0.1 + 0.4 * 2 / 3),
        ("208\n", 0.1 + 0.4 / 3),
        ("222\n", 0.1),
        ("9\n", 0.1 + 0.4 * 2 / 3),
        ("1090\n", 0.1),
        ("109", 0.0),
        ("109 \n", 0.0),
        ("about 109\n", 0.0),
        ("109\n\n", 0.0),
        ("", 0.0),
    ],
)
def test_credit_follows_the_digits(text: str, reward: float) -> None:
    assert grade(text, Problem(27, 82)).reward == pytest.approx(reward)


def test_leading_zeros_are_no_right_answer() -> None:
    result = grade("041\n", Problem(20, 21))
    assert not result.is_right
    assert result.reward < 0.5


@pytest.mark.parametrize("count", [1, 64, 8099])
def test_held_out_problems_are_never_trained_on(count: int) -> None:
    held_out, training = split(count)
    assert len(held_out) == count
    assert not set(held_out) & set(training)
    assert len(set(held_out) | set(training)) == 8100


def test_the_held_out_problems_do_not_change_between_runs() -> None:
    assert split(3)[0] == split(64)[0][:3] == [Problem(*p) for p in HELD_OUT]


HELD_OUT = [(22, 13), (90, 94), (17, 91)]


@pytest.mark.parametrize("count", [-1, 0, 8100])
def test_a_split_with_an_empty_side_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"evaluation_count is {count}: give 1 to 8099"):
        split(count)


def test_problems_come_in_a_seeded_order_and_all_before_any_again() -> None:
    _, training = split(8090)
    first = list(itertools.islice(endless(training, seed=3), 20))
    assert first == list(itertools.islice(endless(training, seed=3), 20))
    assert first != list(itertools.islice(endless(training, seed=4), 20))
    assert set(first[:10]) == set(first[10:]) == set(training)
    assert first[:10] != first[10:]
