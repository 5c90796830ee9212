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
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any

from rowen.scheduler.engine import Engine, SyncRecord
from rowen.scheduler.engine_client import EngineBrokenError, EngineClient, EngineRefusedError
from rowen.scheduler.engines import EngineState
from rowen.scheduler.errors import SHOWN_VALUE_CHARS, ApiError
from rowen.scheduler.registry import Registry
from rowen.scheduler.settings import Settings
from rowen.scheduler.versions import Candidate, VersionSource, choose_updates

log = logging.getLogger(__name__)

LAST_WORDS_S = 1.0
"""Time for aborted streams to deliver what the engine had made; the rest is made again."""

RESTORE_DEADLINE_S = 2.0
"""For each request that brings an engine back with the weights it had."""

KEPT_RUNS = 64
"""Training runs that were replaced and must not come back."""

KEPT_SYNCS = 512
"""Updates that ``/rowen/v1/versions`` lists."""


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
        self._is_closing = False
        self._ended_runs: deque[str] = deque(maxlen=KEPT_RUNS)
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

        A new ``run`` begins with any version and ends the run before it for good.

        Raises:
            ApiError: 409, a newer one of the run was announced before, or another run has taken
                its place; nothing changed.
        """
        current = self.source
        if source == current:
            return False
        if source.run and source.run in self._ended_runs:
            raise ApiError(
                HTTPStatus.CONFLICT,
                f"run is {source.run[:SHOWN_VALUE_CHARS]!r}: another run was announced after it; "
                "end this trainer, or give it a new run",
                param="run",
            )
        is_new_run = current is not None and current.run != source.run
        if current is not None and not is_new_run and source.version < current.version:
            raise ApiError(
                HTTPStatus.CONFLICT,
                f"version is {source.version}: version {current.version} was announced before it; "
                "announce a higher one, or a new run",
                param="version",
            )
        if current is not None and is_new_run:
            self._ended_runs.append(current.run)
        self.source = source
        self.announced_unix_s = time.time()
        log.info(
            "version=%d announced run=%s host=%s port=%d",
            source.version,
            source.run,
            source.host,
            source.port,
        )
        assert self._registry is not None
        for engine in self._registry.engines.values():
            engine.sync.retry_at_s = 0.0  # a new source may cure what failed
        self._registry.judge_all()
        self.plan()
        return True

    def plan(self) -> None:
        """Start the updates that are due."""
        if self.source is None or self._registry is None or self._is_closing:
            return
        now = asyncio.get_running_loop().time()
        engines = self._registry.engines
        due = choose_updates(
            [_candidate(engine, self.source, now) for engine in engines.values()],
            self.source.version,
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
        """Start no update any more and end those under way; engines not written to go on."""
        self._is_closing = True
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
        client, deadline_s, old_version = (
            engine.client,
            self._settings.sync_deadline_s,
            engine.version,
        )

        async def post(path: str, content: dict[str, Any] | None = None) -> None:
            await client.ask("POST", path, deadline_s=deadline_s, content=content)

        # Paused, or perhaps paused: from here on only a complete update says what is there.
        record.is_tainted = True
        engine.version = None
        try:
            await self._open_session(engine, record, post)
        except (EngineBrokenError, EngineRefusedError, asyncio.CancelledError):
            await _restore(engine, record, client, old_version)
            raise
        try:
            await post("/update_weights", {"update_info": asdict(source)})
        except EngineRefusedError:
            # The backend takes a version whole or keeps the old one.
            await _restore(engine, record, client, old_version)
            raise
        await post("/finish_weight_update", {"weight_version": str(source.version)})
        reported = await client.weight_version(deadline_s)
        if reported != str(source.version):
            raise EngineBrokenError(f"version_{source.version}_reported_as_{reported}")
        await post("/resume")

    async def _open_session(
        self, engine: Engine, record: SyncRecord, post: Callable[..., Awaitable[None]]
    ) -> None:
        """Pause and prepare; no weight has been written, whatever becomes of it."""
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

    def _note_success(
        self, engine: Engine, source: VersionSource, from_version: int | None, took_s: float
    ) -> None:
        record = engine.sync
        record.is_tainted, record.problem, record.failed_source = False, None, None
        record.failures_in_row, record.retry_at_s = 0, 0.0
        record.sync_s, record.synced_unix_s = took_s, time.time()
        engine.version, engine.run = source.version, source.run
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
        record.problem, record.failed_source = problem, source
        record.is_initialized = False  # the process may be another one by now
        record.failures_in_row += 1
        self.failures_total += 1
        wait_s = self._settings.sync_retry_s * 2 ** min(record.failures_in_row - 1, 16)
        now = asyncio.get_running_loop().time()
        record.retry_at_s = now + min(wait_s, self._settings.sync_retry_max_s)
        log.warning(
            "engine=%s version=%d sync=failed keeps=%s in_row=%d problem=%s",
            engine.engine_id,
            source.version,
            engine.version,
            record.failures_in_row,
            problem,
        )


async def _restore(
    engine: Engine, record: SyncRecord, client: EngineClient, old_version: int | None
) -> None:
    """Let an engine that was paused and not written to serve its old version again.

    Only where that is known and the engine itself reports it; otherwise it stays out of service.
    """
    if old_version is None or engine.sync is not record:
        return
    try:
        if await client.weight_version(RESTORE_DEADLINE_S) != str(old_version):
            return
        await client.ask("POST", "/resume", deadline_s=RESTORE_DEADLINE_S)
    except (EngineBrokenError, EngineRefusedError):
        return
    if engine.sync is record:
        engine.version, record.is_tainted = old_version, False


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


def _candidate(engine: Engine, source: VersionSource, now: float) -> Candidate:
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
        version=engine.version if engine.is_of_run(source.run) else None,
        is_reachable=is_reachable,
        is_serving=engine.is_routable,
        is_updating=engine.is_updating,
        retry_in_s=engine.sync.retry_at_s - now,
        running=len(engine.stays),
        has_failed=engine.sync.failed_source == source,
    )
