"""What the run did, one JSON object per line, flushed at once so that others may follow it.

Every line has ``event``, ``unix_s`` and ``monotonic_s``; the last one is ``summary``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any


class EventLog:
    """One writer; an existing file is replaced."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; numbers are rounded to six digits after the point."""
        line = {"event": event, "unix_s": time.time(), "monotonic_s": time.monotonic()}
        line.update(fields)
        json.dump({name: _rounded(value) for name, value in line.items()}, self._file)
        self._file.write("\n")
        self._file.flush()


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value
