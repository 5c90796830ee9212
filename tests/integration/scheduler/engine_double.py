"""A stand-in for a vLLM engine: its routes over real sockets, its tokens from a formula.

Tokens are a pure function of weight version and everything before them, like greedy decoding, so a
test can tell what any unbroken run would have made and whether a seam changed it.  The contract
tests in ``test_scheduler_engine_contract.py`` hold it and a real vLLM to the same behaviour.
Faults are switched on by attributes; nothing here runs on a clock.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

from aiohttp import web

VOCABULARY = 512


def next_token(version: str, before: list[int]) -> int:
    """The token after ``before`` under the weights of ``version``."""
    state = int(version) * 7919 + 17
    for token in before[-8:]:
        state = (state * 1103515245 + token + len(before)) % 2**31
    return 3 + state % (VOCABULARY - 3)


def unbroken(prompt: list[int], count: int, version: str = "0") -> list[int]:
    """What one engine would have made without interruption."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(version, tokens))
    return tokens[len(prompt) :]


class EngineDouble:
    """One engine; ``start`` and ``kill`` as often as wanted, always on the same port."""

    def __init__(self) -> None:
        self.port = 0
        self.hold_after: int | None = None
        """Each request makes so many tokens, then waits for ``release()``."""
        self.fault: str | None = None
        """Instead of the token after ``hold_after``: cut, reset, nonsense, html, error, half."""
        self.answer_status = 200
        """Of generate requests; others are answered with an error body."""
        self.wrong_report: str | None = None
        """Version that the last chunk claims instead of the true one."""
        self.update_fault: str | None = None
        """Route of the update session that answers 500."""
        self.requests: list[dict[str, Any]] = []
        self.request_ids: list[str] = []
        self.updates: list[int] = []
        self.tokens_made = 0
        self.cancelled = 0
        self.most_running = 0
        self._released = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._reset_process()

    def _reset_process(self) -> None:
        self.version = "0"
        self.label = "default"
        self.is_paused = False
        self.is_session_open = False
        self.is_initialized = False
        self.running: set[asyncio.Event] = set()
        self._resumed = asyncio.Event()
        self._resumed.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """A fresh process: version 0, nothing running."""
        self._reset_process()
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", self._health),
                web.post("/inference/v1/generate", self._generate),
                web.post("/pause", self._pause),
                web.post("/resume", self._resume),
                web.get("/is_paused", self._is_paused),
                web.get("/weight_info", self._weight_info),
                web.post("/update_weight_version", self._relabel),
                web.post("/init_weight_transfer_engine", self._init),
                web.post("/start_weight_update", self._start_update),
                web.post("/update_weights", self._update),
                web.post("/finish_weight_update", self._finish_update),
            ]
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        await web.SockSite(self._runner, listener).start()

    async def kill(self) -> None:
        """As SIGKILL does: connections are reset and nobody listens any more."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        assert runner.server is not None
        for connection in list(runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        for site in list(runner.sites):
            await site.stop()
        await runner.cleanup()

    def release(self) -> None:
        """Let held requests go on, and later ones not stop at all."""
        self.hold_after = None
        self._released.set()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _pause(self, request: web.Request) -> web.Response:
        if request.query.get("mode", "abort") != "abort":
            return web.json_response({"error": "mode"}, status=400)
        self.is_paused = True
        self._resumed.clear()
        for aborted in self.running:
            aborted.set()
        return web.json_response({"status": "paused"})

    async def _resume(self, _: web.Request) -> web.Response:
        self.is_paused = False
        self._resumed.set()
        return web.json_response({"status": "resumed"})

    async def _is_paused(self, _: web.Request) -> web.Response:
        return web.json_response({"is_paused": self.is_paused})

    async def _weight_info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.label})

    async def _relabel(self, request: web.Request) -> web.Response:
        self.label = (await request.json())["new_version"]
        self.version = self.label
        return web.json_response({"success": True, "new_version": self.label})

    def _refuse(self, route: str) -> None:
        if self.update_fault == route:
            raise web.HTTPInternalServerError(text=json.dumps({"error": {"message": "no luck"}}))

    async def _init(self, _: web.Request) -> web.Response:
        self._refuse("init")
        self.is_initialized = True
        return web.json_response({"message": "Weight transfer initialized"})

    async def _start_update(self, _: web.Request) -> web.Response:
        self._refuse("start")
        if self.is_session_open or not self.is_initialized:
            raise web.HTTPInternalServerError(text="a weight update is already active")
        self.is_session_open = True
        return web.json_response({"message": "Weight update started"})

    async def _update(self, request: web.Request) -> web.Response:
        info = (await request.json())["update_info"]
        assert self.running == set(), "weights move under a running request"
        if self.update_fault == "update":
            self.is_session_open = False
        self._refuse("update")
        if not self.is_session_open:
            raise web.HTTPInternalServerError(text="no weight update is active")
        self.version = str(info["version"])
        self.updates.append(info["version"])
        return web.json_response({"message": "Weights updated"})

    async def _finish_update(self, request: web.Request) -> web.Response:
        self._refuse("finish")
        if not self.is_session_open:
            raise web.HTTPInternalServerError(text="no weight update is active")
        self.is_session_open = False
        self.label = (await request.json()).get("weight_version") or self.label
        return web.json_response({"message": "Weight update finished"})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        request_id = request.headers.get("X-Request-Id", "none")
        if self.answer_status != 200 or not body.get("token_ids"):
            status = 400 if self.answer_status == 200 else self.answer_status
            message = "token_ids: List should have at least 1 item"
            error = {"message": message, "type": "Bad Request", "param": "body", "code": status}
            return web.json_response({"error": error}, status=status)
        self.requests.append(body)
        self.request_ids.append(request_id)
        if not body.get("stream"):
            return await self._whole(body, request_id)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await answer.prepare(request)
        try:
            await self._stream(body, request_id, request, answer)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return answer

    async def _stream(
        self, body: dict[str, Any], request_id: str, request: web.Request, answer: Any
    ) -> None:
        sampling, tokens = body["sampling_params"], list(body["token_ids"])
        limit = sampling.get("max_tokens") or 16
        has_logprobs = sampling.get("logprobs") is not None
        made = 0
        await self._resumed.wait()
        aborted, version = asyncio.Event(), self.version
        self.running.add(aborted)
        self.most_running = max(self.most_running, len(self.running))
        try:
            while True:
                if self.hold_after is not None and made >= self.hold_after:
                    if self.fault is not None:
                        await self._misbehave(request, answer)
                        return
                    await self._wait_for_any(aborted)
                await asyncio.sleep(0)
                if aborted.is_set():
                    await answer.write(
                        self._chunk(request_id, [], has_logprobs, "abort", None, made, version)
                    )
                    break
                token = next_token(version, tokens)
                tokens.append(token)
                made += 1
                self.tokens_made += 1
                is_stop = token in (sampling.get("stop_token_ids") or [])
                finish = "stop" if is_stop else "length" if made >= limit else None
                stop_reason = token if is_stop else None
                await answer.write(
                    self._chunk(
                        request_id, [token], has_logprobs, finish, stop_reason, made, version
                    )
                )
                if finish is not None:
                    break
            await answer.write(b"data: [DONE]\n\n")
        finally:
            self.running.discard(aborted)

    async def _wait_for_any(self, aborted: asyncio.Event) -> None:
        waits = [asyncio.create_task(event.wait()) for event in (aborted, self._released)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _misbehave(self, request: web.Request, answer: Any) -> None:
        transport = request.transport
        assert transport is not None
        if self.fault == "cut":
            return
        if self.fault == "reset":
            transport.abort()
        elif self.fault == "half":
            await answer.write(b'data: {"request_id":"x","choices":[{"index":0,"tok')
            transport.abort()
        elif self.fault == "html":
            await answer.write(b"<html>\noops\n")
        elif self.fault == "error":
            await answer.write(b'data: {"error":{"message":"no","code":500}}\n\n')
        elif self.fault == "nonsense":
            await answer.write(self._chunk("x", [-5], False, None, None, 1, self.version))
            await self._resumed.wait()

    async def _whole(self, body: dict[str, Any], request_id: str) -> web.Response:
        await self._resumed.wait()
        made = unbroken(body["token_ids"], body["sampling_params"]["max_tokens"], self.version)
        has_logprobs = body["sampling_params"].get("logprobs") is not None
        choice = self._choice(made, has_logprobs, "length", None, len(made), self.version)
        prompt_tokens = len(body["token_ids"])
        usage = {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + len(made),
            "completion_tokens": len(made),
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        }
        answer = {"request_id": f"generate-tokens-{request_id}", "model": "m", "created": 0}
        answer |= {"usage": usage, "prompt_logprobs": None, "prompt_token_id_logprobs": None}
        answer |= {"prompt_token_ids": None, "mm_placeholders": None, "metrics": None}
        answer |= {"kv_transfer_params": None, "ec_transfer_params": None}
        answer |= {"output_mode": "tokens", "choices": [choice]}
        return web.json_response(answer)

    def _choice(
        self,
        tokens: list[int],
        has_logprobs: bool,
        finish: str | None,
        stop_reason: int | None,
        made: int,
        version: str,
    ) -> dict[str, Any]:
        label = "default" if version == "0" else version
        spans = [{"version": self.wrong_report or label, "start": 0, "end": made}]
        entries = [
            {
                "token_id": token,
                "logprob": -token / 1000,
                "rank": 1,
                "top_logprobs": [{"token_id": token, "logprob": -token / 1000, "rank": 1}],
            }
            for token in tokens
        ]
        return {
            "index": 0,
            "finish_reason": finish,
            "stop_reason": stop_reason,
            "token_ids": tokens,
            "routed_experts": None,
            "sampling_mask": None,
            "weight_versions": (spans if made else []) if finish is not None else None,
            "logprobs": {"content": entries} if has_logprobs else None,
        }

    def _chunk(self, request_id: str, *choice: Any) -> bytes:
        content = {
            "request_id": f"generate-tokens-{request_id}",
            "usage": None,
            "output_mode": "tokens",
            "choices": [self._choice(*choice)],
        }
        return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
