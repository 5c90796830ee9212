from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rowen.bench.errors import WindowError
from rowen.bench.generate import generate_trace
from rowen.bench.service_model import ServiceModel
from rowen.bench.trace import TraceRequest
from rowen.bench.window import Window, WindowGoal, fit_window

MODEL = ServiceModel(prefill_ms_per_token=0.91, decode_step_ms=30.0, decode_sequence_ms=3.0)


def fit(trace: Sequence[TraceRequest], goal: WindowGoal | None = None) -> Window:
    return fit_window(trace, goal or WindowGoal(), MODEL, source="test")


def steady(count: int, gap_s: float = 1.0) -> list[TraceRequest]:
    return [TraceRequest(number * gap_s, 1000, 200) for number in range(count)]


def peaked() -> list[TraceRequest]:
    """An hour of about one request per second with a peak of 26 times that each ten minutes."""
    draw = random.Random(5)
    trace = [
        TraceRequest(second + draw.random(), draw.randint(0, 120_000), draw.randint(0, 2000))
        for second in range(3600)
        for _ in range(26 if second % 600 == 300 else draw.random() < 0.9)
    ]
    return sorted(trace, key=lambda request: request.arrival_s)


def assert_sendable(window: Window, goal: WindowGoal) -> None:
    at_s = [request.at_s for request in window.requests]
    assert at_s == sorted(at_s)
    assert at_s[0] >= 0
    assert at_s[-1] <= goal.duration_s + 1e-9
    for request in window.requests:
        assert request.input_tokens >= 1
        assert request.output_tokens >= goal.least_output_tokens
        assert request.input_tokens + request.output_tokens <= goal.context_tokens


def test_generated_traffic_gives_the_busy_share_and_enough_requests() -> None:
    window = fit(generate_trace(1))
    scale = window.scale
    assert scale.busy_expected_ratio == pytest.approx(0.45, abs=0.01)
    assert 60 <= scale.requests <= 144
    assert scale.requests == len(window.requests)
    assert scale.burst_requests == scale.trace_burst_requests
    assert scale.notes == ()
    assert_sendable(window, WindowGoal())


def test_the_same_trace_gives_the_same_window() -> None:
    assert fit(peaked()) == fit(peaked())


@pytest.mark.parametrize("busy_ratio", [0.2, 0.5, 0.8])
def test_other_busy_shares_are_reached(busy_ratio: float) -> None:
    scale = fit(generate_trace(2), WindowGoal(busy_ratio=busy_ratio)).scale
    assert scale.busy_expected_ratio == pytest.approx(busy_ratio, abs=0.01)


def test_a_peak_of_26_times_the_mean_is_inside_the_window() -> None:
    window = fit(peaked())
    scale = window.scale
    assert scale.trace_peak_to_mean_1s > 24
    assert scale.burst_requests == scale.trace_burst_requests >= 26
    assert scale.busy_expected_ratio == pytest.approx(0.45, abs=0.02)
    at_N = np.array([request.at_s for request in window.requests])
    peak_at_s = at_N[np.argmax(np.searchsorted(at_N, at_N + 1.0) - np.arange(at_N.size))]
    assert 0.05 * 70 <= peak_at_s <= 0.75 * 70  # with calm before and time to recover after
    assert_sendable(window, WindowGoal())


def test_a_burst_that_no_typical_slice_can_hold_is_left_out_and_noted() -> None:
    flood = [TraceRequest(2000.0 + number / 10_000, 100, 10) for number in range(5000)]
    trace = sorted(steady(4000) + flood, key=lambda request: request.arrival_s)
    for goal in (WindowGoal(), WindowGoal(rate_factor=1.0)):
        scale = fit(trace, goal).scale
        assert 35 <= scale.requests <= 144
        assert scale.rate_factor == pytest.approx(1.0, rel=0.1)
        assert scale.burst_requests < scale.trace_burst_requests
        assert scale.trace_burst_requests >= 5000
        assert any(f"({scale.trace_burst_requests} requests in" in note for note in scale.notes)


def test_volleys_larger_than_the_window_are_replayed_whole_with_their_pause() -> None:
    trace = [
        TraceRequest(volley * 1000.0 + number / 100, 100, 10)
        for volley in range(30)
        for number in range(100)
    ]
    window = fit(trace)
    assert window.scale.slice_length_s > 500
    assert window.scale.peak_1s >= 100


def test_given_factors_are_used_and_their_busy_share_is_reported() -> None:
    trace = generate_trace(1)
    scale = fit(trace, WindowGoal(rate_factor=0.1, token_factor=0.02)).scale
    assert (scale.rate_factor, scale.rate_origin) == (0.1, "given")
    assert (scale.token_factor, scale.token_origin) == (0.02, "given")
    assert scale.slice_length_s == pytest.approx(7.0)
    assert scale.busy_expected_ratio < 0.2
    assert any("below the target" in note for note in scale.notes)


def test_full_size_prompts_are_clipped_to_the_context_and_counted() -> None:
    window = fit(
        [TraceRequest(float(n), 100_000, 5000) for n in range(200)], WindowGoal(token_factor=1.0)
    )
    assert window.scale.inputs_clipped == window.scale.outputs_clipped == window.scale.requests
    assert {(r.input_tokens, r.output_tokens) for r in window.requests} == {(512, 512)}
    assert any("above the target" in note for note in window.scale.notes)


def test_zero_lengths_are_raised_to_the_least_and_counted() -> None:
    window = fit([TraceRequest(float(n), 0, 0) for n in range(200)])
    assert window.scale.inputs_raised == window.scale.outputs_raised == window.scale.requests
    assert {(r.input_tokens, r.output_tokens) for r in window.requests} == {(1, 2)}


def test_few_requests_are_all_replayed_over_the_whole_duration_and_noted() -> None:
    window = fit(steady(5, gap_s=100.0))
    assert [request.at_s for request in window.requests] == pytest.approx([0, 14, 28, 42, 56])
    assert any("few requests (5)" in note for note in window.scale.notes)


def test_one_request_is_replayed_at_once() -> None:
    window = fit(steady(1))
    assert [request.at_s for request in window.requests] == [0.0]
    assert window.scale.peak_1s == 1
    assert_sendable(window, WindowGoal())


def test_requests_at_one_instant_are_thinned_to_about_the_number_asked_for() -> None:
    window = fit([TraceRequest(0.0, 100, 10)] * 7200)
    assert window.scale.keep_every == 100
    assert [request.at_s for request in window.requests] == [0.0] * 72


def test_arrival_times_in_whole_seconds_do_not_shrink_the_window_to_one_volley() -> None:
    trace = [TraceRequest(float(second), 100, 10) for second in range(300) for _ in range(500)]
    window = fit(trace)
    assert len({request.at_s for request in window.requests}) >= 7
    assert 36 <= len(window.requests) <= 144
    assert window.scale.keep_every > 1


def test_long_gaps_do_not_change_the_number_of_requests() -> None:
    busy = generate_trace(1, 300.0)
    later = [TraceRequest(r.arrival_s + 1e6, r.input_tokens, r.output_tokens) for r in busy]
    assert 36 <= fit([*busy, *later]).scale.requests <= 144


def test_the_slice_of_a_trace_that_ends_in_its_burst_contains_it() -> None:
    trace = [*steady(1000), *(TraceRequest(999.0 + n / 100, 100, 10) for n in range(40))]
    scale = fit(trace).scale
    assert scale.burst_requests == scale.trace_burst_requests >= 40


def test_shared_prefixes_lower_the_expected_load_and_are_sent_as_blocks() -> None:
    hashes = tuple(range(20))
    with_prefix = [TraceRequest(float(n), 10_240, 20, hashes) for n in range(300)]
    without = [TraceRequest(float(n), 10_240, 20) for n in range(300)]
    goal = WindowGoal(token_factor=0.05)
    cached = fit(with_prefix, goal)
    assert cached.scale.prefix_cached_tokens > 0
    assert cached.scale.busy_expected_ratio < fit(without, goal).scale.busy_expected_ratio
    assert {request.prefix_hashes for request in cached.requests} == {hashes}
    assert cached.requests[0].block_tokens == pytest.approx(25.6)


def test_mistakes_are_named_with_both_values() -> None:
    with pytest.raises(WindowError, match="holds no requests"):
        fit([])
    with pytest.raises(WindowError, match=r"busy_ratio is 1\.5"):
        WindowGoal(busy_ratio=1.5)
    with pytest.raises(WindowError, match="rate_factor is 0"):
        WindowGoal(rate_factor=0)
    with pytest.raises(WindowError, match="context_tokens is 3 but answers have at least 2"):
        WindowGoal(context_tokens=3)
    with pytest.raises(WindowError, match="more than the 10000"):
        fit(steady(40_000, gap_s=0.001), WindowGoal(rate_factor=1.0))


def test_the_scale_is_plain_json_and_readable_lines() -> None:
    scale = fit(generate_trace(1, 600.0)).scale
    document = scale.as_dict()
    assert document["requests"] == scale.requests
    assert document["notes"] == list(scale.notes)
    text = "\n".join(scale.lines())
    for word in ("traffic", "slice", "rate", "tokens", "busy", "45%"):
        assert word in text


TRACES = st.lists(
    st.builds(
        TraceRequest,
        st.floats(0, 1e6) | st.integers(0, 50).map(float),
        st.integers(0, 2**31 - 1),
        st.integers(0, 2**31 - 1),
    ),
    min_size=1,
    max_size=60,
).map(lambda trace: sorted(trace, key=lambda request: request.arrival_s))


@settings(max_examples=25, deadline=None)
@given(TRACES, st.none() | st.floats(0.001, 1000), st.integers(1, 50))
def test_any_trace_gives_requests_that_an_engine_accepts(
    trace: list[TraceRequest], rate_factor: float | None, requests: int
) -> None:
    first_s = trace[0].arrival_s
    trace = [TraceRequest(r.arrival_s - first_s, r.input_tokens, r.output_tokens) for r in trace]
    goal = WindowGoal(rate_factor=rate_factor, requests=requests)
    window = fit(trace, goal)
    assert window.requests
    assert_sendable(window, goal)
