"""What became of each request that was sent: one JSON line per request, written as it ends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rowen.bench.errors import RequestsError

Status = Literal["ok", "error", "cancelled"]


@dataclass(frozen=True, slots=True)
class ServingRecord:
    """One request as a client saw it.

    Times ``*_s`` without ``monotonic`` count from the start of the replay.  ``sent_monotonic_s`` is
    CLOCK_MONOTONIC, which all processes of a machine share.  ``ttft_ms`` (first token) and
    ``last_token_ms`` count from the moment of sending; both are None when no token came.
    """

    index: int
    pass_number: int
    scheduled_s: float
    sent_s: float
    sent_monotonic_s: float
    lateness_ms: float
    """How long after its time the request was sent: the client's own delay, not the engine's."""
    input_tokens: int
    wanted_tokens: int
    tokens: int
    ttft_ms: float | None
    last_token_ms: float | None
    longest_gap_ms: float | None
    """Longest time between two deliveries of tokens."""
    status: Status
    error: str = ""

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per token after the first: (last - first) / (n - 1); None below two tokens."""
        if self.ttft_ms is None or self.last_token_ms is None or self.tokens < 2:
            return None
        return (self.last_token_ms - self.ttft_ms) / (self.tokens - 1)

    def as_line(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":")) + "\n"


def read_records(path: Path) -> list[ServingRecord]:
    """Read the records that a client wrote, in the order in which the requests ended.

    A last line without its end (the client was killed while writing) is left out.

    Raises:
        RequestsError: the file is missing, or another line is not a record.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestsError(
            f"{path} cannot be read ({error.strerror}); was the client started?"
        ) from None
    complete = text[: text.rfind("\n") + 1]
    return [_record(path, n, line) for n, line in enumerate(complete.splitlines(), start=1)]


def _record(path: Path, number: int, line: str) -> ServingRecord:
    try:
        document: Any = json.loads(line)
        return record_from(document)
    except (ValueError, TypeError) as error:
        raise RequestsError(f"{path}, line {number}: not a serving record ({error})") from None


def record_from(document: Mapping[str, Any]) -> ServingRecord:
    """Make a record from its JSON object.

    Raises:
        TypeError: a field is missing or unknown.
    """
    known = {field.name for field in fields(ServingRecord)}
    unknown = set(document) - known
    if unknown:
        raise TypeError(f"unknown field {min(unknown)}")
    return ServingRecord(**document)
