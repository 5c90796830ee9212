"""The token log of one request and what follows from each event in it.  Pure.

An engine is free to vanish at any token.  So the log is the truth: a token counts once it is here,
the client is only ever sent tokens from here, and what an engine had made but not delivered is made
again elsewhere from prompt + log.  Invariants (property-tested):

* tokens delivered = tokens logged, in order, none twice;
* the spans cover the log without gap or overlap, and each token carries the version that made it;
* a finished log never grows.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

SEED_STEP = 0x9E3779B97F4A7C15
"""Odd constant of Fibonacci hashing: seeds of neighbouring seams come out far apart."""

SEED_MODULUS = 2**63
"""vLLM takes seeds as signed 64-bit integers."""

FINISHED_REASONS = frozenset({"stop", "length", "repetition"})
"""Finish reasons of vLLM that end a request by its own rules; ``abort`` and ``error`` do not."""


class VersionSpan(NamedTuple):
    """``[start, end)`` of output tokens that one weight version made, in vLLM's shape."""

    version: str
    start: int
    end: int


class Step(StrEnum):
    """What the owner of a trajectory does next."""

    DONE = "done"
    CONTINUE = "continue"


class NonsenseError(ValueError):
    """An engine's answer cannot be true.  Nothing of it was logged; break the segment off."""


class FinishedError(RuntimeError):
    """Our own bug: an event for a log that is finished, or without an open segment."""


@dataclass(slots=True)
class Segment:
    """One stay on one engine."""

    engine_id: str
    epoch: int
    version: str
    """The engine's verified version when the stay began; it cannot change during one."""
    start: int
    end: int
    ended_by: str | None = None
    reported: tuple[VersionSpan, ...] | None = None
    """The engine's own word on the versions, in positions of the whole output."""

    @property
    def spans(self) -> Sequence[VersionSpan]:
        if self.reported is not None:
            return self.reported
        return (VersionSpan(self.version, self.start, self.end),)


@dataclass(slots=True)
class Decision:
    """What follows from the end of a segment."""

    action: Step
    reason: str
    is_contradicted: bool = False
    """The engine reported another weight version than the verified one."""


@dataclass(slots=True)
class TrajectoryLog:
    """Append-only; ``max_tokens`` None leaves the length to the engine's context."""

    max_tokens: int | None
    has_logprobs: bool
    tokens: array[int] = field(default_factory=lambda: array("i"))
    logprobs: list[bytes] = field(default_factory=list)
    """One JSON object per token, as the engine wrote it; empty when none were asked for."""
    segments: list[Segment] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    _is_open: bool = False

    def begin(self, engine_id: str, epoch: int, version: str) -> None:
        """A segment starts on an engine whose weights are verified to be ``version``."""
        if self.finish_reason is not None or self._is_open:
            raise FinishedError("a segment begins in a finished log or inside another segment")
        at = len(self.tokens)
        self.segments.append(Segment(engine_id, epoch, version, at, at))
        self._is_open = True

    def append(self, token_ids: Sequence[int], logprobs: Sequence[bytes] | None) -> None:
        """Log what arrived from the open segment's engine.

        Raises:
            NonsenseError: too many tokens, impossible ids, or not one logprob per token.
        """
        if self.finish_reason is not None or not self._is_open:
            raise FinishedError("tokens arrive without an open segment")
        if self.max_tokens is not None and len(self.tokens) + len(token_ids) > self.max_tokens:
            raise NonsenseError(f"more than max_tokens={self.max_tokens} tokens")
        if any(not 0 <= token_id < 2**31 for token_id in token_ids):
            raise NonsenseError("a token id outside 0…2³¹")
        if self.has_logprobs:
            if logprobs is None or len(logprobs) != len(token_ids):
                got = "no" if logprobs is None else str(len(logprobs))
                raise NonsenseError(f"{got} logprobs for {len(token_ids)} tokens")
            self.logprobs.extend(logprobs)
        self.tokens.extend(token_ids)
        self.segments[-1].end = len(self.tokens)

    def end(
        self,
        finish_reason: str,
        stop_reason: int | str | None,
        reported: Sequence[VersionSpan] | None,
    ) -> Decision:
        """The engine ended the open segment by itself and says which versions made it."""
        segment = self._close(finish_reason)
        is_contradicted = False
        if reported is not None and segment.end > segment.start:
            spans = _rebased(reported, segment)
            is_contradicted = spans is None or any(s.version != segment.version for s in spans)
            segment.reported = spans
        if finish_reason in FINISHED_REASONS:
            self.finish_reason, self.stop_reason = finish_reason, stop_reason
            return Decision(Step.DONE, finish_reason, is_contradicted)
        return self._after(finish_reason, is_contradicted)

    def break_off(self, cause: str) -> Decision:
        """The open segment ended without the engine's word (connection, stall, reclaim, …)."""
        self._close(cause)
        return self._after(cause, False)

    def _close(self, cause: str) -> Segment:
        if self.finish_reason is not None or not self._is_open:
            raise FinishedError("a segment ends that is not open")
        self._is_open = False
        self.segments[-1].ended_by = cause
        return self.segments[-1]

    def _after(self, cause: str, is_contradicted: bool) -> Decision:
        # The engine may be gone between the last token and its own word that it was the last.
        if self.max_tokens is not None and len(self.tokens) >= self.max_tokens:
            self.finish_reason = "length"
            return Decision(Step.DONE, "length", is_contradicted)
        return Decision(Step.CONTINUE, cause, is_contradicted)

    @property
    def spans(self) -> list[VersionSpan]:
        """Version spans of everything logged; neighbours of one version are one span."""
        merged: list[VersionSpan] = []
        for segment in self.segments:
            for span in segment.spans:
                if span.start == span.end:
                    continue
                if merged and merged[-1].version == span.version:
                    merged[-1] = merged[-1]._replace(end=span.end)
                else:
                    merged.append(span)
        return merged


def _rebased(reported: Sequence[VersionSpan], segment: Segment) -> tuple[VersionSpan, ...] | None:
    """The engine's spans in positions of the whole output; None unless they tile the segment."""
    at = 0
    spans = []
    for version, start, end in reported:
        if start != at or end < start:
            return None
        at = end
        spans.append(
            VersionSpan(canonical_version(version), segment.start + start, segment.start + end)
        )
    return tuple(spans) if at == segment.end - segment.start else None


def canonical_version(reported: str) -> str:
    """vLLM calls the weights it was started with ``default``; that is version 0."""
    return "0" if reported == "default" else reported


def continue_sampling(sampling: Mapping[str, Any], generated: int) -> dict[str, Any]:
    """Sampling parameters for what remains after ``generated`` logged tokens.

    Lengths shrink by what is there.  A seed is moved on: the same one would draw the same numbers
    again at another place, which correlates the parts.  Everything else that the endpoint lets
    through depends on prompt + output together, or on one token alone, and stays.
    """
    remaining = dict(sampling)
    if generated == 0:
        return remaining
    if remaining.get("max_tokens") is not None:
        remaining["max_tokens"] -= generated
    if remaining.get("min_tokens"):
        remaining["min_tokens"] = max(0, remaining["min_tokens"] - generated)
    if remaining.get("seed") is not None:
        remaining["seed"] = (remaining["seed"] + generated * SEED_STEP) % SEED_MODULUS
    return remaining
