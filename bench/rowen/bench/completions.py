"""Stream one completion from an OpenAI-compatible engine and note when its tokens come."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp


class StreamError(Exception):
    """The engine refused the request, broke the stream, or ended it before the last token."""


@dataclass(slots=True)
class Arrivals:
    """When tokens of one answer came, in ms after ``sent_monotonic_s``; filled while it streams."""

    sent_monotonic_s: float = 0.0
    tokens: int = 0
    ttft_ms: float | None = None
    last_token_ms: float | None = None
    longest_gap_ms: float | None = None

    def note(self, tokens: int, at_ms: float) -> None:
        """Count a delivery of ``tokens`` new tokens."""
        if tokens <= 0:
            return
        if self.last_token_ms is None:
            self.ttft_ms = at_ms
        else:
            self.longest_gap_ms = max(self.longest_gap_ms or 0.0, at_ms - self.last_token_ms)
        self.last_token_ms = at_ms
        self.tokens += tokens


def completion_body(
    model: str, prompt_token_ids: Sequence[int], output_tokens: int, cache_salt: str
) -> dict[str, Any]:
    """Build a request whose work is known beforehand: greedy, exactly ``output_tokens`` tokens.

    The salt separates prefix caches: without it the second replay of the same prompts would find
    them cached, and arms could not be compared.
    """
    return {
        "model": model,
        "prompt": list(prompt_token_ids),
        "max_tokens": output_tokens,
        "min_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "return_token_ids": True,
        "cache_salt": cache_salt,
    }


async def stream_completion(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], arrivals: Arrivals
) -> None:
    """Send ``body`` and fill ``arrivals`` until the answer is complete.

    Raises:
        StreamError: see there; ``arrivals`` holds what came before.
        aiohttp.ClientError, TimeoutError: the connection failed; likewise.
    """
    payload = json.dumps(body).encode()
    arrivals.sent_monotonic_s = time.monotonic()
    async with session.post(
        f"{url}/v1/completions", data=payload, headers={"Content-Type": "application/json"}
    ) as response:
        if response.status != 200:
            detail = " ".join((await response.text())[:300].split())
            raise StreamError(f"HTTP {response.status}: {detail}")
        async for line in response.content:
            if not line.startswith(b"data:"):
                continue
            at_ms = (time.monotonic() - arrivals.sent_monotonic_s) * 1000.0
            data = line[5:].strip()
            if data == b"[DONE]":
                break
            arrivals.note(_token_count(data), at_ms)
    if arrivals.tokens != body["max_tokens"]:
        raise StreamError(
            f"the stream ended after {arrivals.tokens} of {body['max_tokens']} tokens"
        )


def _token_count(data: bytes) -> int:
    """Return how many tokens an event of the stream carries."""
    try:
        event = json.loads(data)
        if "error" in event:
            raise StreamError(f"the engine answered {str(event['error'])[:300]}")
        return sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))
    except (ValueError, TypeError, AttributeError) as error:
        raise StreamError(f"the stream holds {data[:80]!r}, which is no event ({error})") from None


def engine_session(timeout_s: float) -> aiohttp.ClientSession:
    """Open a session that never queues a request in the client: no limit of connections."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=120),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        read_bufsize=1 << 20,  # one event with a long prompt's ids is a single line
    )


async def completed(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Arrivals:
    """Stream one completion to its end and return when its tokens came."""
    arrivals = Arrivals()
    await stream_completion(session, url, body, arrivals)
    return arrivals


async def completed_together(
    session: aiohttp.ClientSession, url: str, bodies: Sequence[dict[str, Any]]
) -> list[Arrivals]:
    """Stream completions at the same time and return when the tokens of each came."""
    return list(await asyncio.gather(*(completed(session, url, body) for body in bodies)))
