"""All trajectories of this process: those that run, and for a while those that ended.

Finds the trajectory of a repeated ``X-Request-Id``, so that a client that lost its connection gets
the same one: live if it still runs, from the log if it ended, resumed if it was cut off.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from typing import Any

from rowen.scheduler.errors import ApiError
from rowen.scheduler.request import GenerateRequest
from rowen.scheduler.settings import Settings
from rowen.scheduler.trajectory import TrajectoryLog


class Status(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    REJECTED = "rejected"
    """The engine found the request itself wrong; its answer was passed on."""
    CANCELLED = "cancelled"
    """The client went away; a repeat of the id resumes it."""
    LOST = "lost"
    """We could not finish it; a repeat of the id resumes it."""


OPEN = frozenset({Status.WAITING, Status.RUNNING})
RESUMABLE = frozenset({Status.CANCELLED, Status.LOST})


@dataclass(slots=True)
class Counters:
    """Since the start of the process."""

    started: int = 0
    finished: int = 0
    rejected: int = 0
    cancelled: int = 0
    lost: int = 0
    """Ended without a finish by our fault, and not resumed since."""
    migrated: int = 0
    """Trajectories that went on, with tokens logged, on another engine (each counted once)."""
    resumed_same_engine: int = 0
    """Trajectories that went on, with tokens logged, on the same engine (each counted once)."""
    rerouted: int = 0
    """Trajectories that left an engine before it made any token (each counted once)."""
    continuations: int = 0
    """Seams within outputs, several per trajectory possible."""
    attached: int = 0
    """Requests with a known ``X-Request-Id``."""


@dataclass(slots=True, eq=False)
class Trajectory:
    """One request and all that became of it."""

    key: str
    number: int
    """Order of arrival: who waits longer goes first, also after a seam."""
    request: GenerateRequest
    log: TrajectoryLog
    started_unix_s: float
    prompt_tokens: int
    status: Status = Status.WAITING
    ended_s: float | None = None
    error: ApiError | None = None
    left_engine: str | None = None
    """The engine it left by a fault, to be avoided at the next choice."""
    fruitless: int = 0
    """Stays in a row without a token."""
    refusals: int = 0
    """Stays since the last token that an engine refused as a wrong request."""
    marks: set[str] = field(default_factory=set)
    """Which of the once-per-trajectory counters it is in."""
    runner: asyncio.Task[None] | None = None
    listeners: dict[asyncio.Event, bool] = field(default_factory=dict)
    """Who sends it to a client now, and whether as a stream."""

    @property
    def is_open(self) -> bool:
        return self.status in OPEN

    def notify_tokens(self) -> None:
        """New tokens are logged: wake those who stream."""
        for listener, is_stream in self.listeners.items():
            if is_stream:
                listener.set()

    def notify_end(self) -> None:
        """It ended: wake everyone."""
        for listener in self.listeners:
            listener.set()

    def describe(self) -> dict[str, Any]:
        """Everything but the content."""
        log = self.log
        return {
            "id": self.key,
            "status": self.status,
            "started_unix_s": self.started_unix_s,
            "prompt_tokens": self.prompt_tokens,
            "tokens": log.segments[-1].end if log.segments else 0,
            "finish_reason": log.finish_reason,
            "error": self.error.message if self.error is not None else None,
            "weight_versions": [span._asdict() for span in log.spans],
            "segments": [
                {
                    "engine_id": segment.engine_id,
                    "fencing_epoch": segment.epoch,
                    "version": segment.version,
                    "start": segment.start,
                    "end": segment.end,
                    "ended_by": segment.ended_by,
                }
                for segment in log.segments
            ],
            "group": self.request.group_key,
            "trajectory": self.request.trajectory_key,
        }


class TrajectoryStore:
    """Bounded memory of trajectories by id."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._all: dict[str, Trajectory] = {}
        self._ended: OrderedDict[str, Trajectory] = OrderedDict()
        self._next_number = 0
        self.counters = Counters()

    @property
    def open_count(self) -> int:
        return len(self._all) - len(self._ended)

    def open_trajectories(self) -> list[Trajectory]:
        return [trajectory for trajectory in self._all.values() if trajectory.is_open]

    def get(self, key: str) -> Trajectory | None:
        self._drop_old()
        return self._all.get(key)

    def open(self, request: GenerateRequest) -> tuple[Trajectory, bool]:
        """The trajectory for a request, and whether it has to be run from here.

        Raises:
            ApiError: 409, the id belongs to another request; 429, too many are open.
        """
        self._drop_old()
        known = self._all.get(request.request_id) if request.is_id_given else None
        if known is not None:
            return known, self._attach(known, request)
        if self.open_count >= self._settings.max_open:
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"{self.open_count} requests are open and --max-open is "
                f"{self._settings.max_open}: send fewer at once, or raise it",
                retry_after_s=1,
            )
        self._next_number += 1
        key = request.request_id
        if key in self._all:  # an id from the body or of our making is a label, not a key
            key = f"{key}#{self._next_number}"
        trajectory = Trajectory(
            key=key,
            number=self._next_number,
            request=request,
            log=TrajectoryLog(request.max_tokens, request.has_logprobs),
            started_unix_s=time.time(),
            prompt_tokens=len(request.prompt),
        )
        self._all[key] = trajectory
        self.counters.started += 1
        return trajectory, True

    def _attach(self, known: Trajectory, request: GenerateRequest) -> bool:
        if known.request.fingerprint != request.fingerprint or not known.request.is_id_given:
            raise ApiError(
                HTTPStatus.CONFLICT,
                f"X-Request-Id is {request.request_id!r}: it belongs to a request with another "
                "prompt or other sampling_params; use a new id",
                param="x-request-id",
            )
        self.counters.attached += 1
        if known.status not in RESUMABLE:
            return False
        if known.status is Status.LOST:
            self.counters.lost -= 1
        else:
            self.counters.cancelled -= 1
        known.status, known.error = Status.WAITING, None
        known.fruitless = known.refusals = 0
        del self._ended[known.key]
        return True

    def end(self, trajectory: Trajectory, status: Status, error: ApiError | None = None) -> None:
        """The trajectory came to its end; wakes its clients."""
        if not trajectory.is_open:
            return
        trajectory.status, trajectory.error = status, error
        trajectory.ended_s = self._loop.time()
        name = status.value
        setattr(self.counters, name, getattr(self.counters, name) + 1)
        self._ended[trajectory.key] = trajectory
        trajectory.notify_end()

    def mark(self, trajectory: Trajectory, counter: str) -> None:
        """Count the trajectory in ``counter``, once."""
        if counter not in trajectory.marks:
            trajectory.marks.add(counter)
            setattr(self.counters, counter, getattr(self.counters, counter) + 1)

    def release(self, trajectory: Trajectory) -> None:
        """Nobody sends it any more: what can never be asked for again is dropped."""
        if not trajectory.request.is_id_given and not trajectory.is_open:
            trajectory.log.tokens = trajectory.log.tokens[:0]
            trajectory.log.logprobs.clear()
            trajectory.request.prompt.clear()

    def _drop_old(self) -> None:
        oldest = self._loop.time() - self._settings.retain_s
        while self._ended:
            key, trajectory = next(iter(self._ended.items()))
            is_old = trajectory.ended_s is not None and trajectory.ended_s < oldest
            if not is_old and len(self._ended) <= self._settings.retain_count:
                return
            if trajectory.listeners:  # being sent right now
                self._ended.move_to_end(key)
                return
            del self._ended[key], self._all[key]
