"""Keeps one engine's lease in Redis alive.

Used by the daemon for the opportunistic engine and by whoever supervises a dedicated one.  All I/O
happens in ``run()``, a task of its own: the callers only change what is to be published and never
wait.  Redis absent, slow or wiped costs the engine its lease (the scheduler then sends it nothing
new and continues its trajectories elsewhere) and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import redis.asyncio
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from rowen.policies.lease import (
    ENGINES_KEY,
    RENEW_EVERY_MS,
    EngineLease,
    Grant,
    encode_lease,
    epoch_key,
    lease_key,
)

log = logging.getLogger(__name__)

REDIS_DEADLINE_S = 1.0
"""Half of the default lease: a slower Redis could not keep one alive anyway."""


@dataclass(frozen=True, slots=True)
class LeaseStatus:
    """What is published, for status pages."""

    is_published: bool
    fencing_epoch: int
    """0 before Redis gave the first one."""
    problem: str | None


class LeaseKeeper:
    """Publishes and renews a lease.  Nothing is published before ``restarted()`` was called.

    Args:
        redis_url: ``redis://``, ``rediss://`` or ``unix://``.
        lease: the document to publish; its ``fencing_epoch`` is replaced by the one from Redis.
    """

    def __init__(self, redis_url: str, lease: EngineLease) -> None:
        self._redis_url = redis_url
        self._lease = lease
        self._epoch = 0
        self._is_offered = False
        self._needs_epoch = False
        self._is_published = False
        self._problem: str | None = None
        self._changed = asyncio.Event()

    @property
    def status(self) -> LeaseStatus:
        """What is published now."""
        return LeaseStatus(self._is_published, self._epoch, self._problem)

    @property
    def lease(self) -> EngineLease:
        """The document as it is, or would be, published."""
        return self._lease

    def restarted(self, *, url: str | None = None) -> None:
        """The engine's process was (re)started: publish under a new fencing epoch from now on."""
        self._is_offered = True
        self._needs_epoch = True
        if url is not None:
            self._lease = self._validated(url=url)
        self._changed.set()

    def update(self, *, grant: Grant | None = None, sequence_cap: int | None = None) -> None:
        """Change the document; a real change is published at once."""
        changed = self._validated(
            grant=self._lease.grant if grant is None else grant,
            sequence_cap=self._lease.sequence_cap if sequence_cap is None else sequence_cap,
        )
        if changed != self._lease:
            self._lease = changed
            self._changed.set()

    def withdraw(self) -> None:
        """The engine is gone: take the lease away until ``restarted()``."""
        if self._is_offered:
            self._is_offered = False
            self._changed.set()

    def _validated(self, **changes: Any) -> EngineLease:
        return EngineLease.model_validate(self._lease.model_dump() | changes)

    async def run(self) -> None:
        """Renew until cancelled; then remove the lease, within one Redis deadline."""
        client = redis.asyncio.Redis.from_url(
            self._redis_url,
            socket_timeout=REDIS_DEADLINE_S,
            socket_connect_timeout=REDIS_DEADLINE_S,
            retry=Retry(NoBackoff(), 0),  # this loop is the retry
        )
        try:
            while True:
                self._changed.clear()
                await self._attempt(client)
                try:
                    async with asyncio.timeout(RENEW_EVERY_MS / 1000):
                        await self._changed.wait()
                except TimeoutError:
                    pass
        finally:
            self._is_offered = False
            try:
                async with asyncio.timeout(REDIS_DEADLINE_S):
                    await self._remove(client, is_leaving=True)
            except (RedisError, OSError, TimeoutError, ValueError) as error:
                log.warning("lease=%s removed=false problem=%r", self._lease.engine_id, error)
            await client.aclose()

    async def _attempt(self, client: redis.asyncio.Redis) -> None:
        try:
            async with asyncio.timeout(REDIS_DEADLINE_S):
                await self._publish(client)
        except (RedisError, OSError, TimeoutError, ValueError) as error:
            # ValueError: somebody else's text stands where the epoch should.
            self._is_published = False
            self._note(f"{type(error).__name__}: {error}".rstrip(": "))
            # An immediate change must not turn into a busy loop against a Redis that is down.
            await asyncio.sleep(RENEW_EVERY_MS / 1000)
            return
        self._note(None if self._is_published or not self._is_offered else "fenced off")

    async def _publish(self, client: redis.asyncio.Redis) -> None:
        if not self._is_offered:
            await self._remove(client, is_leaving=False)
            return
        if self._needs_epoch:
            await self._take_epoch(client)
        elif not await self._is_still_ours(client):
            self._is_published = False
            return
        lease = self._lease.model_copy(update={"fencing_epoch": self._epoch})
        async with client.pipeline(transaction=True) as pipe:
            pipe.sadd(ENGINES_KEY, lease.engine_id)
            pipe.set(lease_key(lease.engine_id), encode_lease(lease), px=lease.lease_ms)
            await pipe.execute()
        self._is_published = True

    async def _take_epoch(self, client: redis.asyncio.Redis) -> None:
        key = epoch_key(self._lease.engine_id)
        self._needs_epoch = False  # before the waits: another restart may come during them
        try:
            epoch = int(await client.incr(key))
            if epoch <= self._epoch:  # Redis was wiped; readers still remember the higher one
                epoch = self._epoch + 1
                await client.set(key, epoch)
        except BaseException:
            self._needs_epoch = True
            raise
        self._epoch = epoch

    async def _is_still_ours(self, client: redis.asyncio.Redis) -> bool:
        """Has nobody taken a higher epoch for this engine?  Restores a wiped counter."""
        key = epoch_key(self._lease.engine_id)
        stored = await client.get(key)
        highest = int(stored) if stored is not None else 0
        if highest < self._epoch:
            await client.set(key, self._epoch)
        return highest <= self._epoch

    async def _remove(self, client: redis.asyncio.Redis, *, is_leaving: bool) -> None:
        if self._epoch == 0 or (not self._is_published and not is_leaving):
            return
        if await self._is_still_ours(client):  # else the lease is that of our successor
            async with client.pipeline(transaction=True) as pipe:
                pipe.delete(lease_key(self._lease.engine_id))
                if is_leaving:
                    pipe.srem(ENGINES_KEY, self._lease.engine_id)
                await pipe.execute()
        self._is_published = False

    def _note(self, problem: str | None) -> None:
        if (problem is None) != (self._problem is None):
            log.log(
                logging.INFO if problem is None else logging.WARNING,
                "lease=%s redis=%s problem=%s",
                self._lease.engine_id,
                "answers" if problem is None else "fails",
                problem,
            )
        self._problem = problem
