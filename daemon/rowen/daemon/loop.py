"""The loop: observe, decide, act, every 100 ms.

It waits for nothing but its own clock.  A tick that comes late is itself a reading: the guard
closes when the time since the last decision exceeds the bound after which the gate closes by
itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from rowen.daemon.act import Actor
from rowen.daemon.journal import Entry, Journal
from rowen.daemon.link import LaneLink
from rowen.daemon.mode import OperatorMode
from rowen.daemon.obedience import is_obedient
from rowen.daemon.observe import Observation, Observer, stricter
from rowen.daemon.rollout import RolloutEngine
from rowen.daemon.telemetry import Telemetry
from rowen.executor.admission import AdmissionBounds, GateReason, may_compute
from rowen.executor.lane import UNLIMITED, DaemonReading
from rowen.policies import guard, reclaim
from rowen.policies.schema import HarvestPolicy, Mode

log = logging.getLogger(__name__)

TICK_S = 0.1
"""Ten decisions within the second that Rowen has to close the gate."""


@dataclass(frozen=True, slots=True)
class Tick:
    """One pass of the loop, for the status page."""

    seen: Observation
    elapsed_ms: float
    mode: Mode
    guard: guard.GuardDecision
    ladder: reclaim.ReclaimDecision
    fast_path: GateReason
    """What the gate itself makes of the lane, were the daemon's gate as the guard says."""


class Loop:
    """Runs the decisions.  ``last`` is the newest tick."""

    def __init__(
        self,
        policy: HarvestPolicy,
        *,
        observer: Observer,
        actor: Actor,
        engine: RolloutEngine,
        link: LaneLink,
        journal: Journal,
        telemetry: Telemetry,
        operator: OperatorMode,
    ) -> None:
        self.policy = policy
        self.last: Tick | None = None
        self._observer = observer
        self._actor = actor
        self._engine = engine
        self._link = link
        self._journal = journal
        self._telemetry = telemetry
        self._operator = operator
        self._guard = guard.START
        self._ladder = reclaim.START
        self._last_ns = time.monotonic_ns()
        freshness = policy.spec.freshness
        self._bounds = AdmissionBounds(
            probe_silent_ms=freshness.probe_heartbeat_ms,
            daemon_silent_ms=freshness.daemon_heartbeat_ms,
        )

    @property
    def mode(self) -> Mode:
        """The mode in force: the stricter of the policy's and the operator's."""
        return stricter(self.policy.spec.mode, self._operator.mode)

    async def run(self) -> None:
        """Tick until cancelled."""
        next_s = time.monotonic()
        while True:
            self.tick()
            # After a late tick the rhythm begins anew; ticks are never made up for in a burst.
            next_s = max(next_s + TICK_S, time.monotonic())
            await asyncio.sleep(next_s - time.monotonic())

    def tick(self) -> None:
        """Observe, decide and act once."""
        seen = self._observer.look()
        elapsed_ms = (seen.now_ns - self._last_ns) / 1e6
        self._last_ns = seen.now_ns
        mode = self.mode
        verdict = guard.decide(self._guard, seen.for_guard(elapsed_ms, mode), self.policy)
        fast_path = self._ask_fast_path(seen, verdict)
        ladder = reclaim.decide(
            self._ladder, self._for_ladder(seen, elapsed_ms, verdict, fast_path), self.policy
        )
        self._guard, self._ladder = verdict.state, ladder.state
        self._actor.apply(verdict, ladder)
        self.last = Tick(seen, elapsed_ms, mode, verdict, ladder, fast_path)
        self._report(self.last)

    def _ask_fast_path(self, seen: Observation, verdict: guard.GuardDecision) -> GateReason:
        word = DaemonReading(
            heartbeat_ns=seen.now_ns,
            gate_open=verdict.gate is guard.Gate.OPEN,
            token_budget=UNLIMITED,
            sequence_cap=verdict.sequence_cap,
            block_cap=UNLIMITED,
            epoch=0,
        )
        return may_compute(seen.probe, word, seen.now_ns, self._bounds).reason

    def _for_ladder(
        self,
        seen: Observation,
        elapsed_ms: float,
        verdict: guard.GuardDecision,
        fast_path: GateReason,
    ) -> reclaim.ReclaimSeen:
        return reclaim.ReclaimSeen(
            elapsed_ms=elapsed_ms,
            gate=verdict.gate,
            is_admitted=fast_path is GateReason.OPEN,
            is_killed=seen.kill_switch is not False,
            is_memory_short=guard.is_memory_short(seen.available_memory_bytes, self.policy),
            engine=self._engine.phase,
            is_obedient=is_obedient(
                seen.gate,
                seen.now_ns,
                self._link.closed_since_ns,
                is_serving_busy=seen.probe is not None and seen.probe.is_busy,
            ),
        )

    def _report(self, tick: Tick) -> None:
        before, entry = self._journal.record(
            tick.guard,
            tick.ladder,
            monotonic_ms=tick.seen.now_ns / 1e6,
            unix_ms=time.time() * 1000,
        )
        self._telemetry.take(tick, is_change=entry is not None)
        if entry is not None:
            log.log(
                logging.INFO if _is_news(before, entry) else logging.DEBUG,
                "gate=%s action=%s reason=%s cap=%d rung=%s cause=%s detail=%r",
                entry.gate,
                entry.action,
                entry.reason,
                entry.sequence_cap,
                entry.rung,
                entry.cause,
                entry.detail,
            )


_FAST_RUNGS = frozenset((reclaim.Rung.RUN, reclaim.Rung.GATE))


def _is_news(before: Entry | None, entry: Entry) -> bool:
    """Is it worth a line?  The fast path's flipping follows each request to production and is not,
    nor are the pauses between two steps of growth; both stand in the history."""
    if before is None or before.gate != entry.gate or before.sequence_cap != entry.sequence_cap:
        return True
    if before.reason != entry.reason and entry.reason != guard.Reason.STEADY:
        return True
    return before.rung != entry.rung and not {before.rung, entry.rung} <= _FAST_RUNGS
