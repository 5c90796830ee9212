"""What ``make demo`` was asked for: traffic, scales, folders; checked before anything starts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rowen.bench.demo.budget import MOST_WINDOW_S
from rowen.bench.generate import generate_trace
from rowen.bench.service_model import ServiceModel
from rowen.bench.trace import TraceRequest, load_trace
from rowen.bench.window import WindowGoal, fit_window
from rowen.cli.stack_config import Stack, StackError, check_stack

ROOT = Path(__file__).resolve().parents[4]
"""The checkout: the demo runs the trainer of ``examples/``, which no wheel carries."""

GENERATED_SPAN_S = 3600.0
"""An hour of generated traffic, as long as the real traces that people replay."""


@dataclass(frozen=True)
class Options:
    """A demo to run."""

    trace: tuple[TraceRequest, ...]
    source: str
    """Where the traffic comes from, for people."""
    rate_factor: float | None
    token_factor: float | None
    busy_ratio: float
    seed: int
    out: Path
    stack: Stack


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line, the trace and the stack.

    Raises:
        SystemExit: 2, with one sentence; nothing was started.
        BenchError: the trace cannot be used; nothing was started.
        StackError: the machine lacks something; nothing was started.
    """
    parser = argparse.ArgumentParser(prog="python -m rowen.bench.demo", description=__doc__)
    parser.add_argument("--trace", type=Path, help="replay this trace (default: generated traffic)")
    parser.add_argument("--format", choices=("azure", "mooncake"), help="format of --trace")
    parser.add_argument(
        "--rate", type=_positive, help="seconds of the trace per second of the replay"
    )
    parser.add_argument("--tokens", type=_positive, help="tokens sent per token of the trace")
    parser.add_argument(
        "--busy",
        type=_ratio,
        default=0.45,
        help="share of the time in which serving should compute (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of traffic, prompts and trainer")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="default %(default)s")
    parser.add_argument("--model", default="embedded", help="a Hugging Face model folder")
    given = parser.parse_args(arguments)
    if (given.trace is None) != (given.format is None):
        there, missing = (
            ("--trace", "--format") if given.format is None else ("--format", "--trace")
        )
        parser.error(
            f"{there} is given without {missing}; give both, as in TRACE=FILE FORMAT=azure"
        )
    if given.trace is None:
        trace = generate_trace(seed=given.seed, duration_s=GENERATED_SPAN_S)
        source = f"generated conversation traffic (seed {given.seed})"
    else:
        trace = load_trace(given.trace, given.format)
        source = f"{given.trace.name} ({given.format})"
    _check_scales(trace, source, given)
    stack = Stack.model_validate(
        {
            "model": given.model,
            "run_dir": given.out / "run",
            "serving": {"port": 0, "max_num_seqs": 32},
            "scheduler": {"port": 0},
            "admin": {"port": 0},
        }
    )
    check_stack(stack)
    if not (ROOT / "examples" / "grpo_arithmetic").is_dir():
        raise StackError(
            f"examples/grpo_arithmetic is not under {ROOT}; run the demo from a checkout of Rowen"
        )
    return Options(
        trace=tuple(trace),
        source=source,
        rate_factor=given.rate,
        token_factor=given.tokens,
        busy_ratio=given.busy,
        seed=given.seed,
        out=given.out,
        stack=stack,
    )


def _check_scales(trace: list[TraceRequest], source: str, given: argparse.Namespace) -> None:
    """Refuse scales that cannot be replayed, before anything starts.

    Raises:
        WindowError: the rate given would replay too many requests.
    """
    goal = WindowGoal(
        duration_s=MOST_WINDOW_S, rate_factor=given.rate, token_factor=given.tokens or 1.0
    )
    # The costs do not matter for what is refused; the real ones are measured later.
    fit_window(trace, goal, ServiceModel(1.0, 30.0), source=source)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share of the time between 0 and 1")
    return value
