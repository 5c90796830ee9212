"""Leases in the embedded Redis, renewed by the keeper that daemons use: grants, caps, epochs."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator

import redis
from engine_double import EngineDouble, unbroken
from rig import Answer, Rig, running_scheduler, until

from rowen.daemon.leases import LeaseKeeper
from rowen.policies.lease import EngineId, EngineKind, EngineLease, Grant
from rowen.scheduler.embedded_redis import EmbeddedRedis

PROMPT = [41, 42]


def make_lease(name: str, url: str, kind: EngineKind = EngineKind.OPPORTUNISTIC) -> EngineLease:
    return EngineLease(
        engine_id=EngineId(name),
        url=url,
        kind=kind,
        model="m",
        node="n",
        grant=Grant.RUN,
        fencing_epoch=1,
        sequence_cap=4,
    )


@contextlib.asynccontextmanager
async def keeping(store: EmbeddedRedis, name: str, url: str, **more) -> AsyncIterator[LeaseKeeper]:
    keeper = LeaseKeeper(store.url, make_lease(name, url, **more))
    keeper.restarted()
    task = asyncio.create_task(keeper.run())
    try:
        yield keeper
    finally:
        task.cancel()
        await asyncio.wait([task])


async def is_ready(rig: Rig, name: str) -> None:
    await until(lambda: rig.state(name) == "ready", f"{name} ready")


def test_ordinary_clients_of_another_process_use_the_embedded_redis() -> None:
    program = """
import asyncio, sys, redis.asyncio
async def main():
    client = redis.asyncio.Redis.from_url(sys.argv[1])
    assert await client.set("k", "v", px=60000)
    assert await client.incr("epoch") == 1 and await client.incr("epoch") == 2
    assert await client.sadd("ids", "a", "b") == 2
    assert await client.smembers("ids") == {b"a", b"b"}
    assert await client.mget("k", "none") == [b"v", None]
    assert 0 < await client.pttl("k") <= 60000
    async with client.pipeline(transaction=True) as pipe:
        pipe.sadd("ids", "c")
        pipe.set("k", "w", px=1)
        assert await pipe.execute() == [1, True]
    while await client.get("k") is not None:
        pass
    await client.aclose()
asyncio.run(main())
"""
    with EmbeddedRedis() as store:
        command = [sys.executable, "-W", "error", "-c", program, store.url]
        subprocess.run(command, check=True, timeout=60)


def test_a_draining_lease_moves_running_requests_at_once() -> None:
    async def scenario(store: EmbeddedRedis) -> None:
        leaving, staying = EngineDouble(), EngineDouble()
        await leaving.start()
        await staying.start()
        leaving.hold_after = 5
        async with (
            running_scheduler(redis_url=store.url) as rig,
            keeping(store, "leaving", leaving.url) as keeper,
        ):
            await is_ready(rig, "leaving")
            answer = Answer()
            client = asyncio.create_task(rig.stream(rig.body(PROMPT, 12), answer))
            await until(lambda: len(answer.tokens) == 5)
            async with keeping(store, "staying", staying.url):
                await is_ready(rig, "staying")
                keeper.update(grant=Grant.DRAINING)
                await client
                assert answer.tokens == unbroken(PROMPT, 12)
                await until(lambda: leaving.cancelled == 1, "the upstream connection closed")
                assert rig.state("leaving") == "draining"
                assert (rig.counters.migrated, rig.counters.lost) == (1, 0)
                assert rig.scheduler.dispatcher.faults == {}
                keeper.update(grant=Grant.RUN)
                await is_ready(rig, "leaving")
        await leaving.kill()
        await staying.kill()

    with EmbeddedRedis() as store:
        asyncio.run(scenario(store))


def test_a_lease_that_ends_moves_running_requests() -> None:
    async def scenario(store: EmbeddedRedis) -> None:
        leaving, staying = EngineDouble(), EngineDouble()
        await leaving.start()
        await staying.start()
        leaving.hold_after = 5
        async with running_scheduler(staying.url, redis_url=store.url, stall_s=60) as rig:
            staying.answer_status = 503
            async with keeping(store, "leaving", leaving.url):
                await is_ready(rig, "leaving")
                answer = Answer()
                client = asyncio.create_task(rig.stream(rig.body(PROMPT, 12), answer))
                await until(lambda: len(answer.tokens) == 5)
                staying.answer_status = 200
            await client
            assert answer.tokens == unbroken(PROMPT, 12)
            assert rig.counters.migrated == 1
            assert rig.state("leaving") == "lost"
        await leaving.kill()
        await staying.kill()

    with EmbeddedRedis() as store:
        asyncio.run(scenario(store))


def test_a_closed_gate_keeps_requests_for_a_while_and_the_cap_admits() -> None:
    async def scenario(store: EmbeddedRedis) -> None:
        engine = EngineDouble()
        await engine.start()
        engine.hold_after = 2
        async with (
            running_scheduler(redis_url=store.url, stall_s=0.3) as rig,
            keeping(store, "e", engine.url) as keeper,
        ):
            await is_ready(rig, "e")
            first = asyncio.create_task(rig.post(rig.body(PROMPT, 6)))
            await until(lambda: engine.tokens_made == 2)
            keeper.update(grant=Grant.THROTTLED, sequence_cap=0)
            await until(lambda: rig.state("e") == "throttled")
            second = asyncio.create_task(rig.post(rig.body(PROMPT, 7)))
            await until(lambda: rig.scheduler.dispatcher.waiting == 1)
            sweeps = 0

            def count() -> None:
                nonlocal sweeps
                sweeps += 1

            rig.scheduler.registry.swept = count
            await until(lambda: sweeps > 30)  # twice the stall bound and more
            assert len(engine.running) == 1, "silence of a closed gate is no stall"
            engine.release()
            keeper.update(grant=Grant.RUN, sequence_cap=1)
            for client, length in ((first, 6), (second, 7)):
                _, answer = await client
                assert answer["choices"][0]["token_ids"] == unbroken(PROMPT, length)
            assert engine.most_running == 1
            assert len(engine.requests) == 2
        await engine.kill()

    with EmbeddedRedis() as store:
        asyncio.run(scenario(store))


def test_a_new_epoch_is_a_new_process_and_an_old_one_is_fenced_off() -> None:
    async def scenario(store: EmbeddedRedis) -> None:
        old, new = EngineDouble(), EngineDouble()
        await old.start()
        await new.start()
        old.hold_after = 3
        async with running_scheduler(redis_url=store.url) as rig:
            async with keeping(store, "e", old.url) as keeper:
                await is_ready(rig, "e")
                client = asyncio.create_task(rig.post(rig.body(PROMPT, 9), x_request_id="f"))
                await until(lambda: old.tokens_made == 3)
                keeper.restarted(url=new.url)
                _, answer = await client
                assert answer["choices"][0]["token_ids"] == unbroken(PROMPT, 9)
                assert rig.engine("e").epoch == 2
                _, told = await rig.get("/rowen/v1/trajectories/f")
                assert [s["fencing_epoch"] for s in told["segments"]] == [1, 2]
            stale = make_lease("e", old.url).model_dump_json()
            client = redis.Redis.from_url(store.url)
            client.sadd("rowen:engines", "e")
            client.set("rowen:lease:e", stale, px=60_000)
            client.set("rowen:lease:broken", "{", px=60_000)
            client.sadd("rowen:engines", "broken")
            client.close()
            await until(lambda: rig.state("e") == "lost")
            assert rig.engine("e").client.url == new.url
            assert "broken" not in rig.scheduler.registry.engines
        await old.kill()
        await new.kill()

    with EmbeddedRedis() as store:
        asyncio.run(scenario(store))


def test_a_silent_redis_stops_new_work_on_borrowed_engines_only() -> None:
    async def scenario() -> None:
        borrowed, owned = EngineDouble(), EngineDouble()
        await borrowed.start()
        await owned.start()
        borrowed.hold_after = owned.hold_after = 3
        store = EmbeddedRedis()
        with store:
            async with contextlib.AsyncExitStack() as stack:
                rig = await stack.enter_async_context(running_scheduler(redis_url=store.url))
                dedicated = EngineKind.DEDICATED
                await stack.enter_async_context(keeping(store, "borrowed", borrowed.url))
                await stack.enter_async_context(keeping(store, "owned", owned.url, kind=dedicated))
                await is_ready(rig, "borrowed")
                await is_ready(rig, "owned")
                clients = [asyncio.create_task(rig.post(rig.body([n], 8))) for n in range(2)]
                await until(lambda: borrowed.tokens_made == owned.tokens_made == 3)
                await asyncio.to_thread(store.close)
                await until(lambda: rig.state("borrowed") == "throttled")
                assert rig.engine("borrowed").decision.reason == "lease_unverified"
                assert rig.state("owned") == "ready"
                assert len(borrowed.running) == 1
                borrowed.release()
                owned.release()
                for number, client in enumerate(clients):
                    _, answer = await client
                    assert answer["choices"][0]["token_ids"] == unbroken([number], 8)
                await rig.post(rig.body([9], 2))
                assert owned.requests[-1]["token_ids"] == [9]
        await borrowed.kill()
        await owned.kill()

    asyncio.run(scenario())
