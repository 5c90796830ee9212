"""The journal keeps changes only, and the operator's mode survives restarts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rowen.daemon.journal import Journal
from rowen.daemon.mode import OperatorMode
from rowen.policies import guard, reclaim
from rowen.policies.guard import Action, Gate, GuardDecision, Reason
from rowen.policies.reclaim import Cause, ReclaimDecision, Rung
from rowen.policies.schema import Mode

CLOSED = GuardDecision(Action.CLOSE, Reason.COOL_DOWN, "1 of 2", Gate.CLOSED, 0, guard.START)
STOPPED = ReclaimDecision(Rung.STOPPED, Cause.NOT_YET_STEADY, reclaim.START)


def record(journal: Journal, decision: GuardDecision, at_ms: float) -> bool:
    _, entry = journal.record(decision, STOPPED, monotonic_ms=at_ms, unix_ms=1e12 + at_ms)
    return entry is not None


def test_only_changes_are_kept_and_moving_figures_are_none() -> None:
    journal = Journal()
    assert record(journal, CLOSED, 0)
    assert not record(journal, replace(CLOSED, detail="2 of 2"), 100)
    assert record(journal, replace(CLOSED, reason=Reason.PROBE_STALE), 200)
    assert [entry["monotonic_ms"] for entry in journal.since(0)] == [0, 200]


def test_since_continues_where_the_reader_stopped() -> None:
    journal = Journal(kept_entries=3)
    for at_ms, reason in enumerate([Reason.COOL_DOWN, Reason.PROBE_STALE] * 3):
        record(journal, replace(CLOSED, reason=reason), at_ms)
    assert [entry["sequence"] for entry in journal.since(0)] == [4, 5, 6]
    assert [entry["sequence"] for entry in journal.since(5)] == [6]
    assert [entry["sequence"] for entry in journal.since(0, limit=2)] == [4, 5]
    assert [entry["sequence"] for entry in journal.last(1)] == [6]
    assert journal.since(6) == []
    assert journal.newest == 6


def test_the_operators_mode_survives_a_restart(tmp_path: Path) -> None:
    assert OperatorMode(tmp_path).mode is Mode.ENFORCE
    OperatorMode(tmp_path).set(Mode.PREVIEW)
    assert OperatorMode(tmp_path).mode is Mode.PREVIEW
    OperatorMode(tmp_path).set(Mode.ENFORCE)
    assert OperatorMode(tmp_path).mode is Mode.ENFORCE


def test_an_unreadable_mode_means_off(tmp_path: Path) -> None:
    (tmp_path / "operator-mode").write_text("halb", encoding="utf-8")
    assert OperatorMode(tmp_path).mode is Mode.OFF


def test_a_mode_that_cannot_be_stored_only_takes_effect_when_stricter(tmp_path: Path) -> None:
    operator = OperatorMode(tmp_path / "gone")
    with pytest.raises(OSError, match="No such file"):
        operator.set(Mode.OFF)
    assert operator.mode is Mode.OFF
    with pytest.raises(OSError, match="No such file"):
        operator.set(Mode.ENFORCE)
    assert operator.mode is Mode.OFF
