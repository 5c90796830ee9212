"""Cuts a server-sent event stream into the payloads of its ``data:`` lines, however it is split.

Pure; used by the engine client.  vLLM puts one JSON document on each data line, and ``[DONE]`` on
the last one.
"""

from __future__ import annotations

MAX_EVENT_BYTES = 4 * 1024**2
"""A chunk of one token with 1000 alternatives is about 60 kB; more is not an event stream."""


class SseError(ValueError):
    """The bytes are not a server-sent event stream; the parser is unusable from here on."""


class SseParser:
    """Feed it what arrives; it returns the complete payloads and keeps the incomplete rest."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    @property
    def is_mid_event(self) -> bool:
        """Has part of an event arrived whose end is still missing?"""
        return bool(self._rest.strip())

    def feed(self, received: bytes) -> list[bytes]:
        """Return the payloads that are complete now, in order.

        Raises:
            SseError: a line is neither a field nor a comment, or an event is absurdly long.
        """
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise SseError(f"an event is longer than {MAX_EVENT_BYTES} bytes")
        payloads = []
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                payloads.append(line[5:].strip())
            elif line and not line.startswith((b":", b"event:", b"id:", b"retry:")):
                raise SseError("a line is no field of an event stream")
        return payloads
