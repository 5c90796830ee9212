"""Sends a trajectory to one client, as a stream or whole, and notices when the client is gone.

A bare ASGI response: what is sent is cut from the token log as it grows, so a client that attaches
late or reads slowly gets the same bytes' worth of tokens, only in larger pieces.
"""

from __future__ import annotations

import asyncio
import time
from http import HTTPStatus

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rowen.scheduler.dispatch import Dispatcher
from rowen.scheduler.errors import ApiError, error_body
from rowen.scheduler.reply import DONE, chunk, error_event, final_usage, whole
from rowen.scheduler.request import GenerateRequest
from rowen.scheduler.trajectories import Trajectory, TrajectoryStore


class TrajectoryResponse(Response):
    """Runs until the trajectory ended or the client left; the last client to leave cancels it."""

    def __init__(
        self,
        request: GenerateRequest,
        trajectory: Trajectory,
        store: TrajectoryStore,
        dispatcher: Dispatcher,
        model: str,
    ) -> None:
        self._request = request
        self._trajectory = trajectory
        self._store = store
        self._dispatcher = dispatcher
        self._model = model
        self._changed = asyncio.Event()
        self._is_gone = False
        self.background = None
        # From here on, not only from the first byte: an abandoned request has to be noticed.
        trajectory.listeners[self._changed] = request.is_stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch_client(receive))
        try:
            if self._request.is_stream:
                await self._send_stream(send)
            else:
                await self._send_whole(send)
        except OSError:
            self._is_gone = True  # the server says so when it is told to write to a closed client
        finally:
            watcher.cancel()
            trajectory = self._trajectory
            del trajectory.listeners[self._changed]
            if not trajectory.listeners:
                if trajectory.is_open:
                    self._dispatcher.cancel(trajectory)
                self._store.release(trajectory)

    async def _watch_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._is_gone = True
        self._changed.set()

    async def _send_whole(self, send: Send) -> None:
        trajectory = self._trajectory
        while trajectory.is_open and not self._is_gone:
            await self._changed.wait()
            self._changed.clear()
        if self._is_gone:
            return
        if trajectory.log.finish_reason is None:
            await self._send_error(send)
            return
        body = whole(self._request, trajectory.log, self._model, int(time.time()))
        await self._start(
            send, HTTPStatus.OK, "application/json", {"content-length": str(len(body))}
        )
        await send({"type": "http.response.body", "body": body})

    async def _send_stream(self, send: Send) -> None:
        trajectory, sent, has_started = self._trajectory, 0, False
        log = trajectory.log
        while not self._is_gone:
            end, is_last = len(log.tokens), log.finish_reason is not None
            if not has_started and (end or is_last):
                # Not before: until then an engine may still refuse the request with a status.
                await self._start(send, HTTPStatus.OK, "text/event-stream; charset=utf-8", {})
                has_started = True
            if end > sent or is_last:
                piece = chunk(self._request, log, sent, end, is_last)
                sent = end
                if is_last:
                    usage = (
                        final_usage(self._request, log) if self._request.has_final_usage else b""
                    )
                    await send({"type": "http.response.body", "body": piece + usage + DONE})
                    return
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            elif not trajectory.is_open:
                break
            else:
                await self._changed.wait()
                self._changed.clear()
        if self._is_gone:
            return
        if has_started:
            event = error_event(self._error().body)
            await send({"type": "http.response.body", "body": event})
        else:
            await self._send_error(send)

    def _error(self) -> ApiError:
        text = "the trajectory was cancelled: send it again"
        return self._trajectory.error or ApiError(HTTPStatus.SERVICE_UNAVAILABLE, text)

    async def _send_error(self, send: Send) -> None:
        error = self._error()
        body = msgspec.json.encode(error_body(error.status, error.message, error.param))
        headers = {**error.headers, "content-length": str(len(body))}
        await self._start(send, error.status, "application/json", headers)
        await send({"type": "http.response.body", "body": body})

    async def _start(
        self, send: Send, status: HTTPStatus, media_type: str, headers: dict[str, str]
    ) -> None:
        headers = {
            "content-type": media_type,
            "x-request-id": self._request.request_id,
            **headers,
        }
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": int(status), "headers": raw})
