"""What the scheduler remembers of one engine, and of each request's stay on it.

Plain records: the registry fills in what is seen, ``engines.decide`` judges it, the dispatcher adds
and removes stays.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from rowen.policies.lease import EngineKind, EngineLease, Grant
from rowen.scheduler.engine_client import EngineClient
from rowen.scheduler.engines import EngineDecision, EngineSeen, EngineState, Reason
from rowen.scheduler.history import TokenHistory
from rowen.scheduler.route import EngineView
from rowen.scheduler.trajectory import Decision
from rowen.scheduler.versions import VersionSource

ROUTABLE = frozenset({EngineState.READY, EngineState.THROTTLED})


@dataclass(slots=True, eq=False)
class Stay:
    """One request's stay on an engine, from the routing decision until its connection is closed."""

    engine: Engine
    version: int
    """The engine's verified version when the request was routed there."""
    last_token_s: float
    """When it last got a token; the routing time before the first."""
    prefill_tokens: int = 0
    """Tokens that the engine has to read before it makes the first."""
    has_token: bool = False
    task: asyncio.Task[None] | None = None
    cause: str | None = None
    """Why it was, or has to be, left before the engine ended it."""
    decision: Decision | None = None
    """What follows, once the engine ended it."""

    def abandon(self, cause: str) -> None:
        """Drop the connection now; what is logged stays logged."""
        if self.cause is None:
            self.cause = cause
            if self.task is not None:
                self.task.cancel()


@dataclass(slots=True, eq=False)
class SyncRecord:
    """Weight updates of one engine."""

    failures_in_row: int = 0
    retry_at_s: float = 0.0
    is_initialized: bool = False
    is_tainted: bool = False
    """An update did not end well: only a complete one tells what the weights are."""
    failed_source: VersionSource | None = None
    """What the latest update was to, if it failed."""
    problem: str | None = None
    task: asyncio.Task[None] | None = None
    """The update under way."""
    synced_unix_s: float | None = None
    sync_s: float | None = None


@dataclass(slots=True, eq=False)
class Engine:
    """One engine; times are of the event loop's monotonic clock."""

    engine_id: str
    kind: EngineKind
    node: str
    client: EngineClient
    is_leased: bool
    history: TokenHistory
    static_cap: int = 0
    lease: EngineLease | None = None
    epoch: int = 1
    was_seen: bool = False
    is_refused: bool = False
    failed_checks: int = 0
    version: int | None = None
    run: str = ""
    """Training run of ``version``; empty for the weights of the start, and where nobody told."""
    is_updating: bool = False
    faults_in_row: int = 0
    faults_total: int = 0
    last_fault: str | None = None
    rests_until_s: float = 0.0
    disturbed_s: float | None = None
    run_since_s: float = 0.0
    """Since when it may run without a break; stalls are counted from here at the earliest."""
    last_token_s: float = 0.0
    sync: SyncRecord = field(default_factory=SyncRecord)
    stays: set[Stay] = field(default_factory=set)
    emptied: asyncio.Event = field(default_factory=asyncio.Event)
    check_now: asyncio.Event = field(default_factory=asyncio.Event)
    decision: EngineDecision = field(
        default_factory=lambda: EngineDecision(EngineState.COLD, Reason.NO_LEASE, 0, False)
    )

    @property
    def grant(self) -> Grant:
        return self.lease.grant if self.lease is not None else Grant.RUN

    @property
    def sequence_cap(self) -> int:
        return self.lease.sequence_cap if self.lease is not None else self.static_cap

    @property
    def is_routable(self) -> bool:
        return self.decision.action in ROUTABLE

    def is_of_run(self, run: str | None) -> bool:
        """Do its weights belong to the run?  Those of the start are version 0 of any."""
        return run is None or self.run == run or (self.version == 0 and not self.run)

    def restart(self, client: EngineClient, epoch: int) -> None:
        """A new process answers for this engine: forget what was known of the old one."""
        self.client, self.epoch = client, epoch
        self.was_seen = self.is_refused = False
        self.failed_checks = self.faults_in_row = 0
        self.rests_until_s = 0.0
        self.version, self.run = None, ""
        if self.sync.task is not None:
            self.sync.task.cancel()  # it speaks to a process that is gone
        self.sync = SyncRecord()
        self.is_updating = False
        self.check_now.set()

    def distrust(self) -> None:
        """The process may have been replaced: its weight version has to be read again."""
        if not self.is_updating:
            self.version = None
        self.check_now.set()

    def seen(
        self, now_s: float, target_version: int, run: str | None, is_lease_verified: bool
    ) -> EngineSeen:
        return EngineSeen(
            kind=self.kind,
            has_lease=self.lease is not None or not self.is_leased,
            is_lease_verified=is_lease_verified or not self.is_leased,
            grant=self.grant,
            sequence_cap=self.sequence_cap,
            was_seen=self.was_seen,
            is_refused=self.is_refused,
            failed_checks=self.failed_checks,
            is_backing_off=now_s < self.rests_until_s,
            is_updating=self.is_updating,
            version=self.version,
            target_version=target_version,
            is_of_run=self.is_of_run(run),
        )

    def view(self, now_s: float) -> EngineView:
        return EngineView(
            engine_id=self.engine_id,
            kind=self.kind,
            version=self.version if self.version is not None else -1,
            running=len(self.stays),
            capacity=self.decision.capacity,
            is_routable=self.is_routable,
            disturbed_age_s=None if self.disturbed_s is None else now_s - self.disturbed_s,
        )

    def leave(self, stay: Stay) -> None:
        """A stay is over and its connection closed."""
        self.stays.discard(stay)
        if not self.stays:
            self.emptied.set()
