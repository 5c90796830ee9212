"""The policy file: what an operator of a serving node allows the harvest to do.

Kubernetes-shaped (``apiVersion``, ``kind``, ``metadata``, ``spec``), so that one document can be a
file or a ConfigMap value.  Every field carries its unit in its name.  The objectives say where the
line is; guard bands, as ratios of the threshold, say how far from it the harvest has to stay.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

API_VERSION = "rowen.dev/v1alpha1"
KIND = "HarvestPolicy"

Milliseconds = Annotated[int, Field(gt=0, le=86_400_000)]


class Strict(BaseModel):
    """Base of every configuration document: unknown keys fail loudly, values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Mode(StrEnum):
    """How far the harvest goes: do it, only say what it would do, or nothing."""

    ENFORCE = "enforce"
    PREVIEW = "preview"
    OFF = "off"


class Objective(Strict):
    """One latency objective of the serving engine, read from its ``/metrics`` histograms."""

    percentile: Annotated[float, Field(gt=0, lt=100)]
    """Which percentile of the window is held against the threshold, for example 99."""
    threshold_ms: Annotated[float, Field(gt=0)]
    """Above this the objective is breached: the gate closes and the cool-down starts."""
    window_s: Annotated[float, Field(ge=2, le=3600)]
    """Length of the sliding window; at least two scrapes of one second."""
    min_samples: Annotated[int, Field(ge=1)]
    """With fewer samples in the window the objective can stop growth but not close the gate."""
    cut_ratio: Annotated[float, Field(gt=0, le=1)] = 0.95
    """From this share of the threshold on, concurrency is cut to ``growth.initial_sequences``.
    Heracles (ISCA 2015) cuts below 5 % slack."""
    recover_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.90
    """Growth, and opening after a breach, need a value below this share of the threshold.
    Heracles forbids growth below 10 % slack; Caelus recovers at 0.9 of the objective."""

    @model_validator(mode="after")
    def _bands_are_ordered(self) -> Self:
        if self.recover_ratio >= self.cut_ratio:
            raise ValueError(
                f"recover_ratio ({self.recover_ratio}) must be below cut_ratio ({self.cut_ratio}), "
                "or the harvest would grow where it is cut: lower recover_ratio"
            )
        return self


class Objectives(Strict):
    """What users of the serving engine are promised."""

    ttft: Objective
    """Time from arrival to first token (``vllm:time_to_first_token_seconds``)."""
    tpot: Objective
    """A request's mean time per output token (``vllm:request_time_per_output_token_seconds``)."""


class Freshness(Strict):
    """How old a reading may be.  An older one counts as missing, and missing means closed."""

    probe_heartbeat_ms: Annotated[int, Field(ge=150, le=900)] = 500
    """The serving engine's probe writes at every step and every 100 ms when idle.  At most 900, so
    that with one 100 ms tick the gate is closed within the second that Rowen promises."""
    daemon_heartbeat_ms: Annotated[int, Field(ge=150, le=900)] = 500
    """The rollout engine closes by itself when the daemon has been silent for this long; a tick of
    the daemon's own loop that comes later than this closes as well."""
    metrics_ms: Annotated[int, Field(ge=1000, le=60_000)] = 5000
    """Age of the last complete scrape of the serving engine's ``/metrics`` (one per second)."""


class Growth(Strict):
    """Cut at once, grow slowly: how concurrency comes back after every cut."""

    initial_sequences: Annotated[int, Field(ge=1)] = 2
    """Concurrent rollouts directly after opening and after a cut."""
    step_factor: Annotated[float, Field(gt=1, le=2)] = 1.5
    """Each growth multiplies the concurrency by this (at least one more sequence)."""
    every_ms: Milliseconds = 1000
    """Continuous good readings needed before each growth."""
    cool_down_ms: Milliseconds = 10_000
    """Continuous good readings needed to open again, whatever closed the gate (or a restart)."""


class Resources(Strict):
    """Bounds that hold whatever the objectives say."""

    max_sequences: Annotated[int, Field(ge=1)]
    """Most concurrent rollouts; the rollout engine's own ``max_num_seqs`` bounds it as well."""
    min_available_memory_bytes: Annotated[int, Field(ge=0)]
    """Below this much available host memory the gate closes and the engine is reclaimed."""


class Reclaim(Strict):
    """Deadlines of the reclaim ladder: run, gate, drain, terminate, kill."""

    acknowledge_ms: Milliseconds = 2000
    """The rollout engine must show a living, obedient gate within this time, or it is reclaimed."""
    drain_after_ms: Milliseconds = 10_000
    """A gate closed for this long without a break moves the trajectories to other engines."""
    resume_after_ms: Milliseconds = 1000
    """The gate must stay open for this long before a drained or stopped engine is granted again."""
    terminate_after_ms: Milliseconds = 10_000
    """From draining to SIGTERM, and only when memory is short, the kill switch is on, or the engine
    ignores its gate."""
    kill_after_ms: Milliseconds = 10_000
    """From SIGTERM to SIGKILL."""


class Metadata(Strict):
    """Names the policy."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
    """An RFC 1123 label: lower-case letters, digits and dashes, at most 63."""


class Spec(Strict):
    """The policy itself."""

    mode: Mode = Mode.ENFORCE
    """``enforce`` harvests, ``preview`` decides and reports but stays closed, ``off`` is closed."""
    objectives: Objectives
    """What users of the serving engine are promised."""
    freshness: Freshness = Freshness()
    """How old readings may be."""
    growth: Growth = Growth()
    """How concurrency comes back."""
    resources: Resources
    """Bounds that always hold."""
    reclaim: Reclaim = Reclaim()
    """Deadlines of the reclaim ladder."""

    @model_validator(mode="after")
    def _growth_starts_within_bounds(self) -> Self:
        if self.growth.initial_sequences > self.resources.max_sequences:
            raise ValueError(
                f"growth.initial_sequences ({self.growth.initial_sequences}) is above "
                f"resources.max_sequences ({self.resources.max_sequences}): lower it"
            )
        return self


class HarvestPolicy(Strict):
    """A policy file."""

    apiVersion: Literal["rowen.dev/v1alpha1"]
    """Always ``rowen.dev/v1alpha1``."""
    kind: Literal["HarvestPolicy"]
    """Always ``HarvestPolicy``."""
    metadata: Metadata
    """Names the policy."""
    spec: Spec
    """The policy itself."""
