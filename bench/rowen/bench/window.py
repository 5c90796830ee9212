"""Scale a trace to this machine: a slice of it, slower or faster, with shorter or longer texts.

A trace of a production cluster would bury a small machine, so three things are scaled, each by one
factor for all requests, so that the pattern stays that of the trace:

    slice    the part that is replayed (``slices``: typical, with the largest burst it can hold)
    rate     arrival times divided by ``rate_factor``
    tokens   prompt and answer lengths multiplied by ``token_factor``, found by bisection so that
             the service model (``service_model``) expects the busy share asked for

Lengths are clipped to the model's context.  All of it is written down in a ``Scale``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from rowen.bench.errors import WindowError
from rowen.bench.scale import Scale
from rowen.bench.service_model import Job, Load, ServiceModel, expected_load
from rowen.bench.slices import Slice, choose_slice
from rowen.bench.trace import HASH_BLOCK_TOKENS, TraceRequest

_LEAST_TOKEN_FACTOR = 1e-5
_MOST_REQUESTS = 10_000
"""More requests than this are not a replay on one machine but a mistyped rate."""
_BUSY_TOLERANCE_RATIO = 0.002
_BUSY_MISSED_RATIO = 0.05
"""A difference between the expected and the wanted busy share that is worth a note."""
_FEW_REQUESTS = 60
"""Below this the 99th percentile is the largest value and little else."""


@dataclass(frozen=True, slots=True)
class WindowGoal:
    """What the replay should be like on this machine."""

    duration_s: float = 70.0
    busy_ratio: float = 0.45
    """Share of the time in which the serving engine computes; the rest is there to harvest."""
    requests: int = 72
    """About how many requests (one per second of the default duration); a slice with a large
    burst holds up to twice as many."""
    context_tokens: int = 1024
    """The serving engine's ``--max-model-len``: prompt and answer together."""
    least_output_tokens: int = 2
    """TPOT is the time between tokens, so an answer needs two."""
    rate_factor: float | None = None
    """Seconds of the trace per second of the replay; None: from ``requests``."""
    token_factor: float | None = None
    """Tokens sent per token of the trace; None: from ``busy_ratio``."""

    def __post_init__(self) -> None:
        for name in ("duration_s", "rate_factor", "token_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise WindowError(f"{name} is {value}; it must be a number above 0")
        if not 0 < self.busy_ratio <= 1:
            raise WindowError(
                f"busy_ratio is {self.busy_ratio}; it is a share of the time, above 0 and up to 1"
            )
        if self.requests < 1:
            raise WindowError(f"requests is {self.requests}; the replay needs at least 1")
        if self.least_output_tokens < 1:
            raise WindowError(f"least_output_tokens is {self.least_output_tokens}; at least 1")
        if self.context_tokens < 2 * self.least_output_tokens:
            raise WindowError(
                f"context_tokens is {self.context_tokens} but answers have at least "
                f"{self.least_output_tokens} tokens; use a context of at least twice that"
            )


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """One request as it will be sent; ``at_s`` counts from the start of the replay.

    The first prompt tokens come from ``prefix_hashes``: block ``j`` is the prompt's tokens from
    ``round(j * block_tokens)`` up to ``round((j + 1) * block_tokens)``.
    """

    at_s: float
    input_tokens: int
    output_tokens: int
    prefix_hashes: tuple[int, ...] = ()
    block_tokens: float = float(HASH_BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Window:
    """Requests to send, sorted by ``at_s`` in ``[0, scale.duration_s)``, and how they arose."""

    requests: tuple[ReplayRequest, ...]
    scale: Scale


@dataclass(frozen=True, slots=True)
class _Scaled:
    """The requests under one token factor, with what had to be changed."""

    requests: tuple[ReplayRequest, ...]
    inputs_clipped: int
    outputs_clipped: int
    inputs_raised: int
    outputs_raised: int
    cached_tokens: int
    load: Load


def fit_window(
    trace: Sequence[TraceRequest], goal: WindowGoal, model: ServiceModel, *, source: str
) -> Window:
    """Cut and scale ``trace`` (sorted by arrival) to ``goal``.

    Raises:
        WindowError: the trace is empty, or the slice at the rate given holds too many requests.
    """
    if not trace:
        raise WindowError(f"{source} holds no requests; give a trace with at least one")
    arrival_N = np.array([request.arrival_s for request in trace], dtype=np.float64)
    chosen = choose_slice(
        arrival_N,
        duration_s=goal.duration_s,
        requests=goal.requests,
        rate_factor=goal.rate_factor,
    )
    end_s = chosen.start_s + chosen.length_s
    cut = [
        request
        for request in trace[:: chosen.keep_every]
        if chosen.start_s <= request.arrival_s < end_s
    ]
    if len(cut) > _MOST_REQUESTS:
        raise WindowError(
            f"{source} has {len(cut)} requests in {goal.duration_s:g} s at the rate factor "
            f"{chosen.rate_factor:g}, more than the {_MOST_REQUESTS} that are replayed; "
            "give a lower rate or none"
        )
    factor, scaled = _fit_tokens(cut, chosen, goal, model)
    return Window(
        scaled.requests, _describe(trace, cut, chosen, factor, scaled, goal, model, source)
    )


def _fit_tokens(
    cut: Sequence[TraceRequest], chosen: Slice, goal: WindowGoal, model: ServiceModel
) -> tuple[float, _Scaled]:
    """Find the token factor for the busy share by bisection, or use the given one."""
    if goal.token_factor is not None:
        return goal.token_factor, _scale_tokens(cut, chosen, goal.token_factor, goal, model)
    # At the upper end every length that is not 0 fills its share of the context.
    low, high = _LEAST_TOKEN_FACTOR, float(goal.context_tokens)
    for _ in range(48):
        factor = float(np.sqrt(low * high))
        scaled = _scale_tokens(cut, chosen, factor, goal, model)
        error_ratio = scaled.load.busy_s / goal.duration_s - goal.busy_ratio
        if abs(error_ratio) <= _BUSY_TOLERANCE_RATIO:
            break
        low, high = (factor, high) if error_ratio < 0 else (low, factor)
    return factor, scaled


def _scale_tokens(
    cut: Sequence[TraceRequest], chosen: Slice, factor: float, goal: WindowGoal, model: ServiceModel
) -> _Scaled:
    """Scale, round, raise and clip all lengths, and ask the model what the result costs."""
    requests: list[ReplayRequest] = []
    jobs: list[Job] = []
    seen_hashes: set[int] = set()
    clipped_in = clipped_out = raised_in = raised_out = cached_total = 0
    # An answer may take half of the context, the prompt what the answer leaves.
    most_output = max(goal.least_output_tokens, goal.context_tokens // 2)
    block_tokens = HASH_BLOCK_TOKENS * factor
    for request in cut:
        wanted_in = round(request.input_tokens * factor)
        wanted_out = round(request.output_tokens * factor)
        output_tokens = min(max(wanted_out, goal.least_output_tokens), most_output)
        input_tokens = min(max(wanted_in, 1), goal.context_tokens - output_tokens)
        raised_out += wanted_out < output_tokens
        clipped_out += wanted_out > output_tokens
        raised_in += wanted_in < input_tokens
        clipped_in += wanted_in > input_tokens
        hashes = request.prefix_hashes[: int(input_tokens / block_tokens) + 1]
        cached = _cached_tokens(hashes, seen_hashes, block_tokens, input_tokens, model)
        seen_hashes.update(hashes)
        cached_total += cached
        at_s = (request.arrival_s - chosen.start_s) / chosen.rate_factor
        requests.append(ReplayRequest(at_s, input_tokens, output_tokens, hashes, block_tokens))
        jobs.append(Job(at_s, input_tokens - cached, output_tokens))
    load = expected_load(jobs, model, goal.duration_s)
    return _Scaled(
        tuple(requests), clipped_in, clipped_out, raised_in, raised_out, cached_total, load
    )


def _cached_tokens(
    hashes: Sequence[int],
    seen: set[int],
    block_tokens: float,
    input_tokens: int,
    model: ServiceModel,
) -> int:
    """Return how many prompt tokens the engine's prefix cache will have: whole blocks of its own.

    The last prompt token is always computed, since its logits are needed.
    """
    shared = next((n for n, one in enumerate(hashes) if one not in seen), len(hashes))
    tokens = min(round(shared * block_tokens), input_tokens - 1)
    return tokens - tokens % model.cache_block_tokens


def _describe(
    trace: Sequence[TraceRequest],
    cut: Sequence[TraceRequest],
    chosen: Slice,
    factor: float,
    scaled: _Scaled,
    goal: WindowGoal,
    model: ServiceModel,
    source: str,
) -> Scale:
    span_s = trace[-1].arrival_s
    rate = len(trace) / span_s if span_s > 0 else float(len(trace))
    at_N = np.array([request.at_s for request in scaled.requests])
    inputs = [request.input_tokens for request in scaled.requests]
    outputs = [request.output_tokens for request in scaled.requests]
    busy_ratio = scaled.load.busy_s / goal.duration_s
    return Scale(
        source=source,
        trace_requests=len(trace),
        trace_span_s=span_s,
        trace_requests_per_s=rate,
        trace_peak_to_mean_1s=_peak_to_mean(trace),
        slice_start_s=chosen.start_s,
        slice_length_s=chosen.length_s,
        keep_every=chosen.keep_every,
        duration_s=goal.duration_s,
        rate_factor=chosen.rate_factor,
        rate_origin="fitted" if goal.rate_factor is None else "given",
        token_factor=factor,
        token_origin="fitted" if goal.token_factor is None else "given",
        requests=len(cut),
        requests_per_s=len(cut) / goal.duration_s,
        peak_1s=int((np.searchsorted(at_N, at_N + 1.0) - np.arange(at_N.size)).max()),
        burst_window_s=chosen.burst_window_s,
        burst_requests=chosen.burst_requests,
        trace_burst_requests=chosen.trace_burst_requests,
        context_tokens=goal.context_tokens,
        inputs_clipped=scaled.inputs_clipped,
        outputs_clipped=scaled.outputs_clipped,
        inputs_raised=scaled.inputs_raised,
        outputs_raised=scaled.outputs_raised,
        input_p50_tokens=float(np.percentile(inputs, 50)),
        input_p99_tokens=float(np.percentile(inputs, 99)),
        output_p50_tokens=float(np.percentile(outputs, 50)),
        output_p99_tokens=float(np.percentile(outputs, 99)),
        trace_input_p50_tokens=float(np.percentile([r.input_tokens for r in cut], 50)),
        trace_output_p50_tokens=float(np.percentile([r.output_tokens for r in cut], 50)),
        prefix_cached_tokens=scaled.cached_tokens,
        busy_target_ratio=goal.busy_ratio,
        busy_expected_ratio=busy_ratio,
        expected_end_s=scaled.load.end_s,
        prefill_ms_per_token=model.prefill_ms_per_token,
        decode_step_ms=model.decode_step_ms,
        decode_sequence_ms=model.decode_sequence_ms,
        notes=tuple(_notes(len(trace), len(cut), chosen, busy_ratio, scaled.load, goal)),
    )


def _peak_to_mean(trace: Sequence[TraceRequest]) -> float:
    """Return the largest count in a whole second of the trace over the mean count per second."""
    if trace[-1].arrival_s < 1.0:
        return 0.0
    count_S = np.bincount(np.array([request.arrival_s for request in trace]).astype(np.int64))
    return float(count_S.max() / count_S.mean())


def _notes(
    trace_requests: int,
    requests: int,
    chosen: Slice,
    busy_ratio: float,
    load: Load,
    goal: WindowGoal,
) -> list[str]:
    notes: list[str] = []
    if requests < _FEW_REQUESTS:
        why = "the trace has no more" if requests == trace_requests else "raise the rate for more"
        notes.append(
            f"few requests ({requests}): below {_FEW_REQUESTS} the 99th percentile is "
            f"little more than the largest value ({why})"
        )
    if chosen.burst_requests < chosen.trace_burst_requests:
        notes.append(
            f"the trace's largest burst ({chosen.trace_burst_requests} requests in "
            f"{chosen.burst_window_s:.1f} s) does not fit a typical slice; the largest that does "
            f"has {chosen.burst_requests}"
        )
    if busy_ratio - goal.busy_ratio > _BUSY_MISSED_RATIO:
        remedy = "lower the rate or the token scale" if goal.token_factor else "lower the rate"
        notes.append(
            f"the engine will be busy {busy_ratio:.0%} of the time, above the target of "
            f"{goal.busy_ratio:.0%}; {remedy}"
        )
    elif goal.busy_ratio - busy_ratio > _BUSY_MISSED_RATIO:
        remedy = "raise the token scale" if goal.token_factor else "raise the rate"
        notes.append(
            f"the engine will be busy only {busy_ratio:.0%} of the time, below the target of "
            f"{goal.busy_ratio:.0%}; {remedy}"
        )
    if load.end_s > goal.duration_s * 1.25:
        notes.append(
            f"the last answers end {load.end_s - goal.duration_s:.0f} s after the replay, "
            "because a burst comes late or the engine is overloaded"
        )
    return notes
