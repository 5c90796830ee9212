"""The status page: the newest tick and everything around it, as one JSON document."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rowen.daemon.config import NodeConfig
from rowen.daemon.journal import Journal
from rowen.daemon.leases import LeaseKeeper
from rowen.daemon.loop import Loop, Tick
from rowen.daemon.mode import OperatorMode
from rowen.daemon.rollout import RolloutEngine
from rowen.policies.guard import ObjectiveReading
from rowen.policies.reclaim import GRANTS
from rowen.policies.schema import HarvestPolicy, Objective

LAST_DECISIONS = 20


class StatusPage:
    """Puts the document together; every part is read where it lives."""

    def __init__(
        self,
        config: NodeConfig,
        *,
        loop: Loop,
        engine: RolloutEngine,
        keeper: LeaseKeeper | None,
        journal: Journal,
        operator: OperatorMode,
    ) -> None:
        self._config = config
        self._loop = loop
        self._engine = engine
        self._keeper = keeper
        self._journal = journal
        self._operator = operator

    def document(self) -> dict[str, Any]:
        """The whole page."""
        policy = self._loop.policy
        tick = self._loop.last
        return {
            "node": self._config.node,
            "engine_id": self._config.engine_id,
            "policy": policy.metadata.name,
            "mode": {
                "policy": policy.spec.mode.value,
                "operator": self._operator.mode.value,
                "in_force": self._loop.mode.value,
            },
            **(_decision(tick) if tick is not None else {}),
            "readings": _readings(tick, policy) if tick is not None else None,
            "engine": self._engine.describe(),
            "lease": asdict(self._keeper.status) if self._keeper is not None else None,
            "last_decisions": self._journal.last(LAST_DECISIONS),
        }


def _decision(tick: Tick) -> dict[str, Any]:
    return {
        "gate": tick.guard.gate.value,
        "action": tick.guard.action.value,
        "reason": tick.guard.reason.value,
        "detail": tick.guard.detail,
        "sequence_cap": tick.guard.sequence_cap,
        "fast_path": tick.fast_path.value,
        "rung": tick.ladder.action.value,
        "cause": tick.ladder.reason.value,
        "rung_ms": tick.ladder.state.rung_ms,
        "grant": GRANTS[tick.ladder.action].value,
        "tick_interval_ms": tick.elapsed_ms,
    }


def _readings(tick: Tick, policy: HarvestPolicy) -> dict[str, Any]:
    seen, objectives = tick.seen, policy.spec.objectives
    return {
        "kill_switch": seen.kill_switch,
        "probe_age_ms": seen.probe_age_ms,
        "gate_age_ms": seen.gate_age_ms,
        "metrics_age_ms": seen.age_ms(seen.metrics_read_at_ns),
        "ttft": _objective(seen.ttft, objectives.ttft),
        "tpot": _objective(seen.tpot, objectives.tpot),
        "available_memory_bytes": seen.available_memory_bytes,
        "serving": None if seen.probe is None else seen.probe._asdict(),
        "rollout": None if seen.gate is None else seen.gate._asdict(),
        "problems": seen.problems,
    }


def _objective(reading: ObjectiveReading | None, objective: Objective) -> dict[str, Any]:
    value_ms = None if reading is None else reading.value_ms
    return {
        "percentile": objective.percentile,
        "value_ms": value_ms,
        "samples": None if reading is None else reading.samples,
        "threshold_ms": objective.threshold_ms,
        "slack_ratio": None if value_ms is None else 1 - value_ms / objective.threshold_ms,
    }
