from __future__ import annotations

import numpy as np
import pytest

from rowen.bench.generate import ConversationProfile, generate_trace

HOUR_S = 3502.0


def test_the_same_seed_makes_the_same_traffic_and_another_seed_another() -> None:
    assert generate_trace(3, 60.0) == generate_trace(3, 60.0)
    assert generate_trace(3, 60.0) != generate_trace(4, 60.0)


def test_lengths_have_the_published_percentiles() -> None:
    trace = generate_trace(1)
    inputs = [request.input_tokens for request in trace]
    outputs = [request.output_tokens for request in trace]
    assert np.percentile(inputs, 50) == pytest.approx(1020, rel=0.03)
    assert np.percentile(inputs, 99) == pytest.approx(4142, rel=0.06)
    assert np.percentile(outputs, 50) == pytest.approx(129, rel=0.03)
    assert np.percentile(outputs, 99) == pytest.approx(601, rel=0.06)
    assert min(inputs) >= 1
    assert min(outputs) >= 1


def test_arrivals_have_the_published_rate_and_peaks() -> None:
    rates, second_peaks, minute_peaks = [], [], []
    for seed in range(8):
        arrival_N = np.array([request.arrival_s for request in generate_trace(seed, HOUR_S)])
        assert np.all(np.diff(arrival_N) >= 0)
        assert 0 <= arrival_N[0] <= arrival_N[-1] < HOUR_S
        per_second = np.bincount(arrival_N.astype(int))
        per_minute = np.bincount((arrival_N / 60).astype(int))[:58]
        rates.append(arrival_N.size / HOUR_S)
        second_peaks.append(per_second.max() / per_second.mean())
        minute_peaks.append(per_minute.max() / per_minute.mean())
    assert np.mean(rates) == pytest.approx(ConversationProfile().requests_per_s, rel=0.05)
    assert np.mean(second_peaks) == pytest.approx(2.9, abs=0.3)
    assert np.mean(minute_peaks) == pytest.approx(1.5, abs=0.2)


def test_a_duration_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="duration_s is 0"):
        generate_trace(1, 0)
