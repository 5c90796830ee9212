"""Which engines take a new weight version now, and which keep serving meanwhile.  Pure.

Engines out of service are updated at once.  Those in service take turns, so that somebody goes on
making tokens, except where there is only one: then it just goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VersionSource:
    """Where a version can be fetched: the trainer's publisher."""

    version: int
    host: str
    port: int
    run: str = ""
    """Which training run it belongs to; version numbers of two runs have nothing in common."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine in the eyes of the version plan."""

    engine_id: str
    version: int | None
    """None: unknown or of another run, which only an update cures."""
    is_reachable: bool
    """It answers, is not draining and does not rest after a fault."""
    is_serving: bool
    """READY or THROTTLED."""
    is_updating: bool
    retry_in_s: float
    """Rest after a failed update; 0 when it may be tried."""
    running: int
    has_failed: bool = False
    """Its latest update failed, and was to the same version from the same source."""


def choose_updates(engines: Sequence[Candidate], target_version: int) -> list[str]:
    """The engines to update now, in order; empty when all are there or have to wait.

    Of the serving engines one at least is chosen unless another update is under way, which has a
    deadline.  The last serving one is left alone while another engine in reach fails on the same
    source: it would only fail as well.  That ends with a success, another source or its loss.
    """
    behind = [
        e
        for e in engines
        if e.is_reachable
        and not e.is_updating
        and e.retry_in_s <= 0
        and (e.version is None or e.version != target_version)
    ]
    chosen = [e for e in behind if not e.is_serving]
    waiting = sorted((e for e in behind if e.is_serving), key=lambda e: (e.running, e.engine_id))
    serving = [e for e in engines if e.is_serving and not e.is_updating]
    if len(serving) == 1 and waiting:
        # The only one in service: wait for those that will be back, and where others fail.
        others = [e for e in engines if e.engine_id != serving[0].engine_id]
        is_hopeless = any(e.is_reachable and e.has_failed for e in others)
        if not chosen and not is_hopeless and not any(e.is_updating for e in engines):
            chosen.extend(waiting)
    else:
        busy = sum(e.is_updating for e in engines)
        chosen.extend(waiting[: max(0, (len(serving) + busy) // 2 - busy)])
    return [e.engine_id for e in chosen]
