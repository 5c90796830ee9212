"""The guard: from readings to an open or closed gate and a cap on concurrent rollouts.

Pure: it reads no clock (ages and elapsed time are in the readings), logs nothing, awaits nothing.
Rules run from the most to the least severe and the first match wins.

Invariants, each of them property-tested:

* The kill switch wins over everything; not knowing its state counts as on.
* A missing, stale or nonsensical reading closes the gate.
* Monotone: of two histories, the one with a worse reading anywhere never ends with more harvest.
  This is why *every* closing, whatever its reason, starts the same cool-down: were a stale reading
  cheaper than a breach, losing sight of the engine would pay.
* Cut at once, grow slowly: one bad reading cuts, growth needs ``growth.every_ms`` of good ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from rowen.policies.schema import HarvestPolicy, Mode, Objective


class Gate(StrEnum):
    """May the rollout engine compute at all?"""

    OPEN = "open"
    CLOSED = "closed"


class Action(StrEnum):
    """What a decision does to the harvest."""

    CLOSE = "close"
    CUT = "cut"
    HOLD = "hold"
    OPEN = "open"
    GROW = "grow"


class Reason(StrEnum):
    """Why; the same word is the metric label, the log field and what ``status`` prints."""

    KILL_SWITCH = "kill_switch"
    KILL_SWITCH_UNKNOWN = "kill_switch_unknown"
    MODE_OFF = "mode_off"
    TICK_LATE = "tick_late"
    PROBE_MISSING = "probe_missing"
    PROBE_STALE = "probe_stale"
    METRICS_MISSING = "metrics_missing"
    METRICS_STALE = "metrics_stale"
    READING_INVALID = "reading_invalid"
    MEMORY_UNKNOWN = "memory_unknown"
    MEMORY_SHORT = "memory_short"
    TTFT_BREACHED = "ttft_breached"
    TPOT_BREACHED = "tpot_breached"
    TTFT_NEAR = "ttft_near"
    TPOT_NEAR = "tpot_near"
    COOL_DOWN = "cool_down"
    PREVIEW = "preview"
    GROWING = "growing"
    STEADY = "steady"
    AT_MAXIMUM = "at_maximum"


@dataclass(frozen=True, slots=True)
class ObjectiveReading:
    """A latency percentile over an objective's window; ``value_ms`` is None with no samples."""

    value_ms: float | None
    samples: int


@dataclass(frozen=True, slots=True)
class GuardSeen:
    """Everything the guard looks at.  None means unknown, which is the worst case."""

    elapsed_ms: float
    """Time since the previous decision."""
    kill_switch: bool | None
    mode: Mode
    """The stricter of the policy's mode and the operator's."""
    probe_age_ms: float | None
    """Age of the serving engine's last heartbeat in the lane."""
    metrics_age_ms: float | None
    """Age of the last complete scrape of the serving engine's metrics."""
    ttft: ObjectiveReading | None
    tpot: ObjectiveReading | None
    available_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class GuardState:
    """What the guard remembers from one decision to the next."""

    gate: Gate
    sequence_cap: int
    """The cap while open; 0 while closed."""
    steady_ms: float
    """Time of good readings without a break: towards opening, or, once open, towards growth."""
    is_preview: bool = False
    """The state is of a preview, where nothing was really harvested."""


START = GuardState(gate=Gate.CLOSED, sequence_cap=0, steady_ms=0.0)
"""Nobody knows what was before a start, so it is treated like a breach: closed for a cool-down."""


@dataclass(frozen=True, slots=True)
class GuardDecision:
    """What to do and why."""

    action: Action
    reason: Reason
    detail: str
    """The reading that decided and the bound it was held against, for people."""
    gate: Gate
    """What the lane is told.  Always closed in preview; ``state`` then says what would be."""
    sequence_cap: int
    """Most concurrent rollouts now; 0 exactly when the gate is closed."""
    state: GuardState


@dataclass(frozen=True, slots=True)
class _Finding:
    reason: Reason
    detail: str


def decide(previous: GuardState, seen: GuardSeen, policy: HarvestPolicy) -> GuardDecision:
    """Decide on the gate and the sequence cap; never raises, whatever the readings."""
    is_preview = seen.mode is Mode.PREVIEW
    if previous.is_preview != is_preview:
        # What a preview would have grown to was never tried on real traffic: begin anew.
        previous = START
    stop = _find_stop(seen, policy)
    if stop is not None:
        return _closed(stop.reason, stop.detail, steady_ms=0.0, is_preview=is_preview)
    near = _find_near(seen, policy)
    if previous.gate is Gate.CLOSED:
        decision = _consider_opening(previous, seen, policy, near, is_preview)
    else:
        decision = _consider_growing(previous, seen, policy, near, is_preview)
    return _previewed(decision) if is_preview else decision


def _find_stop(seen: GuardSeen, policy: HarvestPolicy) -> _Finding | None:
    """The most severe reason to be closed, if there is one."""
    spec = policy.spec
    if seen.kill_switch is None:
        return _Finding(Reason.KILL_SWITCH_UNKNOWN, "the kill switch cannot be read")
    if seen.kill_switch:
        return _Finding(Reason.KILL_SWITCH, "the kill switch is on")
    if seen.mode is Mode.OFF:
        return _Finding(Reason.MODE_OFF, "the harvest is switched off")
    if not 0 <= seen.elapsed_ms <= spec.freshness.daemon_heartbeat_ms:  # NaN fails as well
        bound_ms = spec.freshness.daemon_heartbeat_ms
        return _Finding(
            Reason.TICK_LATE,
            f"{seen.elapsed_ms:.0f} ms since the last decision, bound {bound_ms} ms",
        )
    return (
        _find_stale(
            "probe heartbeat",
            seen.probe_age_ms,
            spec.freshness.probe_heartbeat_ms,
            Reason.PROBE_MISSING,
            Reason.PROBE_STALE,
        )
        or _find_stale(
            "metrics",
            seen.metrics_age_ms,
            spec.freshness.metrics_ms,
            Reason.METRICS_MISSING,
            Reason.METRICS_STALE,
        )
        or _find_invalid("ttft", seen.ttft)
        or _find_invalid("tpot", seen.tpot)
        or _find_memory_short(seen.available_memory_bytes, policy)
        or _find_breach("ttft", seen.ttft, spec.objectives.ttft, Reason.TTFT_BREACHED)
        or _find_breach("tpot", seen.tpot, spec.objectives.tpot, Reason.TPOT_BREACHED)
    )


def _find_stale(
    name: str, age_ms: float | None, bound_ms: int, missing: Reason, stale: Reason
) -> _Finding | None:
    if age_ms is None:
        return _Finding(missing, f"no {name} has been seen")
    if not math.isfinite(age_ms) or age_ms < 0:
        return _Finding(Reason.READING_INVALID, f"{name} has an age of {age_ms} ms")
    if age_ms > bound_ms:
        return _Finding(stale, f"{name} is {age_ms:.0f} ms old, bound {bound_ms} ms")
    return None


def _find_invalid(name: str, reading: ObjectiveReading | None) -> _Finding | None:
    if reading is None:
        return _Finding(Reason.METRICS_MISSING, f"no {name} in the metrics")
    value_ms = reading.value_ms
    if reading.samples < 0 or (value_ms is None and reading.samples > 0):
        return _Finding(
            Reason.READING_INVALID, f"{name} is {value_ms} ms over {reading.samples} samples"
        )
    if value_ms is not None and (not math.isfinite(value_ms) or value_ms < 0):
        return _Finding(Reason.READING_INVALID, f"{name} reads {value_ms} ms")
    return None


def _find_memory_short(available_bytes: int | None, policy: HarvestPolicy) -> _Finding | None:
    if available_bytes is None:
        return _Finding(Reason.MEMORY_UNKNOWN, "the available memory cannot be read")
    if is_memory_short(available_bytes, policy):
        bound_bytes = policy.spec.resources.min_available_memory_bytes
        return _Finding(
            Reason.MEMORY_SHORT,
            f"{available_bytes / 2**20:.0f} MiB available, bound {bound_bytes / 2**20:.0f} MiB",
        )
    return None


def is_memory_short(available_bytes: int | None, policy: HarvestPolicy) -> bool:
    """Is there less memory than the policy leaves to serving?  Unknown counts as short."""
    if available_bytes is None:
        return True
    return available_bytes < policy.spec.resources.min_available_memory_bytes


def _find_breach(
    name: str, reading: ObjectiveReading | None, objective: Objective, reason: Reason
) -> _Finding | None:
    if reading is None or reading.value_ms is None or reading.samples < objective.min_samples:
        return None
    if reading.value_ms > objective.threshold_ms:
        return _Finding(reason, _describe(name, reading.value_ms, objective, 1.0))
    return None


def _describe(name: str, value_ms: float, objective: Objective, ratio: float) -> str:
    share = "" if ratio == 1.0 else f"{ratio:g} x "
    return (
        f"{name} p{objective.percentile:g} is {value_ms:.0f} ms, "
        f"bound {share}{objective.threshold_ms:g} ms"
    )


@dataclass(frozen=True, slots=True)
class _Near:
    reason: Reason
    detail: str
    is_cut: bool


def _find_near(seen: GuardSeen, policy: HarvestPolicy) -> _Near | None:
    """The objective inside a guard band, a cut before a mere stop of growth."""
    bands = (
        ("ttft", seen.ttft, policy.spec.objectives.ttft, Reason.TTFT_NEAR),
        ("tpot", seen.tpot, policy.spec.objectives.tpot, Reason.TPOT_NEAR),
    )
    held: _Near | None = None
    for name, reading, objective, reason in bands:
        if reading is None or reading.value_ms is None:
            continue
        value_ms, threshold_ms = reading.value_ms, objective.threshold_ms
        has_samples = reading.samples >= objective.min_samples
        if has_samples and value_ms >= objective.cut_ratio * threshold_ms:
            detail = _describe(name, value_ms, objective, objective.cut_ratio)
            return _Near(reason, detail, is_cut=True)
        if held is None and value_ms >= objective.recover_ratio * threshold_ms:
            detail = _describe(name, value_ms, objective, objective.recover_ratio)
            held = _Near(reason, detail, is_cut=False)
    return held


def _consider_opening(
    previous: GuardState,
    seen: GuardSeen,
    policy: HarvestPolicy,
    near: _Near | None,
    is_preview: bool,
) -> GuardDecision:
    growth = policy.spec.growth
    if near is not None:
        return _closed(near.reason, near.detail, steady_ms=0.0, is_preview=is_preview)
    steady_ms = previous.steady_ms + seen.elapsed_ms
    if steady_ms < growth.cool_down_ms:
        detail = f"{steady_ms:.0f} of {growth.cool_down_ms} ms of good readings"
        return _closed(Reason.COOL_DOWN, detail, steady_ms=steady_ms, is_preview=is_preview)
    state = GuardState(Gate.OPEN, growth.initial_sequences, 0.0, is_preview)
    detail = f"opens with {growth.initial_sequences} sequences"
    return _open(Action.OPEN, Reason.GROWING, detail, state)


def _consider_growing(
    previous: GuardState,
    seen: GuardSeen,
    policy: HarvestPolicy,
    near: _Near | None,
    is_preview: bool,
) -> GuardDecision:
    growth, maximum = policy.spec.growth, policy.spec.resources.max_sequences
    cap = min(previous.sequence_cap, maximum)  # a reload may have lowered the maximum
    if near is not None:
        cut = min(cap, growth.initial_sequences) if near.is_cut else cap
        action = Action.CUT if cut < cap else Action.HOLD
        return _open(action, near.reason, near.detail, GuardState(Gate.OPEN, cut, 0.0, is_preview))
    if cap == maximum:
        state = GuardState(Gate.OPEN, cap, 0.0, is_preview)
        return _open(Action.HOLD, Reason.AT_MAXIMUM, f"{cap} sequences, the maximum", state)
    steady_ms = previous.steady_ms + seen.elapsed_ms
    if steady_ms < growth.every_ms:
        state = GuardState(Gate.OPEN, cap, steady_ms, is_preview)
        detail = f"{cap} sequences, grows every {growth.every_ms} ms of good readings"
        return _open(Action.HOLD, Reason.STEADY, detail, state)
    grown = next_cap(cap, policy)
    detail = f"from {cap} to {grown} sequences"
    state = GuardState(Gate.OPEN, grown, 0.0, is_preview)
    return _open(Action.GROW, Reason.GROWING, detail, state)


def next_cap(cap: int, policy: HarvestPolicy) -> int:
    """The sequence cap one growth step above ``cap``, within the policy's maximum."""
    grown = max(cap + 1, math.floor(cap * policy.spec.growth.step_factor))
    return min(grown, policy.spec.resources.max_sequences)


def _closed(reason: Reason, detail: str, *, steady_ms: float, is_preview: bool) -> GuardDecision:
    state = GuardState(Gate.CLOSED, 0, steady_ms, is_preview)
    return GuardDecision(Action.CLOSE, reason, detail, Gate.CLOSED, 0, state)


def _open(action: Action, reason: Reason, detail: str, state: GuardState) -> GuardDecision:
    return GuardDecision(action, reason, detail, Gate.OPEN, state.sequence_cap, state)


def _previewed(decision: GuardDecision) -> GuardDecision:
    """The same decision with nothing opened; ``state`` and ``detail`` say what it would do."""
    if decision.gate is Gate.CLOSED:
        return decision
    detail = f"preview: would {decision.action} ({decision.reason}: {decision.detail})"
    return GuardDecision(Action.CLOSE, Reason.PREVIEW, detail, Gate.CLOSED, 0, decision.state)
