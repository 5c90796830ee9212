"""Reads the engines' leases from Redis; never writes there.

A lease below the highest fencing epoch seen for its engine is that of a process that was replaced,
so it is not returned, whatever Redis says.
"""

from __future__ import annotations

import logging

import redis.asyncio
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from rowen.policies.lease import (
    ENGINES_KEY,
    EngineId,
    EngineLease,
    LeaseError,
    decode_lease,
    lease_key,
)

log = logging.getLogger(__name__)

REDIS_DEADLINE_S = 1.0
"""Half of a default lease."""


class RedisSilentError(Exception):
    """Redis did not answer; what was known before still is the best there is."""


class LeaseReader:
    """One connection to Redis."""

    def __init__(self, url: str) -> None:
        self._client = redis.asyncio.Redis.from_url(
            url,
            socket_timeout=REDIS_DEADLINE_S,
            socket_connect_timeout=REDIS_DEADLINE_S,
            retry=Retry(NoBackoff(), 0),  # the caller's loop is the retry
        )
        self._highest: dict[str, int] = {}
        self._unreadable: set[str] = set()
        self._fenced: set[str] = set()

    async def read(self) -> dict[str, EngineLease]:
        """Every valid lease by engine id.

        Raises:
            RedisSilentError: nothing could be read; the state here is unchanged.
        """
        try:
            ids = sorted(_text(member) for member in await self._client.smembers(ENGINES_KEY))
            keys = [lease_key(EngineId(engine_id)) for engine_id in ids]
            stored = await self._client.mget(keys) if keys else []
        except (RedisError, OSError, TimeoutError, UnicodeDecodeError) as error:
            raise RedisSilentError(f"{type(error).__name__}: {error}") from error
        leases = {}
        for engine_id, document in zip(ids, stored, strict=True):
            lease = self._accept(engine_id, document) if document is not None else None
            if lease is not None:
                leases[engine_id] = lease
        return leases

    def _accept(self, engine_id: str, document: str | bytes) -> EngineLease | None:
        try:
            lease = decode_lease(document)
        except LeaseError as error:
            if engine_id not in self._unreadable:
                log.warning("engine=%s lease=ignored problem=%s", engine_id, error)
                self._unreadable.add(engine_id)
            return None
        self._unreadable.discard(engine_id)
        if lease.engine_id != engine_id:
            return None
        highest = self._highest.get(engine_id, 0)
        if lease.fencing_epoch < highest:
            if engine_id not in self._fenced:
                log.warning(
                    "engine=%s lease=ignored fencing_epoch=%d highest_seen=%d",
                    engine_id,
                    lease.fencing_epoch,
                    highest,
                )
                self._fenced.add(engine_id)
            return None
        self._fenced.discard(engine_id)
        self._highest[engine_id] = lease.fencing_epoch
        return lease

    async def close(self) -> None:
        await self._client.aclose()


def _text(stored: str | bytes) -> str:
    return stored if isinstance(stored, str) else stored.decode()
