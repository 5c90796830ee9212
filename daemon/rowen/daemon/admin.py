"""The daemon's HTTP server, on loopback: status, metrics, history, and the operator's mode.

A POST must be JSON.  A browser cannot send that to another origin without asking first, and this
server never says yes; and a name that someone made point here (DNS rebinding) is refused by the
Host header.  So no web page can reach the switch.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import BaseModel, ConfigDict, ValidationError

from rowen.daemon.journal import Journal
from rowen.daemon.mode import OperatorMode
from rowen.daemon.status import StatusPage
from rowen.daemon.telemetry import Telemetry
from rowen.policies.schema import Mode

log = logging.getLogger(__name__)

MAX_HISTORY_ENTRIES = 10_000
"""Entries in one answer, about 3 MB; ask again with ``since`` set to ``next``."""


LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
"""What a Host header may name."""


class ModeRequest(BaseModel):
    """Body of POST /mode."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode


class AdminServer:
    """Serves until closed."""

    def __init__(
        self,
        *,
        status: StatusPage,
        telemetry: Telemetry,
        journal: Journal,
        operator: OperatorMode,
        mode_in_force: Callable[[], Mode],
    ) -> None:
        self._status = status
        self._telemetry = telemetry
        self._journal = journal
        self._operator = operator
        self._mode_in_force = mode_in_force
        app = web.Application(client_max_size=65536, middlewares=[_refuse_foreign_names])
        app.router.add_get("/status", self._get_status)
        app.router.add_get("/metrics", self._get_metrics)
        app.router.add_get("/history", self._get_history)
        app.router.add_post("/mode", self._post_mode)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)

    async def start(self, host: str, port: int) -> str:
        """Listen; returns the base URL.

        Raises:
            OSError: the port is taken.  Nothing listens.
        """
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError:
            await self._runner.cleanup()
            raise
        bound_host, bound_port = self._runner.addresses[0][:2]
        shown = f"[{bound_host}]" if ":" in bound_host else bound_host
        return f"http://{shown}:{bound_port}"

    async def close(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    async def _get_status(self, _: web.Request) -> web.Response:
        return _json(self._status.document())

    async def _get_metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._telemetry.page(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def _get_history(self, request: web.Request) -> web.Response:
        given = request.query.get("since", "0")
        if not given.isascii() or not given.isdigit():
            text = f"since is {given!r}, expected the number of an entry (0 for all)"
            return _json({"error": text}, status=400)
        entries = self._journal.since(int(given), MAX_HISTORY_ENTRIES)
        following = entries[-1]["sequence"] if entries else max(int(given), self._journal.newest)
        return _json({"entries": entries, "next": following})

    async def _post_mode(self, request: web.Request) -> web.Response:
        if request.content_type != "application/json":
            text = f"the body is {request.content_type}, send application/json"
            return _json({"error": text}, status=415)
        try:
            wanted = ModeRequest.model_validate_json(await request.read()).mode
        except ValidationError:
            text = 'send {"mode": "enforce"}, "preview" or "off", and nothing else'
            return _json({"error": text}, status=400)
        try:
            self._operator.set(wanted)
        except OSError as error:
            text = (
                f"the mode cannot be stored ({error.strerror}); a stricter one holds until restart"
            )
            return _json({"error": text, "in_force": self._mode_in_force().value}, status=500)
        log.info("operator_mode=%s in_force=%s", wanted, self._mode_in_force())
        return _json({"operator": wanted.value, "in_force": self._mode_in_force().value})


def is_loopback(host: str) -> bool:
    """Whether a Host header, with or without a port, names this machine's loopback."""
    try:
        return urlsplit(f"//{host}").hostname in LOOPBACK_NAMES
    except ValueError:
        return False


@web.middleware
async def _refuse_foreign_names(request: web.Request, handler: Handler) -> web.StreamResponse:
    host = request.headers.get("Host", "")
    if not is_loopback(host):
        return _json({"error": f"the Host header is {host!r}, use 127.0.0.1"}, status=403)
    return await handler(request)


def _json(document: dict[str, Any], *, status: int = 200) -> web.Response:
    return web.Response(
        text=json.dumps(_finite(document)), status=status, content_type="application/json"
    )


def _finite(value: Any) -> Any:
    """JSON knows no infinity; a reading that is beyond the last bucket shows as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
