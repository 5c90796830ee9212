"""Which engines take a new weight version now, and which keep serving meanwhile.  Pure.

Engines out of service are updated at once.  Those in service take turns, so that somebody goes on
making tokens, except where there is only one: then it just goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine in the eyes of the version plan."""

    engine_id: str
    version: int | None
    """None: unknown, which only an update cures."""
    is_reachable: bool
    """It answers, is not draining and does not rest after a fault."""
    is_serving: bool
    """READY or THROTTLED."""
    is_updating: bool
    retry_in_s: float
    """Rest after a failed update; 0 when it may be tried."""
    running: int


def choose_updates(engines: Sequence[Candidate], target_version: int) -> list[str]:
    """The engines to update now, in order; empty when all are there or have to wait.

    Never waits for ever: of the serving engines one at least is chosen unless another update is
    under way, and that has a deadline.
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
        # The only one in service: wait only for those that will be back within a deadline.
        if not chosen and not any(e.is_updating for e in engines):
            chosen.extend(waiting)
    else:
        busy = sum(e.is_updating for e in engines)
        chosen.extend(waiting[: max(0, (len(serving) + busy) // 2 - busy)])
    return [e.engine_id for e in chosen]
