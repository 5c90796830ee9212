"""Errors towards clients, in vLLM's JSON shape."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

SHOWN_VALUE_CHARS = 60
"""A wrong value is shown so far; a prompt must not come back (or into a log) whole."""


class ApiError(Exception):
    """A request cannot be served; nothing was started for it, unless the message says otherwise."""

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        return error_body(self.status, self.message, self.param)

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(self.retry_after_s)}


def error_body(status: HTTPStatus, message: str, param: str | None = None) -> dict[str, Any]:
    """``{"error": {message, type, param, code}}``, as vLLM answers."""
    return {
        "error": {
            "message": message,
            "type": status.phrase,
            "param": param,
            "code": int(status),
        }
    }


def wrong_field(field: str, value: object, remedy: str) -> ApiError:
    """400 that names the field, the value it has and what to do."""
    shown = repr(value)
    if len(shown) > SHOWN_VALUE_CHARS:
        shown = shown[:SHOWN_VALUE_CHARS] + "…"
    return ApiError(HTTPStatus.BAD_REQUEST, f"{field} is {shown}: {remedy}", param=field)
