"""The held-out problems, sampled through the endpoint by one weight version and no other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from examples.grpo_arithmetic.asking import Asker
from examples.grpo_arithmetic.endpoint import TrajectoryLost
from examples.grpo_arithmetic.task import Grade, Problem

CONCURRENCY = 64
RETRY_S = 0.5
"""A sample of another version is asked again after so long: engines switch one by one."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over all samples, at temperature 1, all by weights ``version``."""

    version: int
    samples: int
    missed: int
    """No answer of this version came before the deadline; not part of the means."""
    reward_mean: float | None
    right_ratio: float | None
    seconds: float


async def evaluate(
    asker: Asker,
    problems: Sequence[Problem],
    *,
    repeats: int,
    version: int,
    deadline_s: float,
    run_id: str,
) -> Evaluation:
    """Sample each problem ``repeats`` times; the same seeds in every evaluation.

    Raises:
        EndpointRefused: nothing of it is counted.
    """
    started = time.monotonic()
    gate = asyncio.Semaphore(CONCURRENCY)
    wanted = [problem for problem in problems for _ in range(repeats)]
    tasks = [
        asyncio.create_task(_one(asker, problem, seed, version, run_id, gate))
        for seed, problem in enumerate(wanted)
    ]
    try:
        await asyncio.wait(tasks, timeout=deadline_s)
    finally:
        await cancelled(tasks)
    grades = [grade for grade in map(_grade_or_none, tasks) if grade is not None]
    count = len(grades)
    return Evaluation(
        version=version,
        samples=count,
        missed=len(tasks) - count,
        reward_mean=sum(grade.reward for grade in grades) / count if count else None,
        right_ratio=sum(grade.is_right for grade in grades) / count if count else None,
        seconds=time.monotonic() - started,
    )


async def _one(
    asker: Asker, problem: Problem, seed: int, version: int, run_id: str, gate: asyncio.Semaphore
) -> Grade:
    """Ask until one answer is by ``version`` from the first to the last token."""
    # Staleness 0 keeps the sample from engines that have not switched yet, as far as the endpoint
    # has heard of the version.
    headers = {"X-Rowen-Group": f"{run_id}-eval-{version}", "X-Rowen-Max-Staleness": "0"}
    attempt = 0
    while True:
        async with gate:
            sample = await asker.ask(
                problem,
                # Another id for another attempt: the old one is finished, and stays what it was.
                request_id=f"{run_id}-eval-{version}-{seed}-{attempt}",
                headers=headers,
                seed=seed,
            )
        completion = sample.completion
        if completion.oldest_version == completion.newest_version == version:
            return sample.grade
        attempt += 1
        await asyncio.sleep(RETRY_S)


def _grade_or_none(task: asyncio.Task[Grade]) -> Grade | None:
    if task.cancelled():
        return None
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, TrajectoryLost):
        return None
    raise error


async def cancelled(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel the tasks and wait for their end; what already ended keeps its result."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
