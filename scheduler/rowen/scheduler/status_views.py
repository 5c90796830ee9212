"""The JSON of ``/rowen/v1/…``: what status pages, trainers and plots read."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from rowen.scheduler.dispatch import Dispatcher
from rowen.scheduler.engine import Engine
from rowen.scheduler.registry import Registry
from rowen.scheduler.trajectories import TrajectoryStore
from rowen.scheduler.weight_sync import WeightSync


def engines_view(registry: Registry, dispatcher: Dispatcher) -> dict[str, Any]:
    """Every engine with its state and its tokens per second, second by second."""
    now = time.monotonic()
    return {
        "engines": [_engine(engine, now) for engine in registry.engines.values()],
        "target_version": registry.target_version,
        "waiting": dispatcher.waiting,
        "is_redis_silent": registry.is_redis_silent,
        "now_unix_s": time.time(),
        "now_monotonic_s": now,
    }


def _engine(engine: Engine, now: float) -> dict[str, Any]:
    first_s, counts = engine.history.series(now)
    return {
        "engine_id": engine.engine_id,
        "url": engine.client.url,
        "kind": engine.kind,
        "node": engine.node,
        "state": engine.decision.action,
        "reason": engine.decision.reason,
        "grant": engine.grant if engine.lease is not None or not engine.is_leased else None,
        "sequence_cap": engine.sequence_cap,
        "running": len(engine.stays),
        "version": engine.version,
        "fencing_epoch": engine.epoch,
        "tokens_total": engine.history.total,
        "tokens_per_s": engine.history.rate(now),
        "faults_total": engine.faults_total,
        "last_fault": engine.last_fault,
        "history": {
            "start_monotonic_s": first_s,
            "start_unix_s": round(time.time() - (now - first_s), 3),
            "tokens_per_second": counts,
        },
    }


def versions_view(registry: Registry, weight_sync: WeightSync) -> dict[str, Any]:
    """The announced version, where each engine stands, and the latest updates."""
    source = weight_sync.source
    target = None
    if source is not None:
        announced = {"announced_unix_s": weight_sync.announced_unix_s}
        target = dataclasses.asdict(source) | announced
    return {
        "target": target,
        "engines": [
            {
                "engine_id": engine.engine_id,
                "version": engine.version,
                "run": engine.run,
                "state": engine.decision.action,
                "is_updating": engine.is_updating,
                "synced_at_unix_s": engine.sync.synced_unix_s,
                "sync_s": engine.sync.sync_s,
                "problem": engine.sync.problem,
            }
            for engine in registry.engines.values()
        ],
        "syncs": [dataclasses.asdict(sync) for sync in weight_sync.done],
    }


def trajectories_view(store: TrajectoryStore, dispatcher: Dispatcher) -> dict[str, Any]:
    """Counts since the start of the process."""
    return {
        **dataclasses.asdict(store.counters),
        "running": dispatcher.running,
        "waiting": dispatcher.waiting,
        "tokens": sum(dispatcher.tokens_per_engine.values()),
        "tokens_per_engine": dispatcher.tokens_per_engine,
        "tokens_per_version": dispatcher.tokens_per_version,
        "faults": dispatcher.faults,
    }
