"""The demo's policy file: the shipped one, with objectives that this machine can keep alone.

An operator promises what serving can keep.  The demo does not know the machine it runs on, so it
takes the P99 of the replay without harvest, adds a margin, and goes up to an edge of vLLM's
histogram buckets that leaves room for what a histogram cannot tell: a percentile read from one may
be as high as the upper edge of the bucket it lies in, and even that must not look like a breach.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from rowen.bench.latency import LatencySummary
from rowen.policies.load import library_policy, load_policy
from rowen.policies.schema import HarvestPolicy

MARGIN_RATIO = 1.25
"""Above the P99 measured alone; a promise at the measured value would be broken every other day."""

TTFT_EDGES_MS = (250, 500, 750, 1000, 2500, 5000, 7500, 10_000, 20_000, 40_000, 80_000)
"""Edges of ``vllm:time_to_first_token_seconds`` (vLLM 0.32, v1/metrics/loggers.py)."""

TPOT_EDGES_MS = (50, 75, 100, 150, 200, 300, 400, 500, 750, 1000, 2500, 5000, 7500, 10_000)
"""Edges of ``vllm:request_time_per_output_token_seconds`` (the same file)."""


def threshold_above(
    value_ms: float | None, edges_ms: Sequence[int], *, least_ms: float, recover_ratio: float
) -> float:
    """The smallest edge that a good reading never comes near.

    Args:
        value_ms: the percentile measured alone; None counts as 0.
        edges_ms: of the histogram, ascending.
        least_ms: the threshold of the shipped policy, never lowered.
        recover_ratio: the guard grows only below this share of the threshold.

    Returns:
        The first edge whose ``recover_ratio`` share lies at or above the upper edge of the bucket
        of ``value_ms`` with its margin; the last edge when there is none.
    """
    expected_ms = MARGIN_RATIO * (value_ms or 0.0)
    read_as_ms = next((edge for edge in edges_ms if edge >= expected_ms), edges_ms[-1])
    enough = (edge for edge in edges_ms if edge >= least_ms and recover_ratio * edge >= read_as_ms)
    return float(next(enough, edges_ms[-1]))


def write_policy(path: Path, alone: LatencySummary) -> HarvestPolicy:
    """Write the policy file of this run and return what was written."""
    document = yaml.safe_load(library_policy("demo").read_text(encoding="utf-8"))
    shipped = load_policy(library_policy("demo")).spec.objectives
    for name, objective, value_ms, edges_ms in (
        ("ttft", shipped.ttft, alone.ttft_p99_ms, TTFT_EDGES_MS),
        ("tpot", shipped.tpot, alone.tpot_p99_ms, TPOT_EDGES_MS),
    ):
        document["spec"]["objectives"][name]["threshold_ms"] = threshold_above(
            value_ms,
            edges_ms,
            least_ms=objective.threshold_ms,
            recover_ratio=objective.recover_ratio,
        )
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return load_policy(path)
