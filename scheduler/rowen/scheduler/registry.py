"""Knows the engines: reads leases, checks health and versions, keeps every engine's state.

Three kinds of loops: leases and a sweep over states and stalls (both every ``poll_ms``), and one
health watch per engine.  Decisions are ``engines.decide``; this module only gathers what it asks
for and does what it says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from urllib.parse import urlsplit

import aiohttp

from rowen.policies.lease import EngineKind, EngineLease, Grant
from rowen.scheduler.engine import Engine, Stay
from rowen.scheduler.engine_client import EngineBrokenError, EngineClient, EngineRefusedError
from rowen.scheduler.engines import EnginePolicy, EngineState, decide
from rowen.scheduler.history import TokenHistory
from rowen.scheduler.lease_reader import LeaseReader, RedisSilentError
from rowen.scheduler.settings import Settings
from rowen.scheduler.versions import VersionSource

log = logging.getLogger(__name__)

DRAIN_OF_ENDED_S = 1.0
"""An ended stream is read to its last byte to keep the connection; no longer than this."""

PREFILL_S_PER_TOKEN = 0.01
"""Allowed before the first token of a stay, per token to read; a CPU engine needs a few ms."""

FORGET_AFTER_S = 3600.0
"""An engine without a lease for so long leaves the list."""


class Registry:
    """All engines; ``changed`` is called whenever room may have appeared."""

    def __init__(
        self,
        settings: Settings,
        session: aiohttp.ClientSession,
        leases: LeaseReader | None,
        announced: Callable[[], VersionSource | None],
    ) -> None:
        self._settings = settings
        self._session = session
        self._leases = leases
        self._announced = announced
        self._policy = EnginePolicy(health_failures=settings.health_failures)
        self._loop = asyncio.get_running_loop()
        self._tasks: asyncio.TaskGroup
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._redis_answered_s = self._loop.time()
        self._gone_since: dict[str, float] = {}
        self._other_models: set[str] = set()
        self.is_redis_silent = False
        self.engines: dict[str, Engine] = {}
        self.changed: Callable[[], None] = lambda: None
        self.swept: Callable[[], None] = lambda: None
        """Called after every sweep; the weight sync plans then."""

    @property
    def target_version(self) -> int:
        """The announced version, or, before any announcement, the newest that an engine has."""
        announced = self._announced()
        if announced is not None:
            return announced.version
        return max((e.version for e in self.engines.values() if e.version is not None), default=0)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            for url in self._settings.dedicated:
                self._add_static(url)
            self._tasks.create_task(self._sweep_loop())
            if self._leases is not None:
                self._tasks.create_task(self._lease_loop(self._leases))

    # Leases.

    async def _lease_loop(self, reader: LeaseReader) -> None:
        while True:
            try:
                leases = await reader.read()
            except RedisSilentError as error:
                if not self.is_redis_silent:
                    log.warning("redis=silent problem=%s", error)
                self.is_redis_silent = True
            else:
                if self.is_redis_silent:
                    log.info("redis=answers")
                self.is_redis_silent = False
                self._redis_answered_s = self._loop.time()
                self._take_leases(leases)
            await asyncio.sleep(self._settings.poll_ms / 1000)

    def _take_leases(self, leases: dict[str, EngineLease]) -> None:
        now = self._loop.time()
        for engine_id, lease in leases.items():
            if lease.model == self._settings.model:
                self._gone_since.pop(engine_id, None)
                self._take_lease(lease)
            elif engine_id not in self._other_models:
                self._other_models.add(engine_id)
                log.warning("engine=%s lease=ignored model=%s", engine_id, lease.model)
        for engine in list(self.engines.values()):
            if engine.is_leased and engine.engine_id not in leases:
                engine.lease = None
                since = self._gone_since.setdefault(engine.engine_id, now)
                if now - since > FORGET_AFTER_S and not engine.stays:
                    self._forget(engine)
        self.judge_all()

    def _take_lease(self, lease: EngineLease) -> None:
        engine = self.engines.get(lease.engine_id)
        if engine is None:
            engine = Engine(
                engine_id=lease.engine_id,
                kind=lease.kind,
                node=lease.node,
                client=EngineClient(self._session, lease.url),
                is_leased=True,
                history=TokenHistory(self._settings.history_s),
                epoch=lease.fencing_epoch,
            )
            self._add(engine)
        elif lease.fencing_epoch > engine.epoch or lease.url != engine.client.url:
            for stay in list(engine.stays):
                stay.abandon("engine_restarted")
            engine.restart(EngineClient(self._session, lease.url), lease.fencing_epoch)
        elif engine.lease is None:
            engine.distrust()  # nobody vouched for it in between
        had_grant = engine.grant if engine.lease is not None else None
        engine.lease, engine.kind, engine.node = lease, lease.kind, lease.node
        if had_grant is not lease.grant:
            now = self._loop.time()
            if lease.grant is Grant.RUN:
                engine.run_since_s = now
            else:
                engine.disturbed_s = now

    def _add_static(self, url: str) -> None:
        place = urlsplit(url)
        self._add(
            Engine(
                engine_id=f"dedicated-{place.hostname}-{place.port or 80}",
                kind=EngineKind.DEDICATED,
                node=place.hostname or "",
                client=EngineClient(self._session, url),
                is_leased=False,
                history=TokenHistory(self._settings.history_s),
                static_cap=self._settings.dedicated_sequences,
            )
        )

    def _add(self, engine: Engine) -> None:
        self.engines[engine.engine_id] = engine
        engine.emptied.set()
        watch = self._tasks.create_task(self._watch(engine), name=f"watch-{engine.engine_id}")
        self._watches[engine.engine_id] = watch

    def _forget(self, engine: Engine) -> None:
        self._watches.pop(engine.engine_id).cancel()
        del self.engines[engine.engine_id]
        self._gone_since.pop(engine.engine_id, None)

    # States.

    def judge(self, engine: Engine) -> None:
        """Decide on an engine's state again and act on it; call after anything changed."""
        now = self._loop.time()
        lease_ms = engine.lease.lease_ms if engine.lease is not None else 0
        is_verified = (now - self._redis_answered_s) * 1000 < lease_ms
        announced = self._announced()
        run = announced.run if announced is not None else None
        decision = decide(
            engine.decision.action,
            engine.seen(now, self.target_version, run, is_verified),
            self._policy,
        )
        before, engine.decision = engine.decision, decision
        if (before.action, before.reason) != (decision.action, decision.reason):
            log.info(
                "engine=%s state=%s reason=%s version=%s running=%d",
                engine.engine_id,
                decision.action,
                decision.reason,
                engine.version,
                len(engine.stays),
            )
        if not decision.keeps_running:
            for stay in list(engine.stays):
                stay.abandon(decision.reason)
        if decision.capacity > len(engine.stays):
            self.changed()

    def judge_all(self) -> None:
        for engine in self.engines.values():
            self.judge(engine)

    def note_fault(self, engine: Engine, cause: str, *, is_refused: bool) -> None:
        """A stay ended in a way that an engine in order does not let happen."""
        now = self._loop.time()
        engine.faults_total += 1
        engine.last_fault = cause
        engine.is_refused = engine.is_refused or is_refused
        if now >= engine.rests_until_s:  # one death breaks all streams: that is one fault
            engine.faults_in_row += 1
            wait_s = self._settings.fault_wait_s * 2 ** min(engine.faults_in_row - 1, 16)
            engine.rests_until_s = now + min(wait_s, self._settings.fault_wait_max_s)
        engine.distrust()
        log.warning("engine=%s fault=%s in_row=%d", engine.engine_id, cause, engine.faults_in_row)
        self.judge(engine)

    def note_tokens(self, engine: Engine, tokens: int, now_s: float) -> None:
        engine.history.add(tokens, now_s)
        engine.last_token_s = now_s
        engine.failed_checks = 0

    def note_success(self, engine: Engine) -> None:
        engine.faults_in_row = 0

    async def _sweep_loop(self) -> None:
        while True:
            now = self._loop.time()
            for engine in list(self.engines.values()):
                self._leave_stalled(engine, now)
                self.judge(engine)
            self.swept()
            await asyncio.sleep(self._settings.poll_ms / 1000)

    def _leave_stalled(self, engine: Engine, now: float) -> None:
        if engine.grant is not Grant.RUN or engine.sequence_cap == 0:
            engine.run_since_s = now  # silence is what is asked of it
        open_stays = [stay for stay in engine.stays if stay.decision is None]
        longest_s = max(map(self._silence_allowed_s, open_stays), default=0.0)
        # Only tokens show that the engine moves; one that never made any is judged by its stays.
        moved_s = max(engine.last_token_s, engine.run_since_s)
        is_stalled = now - moved_s > longest_s
        for stay in list(engine.stays):
            if stay.decision is not None:
                if now - stay.last_token_s > DRAIN_OF_ENDED_S:
                    stay.abandon("ended")
                continue
            silent_s = now - max(stay.last_token_s, engine.run_since_s)
            if not engine.is_updating and silent_s > self._silence_allowed_s(stay):
                stay.abandon("stalled" if is_stalled else "slow")

    def _silence_allowed_s(self, stay: Stay) -> float:
        prefill_s = 0.0 if stay.has_token else PREFILL_S_PER_TOKEN * stay.prefill_tokens
        return self._settings.stall_s + prefill_s

    # Health.

    async def _watch(self, engine: Engine) -> None:
        while True:
            engine.check_now.clear()
            if engine.lease is not None or not engine.is_leased:
                await self._check(engine)
                self.judge(engine)
            try:
                async with asyncio.timeout(self._settings.health_every_ms / 1000):
                    await engine.check_now.wait()
                    # An engine that fails every check must not be asked in a busy loop.
                    await asyncio.sleep(self._settings.poll_ms / 1000)
            except TimeoutError:
                pass

    async def _check(self, engine: Engine) -> None:
        now = self._loop.time()
        is_streaming = (now - engine.last_token_s) * 1000 < self._settings.health_every_ms
        if is_streaming and engine.version is not None:
            return
        epoch, deadline_s = engine.epoch, self._settings.health_deadline_s
        try:
            await engine.client.ask("GET", "/health", deadline_s=deadline_s)
            version, is_paused = await self._read_version(engine, deadline_s)
        except (EngineBrokenError, EngineRefusedError) as error:
            if engine.epoch == epoch:
                engine.failed_checks += 1
                engine.is_refused = isinstance(error, EngineBrokenError) and error.is_refused
                if engine.is_refused or engine.failed_checks >= self._policy.health_failures:
                    engine.distrust()
            return
        if engine.epoch != epoch:
            return
        engine.was_seen, engine.is_refused, engine.failed_checks = True, False, 0
        if engine.version is None and not engine.is_updating and not engine.sync.is_tainted:
            engine.version = None if is_paused else version
            engine.sync.is_tainted = engine.version is None

    async def _read_version(self, engine: Engine, deadline_s: float) -> tuple[int | None, bool]:
        """Weight version and whether generation is paused, which an unfinished update leaves."""
        if engine.version is not None or engine.is_updating or engine.sync.is_tainted:
            return engine.version, False
        try:
            is_paused = await engine.client.is_paused(deadline_s)
            version = await engine.client.weight_version(deadline_s)
        except EngineRefusedError as error:
            if error.status == 404:
                return 0, False  # no RL routes: the weights it was started with, for ever
            raise
        is_number = version.isascii() and version.isdecimal()
        return int(version) if is_number else None, is_paused

    def is_ready(self) -> bool:
        return any(e.decision.action is EngineState.READY for e in self.engines.values())
