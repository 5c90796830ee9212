"""From what was measured to ``result.json``, the series of the report, and the printed table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from rowen.bench.demo import training
from rowen.bench.demo.run import Demo, Measured
from rowen.bench.demo.watch import Sample, Watch
from rowen.bench.latency import compare, percentile, summarise
from rowen.bench.series import (
    EventPoint,
    GatePoint,
    RatePoint,
    Series,
    StepPoint,
    VersionPoint,
)

OPPORTUNISTIC = "opportunistic"


def conclude(demo: Demo, *, took_s: float) -> tuple[dict[str, Any], Series]:
    """Build the result (JSON values) and the series; every process has ended by now."""
    measured, watch = demo.measured, demo.watch
    assert measured.scale is not None
    log = training.read(measured.training_log)
    result: dict[str, Any] = {
        "serving_alone": summarise(measured.alone).as_dict(),
        "serving_harvested": summarise(measured.harvested).as_dict(),
        "ratios": compare(measured.alone, measured.harvested),
        "rollout": _rollout(measured, watch, log),
        "weights": _weights(log, watch),
        "rl": _rl(log),
        "gate": _gate(measured, watch),
        "scale": measured.scale.as_dict(),
        "machine": _machine(measured, watch),
        "events": [asdict(event) for event in measured.events],
        "took_s": round(took_s, 1),
    }
    result["unmet"] = unmet(result, was_engine_killed=measured.was_engine_killed)
    return result, _series(measured, watch, log)


def unmet(result: dict[str, Any], *, was_engine_killed: bool) -> list[str]:
    """What the demo sets out to show and this run did not; one sentence each."""
    rl, rollout = result["rl"], result["rollout"]
    first, last = rl["reward_first"], rl["reward_last"]
    claims = [
        (rl["steps"] >= training.LEAST_STEPS, f"{rl['steps']} of {training.LEAST_STEPS} steps"),
        (rollout["lost"] == 0, f"{rollout['lost']} trajectories were lost"),
        (was_engine_killed, "no engine was killed: none was ready in time"),
        (result["gate"]["reclaims"] > 0, "no burst had the rollout engine reclaimed"),
        (
            first is not None and last is not None and last > first,
            f"the held-out reward did not rise (from {first} to {last})",
        ),
    ]
    for arm in ("serving_alone", "serving_harvested"):
        bad = result[arm]["failed"] + result[arm]["unfinished"]
        claims.append((bad == 0, f"{arm}: {bad} requests failed or were not finished"))
    return [sentence for is_met, sentence in claims if not is_met]


def write(folder: Path, result: dict[str, Any], series: Series) -> None:
    """Write ``result.json`` and ``series.json`` (what ``rowen.bench.report`` draws from)."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    (folder / "result.json").write_text(text, encoding="utf-8")
    series.write(folder / "series.json")


def _rollout(measured: Measured, watch: Watch, log: training.Log) -> dict[str, Any]:
    harvest_s = measured.harvest_to_s - measured.harvest_from_s
    free_s = measured.free_to_s - measured.free_from_s
    harvest = (measured.harvest_from_s, measured.harvest_to_s)
    harvested = tokens_between(watch.samples, *harvest, OPPORTUNISTIC)
    free = tokens_between(watch.samples, measured.free_from_s, measured.free_to_s, OPPORTUNISTIC)
    dedicated = tokens_between(watch.samples, *harvest, "dedicated")
    busy_ratio = busy_between(watch.samples, *harvest)
    rate, free_rate = harvested / harvest_s, free / free_s
    return {
        "tokens": harvested,
        "tokens_per_s": rate,
        "tokens_per_s_alone": free_rate,
        "kept_ratio": rate / free_rate if free_rate else None,
        "serving_busy_ratio": busy_ratio,
        "oracle_ratio": rate / (free_rate * (1 - busy_ratio))
        if free_rate and busy_ratio is not None and busy_ratio < 1
        else None,
        "tokens_dedicated": dedicated,
        "trajectories": watch.trajectories["finished"],
        "lost": watch.trajectories["lost"] + log.lost,
        "migrated": watch.trajectories["migrated"],
    }


def tokens_between(samples: Sequence[Sample], from_s: float, to_s: float, kind: str) -> int:
    """Tokens that engines of ``kind`` made between two moments.

    Counted from sample to sample, so that an engine's new life (its count may begin anew) and a
    moment in which the endpoint did not answer cost nothing but the tokens in between.
    """
    total = 0
    last: dict[str, int] = {}
    for sample in samples:
        if sample.monotonic_s > to_s:
            break
        for engine in sample.engines:
            if engine.kind != kind:
                continue
            before = last.get(engine.engine_id, 0)
            if sample.monotonic_s > from_s and engine.tokens_total >= before:
                total += engine.tokens_total - before
            last[engine.engine_id] = engine.tokens_total
    return total


def busy_between(samples: Sequence[Sample], from_s: float, to_s: float) -> float | None:
    """Share of the time in which production ran or waited; None without two readings."""
    seen = [
        (sample.monotonic_s, sample.busy_ns_total)
        for sample in samples
        if from_s <= sample.monotonic_s <= to_s and sample.busy_ns_total is not None
    ]
    if len(seen) < 2:
        return None
    (first_s, first_ns), (last_s, last_ns) = seen[0], seen[-1]
    return (last_ns - first_ns) / 1e9 / (last_s - first_s)


def _machine(measured: Measured, watch: Watch) -> dict[str, Any]:
    """What the host took from the accelerator's core in each arm: on a shared machine a difference
    here makes a difference in latency that no part of the run has caused."""
    return {
        "stolen_ratio_alone": stolen_between(
            watch.samples, measured.alone_from_s, measured.alone_to_s
        ),
        "stolen_ratio_harvested": stolen_between(
            watch.samples, measured.harvest_from_s, measured.harvest_to_s
        ),
    }


def stolen_between(samples: Sequence[Sample], from_s: float, to_s: float) -> float | None:
    """Share of the time that the host took; None without two readings."""
    seen = [
        (sample.monotonic_s, sample.steal_s)
        for sample in samples
        if from_s <= sample.monotonic_s <= to_s and sample.steal_s is not None
    ]
    if len(seen) < 2:
        return None
    return (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0])


def _weights(log: training.Log, watch: Watch) -> dict[str, Any]:
    published = log.steps
    sync_s = training.publish_to_verified_s(log, watch.syncs.values())
    return {
        "versions": len(published),
        "full_bytes": published[0].full_bytes if published else None,
        "delta_bytes": round(median(one.delta_bytes for one in published)) if published else None,
        "changed_ratio": median(one.changed_ratio for one in published) if published else None,
        "bytes_per_changed": median(one.delta_bytes / max(1, one.changed) for one in published)
        if published
        else None,
        "encode_s_p50": percentile([one.encode_s for one in published], 50),
        "sync_s_p50": percentile(sync_s, 50),
        "engine_update_s_p50": percentile([one["sync_s"] for one in watch.syncs.values()], 50),
        "syncs": len(watch.syncs),
    }


def _rl(log: training.Log) -> dict[str, Any]:
    return {
        "steps": len(log.steps),
        "reward_first": log.reward_first,
        "reward_last": log.reward_last,
        "reward_of_step_first": log.steps[0].reward if log.steps else None,
        "reward_of_step_last": log.steps[-1].reward if log.steps else None,
        "step_s_p50": percentile([one.step_s for one in log.steps], 50),
        "right_ratio_first": log.right_ratio_first,
        "right_ratio_last": log.right_ratio_last,
        "samples_first": log.samples_first,
        "samples_last": log.samples_last,
        "dropped_as_stale_groups": log.stale_groups,
    }


def _gate(measured: Measured, watch: Watch) -> dict[str, Any]:
    return {
        "closings": watch.closings,
        "close_to_idle_ms_p50": percentile(watch.close_to_idle_ms, 50),
        "close_to_idle_ms_p99": percentile(watch.close_to_idle_ms, 99),
        "close_to_idle_wall_ms_p99": percentile(watch.close_to_idle_wall_ms, 99),
        "reclaims": watch.reclaims_since(measured.harvest_from_s),
        "drill_needed": measured.was_drill_needed,
    }


def _series(measured: Measured, watch: Watch, log: training.Log) -> Series:
    zero_s = measured.harvest_from_s
    assert measured.policy is not None
    objectives = measured.policy.spec.objectives
    end_s = watch.samples[-1].monotonic_s if watch.samples else zero_s
    return Series(
        duration_s=end_s - zero_s,
        slo_ttft_ms=objectives.ttft.threshold_ms,
        slo_tpot_ms=objectives.tpot.threshold_ms,
        alone=measured.alone,
        harvested=measured.harvested,
        gate=[
            GatePoint(
                at_s=one["monotonic_ms"] / 1000 - zero_s,
                gate_open=one["rung"] == "run",
                rung=one["rung"],
                reason=one["cause"],
            )
            for one in watch.decisions
        ],
        rollout=_rates(watch.samples, zero_s),
        versions=_versions(watch.samples, zero_s),
        steps=[
            StepPoint(at_s=one.monotonic_s - zero_s, step=one.step, reward=one.reward)
            for one in log.steps
        ],
        events=[
            EventPoint(at_s=event.monotonic_s - zero_s, label=event.label)
            for event in measured.events
        ],
    )


def _rates(samples: Sequence[Sample], zero_s: float) -> list[RatePoint]:
    points: list[RatePoint] = []
    last: dict[str, tuple[float, int]] = {}
    for sample in samples:
        for engine in sample.engines:
            before = last.get(engine.engine_id)
            last[engine.engine_id] = (sample.monotonic_s, engine.tokens_total)
            if before is None or engine.tokens_total < before[1]:
                continue
            rate = (engine.tokens_total - before[1]) / (sample.monotonic_s - before[0])
            points.append(RatePoint(sample.monotonic_s - zero_s, engine.engine_id, rate))
    return points


def _versions(samples: Sequence[Sample], zero_s: float) -> list[VersionPoint]:
    points: list[VersionPoint] = []
    last: dict[str, int] = {}
    for sample in samples:
        for engine in sample.engines:
            if engine.version is not None and last.get(engine.engine_id) != engine.version:
                last[engine.engine_id] = engine.version
                at_s = sample.monotonic_s - zero_s
                points.append(VersionPoint(at_s, engine.engine_id, engine.version))
    return points


def table(result: dict[str, Any]) -> Table:
    """The one table that the demo prints."""
    out = Table(title="Rowen demo", title_justify="left")
    for column in ("", "alone", "with harvest", "ratio (95 % interval)"):
        out.add_column(column, justify="left" if not column else "right", no_wrap=True)
    alone, harvested = result["serving_alone"], result["serving_harvested"]
    out.add_row("serving requests", str(alone["requests"]), str(harvested["requests"]), "")
    for key, label in (
        ("ttft_p50", "serving P50 TTFT, ms"),
        ("ttft_p99", "serving P99 TTFT, ms"),
        ("tpot_p50", "serving P50 TPOT, ms"),
        ("tpot_p99", "serving P99 TPOT, ms"),
    ):
        interval = result["ratios"][key]
        ratio = (
            f"{interval['ratio']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"
            if interval
            else "-"
        )
        out.add_row(label, _number(alone[f"{key}_ms"]), _number(harvested[f"{key}_ms"]), ratio)
    rollout, weights, rl, gate = (result[key] for key in ("rollout", "weights", "rl", "gate"))
    out.add_section()
    out.add_row(
        "rollout tokens/s on the shared core",
        _number(rollout["tokens_per_s_alone"]),
        _number(rollout["tokens_per_s"]),
        _number(rollout["kept_ratio"]),
    )
    rows = [
        ("serving busy, share of the time", rollout["serving_busy_ratio"]),
        ("of the idle compute harvested", rollout["oracle_ratio"]),
        ("trajectories finished", rollout["trajectories"]),
        ("trajectories moved to another engine", rollout["migrated"]),
        ("trajectories lost", rollout["lost"]),
        ("gate closings", gate["closings"]),
        ("gate close to idle, P99 ms of compute", gate["close_to_idle_ms_p99"]),
        ("reclaims by serving bursts", gate["reclaims"]),
        ("weight versions", weights["versions"]),
        ("full copy / delta, bytes", _ratio(weights["full_bytes"], weights["delta_bytes"])),
        ("publish to engine verified, P50 s", weights["sync_s_p50"]),
        ("training steps", rl["steps"]),
        ("held-out reward, version 0", rl["reward_first"]),
        ("held-out reward, last version", rl["reward_last"]),
    ]
    for label, value in rows:
        out.add_row(label, "", _number(value), "")
    return out


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
