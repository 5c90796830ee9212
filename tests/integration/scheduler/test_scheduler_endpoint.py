"""The endpoint as clients see it: shapes, errors, idempotent ids, cancellation, admission."""

from __future__ import annotations

import asyncio

from engine_double import EngineDouble, unbroken
from rig import Answer, running_scheduler, until

PROMPT = [21, 22]


def test_shapes_and_stop_tokens() -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        async with running_scheduler(engine.url) as rig:
            expected = unbroken(PROMPT, 10)
            stop = expected[6]
            length = expected.index(stop) + 1
            body = rig.body(PROMPT, 10, stop_token_ids=[stop], logprobs=1)
            status, answer = await rig.post(body, x_request_id="one")
            choice = answer["choices"][0]
            assert (status, answer["request_id"]) == (200, "generate-tokens-one")
            assert choice["token_ids"] == expected[:length]
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
            assert choice["weight_versions"] == [{"version": "0", "start": 0, "end": length}]
            assert answer["usage"]["completion_tokens"] == length
            streamed = Answer()
            options = {"stream_options": {"include_usage": True}}
            await rig.stream(body | options, streamed)
            assert streamed.tokens == expected[:length]
            assert streamed.choices[-1]["stop_reason"] == stop
            assert streamed.events[-1]["usage"]["completion_tokens"] == length
            assert all(c["weight_versions"] is None for c in streamed.choices[:-1])
        await engine.kill()

    asyncio.run(scenario())


def test_status_routes() -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        async with running_scheduler(engine.url) as rig:
            await rig.post(rig.body(PROMPT, 5))
            assert (await rig.get("/v1/models"))[1]["data"][0]["id"] == "m"
            assert (await rig.get("/ready"))[0] == 200
            _, told = await rig.get("/rowen/v1/engines")
            (shown,) = told["engines"]
            assert (shown["state"], shown["version"], shown["kind"]) == ("ready", 0, "dedicated")
            assert sum(shown["history"]["tokens_per_second"]) == shown["tokens_total"] == 5
            async with rig.client.get(f"{rig.url}/metrics") as answer:
                text = await answer.text()
            assert 'rowen_scheduler_trajectories_total{event="finished"} 1.0' in text
            async with rig.client.get(f"{rig.url}/health") as answer:
                assert answer.status == 200
            status, answer = await rig.get("/rowen/v1/trajectories/unknown")
            assert (status, answer["error"]["param"]) == (404, "trajectory_id")
        await engine.kill()

    asyncio.run(scenario())


def test_wrong_requests_get_a_sentence_and_reach_no_engine() -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        async with running_scheduler(engine.url, max_body_bytes=2000) as rig:
            status, answer = await rig.post(rig.body(PROMPT, 0))
            assert (status, answer["error"]["param"]) == (400, "sampling_params.max_tokens")
            assert (await rig.post(rig.body([1] * 2000, 1)))[0] == 413
            for path in ("/v1/completions", "/v1/chat/completions"):
                status, answer = await rig.post({}, path=path)
                assert status == 404
                assert "/inference/v1/generate" in answer["error"]["message"]
            status, answer = await rig.post({"version": "x"}, path="/rowen/v1/versions")
            assert (status, answer["error"]["param"]) == (400, "version")
            assert engine.requests == []
        await engine.kill()

    asyncio.run(scenario())


def test_a_request_that_the_engine_finds_wrong_is_the_clients_and_not_tried_again() -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        async with running_scheduler(engine.url) as rig:
            engine.answer_status = 400
            for is_stream in (False, True):
                body = rig.body(PROMPT, 5) | {"stream": is_stream}
                status, answer = await rig.post(body)
                assert status == 400
                assert "at least 1 item" in answer["error"]["message"]
            assert (rig.counters.rejected, rig.counters.lost) == (2, 0)
            assert rig.state(next(iter(rig.scheduler.registry.engines))) == "ready"
        await engine.kill()

    asyncio.run(scenario())


def test_repeated_ids_attach_live_and_from_the_log() -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        engine.hold_after = 4
        async with running_scheduler(engine.url) as rig:
            body = rig.body(PROMPT, 9)
            live = [Answer(), Answer()]
            clients = [asyncio.create_task(rig.stream(body, live[0], x_request_id="same"))]
            await until(lambda: len(live[0].tokens) == 4)
            clients.append(asyncio.create_task(rig.stream(body, live[1], x_request_id="same")))
            await until(lambda: len(live[1].tokens) == 4)
            engine.release()
            await asyncio.gather(*clients)
            _, late = await rig.post(body, x_request_id="same")
            tokens = late["choices"][0]["token_ids"]
            assert live[0].tokens == live[1].tokens == tokens == unbroken(PROMPT, 9)
            assert len(engine.requests) == 1
            status, answer = await rig.post(rig.body([9], 9), x_request_id="same")
            assert (status, answer["error"]["param"]) == (409, "x-request-id")
        await engine.kill()

    asyncio.run(scenario())


def test_a_client_that_leaves_stops_the_engine_and_may_come_back_for_the_rest() -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        engine.hold_after = 4
        async with running_scheduler(engine.url) as rig:
            body = rig.body(PROMPT, 9)
            for is_stream in (True, False):
                name = f"leaver-{is_stream}"
                answer, before = Answer(), engine.cancelled
                asked = (
                    rig.stream(body, answer, x_request_id=name)
                    if is_stream
                    else rig.post(body, x_request_id=name)
                )
                client = asyncio.create_task(asked)
                await until(lambda: len(engine.running) == 1)
                made = engine.tokens_made
                await until(lambda n=made: engine.tokens_made >= n and engine.tokens_made % 4 == 0)
                client.cancel()
                await asyncio.wait([client])
                await until(lambda n=before: engine.cancelled == n + 1, "the engine's cancel")
            assert rig.counters.cancelled == 2
            engine.release()
            for is_stream in (True, False):
                _, told = await rig.post(body, x_request_id=f"leaver-{is_stream}")
                assert told["choices"][0]["token_ids"] == unbroken(PROMPT, 9)
            assert engine.tokens_made == 18
            assert (rig.counters.cancelled, rig.counters.finished) == (0, 2)
        await engine.kill()

    asyncio.run(scenario())


def test_admission_keeps_to_the_cap_and_serves_in_order() -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        engine.hold_after = 0
        async with running_scheduler(engine.url, dedicated_sequences=2, max_open=6) as rig:
            clients = []
            for number in range(6):
                clients.append(asyncio.create_task(rig.post(rig.body([number], 3))))
                await until(lambda n=number: rig.counters.started == n + 1)
            await until(lambda: len(engine.running) == 2)
            assert rig.scheduler.dispatcher.waiting == 4
            status, answer = await rig.post(rig.body([9], 3))
            assert (status, answer["error"]["type"]) == (429, "Too Many Requests")
            engine.release()
            await asyncio.gather(*clients)
            assert [request["token_ids"][0] for request in engine.requests] == list(range(6))
            assert engine.most_running == 2
        await engine.kill()

    asyncio.run(scenario())


def test_stopping_answers_open_requests_at_once() -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        engine.hold_after = 2
        async with running_scheduler(engine.url) as rig:
            answer = Answer()
            streamed = asyncio.create_task(rig.stream(rig.body(PROMPT, 5), answer))
            whole = asyncio.create_task(rig.post(rig.body(PROMPT, 5)))
            await until(lambda: len(answer.tokens) == 2 and len(engine.running) == 2)
            rig.scheduler.stop_soon()
            status, told = await whole
            await streamed
            assert (status, told["error"]["code"]) == (503, 503)
            assert answer.error["code"] == 503
            assert answer.is_done
        await engine.kill()

    asyncio.run(scenario())
