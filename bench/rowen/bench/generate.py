"""Make conversation traffic from a seed, with the published figures of a production trace.

The default traffic of the demo, for which no trace file is needed.  The same seed gives the same
requests on every machine.  Arrivals are a Poisson process whose rate follows a slowly moving
level; lengths are lognormal and independent of each other and of the arrivals (real traces also
hold correlations and repeated prefixes: replay one to have them).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import numpy as np

from rowen.bench.trace import TraceRequest

IntArray = np.ndarray[tuple[int], np.dtype[np.int64]]

_Z99 = 2.3263478740408408
"""99th percentile of the standard normal distribution."""


@dataclass(frozen=True, slots=True)
class ConversationProfile:
    """Figures of conversation traffic; the defaults are those of the Azure conversation trace
    of 2023-11-16 (Azure Public Dataset, CC-BY-4.0; measured over its 58 minutes)."""

    requests_per_s: float = 19_366 / 3_502
    """Mean rate: 19,366 requests in 58 minutes and 22 seconds."""
    level_period_s: float = 60.0
    """How long a level lasts: the trace's rate differs from minute to minute (peak/mean 1.5)."""
    level_cv: float = 0.24
    """Coefficient of variation of the level.  Of 58 gamma-distributed minutes with this CV, plus
    Poisson noise, the largest is on average 1.6 x the mean (trace: 1.5); the peak of 1-second
    counts is then 2.9 x the mean (trace: 2.9), as the Poisson process itself makes it."""
    context_p50_tokens: float = 1020.0
    context_p99_tokens: float = 4142.0
    """Prompt lengths: median and 99th percentile of ContextTokens."""
    output_p50_tokens: float = 129.0
    output_p99_tokens: float = 601.0
    """Answer lengths: median and 99th percentile of GeneratedTokens."""


def generate_trace(
    seed: int, duration_s: float = 3_502.0, profile: ConversationProfile | None = None
) -> list[TraceRequest]:
    """Make ``duration_s`` seconds of traffic at production scale, sorted by arrival.

    Raises:
        ValueError: ``duration_s`` is not positive.
    """
    if not duration_s > 0:
        raise ValueError(f"duration_s is {duration_s}; it must be above 0")
    profile = profile or ConversationProfile()
    random = np.random.Generator(np.random.PCG64(seed))
    arrival_N = _arrivals(random, duration_s, profile)
    input_N = _lengths(
        random, arrival_N.size, profile.context_p50_tokens, profile.context_p99_tokens
    )
    output_N = _lengths(
        random, arrival_N.size, profile.output_p50_tokens, profile.output_p99_tokens
    )
    return [
        TraceRequest(arrival_s=arrival, input_tokens=tokens_in, output_tokens=tokens_out)
        for arrival, tokens_in, tokens_out in zip(
            arrival_N.tolist(), input_N.tolist(), output_N.tolist(), strict=True
        )
    ]


def _arrivals(
    random: np.random.Generator, duration_s: float, profile: ConversationProfile
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Draw a level per period (gamma, mean 1), then Poisson arrivals inside each period."""
    periods = int(np.ceil(duration_s / profile.level_period_s))
    shape = 1.0 / profile.level_cv**2
    level_P = random.gamma(shape, 1.0 / shape, periods)
    mean_P = level_P * profile.requests_per_s * profile.level_period_s
    count_P = random.poisson(mean_P)
    start_N = np.repeat(np.arange(periods) * profile.level_period_s, count_P)
    arrival_N = np.sort(start_N + random.random(start_N.size) * profile.level_period_s)
    return arrival_N[arrival_N < duration_s]


def _lengths(random: np.random.Generator, count: int, p50: float, p99: float) -> IntArray:
    """Draw lognormal lengths with the median and the 99th percentile given, at least 1 token."""
    sigma = log(p99 / p50) / _Z99
    length_N: IntArray = np.rint(random.lognormal(log(p50), sigma, count)).astype(np.int64)
    return np.maximum(length_N, 1)
