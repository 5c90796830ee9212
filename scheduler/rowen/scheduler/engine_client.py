"""HTTP towards one engine: its token stream and its RL routes.  Decides nothing.

Every failure is one of two exceptions: ``EngineRefusedError`` (it answered, and said no) or
``EngineBrokenError`` (it is not there, stopped in the middle, or talks nonsense).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any

import aiohttp
import msgspec

from rowen.scheduler.sse import SseError, SseParser
from rowen.scheduler.trajectory import canonical_version

CONNECT_DEADLINE_S = 2.0
"""Loopback or one cluster network; slower means nobody accepts."""

MAX_ERROR_BYTES = 64 * 1024
"""Of an error body that is read."""


class EngineBrokenError(Exception):
    """The engine is gone or talks nonsense; what it had sent before stays valid."""

    def __init__(self, cause: str, *, is_refused: bool = False) -> None:
        super().__init__(cause)
        self.cause = cause
        self.is_refused = is_refused
        """Nobody listens at its address."""


class EngineRefusedError(Exception):
    """The engine answered with an HTTP error; it did nothing."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
        self.body = body

    @property
    def sentence(self) -> str:
        """What the engine says is wrong, shortened."""
        try:
            content = msgspec.json.decode(self.body)
            error = content.get("error", content.get("detail", content))
            text = error.get("message", error) if isinstance(error, dict) else error
        except (msgspec.DecodeError, UnicodeDecodeError, AttributeError):
            text = self.body.decode("utf-8", "replace")
        return f"HTTP {self.status}: {str(text)[:300]}"


class Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Logprobs(msgspec.Struct):
    content: list[msgspec.Raw] | None = None


class Choice(msgspec.Struct):
    """What of a streamed choice the log needs."""

    token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: _Logprobs | None = None
    weight_versions: list[Span] | None = None

    @property
    def logprob_entries(self) -> list[bytes] | None:
        if self.logprobs is None or self.logprobs.content is None:
            return None
        return [bytes(entry) for entry in self.logprobs.content]


class _Chunk(msgspec.Struct):
    choices: list[Choice] = []
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


def open_session() -> aiohttp.ClientSession:
    """One session for all engines; streams have no total deadline, the sweep watches them."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_DEADLINE_S)
    return aiohttp.ClientSession(
        # vLLM closes idle connections after 5 s: ours must be gone before, or a request meets
        # a closing one and counts as broken.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0),
        timeout=timeout,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        headers={"Accept-Encoding": "identity"},
    )


class EngineClient:
    """Talks to the engine at one address."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self.url = url

    async def generate(self, body: bytes, request_id: str) -> AsyncGenerator[list[Choice], None]:
        """Stream a generation; yields what each network read completed, to the end of the stream.

        Closing the iterator drops the connection, which makes the engine abort the request.

        Raises:
            EngineRefusedError: HTTP error before the stream.
            EngineBrokenError: connection, half an event, malformed event, error event.
        """
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
        url = f"{self.url}/inference/v1/generate"
        try:
            async with self._session.post(
                url, data=body, headers=headers, allow_redirects=False
            ) as answer:
                if answer.status != HTTPStatus.OK:
                    raise EngineRefusedError(
                        answer.status, await answer.content.read(MAX_ERROR_BYTES)
                    )
                parser = SseParser()
                async for received in answer.content.iter_any():
                    choices = _choices(parser.feed(received))
                    if choices:
                        yield choices
                if parser.is_mid_event:
                    raise EngineBrokenError("stream_cut")
        except aiohttp.ClientConnectorError as error:
            raise EngineBrokenError("connection_refused", is_refused=True) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EngineBrokenError("connection_broken") from error
        except (SseError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise EngineBrokenError("malformed_stream") from error

    async def ask(
        self, method: str, path: str, *, deadline_s: float, content: dict[str, Any] | None = None
    ) -> Any:
        """One short request; returns the decoded JSON, or None for an empty body.

        Raises:
            EngineRefusedError: HTTP status other than 200.
            EngineBrokenError: no answer within the deadline, or not JSON.
        """
        try:
            async with (
                asyncio.timeout(deadline_s),
                self._session.request(
                    method, f"{self.url}{path}", json=content, allow_redirects=False
                ) as answer,
            ):
                body = await answer.read()
        except aiohttp.ClientConnectorError as error:
            raise EngineBrokenError("connection_refused", is_refused=True) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EngineBrokenError("no_answer") from error
        if answer.status != HTTPStatus.OK:
            raise EngineRefusedError(answer.status, body)
        try:
            return msgspec.json.decode(body) if body else None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise EngineBrokenError("malformed_answer") from error

    async def weight_version(self, deadline_s: float) -> str:
        """The version that the engine says its weights have; raises as ``ask``."""
        told = await self.ask("GET", "/weight_info", deadline_s=deadline_s)
        if not isinstance(told, dict) or not isinstance(told.get("weight_version"), str):
            raise EngineBrokenError("malformed_answer")
        return canonical_version(told["weight_version"])

    async def is_paused(self, deadline_s: float) -> bool:
        """Is generation paused?  Raises as ``ask``."""
        told = await self.ask("GET", "/is_paused", deadline_s=deadline_s)
        if not isinstance(told, dict) or not isinstance(told.get("is_paused"), bool):
            raise EngineBrokenError("malformed_answer")
        return bool(told["is_paused"])


def _choices(payloads: list[bytes]) -> list[Choice]:
    choices: list[Choice] = []
    for payload in payloads:
        if payload == b"[DONE]":
            continue
        parsed = _decode_chunk(payload)
        if parsed.error is not None:
            raise EngineBrokenError("error_in_stream")
        choices.extend(parsed.choices)
    return choices
