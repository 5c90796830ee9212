"""How long a step of so many tokens takes, learned from the steps that were made.  Pure.

Used by the probe to say when the serving engine's step in flight should end.
"""

from __future__ import annotations

from dataclasses import dataclass

_KEEP_RATIO = 0.98
"""Weight of the past at each new step: a memory of about fifty steps."""


@dataclass
class StepTime:
    """Least squares of ``time = a + b * tokens`` with exponentially fading weights."""

    _weight: float = 0.0
    _tokens: float = 0.0
    _ms: float = 0.0
    _tokens_tokens: float = 0.0
    _tokens_ms: float = 0.0

    def learn(self, tokens: int, took_ms: float) -> None:
        """Add one finished step."""
        self._weight = self._weight * _KEEP_RATIO + 1.0
        self._tokens = self._tokens * _KEEP_RATIO + tokens
        self._ms = self._ms * _KEEP_RATIO + took_ms
        self._tokens_tokens = self._tokens_tokens * _KEEP_RATIO + tokens * tokens
        self._tokens_ms = self._tokens_ms * _KEEP_RATIO + tokens * took_ms

    def predict_ms(self, tokens: int) -> float:
        """Expected time of a step; 0 before the first was learned, never negative."""
        if self._weight == 0.0:
            return 0.0
        mean_tokens, mean_ms = self._tokens / self._weight, self._ms / self._weight
        spread = self._tokens_tokens / self._weight - mean_tokens**2
        if spread < 1e-9 * (1.0 + mean_tokens**2):
            return mean_ms  # all steps had one size: nothing can be said about another
        slope = (self._tokens_ms / self._weight - mean_tokens * mean_ms) / spread
        return max(0.0, mean_ms + slope * (tokens - mean_tokens))
