"""The demo's division of time: within bounds, and never more for a slower machine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rowen.bench.demo.budget import (
    HARVEST_PASSES,
    LEAST_WINDOW_S,
    MOST_WINDOW_S,
    ROLLOUT_ALONE_S,
    TAIL_S,
    TOTAL_S,
    divide,
)

seconds = st.floats(min_value=0.0, max_value=1000.0)


@given(seconds, seconds)
def test_the_window_stays_within_its_bounds(elapsed_s: float, engine_s: float) -> None:
    assert LEAST_WINDOW_S <= divide(elapsed_s, engine_s).window_s <= MOST_WINDOW_S


@given(seconds, seconds, seconds)
def test_a_slower_start_never_gives_a_longer_window(
    elapsed_s: float, engine_s: float, more_s: float
) -> None:
    before = divide(elapsed_s, engine_s).window_s
    assert divide(elapsed_s + more_s, engine_s).window_s <= before
    assert divide(elapsed_s, engine_s + more_s).window_s <= before


def test_on_the_reference_machine_all_phases_fit_into_the_total() -> None:
    elapsed_s, engine_s = 50.0, 40.0
    budget = divide(elapsed_s, engine_s)
    total_s = elapsed_s + engine_s + ROLLOUT_ALONE_S + TAIL_S
    total_s += budget.window_s * (1 + HARVEST_PASSES)
    assert total_s <= TOTAL_S


def test_a_machine_four_times_slower_still_gets_the_least_window() -> None:
    assert divide(200.0, 160.0).window_s == LEAST_WINDOW_S
