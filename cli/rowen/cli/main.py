"""Entry point of ``rowen``: parses the command line and hands over to one module per command.

Exit status: 0 done, 1 failed, 2 wrong use (one sentence on stderr, nothing was started).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rowen.cli.stack_config import DEFAULT_RUN_DIR


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rowen",
        description="Harvest the idle compute of production LLM serving for RL rollouts.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="run everything on this machine from one YAML file")
    up.add_argument("file", nargs="?", type=Path, help="a Stack file; embedded defaults without it")
    up.add_argument(
        "--print-config", action="store_true", help="print the resolved stack as YAML and exit"
    )

    status = commands.add_parser("status", help="what a running `rowen up` does now")
    status.add_argument(
        "--run-dir",
        type=Path,
        default=DEFAULT_RUN_DIR,
        help="the run_dir of the stack (default: %(default)s)",
    )
    status.add_argument("--json", action="store_true", help="print JSON instead of tables")

    doctor = commands.add_parser("doctor", help="what this machine has and lacks")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")

    # These two own their options; `rowen daemon --help` shows them.
    commands.add_parser("daemon", help="the per-node daemon alone", add_help=False)
    commands.add_parser("scheduler", help="the rollout endpoint alone", add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    match arguments[:1]:
        case ["daemon"]:
            from rowen.daemon.__main__ import main as daemon_main

            return daemon_main(arguments[1:])
        case ["scheduler"]:
            from rowen.scheduler.__main__ import main as scheduler_main

            return scheduler_main(arguments[1:])
    options = build_parser().parse_args(arguments)
    match options.command:
        case "up":
            from rowen.cli.up import run_up

            return run_up(options.file, print_config=options.print_config)
        case "status":
            from rowen.cli.status import run_status

            return run_status(options.run_dir, as_json=options.json)
        case "doctor":
            from rowen.cli.doctor import run_doctor

            return run_doctor(as_json=options.json)
    raise AssertionError(options.command)


if __name__ == "__main__":
    sys.exit(main())
