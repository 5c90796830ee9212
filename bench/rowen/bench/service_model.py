"""What serving a list of requests costs an engine: a small model with measured coefficients.

Used to scale a trace to a machine, never to decide anything while serving.  The model is that of
an engine with continuous batching and chunked prefill, which runs one step after another:

    step_ms = prefill_ms_per_token x prefill tokens in the step
            + decode_step_ms + decode_sequence_ms x (sequences that decode - 1)   if any decodes

Prefill and decode costs add up (in truth they overlap a little), front-end work is left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf

from rowen.bench.errors import WindowError


@dataclass(frozen=True, slots=True)
class ServiceModel:
    """Coefficients of one engine on one machine, measured (see ``calibrate``)."""

    prefill_ms_per_token: float
    decode_step_ms: float
    """A decode step of a single sequence."""
    decode_sequence_ms: float = 0.0
    """What each further sequence adds to a decode step."""
    max_sequences: int = 32
    """The engine's ``--max-num-seqs``."""
    step_tokens: int = 2048
    """The engine's ``--max-num-batched-tokens``: bound of one step."""
    cache_block_tokens: int = 128
    """The engine's KV block size: shared prefixes are reused in whole blocks (vLLM on CPU: 128)."""

    def __post_init__(self) -> None:
        for name in ("prefill_ms_per_token", "decode_step_ms"):
            if not 0 < getattr(self, name) < inf:
                raise WindowError(
                    f"{name} is {getattr(self, name)}; the model needs a measured time above 0"
                )
        for name in ("max_sequences", "step_tokens", "cache_block_tokens"):
            if getattr(self, name) < 1:
                raise WindowError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.decode_sequence_ms < inf:
            raise WindowError(
                f"decode_sequence_ms is {self.decode_sequence_ms}; it must be 0 or more"
            )


@dataclass(frozen=True, slots=True)
class Job:
    """One request as the model sees it: prompt tokens that must be computed, tokens to make."""

    at_s: float
    prefill_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """What the model expects: seconds of compute inside the window, and when the last one ends."""

    busy_s: float
    end_s: float
    most_running: int


def expected_load(jobs: Sequence[Job], model: ServiceModel, window_s: float) -> Load:
    """Run the jobs (sorted by ``at_s``) through the model; only time before ``window_s`` counts."""
    now_s = 0.0
    busy_s = 0.0
    most_running = 0
    arrived = 0
    waiting: deque[list[int]] = deque()  # [prefill tokens left, output tokens]
    running: list[int] = []  # output tokens left, each at least 1
    while arrived < len(jobs) or waiting or running:
        if not waiting and not running:
            now_s = max(now_s, jobs[arrived].at_s)
        while arrived < len(jobs) and jobs[arrived].at_s <= now_s:
            waiting.append([max(1, jobs[arrived].prefill_tokens), jobs[arrived].output_tokens])
            arrived += 1
        decoding = len(running)
        prefilled, started = _prefill(waiting, model, decoding)
        step_s = _step_ms(model, prefilled, decoding) / 1000.0
        steps = 1
        if not prefilled:
            # Nothing changes until a sequence ends or a request comes: take these steps at once.
            steps = min(running)
            if arrived < len(jobs):
                steps = min(steps, max(1, ceil((jobs[arrived].at_s - now_s) / step_s)))
        end_s = now_s + steps * step_s
        busy_s += max(0.0, min(end_s, window_s) - min(now_s, window_s))
        now_s = end_s
        running = [left - steps for left in running if left > steps]
        running.extend(tokens - 1 for tokens in started if tokens > 1)
        most_running = max(most_running, len(running), decoding)
    return Load(busy_s=busy_s, end_s=now_s, most_running=most_running)


def _prefill(
    waiting: deque[list[int]], model: ServiceModel, decoding: int
) -> tuple[int, list[int]]:
    """Take one step's prefill tokens off the queue, first come first served.

    Returns the tokens taken and the output lengths of the requests whose prompt is complete.
    """
    budget = max(1, model.step_tokens - decoding)
    prefilled = 0
    started: list[int] = []
    while waiting and prefilled < budget and decoding + len(started) < model.max_sequences:
        take = min(waiting[0][0], budget - prefilled)
        prefilled += take
        waiting[0][0] -= take
        if waiting[0][0] == 0:
            started.append(waiting.popleft()[1])
    return prefilled, started


def _step_ms(model: ServiceModel, prefilled: int, decoding: int) -> float:
    decode_ms = (
        model.decode_step_ms + model.decode_sequence_ms * (decoding - 1) if decoding else 0.0
    )
    return model.prefill_ms_per_token * prefilled + decode_ms
