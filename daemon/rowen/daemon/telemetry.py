"""The daemon's own Prometheus metrics; the README says what to do when one moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rowen.policies.guard import Gate
from rowen.policies.reclaim import Rung

if TYPE_CHECKING:
    from rowen.daemon.loop import Tick

_TICK_BUCKETS_S = (0.05, 0.09, 0.11, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


class Telemetry:
    """Counts decisions and mirrors the newest tick."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._gate = Gauge("rowen_gate_open", "The guard's word: 1 open", registry=registry)
        self._cap = Gauge("rowen_sequence_cap", "Rollouts allowed at once", registry=registry)
        self._rung = Gauge(
            "rowen_reclaim_rung", "1 for the rung held now", ["rung"], registry=registry
        )
        self._changes = Counter(
            "rowen_decision_changes",
            "Decisions that differ from the one before",
            ["action", "reason"],
            registry=registry,
        )
        self._ticks = Histogram(
            "rowen_tick_interval_seconds",
            "Time from decision to decision; 0.1 is on time",
            buckets=_TICK_BUCKETS_S,
            registry=registry,
        )
        self._ages = Gauge(
            "rowen_reading_age_seconds", "Age per source; -1 unknown", ["source"], registry=registry
        )
        self._tokens = Gauge(
            "rowen_rollout_tokens", "Tokens of the present rollout engine", registry=registry
        )
        self._closings = Gauge(
            "rowen_gate_closings", "Closings of the present rollout engine", registry=registry
        )
        self._idle_max = Gauge(
            "rowen_close_to_idle_max_seconds",
            "Longest time from a closing to no compute, present engine",
            registry=registry,
        )

    def take(self, tick: Tick, *, is_change: bool) -> None:
        """Take in one tick."""
        self._gate.set(tick.guard.gate is Gate.OPEN)
        self._cap.set(tick.guard.sequence_cap)
        for rung in Rung:
            self._rung.labels(rung.value).set(tick.ladder.action is rung)
        self._ticks.observe(tick.elapsed_ms / 1000)
        if is_change:
            self._changes.labels(tick.guard.action.value, tick.guard.reason.value).inc()
        seen = tick.seen
        for source, age_ms in (
            ("probe", seen.probe_age_ms),
            ("gate", seen.gate_age_ms),
            ("metrics", seen.age_ms(seen.metrics_read_at_ns)),
        ):
            self._ages.labels(source).set(-1 if age_ms is None else age_ms / 1000)
        if seen.gate is not None:
            self._tokens.set(seen.gate.tokens_total)
            self._closings.set(seen.gate.closings_total)
            self._idle_max.set(seen.gate.close_to_idle_max_us / 1e6)

    def page(self) -> bytes:
        """The Prometheus text page."""
        return generate_latest(self._registry)
