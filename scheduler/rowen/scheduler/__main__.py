"""``python -m rowen.scheduler``: the rollout endpoint as a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from rowen.scheduler.app import Scheduler, create_app
from rowen.scheduler.embedded_redis import EmbeddedRedis
from rowen.scheduler.settings import Settings

log = logging.getLogger("rowen.scheduler")

FLAGS = (
    "model", "dedicated_sequences", "request_deadline_s", "stall_s", "poll_ms",
    "health_every_ms", "sync_deadline_s", "max_open", "max_body_bytes", "retain_s",
    "retain_count", "history_s",
)  # fmt: skip
"""Settings that are flags; the rest are the state machine's own affair."""

EMBEDDED = re.compile(r"^embedded(?::(?P<port>\d{1,5}))?$")
REDIS_URL = re.compile(r"^(rediss?://[^\s]+|unix://[^\s]+)$")


class UsageError(Exception):
    """Wrong use: one sentence, exit status 2, nothing started."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; 0 after a clean end, 2 after wrong use."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    logging.getLogger("fakeredis").setLevel(logging.WARNING)
    options = _parser().parse_args(arguments)
    try:
        settings = _settings(options)
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(_bind(options.host, options.port))
            redis_url = _redis(options.redis, stack)
            _serve(settings, listener, redis_url)
    except UsageError as error:
        print(f"rowen scheduler: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rowen.scheduler", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one (%(default)s)")
    parser.add_argument(
        "--redis",
        default="embedded",
        metavar="URL|embedded[:PORT]|none",
        help="where the leases are; embedded starts one on loopback (%(default)s)",
    )
    parser.add_argument(
        "--dedicated",
        action="append",
        default=[],
        metavar="URL",
        help="an engine without a lease, at a fixed address; repeatable",
    )
    for name in FLAGS:
        field = Settings.model_fields[name]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            required=field.is_required(),
            default=None if field.is_required() else str(field.default),
            metavar="NAME" if name == "model" else "N",
            help=f"{(field.description or '').split('.')[0].replace('`', '')} (%(default)s)",
        )
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    given = {name: getattr(options, name) for name in FLAGS}
    try:
        return Settings.model_validate({**given, "dedicated": options.dedicated})
    except ValidationError as error:
        first = error.errors()[0]
        flag = f"--{str(first['loc'][0]).replace('_', '-')}"
        message = first["msg"][0].lower() + first["msg"][1:]
        raise UsageError(f"{flag} is {first['input']!r}: {message}; correct it") from None


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"--host {host} --port {port}: {reason}; end what listens there, "
            "or give another address, or port 0 for any free one"
        ) from None
    return listener


def _redis(value: str, stack: contextlib.ExitStack) -> str | None:
    if value == "none":
        return None
    embedded = EMBEDDED.match(value)
    if embedded is None:
        if not REDIS_URL.match(value):
            raise UsageError(
                f"--redis is {value!r}: give redis://HOST:PORT, unix://PATH, "
                "embedded, embedded:PORT, or none"
            )
        return value
    port = int(embedded["port"] or 0)
    try:
        return stack.enter_context(EmbeddedRedis(port=port)).url
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"--redis is {value!r}: port {port} on 127.0.0.1: {reason}; "
            "give another port, or embedded for any free one"
        ) from None


class _Server(uvicorn.Server):
    """Ends open requests with an answer when told to stop, instead of waiting for them."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        scheduler: Scheduler | None = getattr(self._app.state, "scheduler", None)
        if scheduler is not None:  # None while still starting: nothing is open then
            scheduler.stop_soon()
        super().handle_exit(sig, frame)


def _serve(settings: Settings, listener: socket.socket, redis_url: str | None) -> None:
    host, port = listener.getsockname()[:2]
    log.info("listening url=http://%s:%d redis=%s", host, port, redis_url)
    app = create_app(settings, redis_url)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=5,
    )
    # The server raises the signal again once it has ended in order: then that is a clean end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_cleanly)
    _Server(config, app).run(sockets=[listener])


def _end_cleanly(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
