"""The demo's policy file: the shipped one, with objectives that this machine can keep alone.

An operator promises what serving can keep.  The demo does not know the machine it runs on, so it
takes the P99 of the replay without harvest, adds a margin, and rounds up to an edge of vLLM's
histogram buckets, where a percentile can be judged without interpolation.
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


def edge_above(value_ms: float | None, edges_ms: Sequence[int], least_ms: float) -> float:
    """The smallest edge at or above the value with its margin, and not below ``least_ms``."""
    wanted_ms = max(least_ms, MARGIN_RATIO * (value_ms or 0.0))
    return float(next((edge for edge in edges_ms if edge >= wanted_ms), edges_ms[-1]))


def write_policy(path: Path, alone: LatencySummary) -> HarvestPolicy:
    """Write the policy file of this run and return what was written."""
    document = yaml.safe_load(library_policy("demo").read_text(encoding="utf-8"))
    objectives = document["spec"]["objectives"]
    for name, value_ms, edges_ms in (
        ("ttft", alone.ttft_p99_ms, TTFT_EDGES_MS),
        ("tpot", alone.tpot_p99_ms, TPOT_EDGES_MS),
    ):
        objective = objectives[name]
        objective["threshold_ms"] = edge_above(value_ms, edges_ms, objective["threshold_ms"])
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return load_policy(path)
