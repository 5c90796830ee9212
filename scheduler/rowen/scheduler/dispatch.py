"""Runs trajectories: waits for an engine, streams from it, goes on elsewhere when it goes away.

One task per open trajectory.  Those without an engine wait in order of arrival, so a
trajectory that lost its engine goes before all younger ones.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
import logging
from http import HTTPStatus

import msgspec

from rowen.scheduler.affinity import AffinityMemory
from rowen.scheduler.engine import Engine, Stay
from rowen.scheduler.engine_client import Choice, EngineBrokenError, EngineRefusedError
from rowen.scheduler.errors import ApiError
from rowen.scheduler.registry import Registry
from rowen.scheduler.route import Action, EngineView, RouteDecision, RouteSeen, decide
from rowen.scheduler.settings import Settings
from rowen.scheduler.trajectories import Status, Trajectory, TrajectoryStore
from rowen.scheduler.trajectory import (
    NonsenseError,
    Step,
    VersionSpan,
    continue_sampling,
)

log = logging.getLogger(__name__)

FAULTS = frozenset(
    {
        "connection_broken", "connection_refused", "error_in_stream", "malformed_stream",
        "nonsense", "refused_work", "stalled", "stream_cut",
    }
)  # fmt: skip
"""Causes that speak against the engine; the others are somebody's decision."""

WRONG_REQUEST = frozenset({400, 413, 422})
"""Statuses by which an engine says that the request itself is wrong."""

REFUSALS_OF_A_CONTINUATION = 3
"""The request was right once; when its rest was refused three times without a token in between, no
fourth engine will do.  Aborts and stalls do not count."""

RETRY_WAIT_S = 0.05
RETRY_WAIT_MAX_S = 2.0
"""After stays without any token, doubling: nobody gains from a tight loop of refusals."""


class _RequestRefusedError(Exception):
    def __init__(self, refusal: EngineRefusedError) -> None:
        super().__init__(refusal.sentence)
        self.refusal = refusal


class Dispatcher:
    """Owns the queue and the tasks of trajectories."""

    def __init__(self, settings: Settings, registry: Registry, store: TrajectoryStore) -> None:
        self._settings = settings
        self._registry = registry
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._affinity = AffinityMemory()
        self._queue: list[tuple[int, Trajectory, asyncio.Future[Stay]]] = []
        self._is_match_due = False
        self.tokens_per_engine: dict[str, int] = {}
        self.tokens_per_version: dict[str, int] = {}
        self.faults: dict[str, int] = {}
        self.routes: dict[str, int] = {}
        registry.changed = self.kick

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return self._store.open_count - len(self._queue)

    def start(self, trajectory: Trajectory) -> None:
        """Run (or resume) a trajectory until it ends or is cancelled."""
        trajectory.runner = asyncio.create_task(
            self._run(trajectory, trajectory.runner), name=f"trajectory-{trajectory.number}"
        )

    def cancel(self, trajectory: Trajectory) -> None:
        """Its last client is gone: stop the work, keep the log."""
        self._store.end(trajectory, Status.CANCELLED)
        if trajectory.runner is not None:
            trajectory.runner.cancel()

    async def close(self) -> None:
        """End every open trajectory and wait until its connections are closed."""
        runners = self.end_all()
        await asyncio.gather(*runners, return_exceptions=True)

    def end_all(self) -> list[asyncio.Task[None]]:
        """End every open trajectory with an error to its client; its log is gone with us."""
        error = ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "the scheduler is stopping: send the request again to the one that replaces it",
        )
        runners = []
        for trajectory in self._store.open_trajectories():
            self._store.end(trajectory, Status.LOST, error)
            if trajectory.runner is not None:
                trajectory.runner.cancel()
                runners.append(trajectory.runner)
        return runners

    async def _run(self, trajectory: Trajectory, cancelled: asyncio.Task[None] | None) -> None:
        if cancelled is not None:
            await asyncio.wait([cancelled])  # a resumed log must not have two writers
        deadline_s = self._settings.request_deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                while trajectory.log.finish_reason is None:
                    stay = await self._wait_for_engine(trajectory)
                    await self._use(trajectory, stay)
                    await self._rest(trajectory)
            self._finish(trajectory)
        except TimeoutError:
            text = (
                f"not finished within {deadline_s:g} s ({len(trajectory.log.tokens)} tokens are "
                "logged): send it again with the same X-Request-Id, or raise --request-deadline-s"
            )
            self._store.end(trajectory, Status.LOST, ApiError(HTTPStatus.GATEWAY_TIMEOUT, text))
        except _RequestRefusedError as error:
            self._end_refused(trajectory, error.refusal)
        except Exception:
            log.exception("trajectory=%d failed by our own fault", trajectory.number)
            text = "the scheduler failed on this request; its log has the traceback"
            self._store.end(
                trajectory, Status.LOST, ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, text)
            )

    def _finish(self, trajectory: Trajectory) -> None:
        self._store.end(trajectory, Status.FINISHED)

    def _end_refused(self, trajectory: Trajectory, refusal: EngineRefusedError) -> None:
        has_tokens = len(trajectory.log.tokens) > 0
        status = HTTPStatus.BAD_GATEWAY if has_tokens else HTTPStatus(refusal.status)
        error = ApiError(status, f"the engine refuses the request: {refusal.sentence}")
        self._store.end(trajectory, Status.LOST if has_tokens else Status.REJECTED, error)

    async def _rest(self, trajectory: Trajectory) -> None:
        if trajectory.log.finish_reason is None and trajectory.fruitless > 1:
            wait_s = RETRY_WAIT_S * 2 ** min(trajectory.fruitless - 2, 16)
            await asyncio.sleep(min(wait_s, RETRY_WAIT_MAX_S))

    # The queue.

    async def _wait_for_engine(self, trajectory: Trajectory) -> Stay:
        trajectory.status = Status.WAITING
        assigned: asyncio.Future[Stay] = self._loop.create_future()
        entry = (trajectory.number, trajectory, assigned)
        bisect.insort(self._queue, entry, key=lambda e: e[0])
        self.kick()
        try:
            stay = await assigned
        except asyncio.CancelledError:
            if assigned.done() and not assigned.cancelled():
                self._leave(assigned.result())
            else:
                self._queue.remove(entry)
            raise
        trajectory.status = Status.RUNNING
        return stay

    def kick(self) -> None:
        """Room or work has appeared: match once, soon."""
        if self._queue and not self._is_match_due:
            self._is_match_due = True
            self._loop.call_soon(self._match)

    def _match(self) -> None:
        self._is_match_due = False
        now = self._loop.time()
        views = {e.engine_id: e.view(now) for e in self._registry.engines.values()}
        left = []
        for place, entry in enumerate(self._queue):
            if not any(v.is_routable and v.running < v.capacity for v in views.values()):
                left.extend(self._queue[place:])
                break
            _, trajectory, assigned = entry
            if assigned.done():  # cancelled just now; its owner takes it out
                left.append(entry)
                continue
            decision = self._route(trajectory, views)
            self.routes[decision.reason] = self.routes.get(decision.reason, 0) + 1
            if decision.action is Action.WAIT or decision.engine_id is None:
                left.append(entry)
                continue
            view = views[decision.engine_id]
            views[decision.engine_id] = dataclasses.replace(view, running=view.running + 1)
            assigned.set_result(self._assign(trajectory, decision.engine_id, now))
        self._queue = left

    def _route(self, trajectory: Trajectory, views: dict[str, EngineView]) -> RouteDecision:
        request, engines = trajectory.request, self._registry.engines
        seen = RouteSeen(
            engines=list(views.values()),
            target_version=self._registry.target_version,
            max_staleness=request.max_staleness,
            trajectory_engine=self._affinity.of_trajectory(request.trajectory_key, engines),
            group_engines=self._affinity.of_group(request.group_key, engines),
        )
        return decide(trajectory.left_engine, seen)

    def _assign(self, trajectory: Trajectory, engine_id: str, now: float) -> Stay:
        engine = self._registry.engines[engine_id]
        assert engine.version is not None  # routable engines have a verified one
        request = trajectory.request
        prefill_tokens = len(request.prompt) + len(trajectory.log.tokens)
        stay = Stay(engine, engine.version, now, prefill_tokens)
        engine.stays.add(stay)
        self._affinity.note(engine, stay.version, request.trajectory_key, request.group_key)
        return stay

    def _leave(self, stay: Stay) -> None:
        stay.engine.leave(stay)
        self.kick()

    # A stay on an engine.

    async def _use(self, trajectory: Trajectory, stay: Stay) -> None:
        """Stream from the engine until it ends the request, goes away, or has to be left."""
        engine, tokens = stay.engine, trajectory.log
        logged_before = len(tokens.tokens)
        refusal: EngineRefusedError | None = None
        has_begun = False
        try:
            if engine.is_updating:
                stay.abandon("weight_update")
            if stay.cause is None:
                self._count_seam(trajectory, engine)
                tokens.begin(engine.engine_id, engine.epoch, str(stay.version))
                has_begun = True
                stay.task = asyncio.create_task(self._pump(trajectory, stay))
                await stay.task
        except asyncio.CancelledError:
            if _is_being_cancelled():
                if has_begun and stay.decision is None:
                    tokens.break_off("cancelled")
                raise
        except EngineRefusedError as error:
            refusal = error
            stay.cause = stay.cause or "refused_work"
        except (EngineBrokenError, NonsenseError) as error:
            told = error.cause if isinstance(error, EngineBrokenError) else "nonsense"
            stay.cause = stay.cause or told  # a connection that we drop may break loudly
            if isinstance(error, NonsenseError):
                log.warning("engine=%s nonsense=%s", engine.engine_id, error)
        finally:
            self._leave(stay)
        if stay.decision is None and has_begun:
            stay.decision = tokens.break_off(stay.cause or "stream_cut")
            stay.cause = stay.cause or "stream_cut"
        elif stay.decision is not None and stay.decision.reason == "error":
            stay.cause = "error_in_stream"
        has_progress = len(tokens.tokens) > logged_before
        is_excused = stay.cause is not None and stay.cause not in FAULTS
        trajectory.fruitless = 0 if has_progress or is_excused else trajectory.fruitless + 1
        if has_progress:
            trajectory.refusals = 0
        elif refusal is not None and refusal.status in WRONG_REQUEST:
            trajectory.refusals += 1
        self._judge_stay(trajectory, stay, refusal)

    def _judge_stay(
        self, trajectory: Trajectory, stay: Stay, refusal: EngineRefusedError | None
    ) -> None:
        """Whether the engine, the request or nobody is to blame."""
        engine = stay.engine
        trajectory.left_engine = None
        if stay.decision is not None and stay.decision.is_contradicted:
            log.warning(
                "engine=%s version=contradicted believed=%s", engine.engine_id, stay.version
            )
            engine.distrust()
            self._registry.judge(engine)
        if stay.decision is not None and stay.decision.action is Step.DONE:
            self._registry.note_success(engine)
            return
        if refusal is not None and refusal.status in WRONG_REQUEST:
            is_first = len(trajectory.log.tokens) == 0
            if is_first or trajectory.refusals >= REFUSALS_OF_A_CONTINUATION:
                raise _RequestRefusedError(refusal)
        cause = stay.cause
        if cause == "slow":  # of this stream only: the engine makes tokens for others
            trajectory.left_engine = engine.engine_id
        if cause in FAULTS:
            assert cause is not None
            trajectory.left_engine = engine.engine_id
            self.faults[cause] = self.faults.get(cause, 0) + 1
            self._registry.note_fault(engine, cause, is_refused=cause == "connection_refused")

    def _count_seam(self, trajectory: Trajectory, engine: Engine) -> None:
        if not trajectory.log.segments:
            return
        with_tokens = [s for s in trajectory.log.segments if s.end > s.start]
        if not with_tokens:
            self._store.mark(trajectory, "rerouted")
            return
        self._store.counters.continuations += 1
        is_same = with_tokens[-1].engine_id == engine.engine_id
        self._store.mark(trajectory, "resumed_same_engine" if is_same else "migrated")

    async def _pump(self, trajectory: Trajectory, stay: Stay) -> None:
        """From the engine's stream into the log; to the stream's end, so that it can be reused."""
        body = _upstream_body(trajectory)
        upstream_id = f"{trajectory.request.request_id}-{len(trajectory.log.segments)}"
        async with contextlib.aclosing(stay.engine.client.generate(body, upstream_id)) as stream:
            async for choices in stream:
                if stay.decision is None:
                    self._log(trajectory, stay, choices)

    def _log(self, trajectory: Trajectory, stay: Stay, choices: list[Choice]) -> None:
        now = self._loop.time()
        engine, tokens = stay.engine, trajectory.log
        for choice in choices:
            if choice.token_ids:
                tokens.append(choice.token_ids, choice.logprob_entries)
                stay.has_token = True
                self._count_tokens(engine, str(stay.version), len(choice.token_ids), now)
            stay.last_token_s = now
            if choice.finish_reason is not None:
                spans = choice.weight_versions
                reported = (
                    [VersionSpan(s.version, s.start, s.end) for s in spans] if spans else None
                )
                stay.decision = tokens.end(choice.finish_reason, choice.stop_reason, reported)
                break
        if tokens.finish_reason is not None:
            self._finish(trajectory)
        else:
            trajectory.notify_tokens()

    def _count_tokens(self, engine: Engine, version: str, count: int, now: float) -> None:
        self._registry.note_tokens(engine, count, now)
        per_engine, per_version = self.tokens_per_engine, self.tokens_per_version
        per_engine[engine.engine_id] = per_engine.get(engine.engine_id, 0) + count
        per_version[version] = per_version.get(version, 0) + count


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _upstream_body(trajectory: Trajectory) -> bytes:
    request, logged = trajectory.request, trajectory.log.tokens
    return msgspec.json.encode(
        {
            "token_ids": request.prompt + logged.tolist(),
            "sampling_params": continue_sampling(request.sampling, len(logged)),
            "stream": True,
            **request.passed,
        }
    )
