"""Latency percentiles over a sliding window, from Prometheus histograms.

Pure: text and times in, percentiles out.  Prometheus histograms count since the engine's start, so
a window is the difference of two pages; the percentile inside a bucket is interpolated as
Prometheus' own ``histogram_quantile`` does.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from rowen.policies.guard import ObjectiveReading

_LE = re.compile(r'(?:^|,)\s*le="([^"]+)"')


class MetricsError(Exception):
    """A metrics page cannot be believed; the reading counts as missing."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Cumulative counts by upper bucket edge, in rising order; the last edge is infinite."""

    edges_s: tuple[float, ...]
    counts: tuple[float, ...]


def parse_histograms(page: str, names: tuple[str, ...]) -> dict[str, Histogram]:
    """Read the named histograms from a Prometheus text page, summed over all their label sets.

    Raises:
        MetricsError: one of them is absent, incomplete, or its counts are no cumulative counts.
    """
    sums: dict[str, dict[float, float]] = {name: {} for name in names}
    prefixes = tuple(f"{name}_bucket{{" for name in names)
    for line in page.splitlines():
        if not line.startswith(prefixes):
            continue  # most of the page; a full parse of it would cost more than all else here
        name = line[: line.index("_bucket{")]
        edge_s, count = _parse_bucket(line)
        sums[name][edge_s] = sums[name].get(edge_s, 0.0) + count
    return {name: _histogram(name, counts) for name, counts in sums.items()}


def _parse_bucket(line: str) -> tuple[float, float]:
    # A label value may hold a brace as well, so it is the last one that ends the labels.
    labels, _, rest = line[line.index("{") + 1 :].rpartition("}")
    edge = _LE.search(labels)
    fields = rest.split()
    if edge is None or not fields:
        raise MetricsError(f"not a histogram bucket: {line[:120]}")
    try:
        return float(edge.group(1)), float(fields[0])
    except ValueError:
        raise MetricsError(f"not a number in a histogram bucket: {line[:120]}") from None


def _histogram(name: str, counts: Mapping[float, float]) -> Histogram:
    if not counts:
        raise MetricsError(f"the page holds no histogram {name}")
    edges_s = tuple(sorted(counts))
    values = tuple(counts[edge] for edge in edges_s)
    if not math.isinf(edges_s[-1]) or len(edges_s) < 2:
        raise MetricsError(f"{name} has no +Inf bucket beside a finite one")
    if any(not math.isfinite(value) or value < 0 for value in values):
        raise MetricsError(f"{name} has a count that is negative or no number")
    if any(low > high for low, high in pairwise(values)):
        raise MetricsError(f"{name} has bucket counts that fall towards larger edges")
    return Histogram(edges_s, values)


class HistogramWindow:
    """The snapshots of one histogram that a sliding window needs."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._snapshots: deque[tuple[float, Histogram]] = deque()

    def add(self, at_s: float, snapshot: Histogram) -> None:
        """Append the page read at ``at_s`` (monotonic seconds, rising).

        A count that fell, or other bucket edges, mean that the engine restarted: the window then
        begins anew, since a difference over a restart says nothing.
        """
        if self._snapshots and _is_restart(self._snapshots[-1][1], snapshot):
            self._snapshots.clear()
        self._snapshots.append((at_s, snapshot))
        # One snapshot at or before the window's beginning stays, to hold the rest against.
        while len(self._snapshots) > 2 and self._snapshots[1][0] <= at_s - self._window_s:
            self._snapshots.popleft()

    def read(self, percentile: float) -> ObjectiveReading | None:
        """The percentile over the window in ms; None before the first page."""
        if not self._snapshots:
            return None
        first, last = self._snapshots[0][1], self._snapshots[-1][1]
        counts = [new - old for new, old in zip(last.counts, first.counts, strict=True)]
        samples = round(counts[-1])
        if samples <= 0:
            return ObjectiveReading(value_ms=None, samples=0)
        value_s = _quantile(last.edges_s, counts, percentile / 100)
        return ObjectiveReading(value_ms=value_s * 1000, samples=samples)


def _is_restart(before: Histogram, after: Histogram) -> bool:
    if before.edges_s != after.edges_s:
        return True
    return any(new < old for new, old in zip(after.counts, before.counts, strict=True))


def _quantile(edges_s: tuple[float, ...], counts: list[float], share: float) -> float:
    """Linear inside the bucket; infinite in the last one, where nothing bounds it from above."""
    rank = share * counts[-1]
    low_edge_s, low_count = 0.0, 0.0
    for edge_s, count in zip(edges_s, counts, strict=True):
        if count >= rank and count > low_count:
            if math.isinf(edge_s):
                return math.inf
            return low_edge_s + (edge_s - low_edge_s) * (rank - low_count) / (count - low_count)
        low_edge_s, low_count = edge_s, max(low_count, count)
    return math.inf
