"""Versions published by a trainer become the tokens of a real vLLM engine, or nothing changes."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from transformers import AutoModelForCausalLM

from rowen.executor.engine import EngineSpec
from rowen.executor.supervisor import EngineSupervisor
from rowen.weightsync.publisher import Publisher

pytestmark = pytest.mark.engine

READY_S = 200.0
PROMPT = [5, 6, 7, 8, 9, 10]
TOKENS = 24

Weights = dict[str, torch.Tensor]


class Trainer:
    """Holds the weights, says which tokens they give, publishes them."""

    def __init__(self, model: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model.eval()
        self.publisher = Publisher("tiny", self.weights())
        self.expected: dict[int, list[int]] = {0: self.tokens()}

    def weights(self) -> Weights:
        return dict(self.model.named_parameters())

    def tokens(self) -> list[int]:
        ids = torch.tensor([PROMPT])
        made = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return [int(token) for token in made[0, len(PROMPT) :]]

    def step(self, version: int, density: float = 0.02) -> None:
        """Change some weights much, so that the greedy tokens change, and publish."""
        random = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for weight in self.model.parameters():
                chosen = torch.rand(weight.shape, generator=random) < density
                weight[chosen] += 0.3 * torch.randn(int(chosen.sum()), generator=random)
        self.publisher.publish(self.weights(), version)
        self.expected[version] = self.tokens()


class Engine:
    """A rollout engine under its supervisor, spoken to over HTTP."""

    def __init__(self, folder: Path, model: Path, session: aiohttp.ClientSession) -> None:
        spec = EngineSpec(
            name="rollout",
            role="rollout",
            model=model,
            dtype="float32",
            max_model_len=512,
            max_num_seqs=4,
            kv_cache_bytes=64 * 1024**2,
            extra_args=("--skip-tokenizer-init",),
        )
        self.supervisor = EngineSupervisor(spec, run_dir=folder)
        self._session = session

    async def start(self) -> None:
        await self.supervisor.start()
        await self.supervisor.wait_ready(READY_S)
        assert (await self.post("/init_weight_transfer_engine", {"init_info": {}}))[0] == 200

    async def post(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        async with self._session.post(self.supervisor.url + path, json=body) as response:
            return response.status, await response.text()

    async def take(self, publisher: Publisher, version: int) -> tuple[int, str]:
        """One update as the scheduler makes it; the answer of /update_weights."""
        host, port = publisher.address
        assert (await self.post("/pause?mode=abort"))[0] == 200
        assert (await self.post("/start_weight_update"))[0] == 200
        info = {"version": version, "host": host, "port": port}
        answer = await self.post("/update_weights", {"update_info": info})
        if answer[0] == 200:
            finish = {"weight_version": str(version)}
            assert (await self.post("/finish_weight_update", finish))[0] == 200
        assert (await self.post("/resume"))[0] == 200
        return answer

    async def tokens(self) -> list[int]:
        sampling = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0.0}
        body = {"token_ids": PROMPT, "sampling_params": sampling, "model": "rowen"}
        async with self._session.post(
            f"{self.supervisor.url}/inference/v1/generate", json=body
        ) as response:
            assert response.status == 200, await response.text()
            made: list[int] = (await response.json())["choices"][0]["token_ids"]
            return made


@pytest.mark.timeout(500)
def test_published_versions_become_tokens_of_an_engine(tmp_path: Path, tiny_model: Path) -> None:
    trainer = Trainer(tiny_model)

    async def case() -> None:
        # vLLM's server drops a kept connection after it has answered with an error.
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            engine = Engine(tmp_path, tiny_model, session)
            try:
                await engine.start()
                await each_version_gives_its_tokens(engine, trainer)
                await a_corrupted_delta_changes_nothing(engine, trainer)
                await a_dead_publisher_changes_nothing(engine, trainer)
                await a_restarted_engine_catches_up_in_one_step(engine, trainer)
                await a_restarted_trainer_takes_the_engine_along(engine, trainer)
            finally:
                await engine.supervisor.stop()

    asyncio.run(case())
    trainer.publisher.close()


async def each_version_gives_its_tokens(engine: Engine, trainer: Trainer) -> None:
    assert await engine.tokens() == trainer.expected[0]
    for version in (1, 2):
        trainer.step(version)
        assert trainer.expected[version] != trainer.expected[version - 1]
        assert await engine.take(trainer.publisher, version) == (
            200,
            '{"message":"Weights updated"}',
        )
        assert await engine.tokens() == trainer.expected[version]


async def a_corrupted_delta_changes_nothing(engine: Engine, trainer: Trainer) -> None:
    trainer.step(3)
    store = trainer.publisher._store
    honest = store.frame

    def flipped(have: Any, want: int) -> bytes:
        frame = bytearray(honest(have, want) or b"")
        frame[len(frame) // 2] ^= 0x10
        return bytes(frame)

    store.frame = flipped  # type: ignore[method-assign] # this publisher lies
    status, answer = await engine.take(trainer.publisher, 3)
    assert status == 500, answer
    assert await engine.tokens() == trainer.expected[2]
    store.frame = honest  # type: ignore[method-assign] # and now it tells the truth
    assert (await engine.take(trainer.publisher, 3))[0] == 200
    assert await engine.tokens() == trainer.expected[3]


async def a_dead_publisher_changes_nothing(engine: Engine, trainer: Trainer) -> None:
    with Publisher("tiny", trainer.weights()) as other:
        pass
    status, answer = await engine.take(other, 4)
    assert status == 500, answer
    assert await engine.tokens() == trainer.expected[3]


async def a_restarted_engine_catches_up_in_one_step(engine: Engine, trainer: Trainer) -> None:
    trainer.step(4)
    pid = engine.supervisor.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await engine.supervisor.wait_exit()
    await engine.start()
    assert await engine.tokens() == trainer.expected[0]
    assert (await engine.take(trainer.publisher, 4))[0] == 200
    assert await engine.tokens() == trainer.expected[4]
    log = engine.supervisor.log.read_text()
    assert "version=4 base=0" in log


async def a_restarted_trainer_takes_the_engine_along(engine: Engine, trainer: Trainer) -> None:
    with Publisher("tiny", trainer.weights()) as again:
        with torch.no_grad():
            next(trainer.model.parameters()).mul_(-1.0)
        again.publish(trainer.weights(), 1)
        expected = trainer.tokens()
        assert expected != trainer.expected[4]
        assert (await engine.take(again, 1))[0] == 200
        assert await engine.tokens() == expected
    assert "taking a full copy" in engine.supervisor.log.read_text()
