"""The HTTP face: vLLM's token-in token-out route, health, metrics and ``/rowen/v1/…``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Annotated, Any

import aiohttp
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from rowen.scheduler.dispatch import Dispatcher
from rowen.scheduler.engine_client import open_session
from rowen.scheduler.errors import SHOWN_VALUE_CHARS, ApiError, error_body
from rowen.scheduler.generate_route import TrajectoryResponse
from rowen.scheduler.lease_reader import LeaseReader
from rowen.scheduler.metrics import SchedulerCollector
from rowen.scheduler.registry import Registry
from rowen.scheduler.request import read_request
from rowen.scheduler.settings import Settings
from rowen.scheduler.status_views import engines_view, trajectories_view, versions_view
from rowen.scheduler.trajectories import TrajectoryStore
from rowen.scheduler.versions import VersionSource
from rowen.scheduler.weight_sync import WeightSync

log = logging.getLogger(__name__)

NOT_BUILT = {
    "/v1/completions": "text in is not built yet: post token ids to /inference/v1/generate",
    "/v1/chat/completions": "chat is not built yet: post token ids to /inference/v1/generate",
}
"""Routes that a client of vLLM may look for, and what to do instead."""


class VersionAnnouncement(BaseModel):
    """A weight version that the trainer has published."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Annotated[int, Field(ge=0)]
    host: Annotated[str, Field(min_length=1)]
    """Address of the publisher, as the engines reach it."""
    port: Annotated[int, Field(ge=1, le=65535)]
    run: Annotated[str, Field(max_length=200)] = ""
    """Identity of the training run; with a new one the versions may begin again."""


class Scheduler:
    """The running parts behind the routes; exists between start and stop of the app."""

    def __init__(
        self, settings: Settings, session: aiohttp.ClientSession, redis_url: str | None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.settings = settings
        self.started_unix_s = int(time.time())
        self.leases = LeaseReader(redis_url) if redis_url is not None else None
        self.weight_sync = WeightSync(settings)
        self.registry = Registry(settings, session, self.leases, lambda: self.weight_sync.source)
        self.weight_sync.attach(self.registry)
        self.store = TrajectoryStore(settings)
        self.dispatcher = Dispatcher(settings, self.registry, self.store)
        self.metrics = CollectorRegistry(auto_describe=False)
        self.metrics.register(
            SchedulerCollector(self.registry, self.store, self.dispatcher, self.weight_sync)
        )

    def stop_soon(self) -> None:
        """End every open request with an answer; callable from a signal handler."""
        self._loop.call_soon_threadsafe(self.dispatcher.end_all)

    async def close(self) -> None:
        await self.weight_sync.close()
        await self.dispatcher.close()
        if self.leases is not None:
            await self.leases.close()


def create_app(settings: Settings, redis_url: str | None) -> FastAPI:
    """The application; ``app.state.scheduler`` holds the parts while it runs."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_session() as session:
            scheduler = Scheduler(settings, session, redis_url)
            app.state.scheduler = scheduler
            registry = asyncio.create_task(scheduler.registry.run(), name="registry")
            registry.add_done_callback(_stop_on_bug)
            try:
                yield
            finally:
                await scheduler.close()
                registry.cancel()
                await asyncio.gather(registry, return_exceptions=True)

    app = FastAPI(title="Rowen rollout endpoint", lifespan=lifespan)
    _add_error_handlers(app)
    _add_model_routes(app)
    _add_rowen_routes(app)
    return app


def _stop_on_bug(task: asyncio.Task[None]) -> None:
    # Without the registry nothing is ever routed again: better to end and be restarted.
    if not task.cancelled() and task.exception() is not None:
        log.critical("registry=failed", exc_info=task.exception())
        raise SystemExit(1)


def _parts(request: Request) -> Scheduler:
    scheduler: Scheduler = request.app.state.scheduler
    return scheduler


async def _read_body(request: Request, limit_bytes: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > limit_bytes:
            text = f"the body is larger than {limit_bytes} bytes: shorten the prompt"
            raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text, param="body")
    return b"".join(parts)


def _add_model_routes(app: FastAPI) -> None:
    @app.post("/inference/v1/generate")
    async def generate(request: Request) -> Response:
        """Generate from token ids, in vLLM's shape, streamed or whole."""
        parts = _parts(request)
        body = await _read_body(request, parts.settings.max_body_bytes)
        wanted = read_request(body, request.headers, parts.settings.model)
        trajectory, is_to_run = parts.store.open(wanted)
        if is_to_run:
            parts.dispatcher.start(trajectory)
        return TrajectoryResponse(
            wanted, trajectory, parts.store, parts.dispatcher, parts.settings.model
        )

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        parts = _parts(request)
        card = {
            "id": parts.settings.model,
            "object": "model",
            "created": parts.started_unix_s,
            "owned_by": "rowen",
            "root": parts.settings.model,
            "parent": None,
        }
        return {"object": "list", "data": [card]}

    @app.get("/health")
    async def health() -> Response:
        """The process lives."""
        return Response(status_code=HTTPStatus.OK)

    @app.get("/ready")
    async def ready(request: Request) -> JSONResponse:
        """At least one engine takes requests."""
        registry = _parts(request).registry
        is_ready = registry.is_ready()
        states = {e.engine_id: e.decision.action for e in registry.engines.values()}
        status = HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse({"is_ready": is_ready, "engines": states}, status)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        text = generate_latest(_parts(request).metrics)
        return Response(text, media_type=CONTENT_TYPE_LATEST)


def _add_rowen_routes(app: FastAPI) -> None:
    @app.get("/rowen/v1/engines")
    async def engines(request: Request) -> dict[str, Any]:
        parts = _parts(request)
        return engines_view(parts.registry, parts.dispatcher)

    @app.get("/rowen/v1/trajectories")
    async def trajectories(request: Request) -> dict[str, Any]:
        parts = _parts(request)
        return trajectories_view(parts.store, parts.dispatcher)

    @app.get("/rowen/v1/trajectories/{trajectory_id:path}")
    async def trajectory(request: Request, trajectory_id: str) -> dict[str, Any]:
        found = _parts(request).store.get(trajectory_id)
        if found is None:
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                f"trajectory_id is {trajectory_id[:SHOWN_VALUE_CHARS]!r}: no such trajectory is "
                "open or kept; ask with the request's X-Request-Id",
                param="trajectory_id",
            )
        return found.describe()

    @app.get("/rowen/v1/versions")
    async def versions(request: Request) -> dict[str, Any]:
        parts = _parts(request)
        return versions_view(parts.registry, parts.weight_sync)

    @app.post("/rowen/v1/versions")
    async def announce(request: Request, announcement: VersionAnnouncement) -> dict[str, Any]:
        """Tell that a version is published; returns at once, the engines follow."""
        parts = _parts(request)
        source = VersionSource(**announcement.model_dump())
        is_new = parts.weight_sync.announce(source)
        return {"is_new": is_new, **versions_view(parts.registry, parts.weight_sync)}


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, int(error.status), error.headers)

    @app.exception_handler(RequestValidationError)
    async def wrong_body(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        shown = repr(first.get("input"))[:SHOWN_VALUE_CHARS]
        text = f"{field} is {shown}: {first['msg']}; correct it"
        return JSONResponse(error_body(HTTPStatus.BAD_REQUEST, text, field), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        status = HTTPStatus(error.status_code)
        text = f"{request.method} {request.url.path[:200]}: {error.detail}"
        if status is HTTPStatus.NOT_FOUND:
            text = f"{text}; {NOT_BUILT.get(request.url.path, 'see /openapi.json for the routes')}"
        return JSONResponse(error_body(status, text), int(status), error.headers)
