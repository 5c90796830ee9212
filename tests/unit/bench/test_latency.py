from __future__ import annotations

import numpy as np
import pytest

from rowen.bench.latency import _percentiles, compare, percentile, ratio_interval, summarise
from rowen.bench.records import ServingRecord, Status


def record(
    index: int,
    ttft_ms: float | None = 100.0,
    tpot_ms: float = 30.0,
    *,
    tokens: int = 11,
    pass_number: int = 0,
    status: Status = "ok",
) -> ServingRecord:
    last_ms = None if ttft_ms is None else ttft_ms + (tokens - 1) * tpot_ms
    return ServingRecord(
        index, pass_number, 1.0, 1.0, 501.0, 0.5, 20, tokens, tokens, ttft_ms, last_ms, 30.0, status
    )


def test_tpot_is_the_time_after_the_first_token_over_the_tokens_after_it() -> None:
    assert record(0, 100.0, 30.0, tokens=11).tpot_ms == pytest.approx(30.0)
    assert record(0, tokens=1).tpot_ms is None
    assert record(0, None).tpot_ms is None


def test_percentiles_are_linear_between_ranks_and_none_without_values() -> None:
    assert percentile([1.0, None, 2.0], 50) == 1.5
    assert percentile([None], 99) is None


def test_failed_requests_are_counted_and_their_latency_is_not() -> None:
    records = [record(0, 100), record(1, 200), record(2, 9e9, status="error")]
    summary = summarise([*records, record(3, None, status="cancelled")])
    assert (summary.requests, summary.failed) == (2, 1)
    assert summary.ttft_p50_ms == 150
    assert summary.ttft_p99_ms == pytest.approx(199)
    assert summary.tpot_p50_ms == pytest.approx(30)


def test_an_arm_without_answers_has_no_percentiles() -> None:
    assert summarise([]).as_dict() == {
        "requests": 0,
        "failed": 0,
        "unfinished": 0,
        "ttft_p50_ms": None,
        "ttft_p99_ms": None,
        "tpot_p50_ms": None,
        "tpot_p99_ms": None,
        "lateness_p99_ms": None,
    }


def test_a_uniform_slowdown_has_a_ratio_without_width() -> None:
    alone = [record(n, 50.0 + n * n) for n in range(80)]
    harvested = [record(n, 1.05 * (50.0 + n * n)) for n in range(80)]
    interval = ratio_interval(alone, harvested, "ttft", 99, resamples=200)
    assert interval is not None
    assert interval.ratio == pytest.approx(1.05)
    # Paired: the same requests are drawn in both arms, so a common factor shows exactly.
    assert interval.low == pytest.approx(1.05)
    assert interval.high == pytest.approx(1.05)
    assert interval.requests == 80


def test_noise_gives_an_interval_around_the_ratio_that_the_seed_repeats() -> None:
    alone = [record(n, 100.0 + n % 17) for n in range(80)]
    harvested = [record(n, 100.0 + (n * 7) % 23) for n in range(80)]
    first = ratio_interval(alone, harvested, "ttft", 50, seed=1, resamples=300)
    assert first == ratio_interval(alone, harvested, "ttft", 50, seed=1, resamples=300)
    assert first is not None
    assert first.low < first.ratio < first.high


def test_only_requests_answered_in_both_arms_are_compared() -> None:
    alone = [record(0, 100), record(1, 100), record(2, 5000)]
    harvested = [record(0, 110), record(1, 110), record(2, 1, status="error")]
    interval = ratio_interval(alone, harvested, "ttft", 99, resamples=50)
    assert interval is not None
    assert interval.requests == 2
    assert interval.ratio == pytest.approx(1.1)
    assert ratio_interval(alone, [], "ttft", 99) is None


def test_several_passes_of_one_arm_are_kept_together_by_request() -> None:
    alone = [record(n, 100) for n in range(4)]
    harvested = [record(n, 120, pass_number=p) for n in range(4) for p in range(3 if n else 2)]
    interval = ratio_interval(alone, harvested, "ttft", 50, resamples=50)
    assert interval is not None
    assert (interval.ratio, interval.requests) == (pytest.approx(1.2), 4)


def test_a_comparison_names_each_ratio_and_holds_none_where_there_is_none() -> None:
    both = [record(n) for n in range(5)]
    names = ["ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99"]
    assert sorted(compare(both, both)) == sorted(names)
    assert compare(both, both)["tpot_p99"]["ratio"] == 1.0  # type: ignore[index]  # not None here
    assert compare([], both) == dict.fromkeys(names)


def test_percentiles_of_draws_agree_with_numpy_also_where_a_pass_is_missing() -> None:
    random = np.random.Generator(np.random.PCG64(1))
    value_RP = random.random((20, 3))
    value_RP[[2, 5], 2] = np.nan
    drawn_BR = random.integers(0, 20, (7, 20))
    for rank in (0, 37.5, 50, 99, 100):
        expected = [
            np.mean([np.nanpercentile(value_RP[row_R, n], rank) for n in range(3)])
            for row_R in drawn_BR
        ]
        assert _percentiles(value_RP, drawn_BR, rank) == pytest.approx(expected)


def test_replaying_the_same_answers_twice_changes_no_percentile() -> None:
    """A percentile of all passes together would: one outlier in 71, or the same twice in 142."""
    once = [record(n, 100.0 + n) for n in range(70)] + [record(70, 1000.0)]
    twice = once + [record(one.index, one.ttft_ms or 0.0, pass_number=1) for one in once]
    assert summarise(twice).ttft_p99_ms == summarise(once).ttft_p99_ms
    interval = ratio_interval(once, twice, "ttft", 99, resamples=50)
    assert interval is not None
    assert interval.ratio == pytest.approx(1.0)
