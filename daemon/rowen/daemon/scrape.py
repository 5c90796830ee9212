"""Reads the serving engine's ``/metrics`` once per second, beside the 100 ms loop.

A failed or late scrape changes nothing: the last reading grows older until the policy's freshness
bound closes the gate.  A page that lies (negative or falling counts, missing histograms) drops the
reading at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

import aiohttp

from rowen.daemon.histogram import HistogramWindow, MetricsError, parse_histograms
from rowen.policies.guard import ObjectiveReading
from rowen.policies.schema import Objectives

log = logging.getLogger(__name__)

TTFT_METRIC = "vllm:time_to_first_token_seconds"
TPOT_METRIC = "vllm:request_time_per_output_token_seconds"

SCRAPE_EVERY_S = 1.0
"""A page costs the engine's front end a few milliseconds; more often would be felt there."""

SCRAPE_DEADLINE_S = 2.0
"""Twice the interval; a slower answer tells of a moment that is gone."""

MAX_PAGE_BYTES = 16_000_000
"""A vLLM page has about 100 kB; far more is not one."""


@dataclass(frozen=True, slots=True)
class MetricsReading:
    """What the serving engine's metrics say; ``read_at_ns`` is when the scrape began."""

    read_at_ns: int
    ttft: ObjectiveReading | None
    tpot: ObjectiveReading | None


class Scraper:
    """Keeps the newest reading in ``reading``, and in ``problem`` why there is no newer one."""

    def __init__(self, url: str, objectives: Objectives) -> None:
        self.reading: MetricsReading | None = None
        self.problem: str | None = None
        self._url = url
        self._objectives = objectives
        self._ttft = HistogramWindow(objectives.ttft.window_s)
        self._tpot = HistogramWindow(objectives.tpot.window_s)

    async def run(self) -> None:
        """Scrape until cancelled."""
        timeout = aiohttp.ClientTimeout(total=SCRAPE_DEADLINE_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                begun_ns = time.monotonic_ns()
                await self._scrape_once(session, begun_ns)
                spent_s = (time.monotonic_ns() - begun_ns) / 1e9
                await asyncio.sleep(max(0.05, SCRAPE_EVERY_S - spent_s))

    async def _scrape_once(self, session: aiohttp.ClientSession, begun_ns: int) -> None:
        try:
            page = await self._fetch(session)
        except (aiohttp.ClientError, TimeoutError, OSError, UnicodeDecodeError) as error:
            self._note(f"{self._url}: {type(error).__name__}: {error}".rstrip(": "))
            return
        try:
            self.take(page, begun_ns)
        except MetricsError as error:
            self.reading = None
            self._note(f"{self._url}: {error}")
            return
        self._note(None)

    async def _fetch(self, session: aiohttp.ClientSession) -> str:
        async with session.get(self._url) as answer:
            answer.raise_for_status()
            content = bytearray()
            async for chunk in answer.content.iter_chunked(65536):
                content += chunk
                if len(content) > MAX_PAGE_BYTES:
                    raise aiohttp.ClientPayloadError(f"page larger than {MAX_PAGE_BYTES} bytes")
            return content.decode("utf-8")

    def take(self, page: str, read_at_ns: int) -> None:
        """Take in one page.

        Raises:
            MetricsError: the page cannot be believed; the windows are unchanged.
        """
        histograms = parse_histograms(page, (TTFT_METRIC, TPOT_METRIC))
        at_s = read_at_ns / 1e9
        self._ttft.add(at_s, histograms[TTFT_METRIC])
        self._tpot.add(at_s, histograms[TPOT_METRIC])
        self.reading = MetricsReading(
            read_at_ns=read_at_ns,
            ttft=self._ttft.read(self._objectives.ttft.percentile),
            tpot=self._tpot.read(self._objectives.tpot.percentile),
        )

    def _note(self, problem: str | None) -> None:
        if (problem is None) != (self.problem is None):
            log.log(
                logging.INFO if problem is None else logging.WARNING,
                "metrics=%s problem=%s",
                "readable" if problem is None else "unreadable",
                problem,
            )
        self.problem = problem
