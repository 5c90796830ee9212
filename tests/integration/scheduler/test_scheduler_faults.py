"""Engines fail in every way; clients get exactly the tokens of an unbroken run."""

from __future__ import annotations

import asyncio
import random

import pytest
from engine_double import EngineDouble, unbroken
from rig import Answer, running_scheduler, static_id, until

PROMPT = [11, 12, 13]


async def two_engines() -> tuple[EngineDouble, EngineDouble]:
    engines = EngineDouble(), EngineDouble()
    for engine in engines:
        await engine.start()
    return engines


def test_engine_killed_mid_stream_loses_and_doubles_nothing() -> None:
    async def scenario() -> None:
        first, second = await two_engines()
        first.hold_after = second.hold_after = 4
        async with running_scheduler(first.url, second.url) as rig:
            answer = Answer()
            client = asyncio.create_task(rig.stream(rig.body(PROMPT, 20, logprobs=1), answer))
            await until(lambda: len(answer.tokens) == 4)
            victim, other = (first, second) if first.running else (second, first)
            other.release()
            await victim.kill()
            await client
            assert answer.tokens == unbroken(PROMPT, 20)
            assert answer.is_done
            entries = [e for c in answer.choices for e in c["logprobs"]["content"]]
            assert [entry["token_id"] for entry in entries] == answer.tokens
            assert answer.spans == [("0", 0, 20)]
            assert other.requests[-1]["token_ids"] == PROMPT + answer.tokens[:4]
            assert other.requests[-1]["sampling_params"]["max_tokens"] == 16
            counters = rig.counters
            assert (counters.migrated, counters.lost, counters.finished) == (1, 0, 1)
            status, told = await rig.get("/rowen/v1/trajectories")
            assert (status, told["migrated"], told["tokens"]) == (200, 1, 20)
            assert sum(told["tokens_per_engine"].values()) == 20
            await until(lambda: rig.state(static_id(victim.url)) == "lost")
            await victim.start()
            await until(lambda: rig.state(static_id(victim.url)) == "ready", "recovery")
        await first.kill()
        await second.kill()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("cut", "stream_cut"),
        ("reset", "connection_broken"),
        ("half", "connection_broken"),
        ("html", "malformed_stream"),
        ("error", "error_in_stream"),
        ("nonsense", "nonsense"),
    ],
)
def test_every_broken_stream_is_continued_elsewhere(fault: str, cause: str) -> None:
    async def scenario() -> None:
        first, second = await two_engines()
        async with running_scheduler(first.url, second.url) as rig:
            first.hold_after, first.fault = 3, fault
            bodies = [rig.body([n, 7], 10) for n in range(4)]
            answers = await asyncio.gather(*(rig.post(body) for body in bodies))
            for body, (status, answer) in zip(bodies, answers, strict=True):
                assert status == 200
                assert answer["choices"][0]["token_ids"] == unbroken(body["token_ids"], 10)
            assert rig.counters.migrated >= 1
            assert rig.counters.lost == 0
            assert rig.scheduler.dispatcher.faults.get(cause, 0) >= 1
            assert rig.engine(static_id(first.url)).last_fault == cause
        await first.kill()
        await second.kill()

    asyncio.run(scenario())


@pytest.mark.parametrize("status", [404, 500, 503])
def test_an_engine_that_refuses_work_is_left_and_rests(status: int) -> None:
    async def scenario() -> None:
        first, second = await two_engines()
        async with running_scheduler(first.url, second.url) as rig:
            await rig.post(rig.body(PROMPT, 1))
            chosen = first if first.requests else second  # and will be again, all else equal
            chosen.answer_status = status
            for number in range(4):
                _, answer = await rig.post(rig.body([number], 5))
                assert answer["choices"][0]["token_ids"] == unbroken([number], 5)
            assert rig.counters.rerouted >= 1
            assert rig.scheduler.dispatcher.faults == {"refused_work": rig.counters.rerouted}
        await first.kill()
        await second.kill()

    asyncio.run(scenario())


def test_a_stalled_engine_is_left_by_its_requests() -> None:
    async def scenario() -> None:
        first, second = await two_engines()
        first.hold_after = second.hold_after = 4
        async with running_scheduler(first.url, second.url, stall_s=0.3) as rig:
            answer = Answer()
            client = asyncio.create_task(rig.stream(rig.body(PROMPT, 12), answer))
            await until(lambda: len(answer.tokens) == 4)
            victim, other = (first, second) if first.running else (second, first)
            other.release()
            await client
            assert answer.tokens == unbroken(PROMPT, 12)
            assert rig.scheduler.dispatcher.faults == {"stalled": 1}
            await until(lambda: victim.cancelled == 1, "the engine sees the connection closed")
        await first.kill()
        await second.kill()

    asyncio.run(scenario())


def test_while_no_engine_is_there_requests_wait_and_then_finish() -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        engine.hold_after = 2
        async with running_scheduler(engine.url) as rig:
            client = asyncio.create_task(rig.post(rig.body(PROMPT, 8), x_request_id="w"))
            await until(lambda: engine.tokens_made == 2)
            await engine.kill()
            await until(lambda: rig.scheduler.dispatcher.waiting == 1)
            assert (await rig.get("/ready"))[0] == 503
            engine.release()
            await engine.start()
            _, answer = await client
            assert answer["choices"][0]["token_ids"] == unbroken(PROMPT, 8)
            assert (rig.counters.resumed_same_engine, rig.counters.migrated) == (1, 0)
            _, told = await rig.get("/rowen/v1/trajectories/w")
            assert [(s["start"], s["end"]) for s in told["segments"]] == [(0, 2), (2, 8)]
        await engine.kill()

    asyncio.run(scenario())


def test_the_deadline_ends_a_request_with_a_sentence_and_its_id_resumes_it() -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        engine.hold_after = 3
        async with running_scheduler(engine.url, request_deadline_s=0.5) as rig:
            body = rig.body(PROMPT, 6)
            status, answer = await rig.post(body, x_request_id="d")
            assert status == 504
            assert "X-Request-Id" in answer["error"]["message"]
            assert rig.counters.lost == 1
            engine.release()
            status, answer = await rig.post(body, x_request_id="d")
            assert answer["choices"][0]["token_ids"] == unbroken(PROMPT, 6)
            assert engine.tokens_made == 6
            assert (rig.counters.lost, rig.counters.finished) == (0, 1)
        await engine.kill()

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", [5, 6, 7])
def test_randomly_timed_kills_lose_and_double_nothing(seed: int) -> None:
    async def scenario() -> None:
        chance = random.Random(seed)
        engines = [EngineDouble() for _ in range(3)]
        for engine in engines:
            await engine.start()
        urls = [engine.url for engine in engines]
        async with running_scheduler(*urls, dedicated_sequences=4) as rig:
            bodies = [rig.body([n, n + 1], 60, logprobs=0) for n in range(40)]
            answers = [Answer() for _ in bodies]
            clients = [
                asyncio.create_task(rig.stream(body, answer))
                for body, answer in zip(bodies, answers, strict=True)
            ]
            for _ in range(12):
                victim = chance.choice(engines)
                made, wanted = victim.tokens_made, chance.randrange(1, 40)
                await until(
                    lambda v=victim, n=made + wanted: (
                        v.tokens_made >= n or all(c.done() for c in clients)
                    )
                )
                await victim.kill()
                await victim.start()
            await asyncio.gather(*clients)
            for body, answer in zip(bodies, answers, strict=True):
                assert answer.tokens == unbroken(body["token_ids"], 60)
                entries = [e["token_id"] for c in answer.choices for e in c["logprobs"]["content"]]
                assert entries == answer.tokens
            assert (rig.counters.finished, rig.counters.lost) == (40, 0)
            assert rig.counters.migrated > 0
        for engine in engines:
            await engine.kill()

    asyncio.run(scenario())
