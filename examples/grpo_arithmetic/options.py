"""The command line of the trainer, checked before anything heavy is imported or started."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Options:
    """See ``--help`` for each; times in seconds."""

    endpoint: str
    model: Path
    model_id: str
    out: Path
    steps: int
    deadline_s: float | None
    seed: int
    lr: float
    groups_per_step: int
    samples_per_group: int
    train_samples_per_group: int
    in_flight_groups: int
    max_staleness: int
    max_tokens: int
    evaluation_problems: int
    evaluation_repeats: int
    evaluation_deadline_s: float
    stall_s: float
    trajectory_deadline_s: float
    threads: int


def read_options(arguments: Sequence[str] | None = None) -> Options:
    """Parse and check; wrong use ends the program with code 2 and a sentence."""
    parser = _parser()
    values = vars(parser.parse_args(arguments))
    options = Options(**values)
    for problem in _problems(options):
        parser.error(problem)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.grpo_arithmetic.train",
        description="GRPO on two-digit addition, with rollouts from one endpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--endpoint", required=True, help="URL of Rowen's scheduler")
    add("--model", required=True, type=Path, help="folder that the engines were started with")
    add("--model-id", default="", help="name of the weights; empty: the folder's name")
    add("--out", required=True, type=Path, help="events are written here, one JSON per line")
    add("--steps", type=int, default=8, help="at least so many updates")
    add("--deadline-s", type=float, help="go on until so long after the start; none: only --steps")
    add("--seed", type=int, default=0, help="of the order of the training problems")
    add("--lr", type=float, default=3e-5, help="of AdamW; a larger one makes denser deltas")
    add("--groups-per-step", type=int, default=8)
    add("--samples-per-group", type=int, default=16, help="sampled of each problem")
    add("--train-samples-per-group", type=int, default=8, help="those that differ most in reward")
    add("--in-flight-groups", type=int, default=3, help="at the endpoint at any time")
    add("--max-staleness", type=int, default=2, help="in weight versions, of the oldest token")
    add("--max-tokens", type=int, default=8, help="of one completion")
    add("--evaluation-problems", type=int, default=64, help="held out, the same in every run")
    add("--evaluation-repeats", type=int, default=2, help="samples of each held-out problem")
    add("--evaluation-deadline-s", type=float, default=180.0)
    add("--stall-s", type=float, default=180.0, help="without enough fresh groups: give up")
    add("--trajectory-deadline-s", type=float, default=600.0, help="then it counts as lost")
    add("--threads", type=int, default=1, help="of torch")
    return parser


def _problems(options: Options) -> list[str]:
    found: list[str] = []
    url = urlsplit(options.endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        found.append(f"--endpoint is {options.endpoint!r}: give a URL like http://127.0.0.1:8000")
    if not (options.model / "config.json").is_file():
        found.append(
            f"--model is {str(options.model)!r}, which holds no config.json: "
            "give the Hugging Face folder that the engines serve"
        )
    lowest = {
        "steps": 1, "groups_per_step": 1, "samples_per_group": 2, "train_samples_per_group": 2,
        "in_flight_groups": 1, "max_staleness": 0, "max_tokens": 1, "evaluation_problems": 1,
        "evaluation_repeats": 1, "threads": 1,
    }  # fmt: skip
    for name, least in lowest.items():
        value = getattr(options, name)
        if value < least:
            found.append(f"--{name.replace('_', '-')} is {value}: give at least {least}")
    problems = 90 * 90  # all two-digit additions
    if options.evaluation_problems >= problems:
        found.append(
            f"--evaluation-problems is {options.evaluation_problems}: give less than {problems}, "
            "which is all there are"
        )
    if options.deadline_s is not None and not options.deadline_s > 0:
        found.append(f"--deadline-s is {options.deadline_s:g}: give more than 0")
    for name in ("lr", "evaluation_deadline_s", "stall_s", "trajectory_deadline_s"):
        value = getattr(options, name)
        if not value > 0:
            found.append(f"--{name.replace('_', '-')} is {value:g}: give more than 0")
    if options.train_samples_per_group > options.samples_per_group:
        found.append(
            f"--train-samples-per-group is {options.train_samples_per_group} and "
            f"--samples-per-group is {options.samples_per_group}: train on no more than is sampled"
        )
    return found
