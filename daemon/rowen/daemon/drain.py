"""Waits until the rollout engine has nothing to do, when the daemon leaves in good order."""

from __future__ import annotations

import asyncio
import re

import aiohttp

POLL_S = 0.2
_REQUESTS = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? (\S+)", re.MULTILINE)


async def wait_until_idle(url: str, deadline_s: float) -> bool:
    """Wait until the engine holds no request, at most ``deadline_s``.

    Returns:
        True when it is idle; False at the deadline, or when the engine does not answer (then there
        is nothing to wait for).
    """
    try:
        async with (
            asyncio.timeout(deadline_s),
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session,
        ):
            while True:
                async with session.get(f"{url}/metrics") as answer:
                    counts = [float(count) for count in _REQUESTS.findall(await answer.text())]
                if counts and sum(counts) == 0:
                    return True
                await asyncio.sleep(POLL_S)
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
        return False
