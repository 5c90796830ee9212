"""Counting over samples: rates survive restarts of an engine and gaps in the samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rowen.bench.demo.outcome import busy_between, stolen_between, tokens_between, unmet
from rowen.bench.demo.watch import EngineSample, Sample, Watch


def sample(at_s: float, tokens: int, *, kind: str = "opportunistic", busy_s: float = 0.0) -> Sample:
    engine = EngineSample("local.x", kind, "ready", 0, tokens)
    return Sample(at_s, (engine,), busy_ns_total=int(busy_s * 1e9))


def test_only_tokens_between_the_two_moments_count() -> None:
    samples = [sample(0.0, 10), sample(1.0, 30), sample(2.0, 60), sample(3.0, 100)]
    assert tokens_between(samples, 0.5, 2.5, "opportunistic") == 50


def test_other_kinds_of_engines_do_not_count() -> None:
    samples = [sample(0.0, 10, kind="dedicated"), sample(1.0, 30, kind="dedicated")]
    assert tokens_between(samples, 0.0, 2.0, "opportunistic") == 0


def test_a_count_that_begins_anew_costs_only_what_lay_between() -> None:
    samples = [sample(0.0, 100), sample(1.0, 130), sample(2.0, 5), sample(3.0, 25)]
    assert tokens_between(samples, 0.0, 3.0, "opportunistic") == 30 + 20


def test_a_missed_sample_costs_nothing() -> None:
    samples = [sample(0.0, 100), Sample(1.0), sample(2.0, 160)]
    assert tokens_between(samples, 0.0, 2.0, "opportunistic") == 60


def test_busy_share_is_taken_between_the_first_and_last_reading() -> None:
    samples = [sample(0.0, 0, busy_s=1.0), Sample(1.0), sample(4.0, 0, busy_s=3.0)]
    assert busy_between(samples, 0.0, 4.0) == 0.5
    assert busy_between(samples, 0.0, 3.0) is None


def decision(at_s: float, rung: str, cause: str, *, gate: str = "open") -> dict[str, object]:
    return {
        "rung": rung,
        "cause": cause,
        "gate": gate,
        "reason": "steady" if gate == "open" else "probe_stale",
        "monotonic_ms": 1000.0 * at_s,
    }


def watch_of(*decisions: dict[str, object]) -> Watch:
    watch = Watch("http://x", "http://y", lane_path=Path("nowhere"))
    watch.decisions = list(decisions)
    return watch


def test_reclaims_are_counted_once_per_drain() -> None:
    watch = watch_of(
        decision(0, "run", "open"),
        decision(1, "gate", "serving_busy"),
        decision(2, "drain", "closed_too_long"),
        decision(3, "drain", "serving_busy"),
        decision(4, "run", "open"),
        decision(5, "gate", "serving_busy"),
        decision(6, "drain", "closed_too_long"),
        decision(7, "terminate", "gate_ignored"),
    )
    assert watch.reclaims_since(0.0) == 2
    assert watch.reclaims_since(3.0) == 1


def test_a_drain_for_want_of_evidence_is_no_reclaim_by_traffic() -> None:
    watch = watch_of(
        decision(0, "gate", "guard_closed", gate="closed"),
        decision(1, "drain", "closed_too_long", gate="closed"),
    )
    assert watch.reclaims_since(0.0) == 0


def good_result() -> dict[str, Any]:
    arm = {"failed": 0, "unfinished": 0}
    return {
        "rl": {"steps": 5, "reward_first": 0.2, "reward_last": 0.5},
        "rollout": {"lost": 0},
        "gate": {"reclaims": 1},
        "serving_alone": dict(arm),
        "serving_harvested": dict(arm),
    }


def test_a_run_that_shows_everything_has_nothing_unmet() -> None:
    assert unmet(good_result(), was_engine_killed=True) == []


@pytest.mark.parametrize(
    ("section", "field", "value", "words"),
    [
        ("rl", "steps", 4, "4 of 5 steps"),
        ("rl", "reward_last", 0.2, "did not rise"),
        ("rl", "reward_last", None, "did not rise"),
        ("rollout", "lost", 1, "1 trajectories were lost"),
        ("gate", "reclaims", 0, "no burst"),
        ("serving_harvested", "unfinished", 2, "serving_harvested: 2 requests"),
    ],
)
def test_what_a_run_did_not_show_is_said(
    section: str, field: str, value: object, words: str
) -> None:
    result = good_result()
    result[section][field] = value
    (sentence,) = unmet(result, was_engine_killed=True)
    assert words in sentence


def test_counts_of_the_endpoint_add_up_over_its_lives() -> None:
    watch = watch_of()
    for finished in (5, 9, 2, 4):  # a restart after 9
        watch._take_counts({"finished": finished, "lost": 0, "migrated": 1})
    assert watch.trajectories == {"finished": 13, "lost": 0, "migrated": 1}


def test_what_the_host_took_is_a_share_of_the_time() -> None:
    samples = [Sample(0.0, steal_s=1.0), Sample(2.0, steal_s=1.5), Sample(4.0), Sample(5.0)]
    assert stolen_between(samples, 0.0, 5.0) == 0.25
    assert stolen_between(samples, 3.0, 5.0) is None
