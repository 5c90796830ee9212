"""Counting over samples: rates survive restarts of an engine and gaps in the samples."""

from __future__ import annotations

from pathlib import Path

from rowen.bench.demo.outcome import busy_between, tokens_between
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


def test_reclaims_are_counted_once_per_drain() -> None:
    watch = Watch("http://x", "http://y", lane_path=Path("nowhere"))
    rungs = ["run", "gate", "drain", "gate", "run", "gate", "drain", "terminate"]
    watch.decisions = [
        {"rung": rung, "monotonic_ms": 1000.0 * place} for place, rung in enumerate(rungs)
    ]
    assert watch.reclaims_since(0.0) == 2
    assert watch.reclaims_since(3.0) == 1
