"""Brings engines to the announced weight version over vLLM's own RL routes.

An update always runs with nothing on the engine: generation is paused, which ends every stream
with ``abort``, and what is still open then is dropped, before the first byte of weights moves.  So
every stay on an engine has exactly one version, known when it began, also when it never ends well.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any

from rowen.scheduler.engine import Engine, SyncRecord
from rowen.scheduler.engine_client import EngineBrokenError, EngineRefusedError
from rowen.scheduler.engines import EngineState
from rowen.scheduler.errors import ApiError
from rowen.scheduler.registry import Registry
from rowen.scheduler.settings import Settings
from rowen.scheduler.versions import Candidate, choose_updates

log = logging.getLogger(__name__)

LAST_WORDS_S = 1.0
"""Time for aborted streams to deliver what the engine had made; the rest is made again."""

KEPT_SYNCS = 512
"""Updates that ``/rowen/v1/versions`` lists."""


@dataclass(frozen=True, slots=True)
class VersionSource:
    """Where a version can be fetched: the trainer's publisher."""

    version: int
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class SyncDone:
    """One successful update."""

    engine_id: str
    version: int
    from_version: int | None
    sync_s: float
    finished_unix_s: float
    finished_monotonic_s: float


class WeightSync:
    """Holds the announced version and updates engines towards it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tasks: set[asyncio.Task[None]] = set()
        self._registry: Registry | None = None
        self.source: VersionSource | None = None
        self.announced_unix_s: float | None = None
        self.done: deque[SyncDone] = deque(maxlen=KEPT_SYNCS)
        self.done_total = 0
        self.failures_total = 0

    def attach(self, registry: Registry) -> None:
        """Plan after every sweep of the registry."""
        self._registry = registry
        registry.swept = self.plan

    def announce(self, source: VersionSource) -> bool:
        """Take a version to bring the engines to; False if it is announced already.

        Raises:
            ApiError: 409, a newer one was announced before; nothing changed.
        """
        current = self.source
        if current is not None and source.version < current.version:
            raise ApiError(
                HTTPStatus.CONFLICT,
                f"version is {source.version}: version {current.version} was announced before it; "
                "announce a higher one",
                param="version",
            )
        if source == current:
            return False
        self.source = source
        self.announced_unix_s = time.time()
        log.info("version=%d announced host=%s port=%d", source.version, source.host, source.port)
        assert self._registry is not None
        for engine in self._registry.engines.values():
            engine.sync.retry_at_s = 0.0  # a new source may cure what failed
        self._registry.judge_all()
        self.plan()
        return True

    def plan(self) -> None:
        """Start the updates that are due."""
        if self.source is None or self._registry is None:
            return
        now = asyncio.get_running_loop().time()
        engines = self._registry.engines
        due = choose_updates(
            [_candidate(engine, now) for engine in engines.values()], self.source.version
        )
        for engine_id in due:
            engine = engines[engine_id]
            engine.is_updating = True
            self._registry.judge(engine)
            task = asyncio.create_task(
                self._update(engine, self.source, self._registry), name=f"sync-{engine_id}"
            )
            engine.sync.task = task
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _update(self, engine: Engine, source: VersionSource, registry: Registry) -> None:
        # A restart replaces the engine's record: what this update learns then has no meaning.
        record, from_version, started = engine.sync, engine.version, time.monotonic()
        try:
            async with asyncio.timeout(self._settings.sync_deadline_s):
                await self._replace_weights(engine, record, source)
        except (EngineBrokenError, EngineRefusedError, TimeoutError) as error:
            self._note_failure(engine, record, source, error)
        else:
            if engine.sync is record:
                self._note_success(engine, source, from_version, time.monotonic() - started)
        finally:
            if engine.sync is record:
                engine.is_updating = False
                registry.judge(engine)
                self.plan()

    async def _replace_weights(
        self, engine: Engine, record: SyncRecord, source: VersionSource
    ) -> None:
        client, deadline_s = engine.client, self._settings.sync_deadline_s

        async def post(path: str, content: dict[str, Any] | None = None) -> None:
            await client.ask("POST", path, deadline_s=deadline_s, content=content)

        # Paused, or perhaps paused: from here on only a complete update says what is there.
        record.is_tainted = True
        engine.version = None
        await post("/pause?mode=abort")
        await _empty(engine)
        if not record.is_initialized:
            await post("/init_weight_transfer_engine", {"init_info": {}})
            record.is_initialized = True
        try:
            await post("/start_weight_update")
        except EngineRefusedError:
            # A session that an earlier update left open; closing it changes no weights.
            await post("/finish_weight_update", {})
            await post("/start_weight_update")
        await post("/update_weights", {"update_info": asdict(source)})
        await post("/finish_weight_update", {"weight_version": str(source.version)})
        reported = await client.weight_version(deadline_s)
        if reported != str(source.version):
            raise EngineBrokenError(f"version_{source.version}_reported_as_{reported}")
        await post("/resume")

    def _note_success(
        self, engine: Engine, source: VersionSource, from_version: int | None, took_s: float
    ) -> None:
        record = engine.sync
        record.is_tainted, record.problem = False, None
        record.failures_in_row, record.retry_at_s = 0, 0.0
        record.sync_s, record.synced_unix_s = took_s, time.time()
        engine.version = source.version
        self.done_total += 1
        self.done.append(
            SyncDone(
                engine.engine_id,
                source.version,
                from_version,
                took_s,
                record.synced_unix_s,
                time.monotonic(),
            )
        )
        log.info("engine=%s version=%d synced_s=%.3f", engine.engine_id, source.version, took_s)

    def _note_failure(
        self, engine: Engine, record: SyncRecord, source: VersionSource, error: Exception
    ) -> None:
        if isinstance(error, EngineRefusedError):
            problem = error.sentence
        else:
            problem = str(error) or f"no end within {self._settings.sync_deadline_s:g} s"
        record.problem = problem
        record.is_initialized = False  # the process may be another one by now
        record.failures_in_row += 1
        self.failures_total += 1
        wait_s = self._settings.sync_retry_s * 2 ** min(record.failures_in_row - 1, 16)
        now = asyncio.get_running_loop().time()
        record.retry_at_s = now + min(wait_s, self._settings.sync_retry_max_s)
        log.warning(
            "engine=%s version=%d sync=failed in_row=%d problem=%s",
            engine.engine_id,
            source.version,
            record.failures_in_row,
            problem,
        )


async def _empty(engine: Engine) -> None:
    """Wait for the streams to end; drop those that do not.  None is open afterwards."""
    try:
        async with asyncio.timeout(LAST_WORDS_S):
            while engine.stays:
                engine.emptied.clear()
                await engine.emptied.wait()
    except TimeoutError:
        pass
    while engine.stays:
        engine.emptied.clear()
        for stay in list(engine.stays):
            stay.abandon("weight_update")
        await engine.emptied.wait()


def _candidate(engine: Engine, now: float) -> Candidate:
    state = engine.decision.action
    is_reachable = (
        engine.was_seen
        and state not in (EngineState.LOST, EngineState.DRAINING, EngineState.COLD)
        and state is not EngineState.WARMING
        # Not verified yet: the version is asked for first, unless an update is the only cure.
        and (engine.version is not None or engine.sync.is_tainted)
    )
    return Candidate(
        engine_id=engine.engine_id,
        version=engine.version,
        is_reachable=is_reachable,
        is_serving=engine.is_routable,
        is_updating=engine.is_updating,
        retry_in_s=engine.sync.retry_at_s - now,
        running=len(engine.stays),
    )
