"""New weights arrive under running requests: every token carries the version that made it."""

from __future__ import annotations

import asyncio

import pytest
from engine_double import EngineDouble, next_token, unbroken
from rig import Answer, Rig, running_scheduler, static_id, until

PROMPT = [31, 32, 33]


async def announce(rig: Rig, version: int) -> None:
    body = {"version": version, "host": "127.0.0.1", "port": 7}
    status, _ = await rig.post(body, path="/rowen/v1/versions")
    assert status == 200


def check_true_versions(prompt: list[int], answer: Answer) -> None:
    """Replays the answer: each token is the one its claimed version makes at that place."""
    claimed = [v for v, start, end in answer.spans for _ in range(start, end)]
    assert len(claimed) == len(answer.tokens)
    before = list(prompt)
    for token, version in zip(answer.tokens, claimed, strict=True):
        assert token == next_token(version, before)
        before.append(token)


def test_a_request_outlives_the_update_of_the_only_engine() -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        engine.hold_after = 4
        async with running_scheduler(engine.url) as rig:
            answer = Answer()
            client = asyncio.create_task(rig.stream(rig.body(PROMPT, 10), answer))
            await until(lambda: len(answer.tokens) == 4)
            await announce(rig, 1)
            await until(lambda: len(answer.tokens) == 8, "tokens of the new version")
            await announce(rig, 2)
            await client
            assert answer.spans == [("0", 0, 4), ("1", 4, 8), ("2", 8, 10)]
            check_true_versions(PROMPT, answer)
            assert engine.updates == [1, 2]
            counters = rig.counters
            assert (counters.resumed_same_engine, counters.migrated) == (1, 0)
            assert counters.continuations == 2
            assert rig.scheduler.dispatcher.faults == {}
            _, told = await rig.get("/rowen/v1/versions")
            assert told["target"]["version"] == 2
            assert [(s["version"], s["from_version"]) for s in told["syncs"]] == [(1, 0), (2, 1)]
            assert told["engines"][0]["version"] == 2
        await engine.kill()

    asyncio.run(scenario())


def test_somebody_keeps_serving_while_engines_take_turns() -> None:
    async def scenario() -> None:
        engines = [EngineDouble() for _ in range(4)]
        for engine in engines:
            await engine.start()
        async with running_scheduler(*(engine.url for engine in engines)) as rig:
            fewest_serving = 4
            plan = rig.scheduler.weight_sync.plan

            def watch() -> None:
                nonlocal fewest_serving
                plan()
                serving = sum(e.is_routable for e in rig.scheduler.registry.engines.values())
                fewest_serving = min(fewest_serving, serving)

            rig.scheduler.registry.swept = watch
            rig.scheduler.weight_sync.plan = watch
            await announce(rig, 1)
            await until(lambda: all(engine.updates == [1] for engine in engines))
            await until(lambda: all(rig.state(static_id(e.url)) == "ready" for e in engines))
            assert 2 <= fewest_serving < 4
        for engine in engines:
            await engine.kill()

    asyncio.run(scenario())


def test_a_failed_update_keeps_the_engine_out_until_one_succeeds() -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        async with running_scheduler(engine.url) as rig:
            engine.update_fault = "finish"
            await announce(rig, 1)
            await until(lambda: rig.scheduler.weight_sync.failures_total >= 2)
            assert rig.state(static_id(engine.url)) == "stale"
            _, told = await rig.get("/rowen/v1/versions")
            assert (told["engines"][0]["version"], told["engines"][0]["is_updating"]) in [
                (None, False),
                (None, True),
            ]
            assert "HTTP 500" in told["engines"][0]["problem"]
            client = asyncio.create_task(rig.post(rig.body(PROMPT, 5)))
            await until(lambda: rig.scheduler.dispatcher.waiting == 1)
            engine.update_fault = None
            _, answer = await client
            assert answer["choices"][0]["token_ids"] == unbroken(PROMPT, 5, "1")
            assert answer["choices"][0]["weight_versions"][0]["version"] == "1"
            assert not engine.is_paused
        await engine.kill()

    asyncio.run(scenario())


def test_an_engine_that_restarted_catches_up_before_it_works() -> None:
    async def scenario() -> None:
        first, second = EngineDouble(), EngineDouble()
        await first.start()
        await second.start()
        async with running_scheduler(first.url, second.url) as rig:
            for version in (1, 2, 3):
                await announce(rig, version)
                await until(lambda v=version: v in first.updates and v in second.updates)
            await until(lambda: rig.state(static_id(first.url)) == "ready")
            await first.kill()
            await until(lambda: rig.state(static_id(first.url)) == "lost")
            await first.start()
            await until(lambda: rig.state(static_id(first.url)) == "ready", "caught up")
            assert first.updates == [1, 2, 3, 3]
            assert (first.version, first.label) == ("3", "3")
        await first.kill()
        await second.kill()

    asyncio.run(scenario())


def test_a_scheduler_that_died_in_an_update_leaves_an_engine_that_is_not_trusted() -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        engine.update_fault = "finish"
        async with running_scheduler(engine.url) as rig:
            await announce(rig, 1)
            await until(lambda: rig.scheduler.weight_sync.failures_total >= 1)
        assert (engine.version, engine.label, engine.is_paused) == ("1", "default", True)
        engine.update_fault = None
        async with running_scheduler(engine.url, wait_ready=False) as rig:
            name = static_id(engine.url)
            await until(lambda: rig.engine(name).sync.is_tainted)
            assert rig.state(name) == "stale"
            await announce(rig, 1)
            await until(lambda: rig.state(name) == "ready")
            assert (engine.label, engine.is_paused) == ("1", False)
        await engine.kill()

    asyncio.run(scenario())


def test_max_staleness_waits_for_fresh_weights() -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        async with running_scheduler(engine.url) as rig:
            engine.update_fault = "update"
            await announce(rig, 1)
            asked = rig.post(rig.body(PROMPT, 5), X_Rowen_Max_Staleness="0")
            client = asyncio.create_task(asked)
            await until(lambda: rig.scheduler.dispatcher.waiting == 1)
            assert engine.requests == []
            engine.update_fault = None
            _, answer = await client
            assert answer["choices"][0]["weight_versions"][0]["version"] == "1"
        await engine.kill()

    asyncio.run(scenario())


def test_announcing_is_idempotent_and_never_goes_back() -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        async with running_scheduler(engine.url) as rig:
            body = {"version": 4, "host": "127.0.0.1", "port": 7}
            first = await rig.post(body, path="/rowen/v1/versions")
            second = await rig.post(body, path="/rowen/v1/versions")
            assert (first[1]["is_new"], second[1]["is_new"]) == (True, False)
            status, answer = await rig.post(body | {"version": 3}, path="/rowen/v1/versions")
            assert (status, answer["error"]["param"]) == (409, "version")
            await until(lambda: rig.state(static_id(engine.url)) == "ready")
            assert engine.updates == [4]
        await engine.kill()

    asyncio.run(scenario())


def test_a_wrong_version_in_an_answer_is_told_as_the_engine_says_and_checked() -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        async with running_scheduler(engine.url) as rig:
            engine.wrong_report = "9"
            engine.label = "9"  # somebody else changed the weights behind our back
            _, answer = await rig.post(rig.body(PROMPT, 5))
            assert answer["choices"][0]["weight_versions"] == [
                {"version": "9", "start": 0, "end": 5}
            ]
            await until(lambda: rig.engine(static_id(engine.url)).version == 9, "read again")
        await engine.kill()

    asyncio.run(scenario())


def test_versions_stay_true_while_updates_and_kills_come_at_random() -> None:
    async def scenario() -> None:
        engines = [EngineDouble() for _ in range(3)]
        for engine in engines:
            await engine.start()
        urls = [engine.url for engine in engines]
        async with running_scheduler(*urls, dedicated_sequences=3) as rig:
            prompts = [[n, n + 5] for n in range(24)]
            answers = [Answer() for _ in prompts]
            clients = [
                asyncio.create_task(rig.stream(rig.body(prompt, 80), answer))
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
            for version in range(1, 7):
                made = sum(engine.tokens_made for engine in engines)
                await until(
                    lambda n=made: (
                        sum(e.tokens_made for e in engines) > n + 100
                        or all(client.done() for client in clients)
                    )
                )
                await announce(rig, version)
                if version % 2:
                    victim = engines[version % 3]
                    await victim.kill()
                    await victim.start()
            await asyncio.gather(*clients)
            for prompt, answer in zip(prompts, answers, strict=True):
                assert len(answer.tokens) == 80
                check_true_versions(prompt, answer)
            assert len({v for answer in answers for v, _, _ in answer.spans}) > 1
            assert (rig.counters.finished, rig.counters.lost) == (24, 0)
        for engine in engines:
            await engine.kill()

    asyncio.run(scenario())


@pytest.mark.parametrize("route", ["init", "start", "update"])
def test_an_engine_that_refused_an_update_serves_its_old_version(route: str) -> None:
    async def scenario() -> None:
        first, second = EngineDouble(), EngineDouble()
        for engine in (first, second):
            await engine.start()
            engine.update_fault = route
        async with running_scheduler(first.url, second.url) as rig:
            await announce(rig, 1)
            await until(lambda: rig.scheduler.weight_sync.failures_total >= 4)
            _, answer = await rig.post(rig.body(PROMPT, 5))
            assert answer["choices"][0]["token_ids"] == unbroken(PROMPT, 5)
            first.update_fault = second.update_fault = None
            await until(lambda: first.updates == second.updates == [1])
        for engine in (first, second):
            await engine.kill()

    asyncio.run(scenario())


def test_a_new_run_begins_with_any_version_and_the_old_one_stays_ended() -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        async with running_scheduler(engine.url) as rig:
            name, place = static_id(engine.url), {"host": "127.0.0.1", "port": 7}
            for run, version in (("a", 4), ("b", 0), ("b", 1)):
                body = {"version": version, "run": run, **place}
                assert (await rig.post(body, path="/rowen/v1/versions"))[0] == 200
                await until(lambda v=version: engine.updates[-1:] == [v])
                await until(lambda: rig.state(name) == "ready")
            body = {"version": 5, "run": "a", **place}
            status, answer = await rig.post(body, path="/rowen/v1/versions")
            assert (status, answer["error"]["param"]) == (409, "run")
            assert engine.updates == [4, 0, 1]
        await engine.kill()

    asyncio.run(scenario())
