"""The open-loop client against a small HTTP server that streams as vLLM does."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rowen.bench.calibrate import CalibrationError, calibrate
from rowen.bench.errors import RequestsError
from rowen.bench.openloop import OpenLoop, Replay, main, planned
from rowen.bench.records import ServingRecord, read_records
from rowen.bench.requests_file import PromptRequest, RequestsFile, write_requests
from rowen.bench.window import ReplayRequest

Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


def file_of(count: int, output_tokens: int = 3, at_s: float = 0.0) -> RequestsFile:
    return RequestsFile(
        0.01, tuple(PromptRequest(n, at_s, (1, 2, 3), output_tokens) for n in range(count))
    )


@asynccontextmanager
async def engine(handler: Handler) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """Serve ``handler`` on a free port; yields the base URL and the bodies received."""
    bodies: list[dict[str, Any]] = []

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        bodies.append(body)
        return await handler(request, body)

    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", bodies
    finally:
        await runner.cleanup()


async def stream(
    request: web.Request, events: list[object], *, is_done: bool = True
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for event in events:
        await response.write(f"data: {json.dumps(event)}\n\n".encode())
    if is_done:
        await response.write(b"data: [DONE]\n\n")
    return response


def tokens_event(*tokens: int) -> dict[str, Any]:
    return {"choices": [{"text": "", "token_ids": list(tokens)}]}


async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return await stream(request, [tokens_event(n) for n in range(body["max_tokens"])])


async def replayed(
    handler: Handler, file: RequestsFile, **settings: Any
) -> tuple[list[ServingRecord], list[dict[str, Any]]]:
    out = io.StringIO()
    async with engine(handler) as (url, bodies):
        await OpenLoop(file, Replay(url=url, model="m", **settings), out).run()
    return [ServingRecord(**json.loads(line)) for line in out.getvalue().splitlines()], bodies


def test_each_request_is_sent_once_and_recorded_with_its_tokens() -> None:
    records, bodies = asyncio.run(replayed(answer, file_of(20)))
    assert sorted(record.index for record in records) == list(range(20))
    for record in records:
        assert record.status == "ok"
        assert (record.tokens, record.wanted_tokens, record.input_tokens) == (3, 3, 3)
        assert record.ttft_ms is not None
        assert record.last_token_ms is not None
        assert 0 < record.ttft_ms <= record.last_token_ms
        assert record.lateness_ms >= 0
    assert bodies[0] == {
        "model": "m",
        "prompt": [1, 2, 3],
        "max_tokens": 3,
        "min_tokens": 3,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "return_token_ids": True,
        "cache_salt": "arm-0",
    }


def test_requests_are_sent_although_none_is_answered() -> None:
    """Open loop: the engine answers only when it holds all requests at once."""

    async def scenario() -> list[ServingRecord]:
        everyone = asyncio.Barrier(12)

        async def together(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            await everyone.wait()
            return await answer(request, body)

        return (await replayed(together, file_of(12), timeout_s=20))[0]

    assert [record.status for record in asyncio.run(scenario())] == ["ok"] * 12


def test_each_pass_has_its_own_prefix_cache_and_number() -> None:
    records, bodies = asyncio.run(replayed(answer, file_of(2), passes=3, arm="alone"))
    assert sorted((r.pass_number, r.index) for r in records) == [
        (p, n) for p in range(3) for n in range(2)
    ]
    assert {body["cache_salt"] for body in bodies} == {"alone-0", "alone-1", "alone-2"}


def test_a_plan_repeats_until_its_passes_or_its_duration_end() -> None:
    file = RequestsFile(10.0, (PromptRequest(0, 1.0, (1,), 2), PromptRequest(1, 9.0, (1,), 2)))

    def plan(**settings: Any) -> list[tuple[int, float, int]]:
        replay = Replay(url="", model="", **settings)
        return [(number, at_s, one.index) for number, at_s, one in planned(file, replay)]

    assert plan() == [(0, 1.0, 0), (0, 9.0, 1)]
    assert plan(passes=2) == [(0, 1.0, 0), (0, 9.0, 1), (1, 11.0, 0), (1, 19.0, 1)]
    assert plan(passes=None, duration_s=19.0) == [(0, 1.0, 0), (0, 9.0, 1), (1, 11.0, 0)]
    assert plan(passes=1, duration_s=5.0) == [(0, 1.0, 0)]


async def refuse(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.Response(status=503, text="not\nnow")


async def cut(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return await stream(request, [tokens_event(1, 2)], is_done=False)


async def fail(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return await stream(request, [tokens_event(1), {"error": {"message": "boom"}}])


async def babble(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return await stream(request, ["surprise"])


async def drop(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await stream(request, [tokens_event(1)], is_done=False)
    assert request.transport is not None
    request.transport.abort()
    return response


@pytest.mark.parametrize(
    ("handler", "tokens", "part"),
    [
        (refuse, 0, "HTTP 503: not now"),
        (cut, 2, "after 2 of 3 tokens"),
        (fail, 1, "boom"),
        (babble, 0, "no event"),
        (drop, None, "Error"),
    ],
)
def test_a_failure_is_recorded_with_what_came_before(
    handler: Handler, tokens: int | None, part: str
) -> None:
    records, _ = asyncio.run(replayed(handler, file_of(1)))
    assert records[0].status == "error"
    assert part in records[0].error
    if tokens is not None:
        assert records[0].tokens == tokens


def test_an_engine_that_is_gone_is_recorded() -> None:
    out = io.StringIO()
    replay = Replay(url="http://127.0.0.1:9", model="m")
    asyncio.run(_run(OpenLoop, file_of(2), replay, out))
    records = [ServingRecord(**json.loads(line)) for line in out.getvalue().splitlines()]
    assert [record.status for record in records] == ["error", "error"]
    assert all("Connect" in record.error for record in records)


async def _run(
    client: type[OpenLoop], file: RequestsFile, replay: Replay, out: io.StringIO
) -> None:
    await client(file, replay, out).run()


async def hang(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await stream(request, [tokens_event(1)], is_done=False)
    await asyncio.Event().wait()
    return response


def test_an_answer_that_never_ends_is_an_error_after_the_timeout() -> None:
    records, _ = asyncio.run(replayed(hang, file_of(1), timeout_s=0.2))
    assert (records[0].status, records[0].tokens) == ("error", 1)
    assert "within 0.2 s" in records[0].error


def test_requests_beyond_the_bound_are_not_sent_but_recorded() -> None:
    records, bodies = asyncio.run(replayed(hang, file_of(5), timeout_s=0.3, most_in_flight=2))
    assert len(bodies) == 2
    assert sum("not sent: 2 are in flight" in record.error for record in records) == 3


def test_stop_cancels_what_is_in_flight_and_sends_nothing_more() -> None:
    async def scenario() -> list[ServingRecord]:
        reached = asyncio.Event()

        async def reach(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            reached.set()
            return await hang(request, body)

        file = RequestsFile(
            1000.0, (PromptRequest(0, 0.0, (1,), 2), PromptRequest(1, 900.0, (1,), 2))
        )
        out = io.StringIO()
        async with engine(reach) as (url, _):
            client = OpenLoop(file, Replay(url=url, model="m"), out)
            run = asyncio.create_task(client.run())
            await asyncio.wait_for(reached.wait(), 10)
            client.stop()
            await asyncio.wait_for(run, 10)
        return [ServingRecord(**json.loads(line)) for line in out.getvalue().splitlines()]

    records = asyncio.run(scenario())
    assert [(record.index, record.status) for record in records] == [(0, "cancelled")]


def test_a_replay_without_an_end_is_refused() -> None:
    with pytest.raises(RequestsError, match="would not end"):
        OpenLoop(file_of(1), Replay(url="", model="", passes=None), io.StringIO())


def test_sigterm_ends_the_process_with_its_records_written(tmp_path: Path) -> None:
    requests = tmp_path / "requests"
    out = tmp_path / "records"
    write_requests(
        requests,
        [ReplayRequest(0.0, 4, 2), ReplayRequest(900.0, 4, 2)],
        period_s=1000,
        vocabulary=(5, 50),
        seed=1,
    )

    async def scenario() -> int:
        reached = asyncio.Event()

        async def reach(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            reached.set()
            return await hang(request, body)

        async with engine(reach) as (url, _):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "rowen.bench.openloop", "--requests", str(requests),
                "--url", url, "--model", "m", "--out", str(out),
            )  # fmt: skip
            try:
                await asyncio.wait_for(reached.wait(), 60)
                os.kill(process.pid, signal.SIGTERM)
                return await asyncio.wait_for(process.wait(), 60)
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()

    assert asyncio.run(scenario()) == 0
    assert [record.status for record in read_records(out)] == ["cancelled"]


def test_wrong_use_exits_2_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", "m", "--out", str(tmp_path / "out")]
    missing = ["--requests", str(tmp_path / "absent"), "--url", "http://127.0.0.1:9"]
    assert main([*missing, *common]) == 2
    assert "give a requests file" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--requests", "x", "--url", "localhost:1", *common])
    assert "must start with http://" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*missing, *common, "--passes", "0"])
    assert "--passes is 0" in capsys.readouterr().err


def test_calibration_measures_positive_costs_and_says_when_it_cannot() -> None:
    async def measured() -> None:
        async with engine(answer) as (url, bodies):
            model = await calibrate(url, "m", vocabulary=(5, 50), context_tokens=256, repeats=1)
            assert model.prefill_ms_per_token > 0
            assert model.decode_step_ms > 0
            assert len(bodies) == 2 * (1 + 1 + 4)
            assert max(len(body["prompt"]) for body in bodies) == 128

    asyncio.run(measured())

    async def refused() -> None:
        async with engine(refuse) as (url, _):
            with pytest.raises(CalibrationError, match="HTTP 503"):
                await calibrate(url, "m", vocabulary=(5, 50), context_tokens=256)

    asyncio.run(refused())
