"""Read a serving trace: when requests came, how long they and their answers were.

Called by the demo and the benchmarks.  Only the two published formats are read; a file is
either read completely or refused with the line, the field and the value that are wrong.

    azure     CSV with a header: TIMESTAMP, ContextTokens, GeneratedTokens
              (Azure Public Dataset, LLM inference traces of 2023 and 2024)
    mooncake  JSON lines: timestamp (ms), input_length, output_length, hash_ids
              (Mooncake, FAST'25 release; one hash id per block of 512 prompt tokens)
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from rowen.bench.errors import TraceError

TraceFormat = Literal["azure", "mooncake"]

HASH_BLOCK_TOKENS = 512
"""Prompt tokens that one id in ``hash_ids`` stands for (Mooncake trace documentation)."""

_TIME_NAMES = ("timestamp", "time", "arrivaltime", "arrivaltimestamp", "arrivedat")
_INPUT_NAMES = ("contexttokens", "inputtokens", "prompttokens", "numprefilltokens", "inputlength")
_OUTPUT_NAMES = (
    "generatedtokens",
    "outputtokens",
    "completiontokens",
    "numdecodetokens",
    "outputlength",
)
"""Column names, lower case without separators; the first is that of the published file."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace, as it was in production.

    ``arrival_s`` counts from the first request of the trace.  ``prefix_hashes`` holds one id per
    block of 512 prompt tokens; equal leading ids mean an equal prompt prefix.  Empty: unknown.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    prefix_hashes: tuple[int, ...] = ()


def load_trace(path: Path, format: TraceFormat) -> list[TraceRequest]:
    """Read every request of ``path``, sorted by arrival, the first at 0 s.

    Blank lines, a byte-order mark, CRLF and unsorted lines are accepted; token counts of zero
    too (the window raises them to what an engine accepts, and counts them).

    Raises:
        TraceError: the file is missing, empty, or has a line that is not of its format.
    """
    readers: dict[str, Callable[[Path, Sequence[str]], Iterator[TraceRequest]]] = {
        "azure": _read_azure,
        "mooncake": _read_mooncake,
    }
    if format not in readers:
        raise TraceError(f"trace format {format!r} is unknown; use azure or mooncake")
    requests = list(readers[format](path, _read_lines(path)))
    if not requests:
        raise TraceError(f"{path} holds no requests; give a trace with at least one data line")
    requests.sort(key=lambda request: request.arrival_s)
    first_s = requests[0].arrival_s
    return [replace(request, arrival_s=request.arrival_s - first_s) for request in requests]


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise TraceError(f"{path} does not exist; name an existing trace file") from None
    except UnicodeDecodeError as error:
        raise TraceError(
            f"{path} is not text (byte {error.start} is not UTF-8); unpack it if it is compressed"
        ) from None
    except OSError as error:
        raise TraceError(f"{path} cannot be read ({error.strerror}); check the path") from None


def _read_azure(path: Path, lines: Sequence[str]) -> Iterator[TraceRequest]:
    columns: _Columns | None = None
    numeric_time: bool | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if columns is None:
            columns = _azure_columns(path, number, line)
            if columns.is_header:
                continue
        place = f"{path}, line {number}"
        fields = [field.strip() for field in next(csv.reader([line], delimiter=columns.delimiter))]
        if len(fields) <= columns.last:
            raise TraceError(
                f"{place}: {len(fields)} fields where {columns.last + 1} are needed "
                f"({line[:80]!r}); complete or remove the line"
            )
        arrival_s, is_number = _azure_time(place, fields[columns.time])
        if numeric_time is None:
            numeric_time = is_number
        elif numeric_time != is_number:
            raise TraceError(
                f"{place}: TIMESTAMP is {fields[columns.time]!r} although earlier lines hold "
                f"{'seconds' if numeric_time else 'dates'}; use one kind of time in the whole file"
            )
        yield TraceRequest(
            arrival_s=arrival_s,
            input_tokens=_tokens(place, "ContextTokens", fields[columns.input]),
            output_tokens=_tokens(place, "GeneratedTokens", fields[columns.output]),
        )


@dataclass(frozen=True, slots=True)
class _Columns:
    """Positions of the three fields in a line of an azure file."""

    time: int
    input: int
    output: int
    delimiter: str
    is_header: bool

    @property
    def last(self) -> int:
        return max(self.time, self.input, self.output)


def _azure_columns(path: Path, number: int, line: str) -> _Columns:
    """Find the columns by the names in the first line, or by the published order without names."""
    if line.lstrip().startswith("{"):
        raise TraceError(
            f"{path}, line {number}: a JSON object where a CSV header is expected "
            f"({line[:60]!r}); use the format mooncake"
        )
    delimiter = max(",;\t", key=line.count)
    fields = [field.strip() for field in next(csv.reader([line], delimiter=delimiter))]
    names = ["".join(c for c in field.lower() if c.isalnum()) for field in fields]
    if names and not any(name in _TIME_NAMES for name in names) and len(fields) == 3:
        place = f"{path}, line {number}"
        try:
            _azure_time(place, fields[0])
        except TraceError:
            pass  # neither names nor a time: the header error below says it better
        else:
            return _Columns(0, 1, 2, delimiter, is_header=False)

    def position(field: str, known: Sequence[str]) -> int:
        for name in known:
            if name in names:
                return names.index(name)
        raise TraceError(
            f"{path}, line {number}: no column {field} in the header {line[:80]!r}; "
            "the format azure needs the header TIMESTAMP,ContextTokens,GeneratedTokens"
        )

    return _Columns(
        time=position("TIMESTAMP", _TIME_NAMES),
        input=position("ContextTokens", _INPUT_NAMES),
        output=position("GeneratedTokens", _OUTPUT_NAMES),
        delimiter=delimiter,
        is_header=True,
    )


def _azure_time(place: str, text: str) -> tuple[float, bool]:
    """Return the time in seconds and whether it was written as a plain number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        pass
    else:
        if math.isfinite(seconds):
            return seconds, True
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise TraceError(
            f"{place}: TIMESTAMP is {text!r}; write it as 2023-11-16 18:15:46.6805900 "
            "or as a number of seconds"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp(), False


def _read_mooncake(path: Path, lines: Sequence[str]) -> Iterator[TraceRequest]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            hint = "use the format azure" if "," in line and "{" not in line else "repair the line"
            raise TraceError(f"{place}: not a JSON object ({line[:60]!r}); {hint}") from None
        if not isinstance(document, dict):
            raise TraceError(f"{place}: {line[:60]!r} is not a JSON object; repair the line")
        for field in ("timestamp", "input_length", "output_length"):
            if field not in document:
                raise TraceError(
                    f"{place}: no field {field} in {line[:60]!r}; the format mooncake needs "
                    "timestamp (ms), input_length and output_length"
                )
        yield TraceRequest(
            arrival_s=_milliseconds(place, document["timestamp"]) / 1000.0,
            input_tokens=_tokens(place, "input_length", document["input_length"]),
            output_tokens=_tokens(place, "output_length", document["output_length"]),
            prefix_hashes=_hashes(place, document.get("hash_ids")),
        )


def _milliseconds(place: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15:
        return float(value)
    raise TraceError(f"{place}: timestamp is {value!r}; write a number of milliseconds")


def _tokens(place: str, field: str, value: object) -> int:
    """Read a token count; ``"374.0"`` is one, ``"374.5"`` and a negative number are not."""
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    # A count above 2^31 is a corrupt line: no model has such a context.
    if isinstance(value, bool) or not 0 <= number < 2**31 or number != int(number):
        raise TraceError(
            f"{place}: {field} is {value!r}; write a whole number of tokens, 0 or more"
        )
    return int(number)


def _hashes(place: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return tuple(value)
    raise TraceError(
        f"{place}: hash_ids is {str(value)[:60]!r}; write a list of whole numbers, or leave it out"
    )
