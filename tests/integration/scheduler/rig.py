"""A scheduler on real sockets in the test's own event loop, and small things to drive it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import uvicorn

from rowen.scheduler.app import Scheduler, create_app
from rowen.scheduler.settings import Settings

DEADLINE_S = 20.0
"""For anything that has to happen; two shared cores may be busy with something else."""


async def until(condition: Callable[[], Any], what: str = "condition") -> None:
    """Wait until a condition holds; fails after the deadline."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110 - any condition, also those without an event
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"{what} did not come true within {DEADLINE_S} s") from None


@dataclass
class Answer:
    """A streamed answer, as a client sees it."""

    status: int = 0
    events: list[Any] = field(default_factory=list)
    is_done: bool = False
    error: Any = None

    @property
    def choices(self) -> list[Any]:
        return [event["choices"][0] for event in self.events if event.get("choices")]

    @property
    def tokens(self) -> list[int]:
        return [token for choice in self.choices for token in choice["token_ids"]]

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        spans = self.choices[-1]["weight_versions"]
        return [(span["version"], span["start"], span["end"]) for span in spans]


@dataclass
class Rig:
    """The scheduler's parts and an HTTP client of it."""

    url: str
    client: aiohttp.ClientSession
    scheduler: Scheduler

    def body(self, prompt: list[int], max_tokens: int, **sampling: Any) -> dict[str, Any]:
        return {"token_ids": prompt, "sampling_params": {"max_tokens": max_tokens} | sampling}

    async def post(self, body: Any, path: str = "/inference/v1/generate", **headers: str) -> Any:
        """Status and JSON of a whole answer."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.client.post(f"{self.url}{path}", json=body, headers=named) as answer:
            return answer.status, await answer.json()

    async def get(self, path: str) -> Any:
        async with self.client.get(f"{self.url}{path}") as answer:
            return answer.status, await answer.json()

    async def stream(self, body: dict[str, Any], answer: Answer, **headers: str) -> Answer:
        """Fill ``answer`` from a streamed request."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.client.post(
            f"{self.url}/inference/v1/generate", json=body | {"stream": True}, headers=named
        ) as response:
            answer.status = response.status
            if response.status != 200:
                answer.error = await response.json()
                return answer
            async for line in response.content:
                if line.strip() == b"data: [DONE]":
                    answer.is_done = True
                elif line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    answer.error = event.get("error", answer.error)
                    answer.events.append(event)
        return answer

    def engine(self, name: str) -> Any:
        return self.scheduler.registry.engines[name]

    def state(self, name: str) -> str | None:
        engine = self.scheduler.registry.engines.get(name)
        return engine.decision.action.value if engine is not None else None

    @property
    def counters(self) -> Any:
        return self.scheduler.store.counters


def static_id(url: str) -> str:
    """Engine id of an engine that is named by its address."""
    return "dedicated-" + url.removeprefix("http://").replace(":", "-")


@contextlib.asynccontextmanager
async def running_scheduler(
    *engines: str, redis_url: str | None = None, wait_ready: bool = True, **changes: Any
) -> AsyncIterator[Rig]:
    """A scheduler in front of engines at fixed addresses, or of those with leases in Redis."""
    fast = {"poll_ms": 20, "health_every_ms": 100, "fault_wait_s": 0.05, "sync_retry_s": 0.05}
    settings = Settings.model_validate({"model": "m", "dedicated": engines, **fast, **changes})
    app = create_app(settings, redis_url)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]  # not ours here
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started, "the scheduler's start")
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        async with aiohttp.ClientSession() as client:
            rig = Rig(url, client, app.state.scheduler)
            if wait_ready:
                for engine in engines:
                    name = static_id(engine)
                    await until(lambda name=name: rig.state(name) == "ready", f"{name} ready")
            yield rig
            rig.scheduler.dispatcher.end_all()
    finally:
        server.should_exit = True
        await serving
        listener.close()
