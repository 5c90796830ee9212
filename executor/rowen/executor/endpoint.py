"""An engine's HTTP endpoint as the supervisor sees it: its port, and whether it answers."""

from __future__ import annotations

import socket

import aiohttp

from rowen.executor.engine import EngineSpec
from rowen.executor.engine_life import EngineStartError


async def is_healthy(session: aiohttp.ClientSession, url: str) -> bool:
    """Whether /health answers 200 at this moment."""
    try:
        async with session.get(f"{url}/health") as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


def free_port(host: str) -> int:
    """A port that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_port(spec: EngineSpec) -> None:
    """Refuse a chosen port that cannot be used.

    Raises:
        EngineStartError: it is taken or not permitted.  Nothing was started.
    """
    if spec.port:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((spec.host, spec.port))
            except OSError as error:
                raise EngineStartError(
                    f"port {spec.port} of engine {spec.name} cannot be used on {spec.host}: "
                    f"{error.strerror}; set port to another, or to 0 to have a free one chosen"
                ) from error
