"""Prometheus metrics, read from the running parts when scraped; the token path pays nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rowen.scheduler.dispatch import Dispatcher
from rowen.scheduler.engines import EngineState
from rowen.scheduler.registry import Registry
from rowen.scheduler.trajectories import TrajectoryStore
from rowen.scheduler.weight_sync import WeightSync


class SchedulerCollector(Collector):
    """All metrics of the scheduler; names start with ``rowen_scheduler_``."""

    def __init__(
        self,
        registry: Registry,
        store: TrajectoryStore,
        dispatcher: Dispatcher,
        weight_sync: WeightSync,
    ) -> None:
        self._registry = registry
        self._store = store
        self._dispatcher = dispatcher
        self._weight_sync = weight_sync

    def collect(self) -> Iterable[Metric]:
        yield from self._trajectories()
        yield from self._engines()
        yield from self._counts()

    def _trajectories(self) -> Iterable[Metric]:
        ended = CounterMetricFamily(
            "rowen_scheduler_trajectories",
            "Trajectories by what happened to them since the start",
            labels=["event"],
        )
        for name, count in dataclasses.asdict(self._store.counters).items():
            ended.add_metric([name], count)
        yield ended
        now = GaugeMetricFamily(
            "rowen_scheduler_open_trajectories", "Open trajectories by state", labels=["state"]
        )
        now.add_metric(["waiting"], self._dispatcher.waiting)
        now.add_metric(["running"], self._dispatcher.running)
        yield now

    def _engines(self) -> Iterable[Metric]:
        states = GaugeMetricFamily(
            "rowen_scheduler_engine_state", "1 for the state it is in", labels=["engine", "state"]
        )
        running = GaugeMetricFamily(
            "rowen_scheduler_engine_running", "Requests on the engine", labels=["engine"]
        )
        version = GaugeMetricFamily(
            "rowen_scheduler_engine_version", "Verified weight version", labels=["engine"]
        )
        faults = CounterMetricFamily(
            "rowen_scheduler_engine_faults", "Streams ended by a fault", labels=["engine"]
        )
        for engine in self._registry.engines.values():
            for state in EngineState:
                states.add_metric([engine.engine_id, state], state is engine.decision.action)
            running.add_metric([engine.engine_id], len(engine.stays))
            faults.add_metric([engine.engine_id], engine.faults_total)
            if engine.version is not None:
                version.add_metric([engine.engine_id], engine.version)
        yield from (states, running, version, faults)

    def _counts(self) -> Iterable[Metric]:
        tokens = CounterMetricFamily("rowen_scheduler_tokens", "Tokens logged", labels=["engine"])
        for engine_id, count in self._dispatcher.tokens_per_engine.items():
            tokens.add_metric([engine_id], count)
        yield tokens
        causes = CounterMetricFamily(
            "rowen_scheduler_faults", "Faults of engines by cause", labels=["cause"]
        )
        for cause, count in self._dispatcher.faults.items():
            causes.add_metric([cause], count)
        yield causes
        routes = CounterMetricFamily(
            "rowen_scheduler_routes", "Routing decisions by reason", labels=["reason"]
        )
        for reason, count in self._dispatcher.routes.items():
            routes.add_metric([reason], count)
        yield routes
        syncs = CounterMetricFamily(
            "rowen_scheduler_weight_syncs", "Weight updates of engines", labels=["result"]
        )
        syncs.add_metric(["done"], self._weight_sync.done_total)
        syncs.add_metric(["failed"], self._weight_sync.failures_total)
        yield syncs
