"""Keeps the endpoint busy with groups of samples while the trainer computes.

A thread with an event loop of its own: the trainer's thread computes in torch, which releases the
interpreter, and takes finished groups from here.  Nothing here touches the weights.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from examples.grpo_arithmetic.asking import Asker, Tokenizer
from examples.grpo_arithmetic.buffer import Dropped, Group, Sample, choose
from examples.grpo_arithmetic.endpoint import (
    Counts,
    EndpointClient,
    EndpointError,
    TrajectoryLost,
)
from examples.grpo_arithmetic.evaluation import Evaluation, cancelled, evaluate
from examples.grpo_arithmetic.task import Problem

log = logging.getLogger("grpo_arithmetic")
Result = TypeVar("Result")

REANNOUNCE_S = 5.0
"""The newest version is told again so often: the endpoint may have restarted and forgotten it."""


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """How groups are sampled."""

    endpoint: str
    samples_per_group: int
    in_flight_groups: int
    """At the endpoint at any time, while the trainer computes as well."""
    max_staleness: int
    """In versions."""
    max_tokens: int
    stop_token_id: int
    deadline_s: float
    """After so long without an answer a trajectory counts as lost."""


class Rollouts:
    """Start with ``with``; every method is for the trainer's thread."""

    def __init__(
        self, settings: RolloutSettings, tokenizer: Tokenizer, problems: Iterator[Problem]
    ) -> None:
        self._settings = settings
        self._problems = problems
        self._client = EndpointClient(settings.endpoint, deadline_s=settings.deadline_s)
        self._asker = Asker(self._client, tokenizer, settings.max_tokens, settings.stop_token_id)
        self._run_id = uuid.uuid4().hex[:12]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._changed = threading.Condition()
        self._finished: deque[Group] = deque()
        self._failure: EndpointError | None = None
        self._groups_begun = 0
        self._producers: set[asyncio.Task[None]] = set()
        self._announcer: asyncio.Task[None] | None = None
        self._announced: tuple[int, str, int] | None = None
        self._is_announced = asyncio.Event()
        self.dropped = Dropped()
        self.incomplete_groups = 0

    def __enter__(self) -> Rollouts:
        self._thread.start()
        self._submit(self._open()).result()
        return self

    def __exit__(self, *_: object) -> None:
        self._submit(self._close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def counts(self) -> Counts:
        return self._client.counts

    def start(self) -> None:
        """Begin to keep ``in_flight_groups`` groups at the endpoint, until `stop`."""
        self._submit(self._start()).result()

    def stop(self) -> None:
        """Withdraw the groups in flight; they are not lost, nobody wants them any more."""
        self._submit(self._stop()).result()

    def take(
        self, *, version: int, count: int, timeout_s: float, until: Callable[[], bool]
    ) -> tuple[Group, ...]:
        """The freshest ``count`` groups within the staleness bound; waits for them.

        Returns nothing when ``until()`` becomes true.

        Raises:
            EndpointError: the endpoint refused, or not enough groups came in ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not until():
                if self._failure is not None:
                    raise self._failure
                taken = self._choose(version, count)
                if taken:
                    return taken
                if time.monotonic() > deadline:
                    raise EndpointError(
                        f"{len(self._finished)} of {count} groups no more than "
                        f"{self._settings.max_staleness} versions behind {version} came in "
                        f"{timeout_s:g} s (too old: {self.dropped.stale}, without signal: "
                        f"{self.dropped.flat}); see {self._client.url}/rowen/v1/versions"
                    )
                self._changed.wait(0.2)
        return ()

    def evaluate(
        self, problems: Sequence[Problem], *, repeats: int, version: int, deadline_s: float
    ) -> Future[Evaluation]:
        """Sample each problem ``repeats`` times by ``version``, while the trainer goes on."""
        return self._submit(
            evaluate(
                self._asker,
                problems,
                repeats=repeats,
                version=version,
                deadline_s=deadline_s,
                run_id=self._run_id,
            )
        )

    def announce(self, version: int, host: str, port: int) -> None:
        """Tell the endpoint of a version from now on, until a newer one replaces it."""
        self._announced = (version, host, port)
        self._loop.call_soon_threadsafe(self._is_announced.set)

    # Below: in the event loop's thread.

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        # Closed connections are let go in the turn of the loop after the one that closed them.
        self._loop.run_until_complete(asyncio.sleep(0))

    def _submit(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _open(self) -> None:
        await self._client.__aenter__()
        self._announcer = self._watched(self._announce_forever())

    async def _start(self) -> None:
        for _ in range(self._settings.in_flight_groups):
            self._producers.add(self._watched(self._produce_forever()))

    def _watched(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        with self._changed:
            # A bug of ours must stop the trainer as well, not only this thread.
            self._failure = (
                error if isinstance(error, EndpointError) else EndpointError(repr(error))
            )
            self._changed.notify_all()

    async def _stop(self) -> None:
        await cancelled(self._producers)
        self._producers.clear()

    async def _close(self) -> None:
        await self._stop()
        if self._announcer is not None:
            await cancelled([self._announcer])
        await self._client.__aexit__()

    async def _produce_forever(self) -> None:
        while True:
            group = await self._sample_group(next(self._problems))
            if group is None:
                self.incomplete_groups += 1
                continue
            with self._changed:
                self._finished.append(group)
                self._changed.notify_all()

    async def _sample_group(self, problem: Problem) -> Group | None:
        """None when fewer than two samples came back: there is nothing to compare."""
        self._groups_begun += 1
        group_id = f"{self._run_id}-{self._groups_begun}"
        bound = str(self._settings.max_staleness)
        headers = {"X-Rowen-Group": group_id, "X-Rowen-Max-Staleness": bound}
        tasks = [
            asyncio.create_task(self._sample(problem, f"{group_id}-{index}", headers))
            for index in range(self._settings.samples_per_group)
        ]
        try:
            samples = await asyncio.gather(*tasks)
        finally:
            # When one is refused, the others must not outlive the group.
            await cancelled(tasks)
        found = tuple(sample for sample in samples if sample is not None)
        if len(found) < 2:
            return None
        return Group(group_id, problem, self._asker.prompt_ids(problem), found)

    async def _sample(
        self, problem: Problem, request_id: str, headers: Mapping[str, str]
    ) -> Sample | None:
        try:
            return await self._asker.ask(problem, request_id=request_id, headers=headers)
        except TrajectoryLost as error:
            log.warning("event=trajectory_lost reason=%s", error)
            return None

    async def _announce_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(REANNOUNCE_S):
                    await self._is_announced.wait()
            except TimeoutError:
                pass
            self._is_announced.clear()
            if self._announced is None:
                continue
            try:
                await self._client.announce(
                    *self._announced, run=self._run_id, deadline_s=REANNOUNCE_S
                )
            except TimeoutError as error:
                log.warning("event=announce_failed version=%d reason=%s", self._announced[0], error)

    def _choose(self, version: int, count: int) -> tuple[Group, ...]:
        choice = choose(
            list(self._finished),
            version=version,
            max_staleness=self._settings.max_staleness,
            count=count,
            capacity=count,
        )
        self._finished = deque(choice.kept)
        self.dropped.stale += choice.dropped.stale
        self.dropped.flat += choice.dropped.flat
        self.dropped.surplus += choice.dropped.surplus
        return choice.taken
