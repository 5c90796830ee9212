"""``python -m rowen.daemon --config FILE`` and ``rowen daemon --config FILE``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rowen.daemon.app import run_daemon
from rowen.daemon.config import ConfigError, NodeConfig, load_config
from rowen.policies.schema import HarvestPolicy


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="rowen daemon",
        description="Guards one serving engine and runs a rollout engine beside it.",
    )
    parser.add_argument("--config", type=Path, required=True, help="the node file (YAML)")
    parser.add_argument(
        "--check", action="store_true", help="check the node file and its policy, then exit"
    )
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 ended in good order, 1 failed, 2 wrong use (nothing was started)."""
    options = build_parser().parse_args(argv)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    try:
        config, policy = load_config(options.config)
        if options.check:
            print(config.model_dump_json(indent=2))
            return 0
        asyncio.run(_run(config, policy))
    except ConfigError as error:
        print(f"rowen daemon: {error}", file=sys.stderr)
        return 2
    return 0


async def _run(config: NodeConfig, policy: HarvestPolicy) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await run_daemon(config, policy, stop)


if __name__ == "__main__":
    sys.exit(main())
