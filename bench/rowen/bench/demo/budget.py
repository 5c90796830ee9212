"""How the demo divides its time, so that it ends in time on slow machines too.  Pure.

The phases that cannot be shortened (engine starts) take what they take; the two replays, alone
and with harvest, share what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

TOTAL_S = 325.0
"""Six minutes is the promise; the rest is for ending all processes and for a slow last step."""

ROLLOUT_ALONE_S = 14.0
"""Rollouts without serving traffic, for the rate that the harvest is held against."""

LEAST_WINDOW_S = 36.0
MOST_WINDOW_S = 62.0
"""One replay of the traffic.  At about one request per second fewer than 36 say nothing about a
99th percentile, and more than 66 cost time without saying much more."""

HARVEST_PASSES = 2
"""The traffic is replayed once alone and this often with harvest: the trainer needs the time."""

TAIL_S = 30.0
"""Last evaluation of the trainer, ending of all processes, table and report."""


@dataclass(frozen=True)
class Budget:
    """Seconds for the replays."""

    window_s: float
    """Length of one replay of the traffic."""

    @property
    def harvest_s(self) -> float:
        return HARVEST_PASSES * self.window_s


def divide(elapsed_s: float, engine_start_s: float) -> Budget:
    """Divide what is left.

    Args:
        elapsed_s: since the demo began (installation not counted).
        engine_start_s: what the first engine needed to start; the rollout engine, which starts
            later beside an idle serving engine, is expected to need as long.

    Returns:
        A window within its bounds: on a machine too slow for the least window the demo takes
        longer than promised rather than to show a number that means nothing.
    """
    left_s = TOTAL_S - elapsed_s - engine_start_s - ROLLOUT_ALONE_S - TAIL_S
    window_s = left_s / (1 + HARVEST_PASSES)
    return Budget(window_s=min(MOST_WINDOW_S, max(LEAST_WINDOW_S, window_s)))
