"""The demo's objectives: a good reading of a coarse histogram never looks like a breach."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rowen.bench.demo.objectives import (
    MARGIN_RATIO,
    TPOT_EDGES_MS,
    TTFT_EDGES_MS,
    threshold_above,
    write_policy,
)
from rowen.bench.latency import LatencySummary
from rowen.policies.load import load_policy


@given(st.floats(min_value=0.0, max_value=5000.0))
def test_the_bucket_of_the_expected_value_lies_below_the_recovery_line(value_ms: float) -> None:
    threshold_ms = threshold_above(value_ms, TPOT_EDGES_MS, least_ms=150.0, recover_ratio=0.9)
    bucket_edge_ms = min(edge for edge in TPOT_EDGES_MS if edge >= MARGIN_RATIO * value_ms)
    assert threshold_ms in TPOT_EDGES_MS
    assert threshold_ms >= 150.0
    assert bucket_edge_ms <= 0.9 * threshold_ms


@pytest.mark.parametrize(("value_ms", "expected_ms"), [(None, 150), (40, 150), (111, 200)])
def test_thresholds_of_known_machines(value_ms: float | None, expected_ms: float) -> None:
    threshold_ms = threshold_above(value_ms, TPOT_EDGES_MS, least_ms=150.0, recover_ratio=0.9)
    assert threshold_ms == expected_ms


def test_a_value_beyond_all_buckets_gets_the_last_edge() -> None:
    threshold_ms = threshold_above(1e6, TTFT_EDGES_MS, least_ms=1000.0, recover_ratio=0.9)
    assert threshold_ms == TTFT_EDGES_MS[-1]


def test_the_written_policy_is_the_shipped_one_with_other_thresholds(tmp_path: Path) -> None:
    alone = LatencySummary(
        requests=70,
        failed=0,
        unfinished=0,
        ttft_p50_ms=150.0,
        ttft_p99_ms=2000.0,
        tpot_p50_ms=35.0,
        tpot_p99_ms=111.0,
        lateness_p99_ms=1.0,
    )
    written = write_policy(tmp_path / "policy.yaml", alone)
    assert written == load_policy(tmp_path / "policy.yaml")
    assert written.spec.objectives.ttft.threshold_ms == 5000.0
    assert written.spec.objectives.tpot.threshold_ms == 200.0
