"""Send the requests of a file at their times, whatever the engine does, and record the answers.

    python -m rowen.bench.openloop --requests FILE --url http://127.0.0.1:8000 --model NAME \
        --out RECORDS.jsonl [--passes N | --duration-s D]

Open loop: a slow engine gets the next request all the same.  TTFT starts when a request is sent;
how late it was sent is recorded beside it.  Errors are recorded, never raised.  Run as its own
process so that nothing else delays a send.  SIGTERM or SIGINT: no more requests are sent, those in
flight are cancelled and recorded so, exit 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import aiohttp

from rowen.bench.completions import (
    Arrivals,
    StreamError,
    completion_body,
    engine_session,
    stream_completion,
)
from rowen.bench.errors import BenchError, RequestsError
from rowen.bench.records import ServingRecord, Status
from rowen.bench.requests_file import PromptRequest, RequestsFile, read_requests


@dataclass(frozen=True, slots=True)
class Replay:
    """How a file is replayed: against which engine, how often, within which bounds."""

    url: str
    """Base URL without a trailing slash."""
    model: str
    arm: str = "arm"
    """Name of this replay; with the pass number it salts the prefix cache."""
    passes: int | None = 1
    """How often the file is replayed, one pass per ``period_s``; None: until ``duration_s``."""
    duration_s: float | None = None
    """No request is sent after this time."""
    timeout_s: float = 120.0
    """An answer that takes longer is an error."""
    most_in_flight: int = 1024
    """A request beyond is not sent but recorded as an error, so that memory stays bounded."""


def planned(file: RequestsFile, replay: Replay) -> Iterator[tuple[int, float, PromptRequest]]:
    """Yield (pass number, seconds from the start, request) in the order of sending."""
    number = 0
    while replay.passes is None or number < replay.passes:
        for request in file.requests:
            at_s = number * file.period_s + request.at_s
            if replay.duration_s is not None and at_s >= replay.duration_s:
                return
            yield number, at_s, request
        number += 1


class OpenLoop:
    """One replay; ``run`` ends when every answer has ended or after ``stop``."""

    def __init__(self, file: RequestsFile, replay: Replay, out: TextIO) -> None:
        if replay.passes is None and replay.duration_s is None:
            raise RequestsError("neither passes nor duration_s is given; the replay would not end")
        self._file = file
        self._replay = replay
        self._out = out
        self._stopping = asyncio.Event()
        self._in_flight: set[asyncio.Task[None]] = set()
        self._start_s = 0.0
        self.counts: dict[Status, int] = {"ok": 0, "error": 0, "cancelled": 0}
        self.worst_lateness_ms = 0.0

    def stop(self) -> None:
        """End the replay: send no more and cancel what is in flight."""
        self._stopping.set()

    async def run(self) -> None:
        async with engine_session(self._replay.timeout_s) as session:
            self._start_s = time.monotonic()
            for pass_number, at_s, request in planned(self._file, self._replay):
                if await self._stopped_before(self._start_s + at_s):
                    break
                task = asyncio.create_task(self._send(session, pass_number, at_s, request))
                self._in_flight.add(task)
                task.add_done_callback(self._in_flight.discard)
            stopped = asyncio.create_task(self._stopping.wait())
            while self._in_flight and not stopped.done():
                await asyncio.wait({stopped, *self._in_flight}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            for task in self._in_flight:
                task.cancel()
            await asyncio.gather(*self._in_flight, stopped, return_exceptions=True)

    async def _stopped_before(self, due_s: float) -> bool:
        """Wait until ``due_s`` (monotonic); return at once and True when the replay is stopped."""
        wait_s = due_s - time.monotonic()
        if wait_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait_s)
        else:
            await asyncio.sleep(0)  # let tasks that are due send, also in a volley
        return self._stopping.is_set()

    async def _send(
        self,
        session: aiohttp.ClientSession,
        pass_number: int,
        at_s: float,
        request: PromptRequest,
    ) -> None:
        arrivals = Arrivals(sent_monotonic_s=time.monotonic())
        status: Status = "error"
        error = ""
        try:
            if len(self._in_flight) > self._replay.most_in_flight:
                raise StreamError(f"not sent: {self._replay.most_in_flight} are in flight")
            body = completion_body(
                self._replay.model,
                request.prompt_token_ids,
                request.output_tokens,
                f"{self._replay.arm}-{pass_number}",
            )
            await stream_completion(session, self._replay.url, body, arrivals)
            status = "ok"
        except asyncio.CancelledError:
            status = "cancelled"
        except TimeoutError:
            error = f"no complete answer within {self._replay.timeout_s:g} s"
        except (StreamError, aiohttp.ClientError, ValueError, OSError) as failure:
            error = f"{type(failure).__name__}: {failure}"[:400]
        self._record(pass_number, at_s, request, arrivals, status, error)

    def _record(
        self,
        pass_number: int,
        at_s: float,
        request: PromptRequest,
        arrivals: Arrivals,
        status: Status,
        error: str,
    ) -> None:
        sent_s = arrivals.sent_monotonic_s - self._start_s
        record = ServingRecord(
            index=request.index,
            pass_number=pass_number,
            scheduled_s=at_s,
            sent_s=sent_s,
            sent_monotonic_s=arrivals.sent_monotonic_s,
            lateness_ms=(sent_s - at_s) * 1000.0,
            input_tokens=len(request.prompt_token_ids),
            wanted_tokens=request.output_tokens,
            tokens=arrivals.tokens,
            ttft_ms=arrivals.ttft_ms,
            last_token_ms=arrivals.last_token_ms,
            longest_gap_ms=arrivals.longest_gap_ms,
            status=status,
            error=error,
        )
        self.counts[status] += 1
        self.worst_lateness_ms = max(self.worst_lateness_ms, record.lateness_ms)
        self._out.write(record.as_line())
        self._out.flush()


async def replay_file(requests: Path, replay: Replay, out: Path) -> OpenLoop:
    """Replay ``requests`` and write one record per request to ``out``, which is replaced.

    Raises:
        RequestsError: the requests file is not one, or ``out`` cannot be written; nothing was sent.
    """
    file = read_requests(requests)
    try:
        sink = out.open("w", encoding="utf-8")
    except OSError as error:
        raise RequestsError(
            f"{out} cannot be written ({error.strerror}); use another --out"
        ) from None
    with sink:
        client = OpenLoop(file, replay, sink)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, client.stop)
        try:
            await client.run()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
    return client


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rowen.bench.openloop")
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--url", required=True, help="base URL of the engine")
    parser.add_argument("--model", required=True, help="the engine's served model name")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one per request")
    parser.add_argument("--arm", default="arm", help="name that salts the prefix cache")
    parser.add_argument("--passes", type=int, help="replays of the file (default 1)")
    parser.add_argument("--duration-s", type=float, help="repeat the file, stop sending after this")
    parser.add_argument("--timeout-s", type=float, default=120.0)
    parser.add_argument("--most-in-flight", type=int, default=1024)
    options = parser.parse_args(arguments)
    for name in ("passes", "duration_s", "timeout_s", "most_in_flight"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    if not options.url.startswith(("http://", "https://")):
        parser.error(f"--url is {options.url!r}; it must start with http://")
    replay = Replay(
        url=options.url.rstrip("/"),
        model=options.model,
        arm=options.arm,
        passes=options.passes or (None if options.duration_s else 1),
        duration_s=options.duration_s,
        timeout_s=options.timeout_s,
        most_in_flight=options.most_in_flight,
    )
    try:
        client = asyncio.run(replay_file(options.requests, replay, options.out))
    except BenchError as error:
        print(f"openloop: {error}", file=sys.stderr)
        return 2
    print(json.dumps({**client.counts, "worst_lateness_ms": round(client.worst_lateness_ms, 3)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
