"""The daemon with two real vLLM engines (the tiny Llama): harvest, give back, kill switch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from rowen.executor.engine import EngineSpec
from rowen.executor.supervisor import EngineSupervisor

QUICK_START = {
    "growth": {"initial_sequences": 2, "step_factor": 2, "every_ms": 200, "cool_down_ms": 300},
    "resources": {"max_sequences": 8, "min_available_memory_bytes": 0},
    "reclaim": {
        "acknowledge_ms": 5000,
        "drain_after_ms": 60_000,
        "resume_after_ms": 100,
        "terminate_after_ms": 500,
        "kill_after_ms": 5000,
    },
}
SMALL: dict[str, Any] = {
    "served_model_name": "tiny",
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "kv_cache_bytes": 64 * 2**20,
    "engine_cores": [0],
    "extra_args": ["--skip-tokenizer-init"],
}


def generate(url: str, tokens: int) -> list[int]:
    body = {
        "token_ids": [5, 6, 7, 8],
        "sampling_params": {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True},
        "stream": False,
    }
    request = urllib.request.Request(
        f"{url}/inference/v1/generate",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: list[int] = json.loads(answer.read())["choices"][0]["token_ids"]
        return found


@contextlib.asynccontextmanager
async def production(node: Any, model: Path) -> AsyncIterator[EngineSupervisor]:
    spec = EngineSpec(name="serving", role="serving", model=model, lane=node.lane, **SMALL)
    engine = EngineSupervisor(spec, run_dir=node.run_dir)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@pytest.mark.engine
def test_the_daemon_harvests_beside_a_real_engine_and_gives_back(
    node: Any, tiny_model: Path, eventually: Callable[..., Any]
) -> None:
    node.serving.close()  # the real one has the probe's record

    async def run() -> None:
        async with production(node, tiny_model) as serving:
            node.configure(
                model=tiny_model,
                # The gate has to hold by itself: an idle-class engine would be kept off the core
                # by the kernel before it can look.
                rollout=SMALL | {"idle_class": False},
                spec=QUICK_START,
                serving={"url": serving.url},
            )
            daemon = node.start()
            await serving.wait_ready(180)
            await asyncio.to_thread(use, daemon, serving.url)

    def use(daemon: Any, serving_url: str) -> None:
        daemon.wait_until_up()
        eventually(
            "rollout engine ready", lambda: daemon.status()["engine"]["phase"] == "ready", 180
        )
        eventually("lane open", lambda: node.word().gate_open)
        rollout_url = daemon.status()["engine"]["url"]
        alone = generate(rollout_url, 32)
        assert len(alone) == 32
        eventually(
            "the tokens counted on the lane (prompt and all but the last)",
            lambda: daemon.status()["readings"]["rollout"]["tokens_total"] >= 4 + 31,
        )

        # Production works, and the rollout gate closes for it and opens again.
        closings = daemon.status()["readings"]["rollout"]["closings_total"]
        assert generate(serving_url, 64)[:32] == alone
        eventually(
            "a closing for production",
            lambda: daemon.status()["readings"]["rollout"]["closings_total"] > closings,
        )
        assert generate(rollout_url, 32) == alone
        readings = eventually(
            "production's latency in the metrics",
            lambda: found if (found := daemon.status()["readings"])["ttft"]["samples"] else None,
        )
        assert readings["ttft"]["value_ms"] > 0
        assert readings["tpot"]["samples"] > 0

        node.kill_file.touch()
        daemon.wait_for_status(rung="stopped", reason="kill_switch")
        assert daemon.status()["engine"]["pid"] is None
        assert generate(serving_url, 4) == alone[:4]
        assert daemon.end() == 0

    asyncio.run(run())
