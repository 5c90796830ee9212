"""The file of requests that is replayed: a header line, then one request and its prompt per line.

Both arms of a comparison replay the same file, so the comparison is paired request by request.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from rowen.bench.errors import RequestsError
from rowen.bench.window import ReplayRequest

_KIND = "rowen.bench.requests/1"


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """One request to send: when (from the start of a pass), what, and how many tokens to make."""

    index: int
    at_s: float
    prompt_token_ids: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class RequestsFile:
    """Requests sorted by ``at_s``, all below ``period_s``, which is how long one pass lasts."""

    period_s: float
    requests: tuple[PromptRequest, ...]


def write_requests(
    path: Path,
    requests: Sequence[ReplayRequest],
    *,
    period_s: float,
    vocabulary: tuple[int, int],
    seed: int,
) -> None:
    """Draw a prompt for each request and write the file.

    Token ids are uniform over ``vocabulary`` (first id, last id + 1; leave out special tokens).
    Equal ``prefix_hashes`` give equal prompt blocks; everything else differs between requests.
    The same seed gives the same file.

    Raises:
        RequestsError: the vocabulary is empty; nothing was written.
    """
    low, high = vocabulary
    if not 0 <= low < high:
        raise RequestsError(
            f"vocabulary is {low} to {high}; give the first id and one more than the last"
        )
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"kind": _KIND, "period_s": period_s}) + "\n")
        for index, request in enumerate(requests):
            prompt = _prompt(request, index, low, high, seed)
            line = {
                "index": index,
                "at_s": round(request.at_s, 6),
                "output_tokens": request.output_tokens,
                "prompt_token_ids": prompt,
            }
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


def _prompt(request: ReplayRequest, index: int, low: int, high: int, seed: int) -> list[int]:
    tokens: list[int] = []
    for number, block_hash in enumerate(request.prefix_hashes):
        end = min(round((number + 1) * request.block_tokens), request.input_tokens)
        # A stream of its own per block, so that the block is the same in every request.
        tokens += _draw((seed, 0, block_hash), end - len(tokens), low, high)
    return tokens + _draw((seed, 1, index), request.input_tokens - len(tokens), low, high)


def _draw(key: tuple[int, ...], count: int, low: int, high: int) -> list[int]:
    if count <= 0:
        return []
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
    drawn: list[int] = random.integers(low, high, size=count).tolist()
    return drawn


def read_requests(path: Path) -> RequestsFile:
    """Read a file of ``write_requests``.

    Raises:
        RequestsError: it is missing, empty, or has a line that is not one of ours.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestsError(f"{path} cannot be read ({error}); give a requests file") from None
    header = _parse(path, 1, lines[0] if lines else "")
    period_s: Any = header.get("period_s")
    if header.get("kind") != _KIND or not _is_time(period_s) or period_s == 0:
        raise RequestsError(
            f"{path}, line 1: not the header of {_KIND} ({str(header)[:60]}); "
            "make the file with rowen.bench.requests_file.write_requests"
        )
    requests = [_request(path, number, line) for number, line in enumerate(lines[1:], start=2)]
    if not requests:
        raise RequestsError(f"{path} holds no requests; give a file with at least one")
    requests.sort(key=lambda request: request.at_s)
    return RequestsFile(float(period_s), tuple(requests))


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise RequestsError(f"{path}, line {number}: {line[:60]!r} is not a JSON object; remake it")
    return document


def _request(path: Path, number: int, line: str) -> PromptRequest:
    document = _parse(path, number, line)
    prompt = document.get("prompt_token_ids")
    checks = {
        "index": type(document.get("index")) is int,
        "at_s": _is_time(document.get("at_s")),
        "output_tokens": type(document.get("output_tokens")) is int
        and document["output_tokens"] >= 1,
        "prompt_token_ids": isinstance(prompt, list)
        and bool(prompt)
        and all(type(token) is int for token in prompt),
    }
    for field, is_valid in checks.items():
        if not is_valid:
            value = str(document.get(field))[:60]
            raise RequestsError(f"{path}, line {number}: {field} is {value}; remake the file")
    return PromptRequest(
        document["index"], float(document["at_s"]), tuple(document["prompt_token_ids"]),
        document["output_tokens"],
    )  # fmt: skip


def _is_time(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and value >= 0 and isfinite(value)
