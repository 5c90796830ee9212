"""What was done to a trace to replay it on this machine: printed, and kept in ``result.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Origin = Literal["fitted", "given"]


@dataclass(frozen=True, slots=True)
class Scale:
    """Every scaling, clipping and rounding between a trace and the requests that are sent."""

    source: str
    """The trace file, or the generator and its seed."""
    trace_requests: int
    trace_span_s: float
    trace_requests_per_s: float
    trace_peak_to_mean_1s: float
    """Largest count in one second of the trace over the mean (0 for a trace below 1 s)."""
    slice_start_s: float
    slice_length_s: float
    """The part of the trace that is replayed, in seconds of the trace."""
    keep_every: int
    """1: every request of the slice; n: every n-th, where arrival times are too coarse to slow."""
    duration_s: float
    """How long the replay lasts."""
    rate_factor: float
    """Seconds of the trace per second of the replay: 2 replays twice as fast."""
    rate_origin: Origin
    token_factor: float
    """Tokens sent per token of the trace, for prompts and answers alike."""
    token_origin: Origin
    requests: int
    requests_per_s: float
    peak_1s: int
    """Most requests inside one second of the replay."""
    burst_window_s: float
    """The window (in seconds of the trace) in which bursts are counted."""
    burst_requests: int
    trace_burst_requests: int
    """Largest burst inside the slice, and in the whole trace."""
    context_tokens: int
    inputs_clipped: int
    outputs_clipped: int
    inputs_raised: int
    outputs_raised: int
    """Requests whose scaled length was cut to the context, or raised to the least that counts."""
    input_p50_tokens: float
    input_p99_tokens: float
    output_p50_tokens: float
    output_p99_tokens: float
    """Lengths as they are sent."""
    trace_input_p50_tokens: float
    trace_output_p50_tokens: float
    """Lengths in the same slice before scaling."""
    prefix_cached_tokens: int
    """Prompt tokens that the engine is expected to find in its prefix cache."""
    busy_target_ratio: float
    busy_expected_ratio: float
    """Share of the replay during which the engine computes: asked for, and by the model."""
    expected_end_s: float
    """When the model expects the last answer to end (after ``duration_s`` in a late burst)."""
    prefill_ms_per_token: float
    decode_step_ms: float
    decode_sequence_ms: float
    """The service model, as calibrated."""
    notes: tuple[str, ...]
    """What could not be kept, one sentence each; empty when all of it was."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "notes": list(self.notes)}

    def lines(self) -> Sequence[str]:
        """Return the scaling as lines for people."""
        kept = "" if self.keep_every == 1 else f", one request in {self.keep_every}"
        burst = "the largest of the trace"
        if self.burst_requests < self.trace_burst_requests:
            burst = f"the trace's largest has {self.trace_burst_requests}"
        return [
            f"traffic     {self.source}: {self.trace_requests} requests in "
            f"{self.trace_span_s:.0f} s, {self.trace_requests_per_s:.2f}/s, "
            f"1 s peak/mean {self.trace_peak_to_mean_1s:.1f}",
            f"slice       {self.slice_length_s:.1f} s from {self.slice_start_s:.1f} s{kept}; "
            f"largest burst {self.burst_requests} requests in {self.burst_window_s:.1f} s "
            f"({burst})",
            f"rate        x {self.rate_factor:.4g} ({self.rate_origin}): {self.requests} requests "
            f"in {self.duration_s:.0f} s, {self.requests_per_s:.2f}/s, "
            f"up to {self.peak_1s} in one second",
            f"tokens      x {self.token_factor:.4g} ({self.token_origin}): prompts p50/p99 "
            f"{self.input_p50_tokens:.0f}/{self.input_p99_tokens:.0f}, "
            f"answers {self.output_p50_tokens:.0f}/{self.output_p99_tokens:.0f}; clipped "
            f"to the context of {self.context_tokens}: {self.inputs_clipped} prompts, "
            f"{self.outputs_clipped} answers; "
            f"raised to the least: {self.inputs_raised} prompts, {self.outputs_raised} answers",
            f"busy        expected {self.busy_expected_ratio:.0%} of the time (target "
            f"{self.busy_target_ratio:.0%}; {self.prefill_ms_per_token:.2f} ms per prompt token, "
            f"{self.decode_step_ms:.0f} ms per decode step + {self.decode_sequence_ms:.1f} ms per "
            "further sequence)",
            *(f"note        {note}" for note in self.notes),
        ]
