"""What the scheduler relies on in an engine; the double and a real vLLM are held to the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import pytest
from engine_double import EngineDouble
from rig import Answer, running_scheduler, static_id, until
from vllm_process import VllmProcess

PROMPT = [5, 6, 7, 8]
CHUNK_KEYS = {"request_id", "usage", "output_mode", "choices"}
CHOICE_KEYS = {
    "index", "finish_reason", "stop_reason", "token_ids", "routed_experts", "sampling_mask",
    "weight_versions", "logprobs",
}  # fmt: skip


@pytest.fixture(scope="module")
def vllms(tiny_model, tmp_path_factory) -> Iterator[list[VllmProcess]]:
    """Two real engines; the test that kills one comes last."""
    folder = tmp_path_factory.mktemp("vllm")
    engines = [VllmProcess(tiny_model, folder / f"{number}.log") for number in range(2)]
    try:
        for engine in engines:
            engine.wait_ready()
        yield engines
    finally:
        for engine in engines:
            engine.kill()


Check = Callable[[aiohttp.ClientSession, str], Awaitable[None]]


def run_on_double(check: Check) -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        async with aiohttp.ClientSession() as client:
            await check(client, engine.url)
        await engine.kill()

    asyncio.run(scenario())


def run_on_vllm(check: Check, engine: VllmProcess) -> None:
    async def scenario() -> None:
        async with aiohttp.ClientSession() as client:
            await check(client, engine.url)

    asyncio.run(scenario())


def body(prompt: list[int], max_tokens: int, **sampling: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": max_tokens} | sampling
    return {"token_ids": prompt, "sampling_params": sampling}


async def events(client: aiohttp.ClientSession, url: str, asked: Any) -> AsyncIterator[Any]:
    headers = {"X-Request-Id": "contract"}
    async with client.post(
        f"{url}/inference/v1/generate", json=asked | {"stream": True}, headers=headers
    ) as answer:
        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        async for line in answer.content:
            if line.startswith(b"data: "):
                payload = line[6:].strip()
                yield "DONE" if payload == b"[DONE]" else json.loads(payload)


async def whole(client: aiohttp.ClientSession, url: str, asked: Any) -> Any:
    async with client.post(f"{url}/inference/v1/generate", json=asked) as answer:
        assert answer.status == 200
        return await answer.json()


async def post(client: aiohttp.ClientSession, url: str, content: Any = None) -> int:
    async with client.post(url, json=content) as answer:
        await answer.read()
        return answer.status


async def streams_have_vllms_shape(client: aiohttp.ClientSession, url: str) -> None:
    got = [event async for event in events(client, url, body(PROMPT, 6, logprobs=1))]
    assert got.pop() == "DONE"
    choices = [event["choices"][0] for event in got]
    assert all(set(event) == CHUNK_KEYS for event in got)
    assert all(set(choice) == CHOICE_KEYS for choice in choices)
    assert {event["request_id"] for event in got} == {"generate-tokens-contract"}
    assert all(event["output_mode"] == "tokens" for event in got)
    for choice in choices:
        entries = choice["logprobs"]["content"]
        assert [entry["token_id"] for entry in entries] == choice["token_ids"]
        assert set(entries[0]) == {"token_id", "logprob", "rank", "top_logprobs"}
    assert sum(len(choice["token_ids"]) for choice in choices) == 6
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert all(choice["weight_versions"] is None for choice in choices[:-1])
    assert choices[-1]["finish_reason"] == "length"
    assert choices[-1]["weight_versions"] == [{"version": "default", "start": 0, "end": 6}]


async def whole_answers_have_vllms_shape(client: aiohttp.ClientSession, url: str) -> None:
    answer = await whole(client, url, body(PROMPT, 6, logprobs=1))
    assert set(answer) == {
        "request_id", "model", "created", "usage", "prompt_logprobs", "prompt_token_id_logprobs",
        "prompt_token_ids", "mm_placeholders", "metrics", "kv_transfer_params",
        "ec_transfer_params", "output_mode", "choices",
    }  # fmt: skip
    assert set(answer["choices"][0]) == CHOICE_KEYS
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "total_tokens": 10,
        "completion_tokens": 6,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }


async def greedy_tokens_do_not_depend_on_where_the_prompt_ends(
    client: aiohttp.ClientSession, url: str
) -> None:
    full = (await whole(client, url, body(PROMPT, 16)))["choices"][0]["token_ids"]
    for seam in (1, 7, 15):
        rest = await whole(client, url, body(PROMPT + full[:seam], 16 - seam))
        assert rest["choices"][0]["token_ids"] == full[seam:]


async def stop_tokens_end_with_their_id(client: aiohttp.ClientSession, url: str) -> None:
    full = (await whole(client, url, body(PROMPT, 12)))["choices"][0]["token_ids"]
    got = [e async for e in events(client, url, body(PROMPT, 12, stop_token_ids=[full[5]]))]
    last = got[-2]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", full[5])
    made = [token for event in got[:-1] for token in event["choices"][0]["token_ids"]]
    assert made == full[: full.index(full[5]) + 1]


async def pausing_aborts_what_runs_and_queues_what_comes(
    client: aiohttp.ClientSession, url: str
) -> None:
    seen: list[Any] = []

    async def read() -> None:
        async for event in events(client, url, body(PROMPT, 400)):
            seen.append(event)  # noqa: PERF401 - watched while it grows

    running = asyncio.create_task(read())
    await until(lambda: len(seen) >= 3)
    assert await post(client, f"{url}/pause?mode=abort") == 200
    await running
    last = seen[-2]["choices"][0]
    made = sum(len(event["choices"][0]["token_ids"]) for event in seen[:-1])
    assert last["finish_reason"] == "abort"
    assert made < 400
    assert last["weight_versions"] == [{"version": "default", "start": 0, "end": made}]
    async with client.get(f"{url}/is_paused") as answer:
        assert await answer.json() == {"is_paused": True}
    queued = asyncio.create_task(whole(client, url, body(PROMPT, 3)))
    async with client.get(f"{url}/health") as answer:
        assert answer.status == 200
    assert not queued.done()
    assert await post(client, f"{url}/resume") == 200
    assert len((await queued)["choices"][0]["token_ids"]) == 3


async def the_weight_version_is_told_and_labels_new_tokens(
    client: aiohttp.ClientSession, url: str
) -> None:
    async with client.get(f"{url}/weight_info") as answer:
        assert await answer.json() == {"weight_version": "default"}
    assert await post(client, f"{url}/update_weight_version", {"new_version": "4"}) == 200
    async with client.get(f"{url}/weight_info") as answer:
        assert await answer.json() == {"weight_version": "4"}
    choice = (await whole(client, url, body(PROMPT, 3)))["choices"][0]
    assert choice["weight_versions"] == [{"version": "4", "start": 0, "end": 3}]
    assert await post(client, f"{url}/update_weight_version", {"new_version": "default"}) == 200


async def wrong_requests_get_vllms_error_body(client: aiohttp.ClientSession, url: str) -> None:
    async with client.post(f"{url}/inference/v1/generate", json=body([], 3)) as answer:
        assert answer.status == 400
        error = (await answer.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["type"]) == (400, "Bad Request")


CHECKS = [
    streams_have_vllms_shape,
    whole_answers_have_vllms_shape,
    greedy_tokens_do_not_depend_on_where_the_prompt_ends,
    stop_tokens_end_with_their_id,
    pausing_aborts_what_runs_and_queues_what_comes,
    wrong_requests_get_vllms_error_body,
    the_weight_version_is_told_and_labels_new_tokens,
]


SCHEDULER_CHECKS = [
    whole_answers_have_vllms_shape,
    greedy_tokens_do_not_depend_on_where_the_prompt_ends,
    stop_tokens_end_with_their_id,
    wrong_requests_get_vllms_error_body,
]
"""Those about the route that it serves itself."""


@pytest.mark.parametrize("check", SCHEDULER_CHECKS)
def test_scheduler_in_front_keeps_the_contract_of_the_engine(check: Check) -> None:
    async def scenario() -> None:
        engine = EngineDouble()
        await engine.start()
        async with running_scheduler(engine.url) as rig:
            await check(rig.client, rig.url)
        await engine.kill()

    asyncio.run(scenario())


@pytest.mark.parametrize("check", CHECKS)
def test_double_keeps_the_contract(check: Check) -> None:
    run_on_double(check)


@pytest.mark.engine
@pytest.mark.parametrize("check", CHECKS)
def test_vllm_keeps_the_contract(check: Check, vllms: list[VllmProcess]) -> None:
    run_on_vllm(check, vllms[0])


@pytest.mark.engine
def test_stitched_tokens_of_a_killed_vllm_are_those_of_an_unbroken_run(
    vllms: list[VllmProcess],
) -> None:
    async def scenario() -> None:
        first, second = vllms
        async with running_scheduler(first.url, second.url) as rig:
            prompts = [[n + 3, 9, 4] for n in range(6)]
            length, options = 300, {"temperature": 0, "ignore_eos": True, "logprobs": 0}
            expected = [
                (await whole(rig.client, first.url, body(prompt, length)))["choices"][0][
                    "token_ids"
                ]
                for prompt in prompts
            ]
            answers = [Answer() for _ in prompts]
            clients = [
                asyncio.create_task(rig.stream(rig.body(prompt, length, **options), answer))
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
            doomed = rig.engine(static_id(second.url))
            await until(lambda: doomed.stays and doomed.history.total > 40)
            second.kill()
            await asyncio.gather(*clients)
            for tokens, answer in zip(expected, answers, strict=True):
                assert answer.is_done
                assert answer.tokens == tokens
                entries = [e["token_id"] for c in answer.choices for e in c["logprobs"]["content"]]
                assert entries == tokens
                assert answer.spans == [("0", 0, length)]
            assert rig.counters.migrated >= 1
            assert (rig.counters.lost, rig.counters.finished) == (0, len(prompts))

    asyncio.run(scenario())
