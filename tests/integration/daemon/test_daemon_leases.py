"""The lease keeper against a server that speaks Redis' protocol."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress

import pytest
import redis
from fakeredis import TcpFakeServer

from rowen.daemon.leases import LeaseKeeper
from rowen.policies.lease import (
    ENGINES_KEY,
    EngineId,
    EngineKind,
    EngineLease,
    Grant,
    decode_lease,
    epoch_key,
    lease_key,
)

ENGINE = EngineId("node-1.rollout")
LEASE = EngineLease(
    engine_id=ENGINE,
    url="http://127.0.0.1:1",
    kind=EngineKind.DEDICATED,
    model="m",
    node="node-1",
    grant=Grant.RUN,
    fencing_epoch=1,
    sequence_cap=4,
)


@pytest.fixture
def store() -> Iterator[redis.Redis]:
    server = TcpFakeServer(("127.0.0.1", 0))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    client = redis.Redis(port=server.server_address[1], decode_responses=True)
    yield client
    client.close()
    server.shutdown()
    server.server_close()
    thread.join()


def url_of(store: redis.Redis) -> str:
    return f"redis://127.0.0.1:{store.connection_pool.connection_kwargs['port']}"


@asynccontextmanager
async def kept(keeper: LeaseKeeper) -> AsyncIterator[LeaseKeeper]:
    task = asyncio.create_task(keeper.run())
    try:
        yield keeper
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while True:
            if await asyncio.to_thread(condition):
                return
            await asyncio.sleep(0.02)


def stored(store: redis.Redis) -> EngineLease | None:
    found = store.get(lease_key(ENGINE))
    assert found is None or isinstance(found, str)
    return None if found is None else decode_lease(found)


def test_nothing_is_published_before_the_engine_started_and_changes_come_at_once(
    store: redis.Redis,
) -> None:
    async def run() -> None:
        async with kept(LeaseKeeper(url_of(store), LEASE)) as keeper:
            keeper.update(sequence_cap=7)
            assert not keeper.status.is_published
            keeper.restarted(url="http://127.0.0.1:2")
            await until(lambda: keeper.status.is_published)
            wanted = LEASE.model_copy(update={"sequence_cap": 7, "url": "http://127.0.0.1:2"})
            assert stored(store) == wanted
            keeper.update(grant=Grant.DRAINING)
            await until(lambda: (stored(store) or LEASE).grant is Grant.DRAINING)
            keeper.restarted()
            await until(lambda: (stored(store) or LEASE).fencing_epoch == 2)
        assert stored(store) is None
        assert store.smembers(ENGINES_KEY) == set()

    asyncio.run(run())


def test_a_withdrawn_lease_is_gone_but_the_engine_is_remembered(store: redis.Redis) -> None:
    async def run() -> None:
        async with kept(LeaseKeeper(url_of(store), LEASE)) as keeper:
            keeper.restarted()
            await until(lambda: stored(store) is not None)
            keeper.withdraw()
            await until(lambda: stored(store) is None)
            assert store.smembers(ENGINES_KEY) == {ENGINE}

    asyncio.run(run())


def test_a_wiped_redis_never_lowers_the_epoch(store: redis.Redis) -> None:
    store.set(epoch_key(ENGINE), 41)

    async def run() -> None:
        async with kept(LeaseKeeper(url_of(store), LEASE)) as keeper:
            keeper.restarted()
            await until(lambda: keeper.status.fencing_epoch == 42)
            store.flushall()
            await until(lambda: store.get(epoch_key(ENGINE)) == "42")
            store.flushall()
            keeper.restarted()
            await until(lambda: (stored(store) or LEASE).fencing_epoch == 43)

    asyncio.run(run())


def test_foreign_text_for_an_epoch_costs_the_lease_and_not_the_keeper(
    store: redis.Redis,
) -> None:
    async def run() -> None:
        async with kept(LeaseKeeper(url_of(store), LEASE)) as keeper:
            keeper.restarted()
            await until(lambda: keeper.status.is_published)
            store.set(epoch_key(ENGINE), "foreign")
            await until(lambda: "ValueError" in (keeper.status.problem or ""))
            store.set(epoch_key(ENGINE), keeper.status.fencing_epoch)
            await until(lambda: keeper.status.is_published)
            store.set(epoch_key(ENGINE), "foreign")
        assert store.get(epoch_key(ENGINE)) == "foreign"  # and leaving was orderly

    asyncio.run(run())


def test_a_keeper_that_was_overtaken_publishes_nothing_and_removes_nothing(
    store: redis.Redis,
) -> None:
    async def run() -> None:
        async with kept(LeaseKeeper(url_of(store), LEASE)) as successor:
            async with kept(LeaseKeeper(url_of(store), LEASE)) as old:
                old.restarted()
                await until(lambda: old.status.is_published)
                successor.restarted()
                await until(lambda: old.status.problem == "fenced off")
                old.update(sequence_cap=9)
            found = stored(store)
            assert found is not None
            assert (found.fencing_epoch, found.sequence_cap) == (2, 4)
            assert store.smembers(ENGINES_KEY) == {ENGINE}

    asyncio.run(run())
