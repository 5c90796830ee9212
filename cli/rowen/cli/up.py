"""``rowen up``: the whole of Rowen on this machine, until it is told to end."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rowen.cli.model import ModelError
from rowen.cli.service import ServiceError
from rowen.cli.stack import LocalStack, together
from rowen.cli.stack_config import Stack, StackError, check_stack, load_stack
from rowen.executor.lane import LaneError
from rowen.executor.supervisor import EngineError

PARTS_FAIL = (EngineError, ServiceError, LaneError, ModelError)
"""What a part of the stack raises when it cannot start or go on."""


def run_up(file: Path | None, *, print_config: bool) -> int:
    """Run until SIGINT or SIGTERM (0), until a part fails for good (1); 2 for a bad file."""
    try:
        stack = load_stack(file)
        if print_config:
            sys.stdout.write(stack.as_yaml())
            return 0
        check_stack(stack)
    except StackError as error:
        print(f"rowen up: {error}", file=sys.stderr)
        return 2
    return asyncio.run(_run(stack))


def narrator() -> Callable[[str], None]:
    """Prints lines of progress with the seconds since now."""
    start_s = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - start_s:6.1f} s] {line}", flush=True)

    return say


class Narration(logging.Handler):
    """Tells warnings of the parts that run in this process in the same voice."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


def end_requested() -> asyncio.Event:
    """An event that SIGINT and SIGTERM set; further signals change nothing."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, event.set)
    return event


async def _run(stack: Stack) -> int:
    end = end_requested()
    say = narrator()
    logging.getLogger().addHandler(Narration(say))
    try:
        local = LocalStack(stack, say=say)
    except StackError as error:
        print(f"rowen up: {error}", file=sys.stderr)
        return 2
    except PARTS_FAIL as error:
        print(f"rowen up: {error}", file=sys.stderr)
        return 1
    say(f"starting under {local.run_dir} (logs are there)")
    running = asyncio.create_task(_start(local))
    asked = asyncio.create_task(end.wait())
    status = 0
    try:
        await asyncio.wait([running, asked], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
            waits: list[asyncio.Future[Any]] = [asked, local.failure]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            local.raise_failure()
        say("ending")
    except PARTS_FAIL as error:
        print(f"rowen up: {error}", file=sys.stderr)
        status = 1
    finally:
        running.cancel()
        asked.cancel()
        await asyncio.gather(running, asked, return_exceptions=True)
        await local.stop()
        say("ended; nothing of it is left")
    return status


async def _start(local: LocalStack) -> None:
    await together(local.start_serving(), local.start_scheduler())
    local.publish_addresses()
    await together(local.start_daemon(), local.start_dedicated())
    say = local.say
    say(
        f"give trainers {local.endpoint}; `rowen status --run-dir {local.stack.run_dir}` shows more"
    )
