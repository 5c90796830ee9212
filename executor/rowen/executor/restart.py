"""Whether and when an engine that ended is started again.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class RestartPolicy:
    """Back-off and the bound of a crash loop."""

    first_delay_s: float = 0.5
    longest_delay_s: float = 15.0
    crashes_in_window: int = 5
    """The crash that makes it this many within the window is the last."""
    window_s: float = 300.0


class RestartDecision(NamedTuple):
    """``delay_s`` until the next start; None: not again."""

    delay_s: float | None
    reason: str


def decide(crash_ages_s: Sequence[float], policy: RestartPolicy) -> RestartDecision:
    """Decide after a crash.

    Args:
        crash_ages_s: how long ago each known crash was, the present one (0) included.
        policy: the bounds.

    Returns:
        The delay doubles with each crash inside the window and is forgotten after it.
    """
    recent = sum(1 for age_s in crash_ages_s if age_s <= policy.window_s)
    if recent >= policy.crashes_in_window:
        return RestartDecision(None, f"{recent} crashes within {policy.window_s:.0f} s")
    delay_s = min(policy.longest_delay_s, policy.first_delay_s * 2.0 ** max(0, recent - 1))
    return RestartDecision(delay_s, f"crash {recent} within {policy.window_s:.0f} s")
