from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rowen.bench.errors import WindowError
from rowen.bench.service_model import Job, ServiceModel, expected_load

MODEL = ServiceModel(prefill_ms_per_token=1.0, decode_step_ms=30.0, decode_sequence_ms=3.0)


def test_one_request_costs_its_prefill_and_one_step_per_further_token() -> None:
    load = expected_load([Job(2.0, 100, 5)], MODEL, window_s=60.0)
    assert load.busy_s == pytest.approx(0.100 + 4 * 0.030)
    assert load.end_s == pytest.approx(2.0 + 0.220)
    assert load.most_running == 1


def test_sequences_that_decode_together_share_steps() -> None:
    load = expected_load([Job(0.0, 100, 11), Job(0.0, 100, 11)], MODEL, window_s=60.0)
    assert load.busy_s == pytest.approx(0.200 + 10 * 0.033)


def test_compute_after_the_window_is_not_busy_time_of_it() -> None:
    load = expected_load([Job(9.9, 200, 1)], MODEL, window_s=10.0)
    assert load.busy_s == pytest.approx(0.1)
    assert load.end_s == pytest.approx(10.1)


def test_a_prompt_longer_than_a_step_takes_several() -> None:
    model = ServiceModel(1.0, 30.0, step_tokens=64)
    assert expected_load([Job(0.0, 200, 1)], model, 60.0).busy_s == pytest.approx(0.2)


def test_no_more_sequences_run_than_the_engine_allows() -> None:
    model = ServiceModel(1.0, 30.0, max_sequences=2)
    load = expected_load([Job(0.0, 10, 20) for _ in range(6)], model, 60.0)
    assert load.most_running == 2
    assert load.busy_s == pytest.approx(6 * 0.010 + 3 * 19 * 0.030)


JOBS = st.lists(
    st.builds(Job, st.floats(0, 20), st.integers(0, 3000), st.integers(1, 60)), max_size=40
).map(lambda jobs: sorted(jobs, key=lambda job: job.at_s))


@given(JOBS)
def test_busy_time_is_bounded_by_the_window_and_by_work_without_batching(jobs: list[Job]) -> None:
    load = expected_load(jobs, MODEL, window_s=15.0)
    alone_ms = sum(max(1, job.prefill_tokens) + 30 * (job.output_tokens - 1) for job in jobs)
    assert 0 <= load.busy_s <= min(15.0, alone_ms / 1000) + 1e-6
    assert load.end_s >= max((job.at_s for job in jobs), default=0.0)


def test_coefficients_that_cannot_be_are_refused() -> None:
    with pytest.raises(WindowError, match="decode_step_ms is 0"):
        ServiceModel(1.0, 0.0)
    with pytest.raises(WindowError, match="prefill_ms_per_token is inf"):
        ServiceModel(float("inf"), 1.0)
    with pytest.raises(WindowError, match="max_sequences is 0"):
        ServiceModel(1.0, 1.0, max_sequences=0)
