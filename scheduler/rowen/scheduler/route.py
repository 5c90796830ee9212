"""Which engine gets a trajectory: filter, score in [0, 1], pick.  Pure.

Called by the dispatcher for every waiting trajectory while any engine has room.  Dedicated engines
are preferred at equal load since they are never taken away; opportunistic ones the more so the
longer they have been left in peace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from rowen.policies.lease import EngineKind


class Action(StrEnum):
    SEND = "send"
    WAIT = "wait"


class Reason(StrEnum):
    """Why; also the metric label."""

    BEST_SCORE = "best_score"
    ONLY_CHOICE = "only_choice"
    NO_ENGINE = "no_engine"
    NO_ROOM = "no_room"
    TOO_STALE = "too_stale"


@dataclass(frozen=True, slots=True)
class RoutePolicy:
    """Weights of the scores; only their ratios count."""

    load: float = 0.6
    affinity: float = 0.25
    safety: float = 0.15
    base_risk_ratio: float = 0.3
    """Reclaim risk of an opportunistic engine that was never disturbed."""
    calm_s: float = 30.0
    """Undisturbed time after which the risk above the base has halved."""


DEFAULT_POLICY = RoutePolicy()


@dataclass(frozen=True, slots=True)
class EngineView:
    """An engine as the router sees it."""

    engine_id: str
    kind: EngineKind
    version: int
    running: int
    capacity: int
    """Most requests at once; 0 while it takes none."""
    is_routable: bool
    """READY or THROTTLED."""
    disturbed_age_s: float | None = None
    """Since it was last throttled or reclaimed; None for never."""


@dataclass(frozen=True, slots=True)
class RouteSeen:
    """What one trajectory asks for, and the engines there are."""

    engines: Sequence[EngineView]
    target_version: int
    max_staleness: int | None = None
    """Most versions behind the newest; None takes any verified version."""
    trajectory_engine: str | None = None
    """Where the previous turn of the same trajectory ran and its prefix may still be cached."""
    group_engines: frozenset[str] = frozenset()
    """Where samples of the same prompt ran."""


@dataclass(frozen=True, slots=True)
class RouteDecision:
    action: Action
    reason: Reason
    engine_id: str | None = None
    score: float = 0.0


def reclaim_risk(engine: EngineView, policy: RoutePolicy) -> float:
    """Risk in [0, 1] that the engine is taken away soon."""
    if engine.kind is EngineKind.DEDICATED:
        return 0.0
    if engine.disturbed_age_s is None:
        return policy.base_risk_ratio
    recent = policy.calm_s / (policy.calm_s + engine.disturbed_age_s)
    return policy.base_risk_ratio + (1.0 - policy.base_risk_ratio) * recent


def score(engine: EngineView, seen: RouteSeen, policy: RoutePolicy) -> float:
    """How well the engine suits, in [0, 1]."""
    if engine.engine_id == seen.trajectory_engine:
        affinity = 1.0
    else:
        affinity = 0.5 if engine.engine_id in seen.group_engines else 0.0
    free = max(0.0, 1.0 - engine.running / engine.capacity) if engine.capacity else 0.0
    weighted = (
        policy.load * free
        + policy.affinity * affinity
        + policy.safety * (1.0 - reclaim_risk(engine, policy))
    )
    return weighted / (policy.load + policy.affinity + policy.safety)


def decide(
    previous: str | None, seen: RouteSeen, policy: RoutePolicy = DEFAULT_POLICY
) -> RouteDecision:
    """Choose an engine, or say why there is none now.

    Args:
        previous: the engine this trajectory has just left by a fault; taken again only when no
            other has room.
    """
    routable = [e for e in seen.engines if e.is_routable]
    if not routable:
        return RouteDecision(Action.WAIT, Reason.NO_ENGINE)
    if seen.max_staleness is not None:
        oldest = seen.target_version - seen.max_staleness
        routable = [e for e in routable if e.version >= oldest]
        if not routable:
            return RouteDecision(Action.WAIT, Reason.TOO_STALE)
    candidates = [e for e in routable if e.running < e.capacity]
    if len(candidates) > 1:
        candidates = [e for e in candidates if e.engine_id != previous]
    if not candidates:
        return RouteDecision(Action.WAIT, Reason.NO_ROOM)
    scored = [(score(e, seen, policy), -e.running, e.engine_id) for e in candidates]
    best, _, engine_id = max(scored)
    reason = Reason.ONLY_CHOICE if len(candidates) == 1 else Reason.BEST_SCORE
    return RouteDecision(Action.SEND, reason, engine_id, best)
