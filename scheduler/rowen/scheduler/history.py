"""Tokens per second over the last minutes, one number per second, for plots and status."""

from __future__ import annotations

from collections import deque


class TokenHistory:
    """Counts by whole seconds of the machine's monotonic clock."""

    __slots__ = ("_counts", "_second", "total")

    def __init__(self, seconds: int) -> None:
        self._counts: deque[int] = deque(maxlen=seconds)
        self._second: int | None = None
        self.total = 0

    def add(self, tokens: int, now_s: float) -> None:
        self._advance(now_s)
        self._counts[-1] += tokens
        self.total += tokens

    def _advance(self, now_s: float) -> None:
        second = int(now_s)
        if self._second is None:
            self._second = second
            self._counts.append(0)
        for _ in range(min(second - self._second, self._counts.maxlen or 0)):
            self._counts.append(0)
        self._second = max(self._second, second)

    def rate(self, now_s: float, window_s: int = 5) -> float:
        """Tokens per second over the last whole ``window_s`` seconds."""
        if self._second is None:
            return 0.0
        self._advance(now_s)
        recent = list(self._counts)[-window_s - 1 : -1]
        return sum(recent) / window_s

    def series(self, now_s: float) -> tuple[int, list[int]]:
        """First second (monotonic) and the counts from there to now."""
        if self._second is None:
            return int(now_s), []
        self._advance(now_s)
        return self._second - len(self._counts) + 1, list(self._counts)
