"""The HTTP pages of our own processes on this machine, read without any proxy."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

DEADLINE_S = 5.0
"""Our pages answer in milliseconds; five seconds is a process that hangs."""

# A proxy from the environment would be asked for 127.0.0.1 too, and every check would fail.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class PageError(Exception):
    """The page did not answer, or not with JSON.  Nothing was changed."""


def answers(url: str, *, deadline_s: float = DEADLINE_S) -> bool:
    """Whether the page answers 200."""
    try:
        with _OPENER.open(url, timeout=deadline_s) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def read_page(url: str, *, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
    """The JSON object of a page; empty for a page without a body.

    Raises:
        PageError: it does not answer, or not with a JSON object.
    """
    try:
        with _OPENER.open(url, timeout=deadline_s) as answer:
            body = answer.read()
    except urllib.error.HTTPError as error:
        raise PageError(f"{url} answered HTTP {error.code}") from error
    except (OSError, http.client.HTTPException) as error:
        raise PageError(f"{url} does not answer ({error})") from error
    if not body:
        return {}
    try:
        document = json.loads(body)
    except ValueError as error:
        raise PageError(f"{url} answered something else than JSON") from error
    if not isinstance(document, dict):
        raise PageError(f"{url} answered a JSON {type(document).__name__}, expected an object")
    return document
