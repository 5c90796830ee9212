"""Percentiles of serving latency, and how sure one can be of their ratio between two arms.

Where an arm replays its requests several times, a percentile is taken in each pass and averaged.
That of all passes together would be another estimator: with one outlier in 71 requests P99 weighs
it with 0.3, with the same outlier twice in 142 requests with 0.6, and equal arms would differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from rowen.bench.records import ServingRecord

Metric = Literal["ttft", "tpot"]

_VALUE: Mapping[Metric, Callable[[ServingRecord], float | None]] = {
    "ttft": lambda record: record.ttft_ms,
    "tpot": lambda record: record.tpot_ms,
}
FloatArray = np.ndarray[tuple[int], np.dtype[np.float64]]
FloatMatrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]
IntMatrix = np.ndarray[tuple[int, int], np.dtype[np.int64]]

_PORTION_VALUES = 1_000_000
"""Values that are drawn at a time: bounds the memory of the bootstrap to some 10 MB."""


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """Latency of the requests that were answered completely; None where there is no sample."""

    requests: int
    """Requests that were answered completely."""
    failed: int
    """Requests that ended in an error."""
    unfinished: int
    """Requests without their whole answer when the client was stopped: the slowest ones."""
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    tpot_p50_ms: float | None
    tpot_p99_ms: float | None
    lateness_p99_ms: float | None
    """How late the client itself sent: latency below it cannot be told apart."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RatioInterval:
    """Ratio of a percentile, second arm over first, with its bootstrap interval."""

    ratio: float
    low: float
    high: float
    confidence_ratio: float
    requests: int
    """Requests (of the file) that both arms answered and that the ratio is made of."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def percentile(values: Iterable[float | None], rank: float) -> float | None:
    """Return the percentile (0 to 100, linear between ranks) of the values that are not None."""
    present = [value for value in values if value is not None]
    return float(np.percentile(present, rank)) if present else None


def summarise(records: Sequence[ServingRecord]) -> LatencySummary:
    """Summarise the records of one arm."""
    answered = [record for record in records if record.status == "ok"]
    return LatencySummary(
        requests=len(answered),
        failed=sum(record.status == "error" for record in records),
        unfinished=sum(record.status == "cancelled" for record in records),
        ttft_p50_ms=_over_passes(answered, "ttft", 50),
        ttft_p99_ms=_over_passes(answered, "ttft", 99),
        tpot_p50_ms=_over_passes(answered, "tpot", 50),
        tpot_p99_ms=_over_passes(answered, "tpot", 99),
        lateness_p99_ms=percentile((record.lateness_ms for record in records), 99),
    )


def _over_passes(records: Sequence[ServingRecord], metric: Metric, rank: float) -> float | None:
    """The mean over the passes of each pass's percentile; None without a value."""
    passes: defaultdict[int, list[float | None]] = defaultdict(list)
    for record in records:
        passes[record.pass_number].append(_VALUE[metric](record))
    each = [percentile(values, rank) for values in passes.values()]
    present = [value for value in each if value is not None]
    return sum(present) / len(present) if present else None


def ratio_interval(
    alone: Sequence[ServingRecord],
    harvested: Sequence[ServingRecord],
    metric: Metric,
    rank: float,
    *,
    seed: int = 0,
    resamples: int = 2000,
    confidence_ratio: float = 0.95,
) -> RatioInterval | None:
    """Return the ratio of a percentile, harvested over alone, and its bootstrap interval.

    Paired: whole requests of the file are drawn with replacement, each with its answers from every
    pass of both arms, because a request that is slow alone (a long prompt in a burst) is slow in
    the other arm too.  Requests that one arm did not answer are left out of both.

    Returns None when no request was answered in both arms.
    """
    alone_RP, harvested_RP = _paired(alone, harvested, metric)
    requests = alone_RP.shape[0]
    if requests == 0:
        return None
    random = np.random.Generator(np.random.PCG64(seed))
    ratio_B = np.concatenate(
        [
            _ratios(alone_RP, harvested_RP, random.integers(0, requests, (count, requests)), rank)
            for count in _portions(resamples, 1 + _PORTION_VALUES // alone_RP.size)
        ]
    )
    tail = (1.0 - confidence_ratio) / 2.0 * 100.0
    low, high = np.percentile(ratio_B, [tail, 100.0 - tail])
    return RatioInterval(
        ratio=float(_ratios(alone_RP, harvested_RP, np.arange(requests)[None, :], rank)[0]),
        low=float(low),
        high=float(high),
        confidence_ratio=confidence_ratio,
        requests=requests,
    )


def compare(
    alone: Sequence[ServingRecord], harvested: Sequence[ServingRecord]
) -> dict[str, dict[str, Any] | None]:
    """Return the ratios of P50 and P99 of TTFT and TPOT with their intervals, as JSON values."""
    metrics: tuple[Metric, ...] = ("ttft", "tpot")
    intervals = {
        f"{metric}_p{rank}": ratio_interval(alone, harvested, metric, rank)
        for metric in metrics
        for rank in (50, 99)
    }
    return {name: one.as_dict() if one else None for name, one in intervals.items()}


def _portions(total: int, most: int) -> Iterator[int]:
    """Split ``total`` into portions of at most ``most``."""
    for start in range(0, total, most):
        yield min(most, total - start)


def _ratios(
    alone_RP: FloatMatrix, harvested_RP: FloatMatrix, drawn_BR: IntMatrix, rank: float
) -> FloatArray:
    """Return the ratio of the percentile for each row of drawn requests."""
    return _percentiles(harvested_RP, drawn_BR, rank) / _percentiles(alone_RP, drawn_BR, rank)


def _percentiles(value_RP: FloatMatrix, drawn_BR: IntMatrix, rank: float) -> FloatArray:
    """Return for each row of drawn requests the mean over the passes of each pass's percentile.

    numpy's ``nanpercentile`` gives a pass's percentile (linear between ranks) as well, row by row
    in Python, a hundred times slower.
    """
    sorted_BRP = np.sort(value_RP[drawn_BR], axis=1)  # NaN last
    count_BP = np.count_nonzero(~np.isnan(sorted_BRP), axis=1)
    place_BP = np.maximum(count_BP - 1, 0) * rank / 100.0
    below_BP = np.floor(place_BP).astype(np.int64)
    above_BP = np.ceil(place_BP).astype(np.int64)
    low_BP = np.take_along_axis(sorted_BRP, below_BP[:, None, :], axis=1)[:, 0, :]
    high_BP = np.take_along_axis(sorted_BRP, above_BP[:, None, :], axis=1)[:, 0, :]
    value_BP = low_BP + (high_BP - low_BP) * (place_BP - below_BP)
    # A pass without a value among the drawn requests is NaN and does not count.
    counted_BP = ~np.isnan(value_BP)
    total_B = np.where(counted_BP, value_BP, 0.0).sum(axis=1)
    result_B: FloatArray = total_B / counted_BP.sum(axis=1)
    return result_B


def _paired(
    alone: Sequence[ServingRecord], harvested: Sequence[ServingRecord], metric: Metric
) -> tuple[FloatMatrix, FloatMatrix]:
    """Return both arms' values, one row per request that both answered, one column per pass (NaN
    where a pass lacks it)."""
    arms = [_by_request(records, metric) for records in (alone, harvested)]
    shared = sorted(arms[0].keys() & arms[1].keys())
    matrices = []
    for arm in arms:
        width = max((len(arm[index]) for index in shared), default=0)
        matrix = np.full((len(shared), width), np.nan)
        for row, index in enumerate(shared):
            matrix[row, : len(arm[index])] = arm[index]
        matrices.append(matrix)
    return matrices[0], matrices[1]


def _by_request(records: Sequence[ServingRecord], metric: Metric) -> dict[int, list[float]]:
    values: dict[int, list[float]] = defaultdict(list)
    for record in records:
        value = _VALUE[metric](record)
        # A first token in the same millisecond is possible, one in no time at all is not.
        if record.status == "ok" and value is not None and value > 0:
            values[record.index].append(value)
    return values
