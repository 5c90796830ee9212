"""Asks the endpoint for completions, and does not give one up while its deadline lasts.

The endpoint is Rowen's scheduler, or for a try a bare vLLM of 0.32 or later with
``--enable-scale-out``.  A repeat carries the same ``X-Request-Id``, so that
Rowen's endpoint goes on after the last token it logged; a bare vLLM computes all of it again.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 3.0
ATTEMPT_TIMEOUT_S = 60.0
"""A connection that brought nothing for so long is given up; the repeat resumes the trajectory."""
ANCHOR_NAMES = ("default", "")
"""What vLLM calls the weights that it was started with: version 0."""


Answer = TypeVar("Answer")


class EndpointError(Exception):
    """Base of what can go wrong between this example and the endpoint."""


class EndpointRefused(EndpointError):
    """The endpoint says that the request is wrong; a repeat would be refused as well."""


class TrajectoryLost(EndpointError):
    """No answer within the deadline, though repeated all along; the sample is gone."""


class _Unfinished(Exception):
    """The answer is not whole (an abort, a broken body): ask again."""


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens ``[start, end)`` of a completion were computed with weights ``version``."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine wrote: ``logprobs`` are its own, one per token, of the version in force."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[Span, ...]
    finish_reason: str
    attempts: int

    @property
    def oldest_version(self) -> int:
        return min(span.version for span in self.spans)

    @property
    def newest_version(self) -> int:
        return max(span.version for span in self.spans)


@dataclass(slots=True)
class Counts:
    """Of one client, since its start; ``lost`` counts trajectories, ``retries`` attempts."""

    finished: int = 0
    tokens: int = 0
    retries: int = 0
    lost: int = 0


class EndpointClient:
    """Use in one event loop, as an asynchronous context."""

    def __init__(self, url: str, *, deadline_s: float) -> None:
        self.url = url.rstrip("/")
        self.counts = Counts()
        self._deadline_s = deadline_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> EndpointClient:
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Mapping[str, Any],
        *,
        request_id: str,
        headers: Mapping[str, str],
    ) -> Completion:
        """One completion with its logprobs and weight versions.

        Raises:
            EndpointRefused: the request, or the endpoint, is of the wrong kind; not repeated.
            TrajectoryLost: the deadline passed; counted as lost.
        """
        body = {
            "token_ids": list(prompt_ids),
            "sampling_params": {**sampling, "logprobs": 0},
            "stream": False,
        }
        all_headers = {**headers, "X-Request-Id": request_id}
        attempts = 0

        async def attempt() -> Completion:
            nonlocal attempts
            attempts += 1
            answer = await self._post("/inference/v1/generate", body, all_headers)
            return read_completion(answer, request_id, attempts)

        try:
            completion = await self._repeat(attempt, self._deadline_s)
        except TimeoutError as error:
            self.counts.lost += 1
            raise TrajectoryLost(
                f"trajectory {request_id} got no answer in {self._deadline_s:g} s "
                f"and {attempts} attempts at {self.url}: {error}"
            ) from None
        self.counts.finished += 1
        self.counts.tokens += len(completion.token_ids)
        return completion

    async def announce(
        self, version: int, host: str, port: int, *, run: str, deadline_s: float
    ) -> None:
        """Tell the endpoint that weights ``version`` of ``run`` are at ``host:port``; idempotent.

        Raises:
            EndpointRefused: this endpoint knows no versions (a bare vLLM), or not this one.
            TimeoutError: not told; the engines stay on the version they have.
        """
        body = {"version": version, "host": host, "port": port, "run": run}
        await self._repeat(lambda: self._post("/rowen/v1/versions", body, {}), deadline_s)

    async def _repeat(self, attempt: Callable[[], Awaitable[Answer]], deadline_s: float) -> Answer:
        """``attempt()`` until it succeeds; TimeoutError with the last cause after the deadline."""
        backoff_s, cause = FIRST_BACKOFF_S, "no attempt ended"
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    try:
                        return await attempt()
                    except (aiohttp.ClientError, TimeoutError, OSError, _Unfinished) as error:
                        cause = f"{type(error).__name__} {error}".rstrip()
                    self.counts.retries += 1
                    await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
                    backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
        except TimeoutError:
            raise TimeoutError(f"last seen: {cause}") from None

    async def _post(self, route: str, body: object, headers: Mapping[str, str]) -> Any:
        if self._session is None:
            raise RuntimeError("use EndpointClient as an asynchronous context")
        timeout = aiohttp.ClientTimeout(total=ATTEMPT_TIMEOUT_S)
        async with self._session.post(
            self.url + route, json=body, headers=headers, timeout=timeout
        ) as response:
            text = await response.text()
            if response.status in RETRIED_STATUSES:
                raise _Unfinished(f"HTTP {response.status} {text[:200]}")
            if response.status >= 400:
                raise EndpointRefused(
                    f"{self.url}{route} answered HTTP {response.status}: {text[:500]}"
                )
        try:
            return json.loads(text)
        except ValueError:
            raise _Unfinished(f"not JSON: {text[:200]}") from None


def read_completion(answer: Any, request_id: str, attempts: int) -> Completion:
    """Read vLLM's answer in the shape of 0.32.

    Raises:
        EndpointRefused: it lacks logprobs or weight versions, so it cannot be trained on.
        _Unfinished: it was aborted, or is damaged.
    """
    try:
        choice = answer["choices"][0]
        token_ids = tuple(int(token) for token in choice["token_ids"])
        reason = choice["finish_reason"]
        logprobs, spans = choice["logprobs"], choice["weight_versions"]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise _Unfinished(f"unreadable answer: {error!r}") from None
    if reason not in ("stop", "length") or not token_ids:
        raise _Unfinished(f"finish_reason {reason} after {len(token_ids)} tokens")
    if logprobs is None or spans is None:
        missing = "logprobs" if logprobs is None else "weight_versions"
        raise EndpointRefused(
            f"the endpoint's answer has no {missing}; its engines must be vLLM 0.32 or later"
        )
    values = tuple(float(entry["logprob"]) for entry in logprobs["content"])
    read_spans = tuple(
        Span(_version(span["version"]), int(span["start"]), int(span["end"])) for span in spans
    )
    covered = [position for span in read_spans for position in range(span.start, span.end)]
    if len(values) != len(token_ids) or covered != list(range(len(token_ids))):
        raise _Unfinished(
            f"{len(token_ids)} tokens, {len(values)} logprobs, spans {list(read_spans)}"
        )
    return Completion(request_id, token_ids, values, read_spans, reason, attempts)


def _version(name: str) -> int:
    if name in ANCHOR_NAMES:
        return 0
    try:
        return int(name)
    except ValueError:
        raise EndpointRefused(
            f"weight version {name!r} is no number; engines must get their weights from Rowen"
        ) from None
