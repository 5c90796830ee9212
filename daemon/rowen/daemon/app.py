"""One daemon from start to end: puts the parts together, and takes them down in the right order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from rowen.daemon.act import Actor
from rowen.daemon.admin import AdminServer
from rowen.daemon.config import ConfigError, NodeConfig, gated_spec
from rowen.daemon.drain import wait_until_idle
from rowen.daemon.journal import Journal
from rowen.daemon.leases import LeaseKeeper
from rowen.daemon.link import LaneLink
from rowen.daemon.loop import Loop
from rowen.daemon.mode import OperatorMode
from rowen.daemon.observe import Observer
from rowen.daemon.rollout import RolloutEngine
from rowen.daemon.scrape import Scraper
from rowen.daemon.status import StatusPage
from rowen.daemon.telemetry import Telemetry
from rowen.executor.lane import LaneError
from rowen.executor.supervisor import EngineStartError
from rowen.policies.lease import EngineKind, EngineLease, Grant
from rowen.policies.reclaim import EnginePhase
from rowen.policies.schema import HarvestPolicy

log = logging.getLogger(__name__)

ADMIN_URL_FILE = "admin-url"


async def run_daemon(config: NodeConfig, policy: HarvestPolicy, stop: asyncio.Event) -> None:
    """Run until ``stop`` is set, then drain, end the engine and return.

    Raises:
        ConfigError: the lane, the run folder or the admin port cannot be had.  Nothing was started.
    """
    try:
        link = LaneLink(config.lane)
    except LaneError as error:
        raise ConfigError(str(error)) from None
    try:
        await _run_on_lane(config, policy, stop, link)
    finally:
        link.close()


async def _run_on_lane(
    config: NodeConfig, policy: HarvestPolicy, stop: asyncio.Event, link: LaneLink
) -> None:
    engine = RolloutEngine(gated_spec(config, policy), config.run_dir)
    try:
        await engine.end_leftovers()  # now: with the kill switch on, no start would do it
    except EngineStartError as error:
        raise ConfigError(str(error)) from None
    scraper = Scraper(config.serving.scrape_url, policy.spec.objectives)
    keeper = _make_keeper(config)
    actor = Actor(link, engine, keeper, policy)
    journal, telemetry, operator = Journal(), Telemetry(), OperatorMode(config.run_dir)
    loop = Loop(
        policy,
        observer=Observer(link, scraper, config.kill_file),
        actor=actor,
        engine=engine,
        link=link,
        journal=journal,
        telemetry=telemetry,
        operator=operator,
    )
    status = StatusPage(
        config, loop=loop, engine=engine, keeper=keeper, journal=journal, operator=operator
    )
    admin = AdminServer(
        status=status,
        telemetry=telemetry,
        journal=journal,
        operator=operator,
        mode_in_force=lambda: loop.mode,
    )
    async with _listening(admin, config) as url:
        log.info(
            "daemon=started node=%s policy=%s admin=%s", config.node, policy.metadata.name, url
        )
        tasks = [_start(loop.run(), "loop"), _start(scraper.run(), "scraper")]
        if keeper is not None:
            tasks.append(_start(keeper.run(), "lease"))
        try:
            await _wait_for_stop(stop, tasks)
            await _leave(actor, engine, keeper, policy)
        finally:
            # Whatever happened, the engine ends before the lane falls silent and the lease goes.
            actor.is_leaving = True
            await engine.close(policy.spec.reclaim.kill_after_ms / 1000)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
    log.info("daemon=ended node=%s", config.node)


def _start(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    return asyncio.create_task(work, name=name)


def _make_keeper(config: NodeConfig) -> LeaseKeeper | None:
    if config.redis_url is None:
        return None
    lease = EngineLease(
        engine_id=config.engine_id,
        url=f"http://{config.rollout.host}:{config.rollout.port}",
        kind=EngineKind.OPPORTUNISTIC,
        model=config.rollout.served_model_name,
        node=config.node,
        grant=Grant.DRAINING,
        fencing_epoch=1,
        sequence_cap=0,
    )
    return LeaseKeeper(config.redis_url, lease)


@contextlib.asynccontextmanager
async def _listening(admin: AdminServer, config: NodeConfig) -> AsyncIterator[str]:
    address = config.run_dir / ADMIN_URL_FILE
    try:
        url = await admin.start(config.admin.host, config.admin.port)
    except OSError as error:
        raise ConfigError(
            f"admin.port {config.admin.port} on {config.admin.host} cannot be used "
            f"({error.strerror}); give another one, or 0 to have a free one chosen"
        ) from None
    try:
        address.write_text(url + "\n", encoding="utf-8")
        yield url
    finally:
        address.unlink(missing_ok=True)
        await admin.close()


async def _wait_for_stop(stop: asyncio.Event, tasks: list[asyncio.Task[None]]) -> None:
    """Until asked to stop; a part that ends by itself is a bug and ends the daemon with it."""
    asked = asyncio.create_task(stop.wait(), name="stop")
    try:
        done, _ = await asyncio.wait([asked, *tasks], return_when=asyncio.FIRST_COMPLETED)
    finally:
        asked.cancel()
    for task in done - {asked}:
        task.result()
        raise RuntimeError(f"the {task.get_name()} ended by itself")


async def _leave(
    actor: Actor, engine: RolloutEngine, keeper: LeaseKeeper | None, policy: HarvestPolicy
) -> None:
    """Say draining, close the gate, and give the scheduler time to take the trajectories away."""
    actor.is_leaving = True
    has_listener = keeper is not None and keeper.status.is_published
    if engine.phase is EnginePhase.READY and has_listener:
        deadline_s = policy.spec.reclaim.terminate_after_ms / 1000
        is_idle = await wait_until_idle(engine.url, deadline_s)
        log.info("daemon=draining engine_idle=%s", is_idle)
