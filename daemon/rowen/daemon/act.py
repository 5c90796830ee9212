"""Act: carries out decisions, through the executor and the lease keeper, and never waits."""

from __future__ import annotations

from rowen.daemon.leases import LeaseKeeper
from rowen.daemon.link import LaneLink
from rowen.daemon.rollout import RolloutEngine
from rowen.policies.guard import Gate, GuardDecision
from rowen.policies.lease import Grant
from rowen.policies.reclaim import GRANTS, EnginePhase, ReclaimDecision, Rung
from rowen.policies.schema import HarvestPolicy


class Actor:
    """Carries decisions to the lane, the rollout engine and its lease."""

    def __init__(
        self,
        link: LaneLink,
        engine: RolloutEngine,
        keeper: LeaseKeeper | None,
        policy: HarvestPolicy,
    ) -> None:
        self._link = link
        self._engine = engine
        self._keeper = keeper
        self._policy = policy
        self._leased_generation = 0
        self.is_leaving = False
        """The daemon is ending: the lease says draining, and no engine is started any more."""

    def apply(self, guard: GuardDecision, ladder: ReclaimDecision) -> None:
        """Make the world follow one pair of decisions; never raises and never waits."""
        is_open = is_lane_open(guard, ladder, self._engine.phase) and not self.is_leaving
        self._link.write(
            is_open=is_open,
            sequence_cap=guard.sequence_cap if is_open else 0,
            epoch=self._engine.generation,
        )
        if not self.is_leaving:
            self._drive_engine(ladder)
        self._keep_lease(guard, ladder)

    def _drive_engine(self, ladder: ReclaimDecision) -> None:
        if ladder.is_engine_wanted:
            self._engine.want()
        elif ladder.action is Rung.TERMINATE:
            self._engine.terminate(self._policy.spec.reclaim.kill_after_ms / 1000)
        elif self._engine.phase is not EnginePhase.ABSENT:
            self._engine.kill()

    def _keep_lease(self, guard: GuardDecision, ladder: ReclaimDecision) -> None:
        if self._keeper is None:
            return
        if self._engine.phase is EnginePhase.ABSENT:
            self._keeper.withdraw()
            self._leased_generation = 0
            return
        grant = Grant.DRAINING if self.is_leaving else GRANTS[ladder.action]
        self._keeper.update(grant=grant, sequence_cap=guard.sequence_cap)
        if self._engine.generation != self._leased_generation:
            self._leased_generation = self._engine.generation
            self._keeper.restarted(url=self._engine.url)


def is_lane_open(guard: GuardDecision, ladder: ReclaimDecision, phase: EnginePhase) -> bool:
    """What the lane is told: the guard's word, and only while the engine is there and granted.

    A drained engine has nothing left to do, one that ignores its gate must not find it open, and
    neither must an orphan of an earlier life that is about to be ended.
    """
    is_granted = ladder.action in (Rung.RUN, Rung.GATE)
    return guard.gate is Gate.OPEN and is_granted and phase is EnginePhase.READY
