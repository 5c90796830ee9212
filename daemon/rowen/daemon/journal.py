"""What was decided: only changes, bounded, with both clocks, for people and for plots."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from rowen.policies.guard import GuardDecision
from rowen.policies.reclaim import ReclaimDecision

KEPT_ENTRIES = 50_000
"""Under constant serving the fast path flips a few times per second: hours of history, 20 MB."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The decision that held from this moment until the next entry."""

    sequence: int
    monotonic_ms: float
    unix_ms: float
    gate: str
    action: str
    reason: str
    detail: str
    sequence_cap: int
    rung: str
    cause: str


class Journal:
    """A bounded list of changes."""

    def __init__(self, kept_entries: int = KEPT_ENTRIES) -> None:
        self._entries: deque[Entry] = deque(maxlen=kept_entries)
        self._next = 1

    def record(
        self,
        guard: GuardDecision,
        ladder: ReclaimDecision,
        *,
        monotonic_ms: float,
        unix_ms: float,
    ) -> tuple[Entry | None, Entry | None]:
        """Note a decision.  Returns (entry before, new entry or None if nothing changed).

        The figures in ``detail`` move all the time and are no change by themselves.
        """
        before = self._entries[-1] if self._entries else None
        entry = Entry(
            sequence=self._next,
            monotonic_ms=monotonic_ms,
            unix_ms=unix_ms,
            gate=guard.gate,
            action=guard.action,
            reason=guard.reason,
            detail=guard.detail,
            sequence_cap=guard.sequence_cap,
            rung=ladder.action,
            cause=ladder.reason,
        )
        if before is not None and _essence(before) == _essence(entry):
            return before, None
        self._entries.append(entry)
        self._next += 1
        return before, entry

    def since(self, sequence: int, limit: int = KEPT_ENTRIES) -> list[dict[str, Any]]:
        """Entries numbered above ``sequence``, oldest first, at most ``limit``."""
        found: list[dict[str, Any]] = []
        for entry in reversed(self._entries):
            if entry.sequence <= sequence:
                break
            found.append(asdict(entry))
        found.reverse()
        return found[:limit]

    def last(self, count: int) -> list[dict[str, Any]]:
        """The newest ``count`` entries, oldest first."""
        return self.since(self._next - 1 - count)

    @property
    def newest(self) -> int:
        """Number of the newest entry; 0 before the first."""
        return self._next - 1


def _essence(entry: Entry) -> tuple[str, str, int, str, str]:
    return (entry.gate, entry.reason, entry.sequence_cap, entry.rung, entry.cause)
