"""Tokens per second, second by second."""

from __future__ import annotations

from rowen.scheduler.history import TokenHistory


def test_counts_fall_into_their_seconds_and_gaps_are_zero() -> None:
    history = TokenHistory(100)
    for tokens, now in ((3, 10.1), (2, 10.9), (5, 13.0)):
        history.add(tokens, now)
    assert history.series(14.5) == (10, [5, 0, 0, 5, 0])
    assert history.total == 10


def test_only_the_last_seconds_are_kept_but_the_total_stays() -> None:
    history = TokenHistory(3)
    for second in range(10):
        history.add(1, float(second))
    assert history.series(9.0) == (7, [1, 1, 1])
    assert history.series(500.0) == (498, [0, 0, 0])
    assert history.total == 10


def test_rate_is_over_whole_seconds() -> None:
    history = TokenHistory(100)
    for second in range(10, 15):
        history.add(20, second + 0.5)
    assert history.rate(15.2) == 20.0
    assert history.rate(40.0) == 0.0
    assert TokenHistory(5).rate(3.0) == 0.0
