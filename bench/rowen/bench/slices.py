"""Choose the part of a trace that is replayed: as long as it takes, with its largest burst.

Pure and deterministic: the same trace and goal give the same slice.  Nothing here knows a
particular trace; the rules are those of ``choose_slice``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FloatArray = np.ndarray[tuple[int], np.dtype[np.float64]]

MOST_TO_TYPICAL = 2.0
"""A slice is typical when it holds between half and twice the requests of a typical one."""
COARSE_TICKS = 8
"""A slice spans at least this many distinct arrival times: with fewer, a trace whose times are
rounded (to seconds, say) would shrink to one or two volleys."""
_SAMPLES = 1024
"""How many slices are looked at to find the typical number of requests in one."""
_PLACES = np.linspace(0.1, 0.7, 13)
"""Where the burst may begin, as a share of the slice: some calm before it, recovery after it."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A part ``[start_s, start_s + length_s)`` of a trace, of which every n-th request is kept."""

    start_s: float
    length_s: float
    keep_every: int
    rate_factor: float
    burst_window_s: float
    burst_requests: int
    trace_burst_requests: int


def choose_slice(
    arrival_N: FloatArray, *, duration_s: float, requests: int, rate_factor: float | None
) -> Slice:
    """Choose a slice that gives about ``requests`` requests in ``duration_s`` of replay.

    1. *Length*: without ``rate_factor``, the length whose slices typically hold ``requests``
       requests (the median over time, empty slices left out; the whole trace when it has fewer),
       so that the replay has about that many whatever pauses and floods the trace has.  With
       ``rate_factor``: ``duration_s`` times it.
    2. *Bursts*: the requests that follow each arrival within one second of the trace or of the
       replay, whichever is longer.
    3. *Place*: the largest burst for which a slice exists that contains it and is typical (see
       ``MOST_TO_TYPICAL``); among its places the one with the most typical number of requests.
       When no slice is typical, the one that is nearest to it.

    Args:
        arrival_N: sorted seconds from the first request, at least one.
    """
    length_s, keep_every = _length(arrival_N, duration_s, requests, rate_factor)
    arrival_N = arrival_N[::keep_every]
    span_s = float(arrival_N[-1])
    rate = rate_factor or (length_s / duration_s)
    # A burst must be shorter than the slice, or every slice would hold one.
    burst_s = max(min(1.0, length_s / 8), min(rate, length_s))
    burst_N = np.searchsorted(arrival_N, arrival_N + burst_s) - np.arange(arrival_N.size)
    start_s = 0.0
    if span_s >= length_s:
        start_s = _place(arrival_N, burst_N, burst_s, length_s)
    low, high = np.searchsorted(arrival_N, [start_s, start_s + length_s])
    inside_N = np.minimum(burst_N[low:high], high - np.arange(low, high))
    return Slice(
        start_s=start_s,
        length_s=length_s,
        keep_every=keep_every,
        rate_factor=rate,
        burst_window_s=burst_s,
        burst_requests=int(inside_N.max()),
        trace_burst_requests=int(burst_N.max()),
    )


def _length(
    arrival_N: FloatArray, duration_s: float, requests: int, rate_factor: float | None
) -> tuple[float, int]:
    """Return the slice's length in seconds of the trace, and of how many requests one is kept."""
    if rate_factor is not None:
        return duration_s * rate_factor, 1
    span_s = float(arrival_N[-1])
    if span_s == 0.0:  # all at once: replayed so, thinned to the number asked for
        return duration_s, max(1, round(arrival_N.size / requests))
    if arrival_N.size <= requests:
        return span_s * arrival_N.size / (arrival_N.size - 1), 1
    length_s = _length_holding(arrival_N, requests)
    # Where requests come in volleys larger than `requests`, only a part of one volley holds so
    # few; the slice is then one that holds a whole volley and the pause around it.
    volley_s = _length_holding(arrival_N, round(MOST_TO_TYPICAL * requests))
    if volley_s > 2 * MOST_TO_TYPICAL * length_s:
        length_s = volley_s
    tick_s = float(np.median(np.diff(np.unique(arrival_N))))
    if length_s >= COARSE_TICKS * tick_s:
        return length_s, 1
    length_s = min(COARSE_TICKS * tick_s, span_s)
    return length_s, max(1, round(_typical_count(arrival_N, length_s) / requests))


def _length_holding(arrival_N: FloatArray, requests: int) -> float:
    """Return the length whose typical count is ``requests``, by bisection of its logarithm."""
    high = float(arrival_N[-1])
    low = high * 1e-9
    for _ in range(48):
        middle = float(np.sqrt(low * high))
        if _typical_count(arrival_N, middle) > requests:
            high = middle
        else:
            low = middle
    return low


def _typical_count(arrival_N: FloatArray, length_s: float) -> float:
    """Return the median count of slices that begin anywhere in the trace, empty ones left out.

    Over time, not over requests: a flood holds many requests but little time.  Long pauses are
    empty and so change nothing.
    """
    last_s = max(0.0, float(arrival_N[-1]) - length_s)
    # From the first arrival on and up to the last, so that never all of them are empty.
    start_M = np.linspace(0.0, last_s, _SAMPLES)
    held_M = np.searchsorted(arrival_N, start_M + length_s) - np.searchsorted(arrival_N, start_M)
    return float(np.median(held_M[held_M > 0]))


def _place(
    arrival_N: FloatArray,
    burst_N: np.ndarray[tuple[int], np.dtype[np.int64]],
    burst_s: float,
    length_s: float,
) -> float:
    """Return the start of the slice with the largest burst that a typical slice can hold."""
    last_s = float(arrival_N[-1])
    start_NP = arrival_N[:, None] - _PLACES[None, :] * length_s
    # At the ends of the trace the burst lies nearer to an end of the slice.
    start_NP = np.clip(start_NP, 0.0, max(0.0, last_s - length_s))
    # The clip must not push a burst at the very end of the trace out of the slice.
    start_NP = np.where(
        start_NP + length_s < arrival_N[:, None] + burst_s,
        arrival_N[:, None] + burst_s - length_s,
        start_NP,
    )
    held_NP = np.searchsorted(arrival_N, start_NP + length_s) - np.searchsorted(arrival_N, start_NP)
    typical = _typical_count(arrival_N, length_s)
    distance_NP = np.abs(np.log(np.maximum(held_NP, 0.5) / typical))
    place_N = distance_NP.argmin(axis=1)
    best_N = distance_NP.min(axis=1)
    feasible_N = best_N <= np.log(MOST_TO_TYPICAL)
    if feasible_N.any():
        candidate = int(np.argmax(np.where(feasible_N, burst_N, -1)))
    else:
        candidate = int(best_N.argmin())
    return float(start_NP[candidate, place_N[candidate]])
