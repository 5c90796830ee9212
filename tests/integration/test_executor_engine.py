"""Two real vLLM engines share a lane: rollouts stand still while serving works, and go on after."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from rowen.executor.engine import EngineSpec
from rowen.executor.identity import identify
from rowen.executor.isolation import command_line
from rowen.executor.lane import UNLIMITED, Lane
from rowen.executor.supervisor import EngineSupervisor

pytestmark = pytest.mark.engine

READY_S = 200.0
DEADLINE_S = 30.0


class Node:
    """A serving and a rollout engine on one lane; the test plays the daemon."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.lane = folder / "node.lane"
        Lane.create(self.lane)
        cores = sorted(os.sched_getaffinity(0))
        shared: dict[str, Any] = {
            "model": model,
            "dtype": "float32",
            "max_model_len": 1024,
            "max_num_seqs": 8,
            "kv_cache_bytes": 64 * 1024**2,
            "lane": self.lane,
            "engine_cores": cores[:1],
            "front_cores": cores[1:2],
            "extra_args": ("--skip-tokenizer-init",),
        }
        self.serving = EngineSupervisor(
            EngineSpec(name="serving", role="serving", **shared), run_dir=folder
        )
        self.rollout = EngineSupervisor(
            # Not in the idle class: the gate has to hold by itself, where the kernel would keep the
            # engine off the core before it can look.
            EngineSpec(name="rollout", role="rollout", **shared),
            run_dir=folder,
        )
        self.reader = Lane.open(self.lane, role="reader")
        self.is_open = True
        self.sequence_cap = UNLIMITED

    async def play_daemon(self) -> None:
        daemon = Lane.open(self.lane, role="daemon")
        try:
            while True:
                daemon.write_daemon(gate_open=self.is_open, sequence_cap=self.sequence_cap, epoch=1)
                await asyncio.sleep(0.05)
        finally:
            daemon.close()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not holds():  # noqa: ASYNC110 - a file, nothing signals its changes
                await asyncio.sleep(0.005)


@asynccontextmanager
async def running(folder: Path, model: Path) -> AsyncIterator[tuple[Node, aiohttp.ClientSession]]:
    node = Node(folder, model)
    daemon = asyncio.create_task(node.play_daemon())
    try:
        await asyncio.gather(node.serving.start(), node.rollout.start())
        await asyncio.gather(node.serving.wait_ready(READY_S), node.rollout.wait_ready(READY_S))
        async with aiohttp.ClientSession() as session:
            yield node, session
    finally:
        await asyncio.gather(node.serving.stop(), node.rollout.stop())
        node.reader.close()
        daemon.cancel()
        with suppress(asyncio.CancelledError):
            await daemon


async def generate(session: aiohttp.ClientSession, url: str, tokens: int) -> list[int]:
    sampling = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
    body = {"token_ids": [5, 6, 7], "sampling_params": sampling, "model": "rowen", "stream": True}
    made: list[int] = []
    async with session.post(f"{url}/inference/v1/generate", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    made += choice["token_ids"]
    return made


async def post(session: aiohttp.ClientSession, url: str, path: str) -> None:
    async with session.post(url + path) as response:
        assert response.status == 200, await response.text()


@pytest.mark.timeout(420)
def test_production_comes_first_whatever_happens(tmp_path: Path, tiny_model: Path) -> None:
    async def case() -> None:
        async with running(tmp_path, tiny_model) as (node, session):
            await rollouts_stand_still_while_serving_works(node, session)
            await a_sequence_cap_parks_and_continues(node, session)
            await a_held_engine_answers(node, session)
            await serving_does_not_need_the_lane(node, session)
            await a_dead_serving_engine_closes_the_gate(node, session)

    asyncio.run(case())
    assert not psutil.Process().children(recursive=True)
    assert not list(tmp_path.glob("*.json"))


async def rollouts_stand_still_while_serving_works(
    node: Node, session: aiohttp.ClientSession
) -> None:
    undisturbed = await generate(session, node.rollout.url, 900)
    rolling = asyncio.create_task(generate(session, node.rollout.url, 900))
    before = node.reader.read_gate().tokens_total
    await node.until(lambda: node.reader.read_gate().tokens_total > before + 20)
    samples_before = node.reader.read_gate().samples_total
    serving = asyncio.create_task(generate(session, node.serving.url, 600))
    await node.until(lambda: node.reader.read_probe().is_busy)
    busy_since_ns = node.reader.read_probe().changed_ns

    def is_held() -> bool:
        gate = node.reader.read_gate()
        return gate.samples_total > samples_before and not gate.is_open

    await node.until(is_held)
    held_from = node.reader.read_gate()
    probe = held_until = None
    while (probe := node.reader.read_probe()).changed_ns == busy_since_ns:
        held_until = node.reader.read_gate()
        if node.reader.read_probe().changed_ns == busy_since_ns:
            # The step that the closing met may end (at its next layer or when a hold reaches its
            # bound), but no new one begins.
            assert held_until.steps_total == held_from.steps_total
        await asyncio.sleep(0.01)
    assert held_until is not None
    assert held_until.heartbeat_ns > held_from.heartbeat_ns, "the held gate must show life"
    assert len(await serving) == 600
    assert await rolling == undisturbed
    assert probe.steps_total >= 600
    assert probe.busy_ns_total >= probe.changed_ns - busy_since_ns > 0
    after = node.reader.read_gate()
    assert after.closings_total >= 1
    assert len(after.close_to_idle_ring_us) == after.samples_total >= 1


async def a_sequence_cap_parks_and_continues(node: Node, session: aiohttp.ClientSession) -> None:
    alone = await generate(session, node.rollout.url, 100)
    rolling = [asyncio.create_task(generate(session, node.rollout.url, 100)) for _ in range(4)]
    started = node.reader.read_gate().tokens_total
    await node.until(lambda: node.reader.read_gate().tokens_total > started + 20)
    node.sequence_cap = 1
    assert await asyncio.gather(*rolling) == [alone] * 4
    node.sequence_cap = UNLIMITED


async def a_held_engine_answers(node: Node, session: aiohttp.ClientSession) -> None:
    rolling = asyncio.create_task(generate(session, node.rollout.url, 900))
    started = node.reader.read_gate().tokens_total
    await node.until(lambda: node.reader.read_gate().tokens_total > started + 20)
    node.is_open = False
    await node.until(lambda: not node.reader.read_gate().is_open)
    async with asyncio.timeout(DEADLINE_S):
        async with session.get(f"{node.rollout.url}/health") as response:
            assert response.status == 200
        await post(session, node.rollout.url, "/pause?mode=abort")
        assert len(await rolling) < 900
        await post(session, node.rollout.url, "/resume")
    assert not node.reader.read_gate().is_open
    waiting = asyncio.create_task(generate(session, node.rollout.url, 5))
    await post(session, node.rollout.url, "/pause?mode=keep")
    await post(session, node.rollout.url, "/resume")
    assert not waiting.done()
    node.is_open = True
    assert len(await waiting) == 5


async def serving_does_not_need_the_lane(node: Node, session: aiohttp.ClientSession) -> None:
    with_lane = await generate(session, node.serving.url, 50)
    node.lane.unlink()
    assert await generate(session, node.serving.url, 50) == with_lane
    await node.until(lambda: not node.reader.read_gate().is_open)
    Lane.create(node.lane)
    node.reader = Lane.open(node.lane, role="reader")
    # The test's daemon still writes to the deleted file, so the gate follows but stays closed.
    await node.until(lambda: node.reader.read_gate().heartbeat_ns > 0)
    await node.until(lambda: node.reader.read_probe().heartbeat_ns > 0)
    assert not node.reader.read_gate().is_open
    os.truncate(node.lane, 0)
    assert await generate(session, node.serving.url, 50) == with_lane
    node.lane.unlink()
    Lane.create(node.lane)
    node.reader = Lane.open(node.lane, role="reader")


async def a_dead_serving_engine_closes_the_gate(node: Node, session: aiohttp.ClientSession) -> None:
    daemon = asyncio.create_task(node.play_daemon())
    await node.until(lambda: node.reader.read_gate().is_open)
    rolling = asyncio.create_task(generate(session, node.rollout.url, 900))
    await node.until(lambda: node.reader.read_gate().is_computing)
    for pid in node.serving.pids:
        if "EngineCore" in command_line(pid):
            os.kill(pid, signal.SIGKILL)
    await node.until(lambda: not node.reader.read_gate().is_open)
    silence = node.reader.read_gate().heartbeat_ns - node.reader.read_probe().heartbeat_ns
    assert silence < 1_500_000_000
    ended = await node.serving.wait_exit()
    assert not ended.was_asked
    async with session.get(f"{node.rollout.url}/health") as response:
        assert response.status == 200
    await post(session, node.rollout.url, "/pause?mode=abort")
    assert len(await rolling) < 900
    pids = node.rollout.pids
    await node.rollout.stop()
    assert not [pid for pid in pids if identify(pid) is not None]
    daemon.cancel()
    with suppress(asyncio.CancelledError):
        await daemon
