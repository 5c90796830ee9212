"""The daemon's end of the lane: makes it, holds it, and makes it anew when it was damaged."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from rowen.executor.lane import Lane, LaneError

log = logging.getLogger(__name__)


class LaneLink:
    """Owns the daemon's record of one lane.  A second daemon on the same lane is refused.

    Raises:
        LaneError: the lane cannot be made, is something else, or has a living daemon.  Unchanged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        Lane.create(path)
        self.lane = Lane.open(path, role="daemon")
        self.problem: str | None = None
        self.closed_since_ns: int | None = time.monotonic_ns()
        """When the gate was last told to close; None while it is told to be open."""

    def write(self, *, is_open: bool, sequence_cap: int, epoch: int) -> None:
        """Publish the decision; this is the daemon's heartbeat too.

        A lane that cannot be written stays silent, and silence closes the gate.
        """
        try:
            self._make_whole()
            self.lane.write_daemon(gate_open=is_open, sequence_cap=sequence_cap, epoch=epoch)
        except LaneError as error:
            self._note(str(error))
        else:
            self._note(None)
        if is_open:
            self.closed_since_ns = None
        elif self.closed_since_ns is None:
            self.closed_since_ns = time.monotonic_ns()

    def _make_whole(self) -> None:
        """Replace the lane when it was deleted, truncated or overwritten; 20 µs when it is whole.

        Writers of a truncated file make it long again, with zeros for a header, so its length
        alone proves nothing.
        """
        is_ours = self.lane.is_current()
        try:
            Lane.open(self._path, role="reader").close()
            if is_ours:
                return
        except LaneError:
            if is_ours:
                self._unlink()
        Lane.create(self._path)
        fresh = Lane.open(self._path, role="daemon")
        self.lane.close()
        self.lane = fresh
        log.warning("lane=%s renewed=true", self._path)

    def _unlink(self) -> None:
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise LaneError(
                f"the damaged lane {self._path} cannot be removed: {error.strerror}"
            ) from error

    def _note(self, problem: str | None) -> None:
        if problem != self.problem:
            level = logging.INFO if problem is None else logging.ERROR
            log.log(level, "lane=%s problem=%s", self._path, problem)
        self.problem = problem

    def close(self) -> None:
        """Fall silent and free the lane for another daemon; never raises."""
        self.lane.close()
