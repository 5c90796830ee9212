"""The trainer of the demo: how it is started, and what its event log says."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rowen.bench.demo.options import ROOT, Options
from rowen.cli.service import ServiceSpec
from rowen.cli.stack import LocalStack

LEAST_STEPS = 5
"""What the demo promises at least."""

LEAST_STEPS_DEADLINE_S = 60.0
"""How long the demo waits for them after the traffic has ended."""

END_DEADLINE_S = 60.0
"""For the step under way and the last evaluation."""


@dataclass(frozen=True)
class Step:
    """One update of the policy; ``monotonic_s`` is its end."""

    step: int
    version: int
    monotonic_s: float
    reward: float
    step_s: float
    publish_s: float
    """From the beginning of publishing to the end of the step."""
    full_bytes: int
    delta_bytes: int
    changed: int
    changed_ratio: float
    encode_s: float


@dataclass
class Log:
    """The events of one training run."""

    steps: list[Step] = field(default_factory=list)
    reward_first: float | None = None
    """Mean reward on the held-out problems with version 0."""
    reward_last: float | None = None
    """The same problems with the last version."""
    right_ratio_first: float | None = None
    right_ratio_last: float | None = None
    samples_first: int = 0
    samples_last: int = 0
    """Held-out answers that came in time; the others are missing from the means."""
    trajectories: int = 0
    lost: int = 0
    stale_groups: int = 0


def service(options: Options, local: LocalStack, log: Path) -> ServiceSpec:
    """The trainer's process: on the host core, in the idle class, like the dedicated engine."""
    argv = [sys.executable, "-m", "examples.grpo_arithmetic.train", "--endpoint", local.endpoint]
    argv += ["--model", str(local.model), "--out", str(log), "--seed", str(options.seed)]
    argv += ["--steps", "1000000"]  # until the demo asks it to finish
    argv += ["--evaluation-deadline-s", "40"]  # within END_DEADLINE_S
    return ServiceSpec(
        name="trainer",
        argv=argv,
        log=local.run_dir / "trainer.log",
        cores=(local.stack.cores.host,),
        idle_class=True,
        folder=ROOT,
    )


def read(path: Path) -> Log:
    """Read the event log of a run, finished or not; lines without their end are left out."""
    log = Log()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return log
    for line in text[: text.rfind("\n") + 1].splitlines():
        document: Mapping[str, Any] = json.loads(line)
        match document["event"]:
            case "step":
                log.steps.append(_step(document))
            case "evaluation" if log.reward_first is None:
                log.reward_first = document["reward_mean"]
                log.right_ratio_first = document["right_ratio"]
                log.samples_first = document["samples"]
            case "evaluation":
                log.reward_last = document["reward_mean"]
                log.right_ratio_last = document["right_ratio"]
                log.samples_last = document["samples"]
            case "summary":
                log.trajectories = document["trajectories"]
                log.lost = document["lost"]
                log.stale_groups = document["dropped_stale_groups"]
    return log


def publish_to_verified_s(log: Log, syncs: Iterable[Mapping[str, Any]]) -> list[float]:
    """For each version and each engine that was in service: from publishing to verified weights.

    An engine that catches up after a start is left out: the version was there before it.
    """
    published_s = {one.version: one.monotonic_s - one.publish_s for one in log.steps}
    return [
        sync["finished_monotonic_s"] - published_s[sync["version"]]
        for sync in syncs
        if sync["version"] in published_s
        and sync["from_version"] is not None
        and (sync["from_version"] > 0 or sync["version"] == 1)
    ]


def _step(document: Mapping[str, Any]) -> Step:
    return Step(
        step=document["step"],
        version=document["version"],
        monotonic_s=document["monotonic_s"],
        reward=document["reward_mean"],
        step_s=document["step_s"],
        publish_s=document["publish_s"],
        full_bytes=document["full_bytes"],
        delta_bytes=document["delta_bytes"],
        changed=document["changed"],
        changed_ratio=document["changed_ratio"],
        encode_s=document["encode_s"],
    )
