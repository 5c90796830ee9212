"""``python -m rowen.bench.demo``: run, print one table, write result.json and report.html.

Exit 0: done.  1: a part failed, or the run did not show all it is meant to; the message says which.
2: wrong use, nothing was started.
130: ended by Ctrl-C or SIGTERM.  In every case no process is left behind.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Sequence

from rich.console import Console

from rowen.bench.demo import outcome
from rowen.bench.demo.options import Options, parse
from rowen.bench.demo.run import PART_ERRORS, Demo
from rowen.bench.errors import BenchError
from rowen.bench.report import write_report
from rowen.cli.stack import LocalStack
from rowen.cli.stack_config import StackError
from rowen.cli.up import PARTS_FAIL, Narration, end_requested, narrator

PLAIN_WIDTH = 110
"""Columns of the table where no terminal says how wide it is."""

INTERRUPTED = 130
"""128 + SIGINT, what a shell expects."""


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse(arguments)
    except (BenchError, StackError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return asyncio.run(_run(options))


async def _run(options: Options) -> int:
    started_s = time.monotonic()
    say = narrator()
    logging.getLogger().addHandler(Narration(say))
    end = end_requested()
    policy_path = options.stack.run_dir / "policy.yaml"
    try:
        stack = options.stack.model_copy(update={"policy": policy_path})
        local = LocalStack(stack, say=say)
    except StackError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except PARTS_FAIL as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    for name in ("result.json", "series.json", "report.html"):
        (options.out / name).unlink(missing_ok=True)  # those of an earlier run are not this one's
    demo = Demo(options, local, started_s=started_s)
    running = asyncio.create_task(demo.run())
    asked = asyncio.create_task(end.wait())
    status = 0
    try:
        await asyncio.wait([running, asked], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        else:
            status = INTERRUPTED
            say("interrupted; ending every process")
    except (*PARTS_FAIL, *PART_ERRORS) as error:
        print(f"demo: {error}", file=sys.stderr)
        status = 1
    finally:
        running.cancel()
        asked.cancel()
        await asyncio.gather(running, asked, return_exceptions=True)
        await demo.stop()
        say("every process ended")
    if status == 0:
        result, series = outcome.conclude(demo, took_s=time.monotonic() - started_s)
        outcome.write(options.out, result, series)
        write_report(options.out / "report.html", result, series)
        Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(outcome.table(result))
        say(f"written: {options.out / 'result.json'}, {options.out / 'report.html'}")
        for sentence in result["unmet"]:
            print(f"demo: not shown by this run: {sentence}", file=sys.stderr)
        status = 1 if result["unmet"] else 0
    return status


if __name__ == "__main__":
    sys.exit(main())
