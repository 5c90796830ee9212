"""The operator's mode: holds the harvest back, or releases it, over restarts of the daemon."""

from __future__ import annotations

import logging
from pathlib import Path

from rowen.policies.schema import Mode

log = logging.getLogger(__name__)

FILE_NAME = "operator-mode"


class OperatorMode:
    """Kept in one small file.  It can only make the policy's mode stricter, never looser."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE_NAME
        self.mode = self._read()

    def _read(self) -> Mode:
        try:
            return Mode(self._path.read_text(encoding="utf-8").strip())
        except FileNotFoundError:
            return Mode.ENFORCE
        except (OSError, ValueError) as error:
            # Somebody held the harvest back here; not knowing how far means entirely.
            log.warning("operator_mode=off file=%s problem=%r", self._path, error)
            return Mode.OFF

    def set(self, mode: Mode) -> None:
        """Take the mode over and store it.

        Raises:
            OSError: it could not be stored.  A stricter mode holds anyway until the daemon ends; a
                looser one is not taken over.
        """
        is_looser = _place(mode) < _place(self.mode)
        if not is_looser:
            self.mode = mode
        scratch = self._path.with_suffix(".tmp")
        scratch.write_text(mode.value + "\n", encoding="utf-8")
        scratch.replace(self._path)
        self.mode = mode


def _place(mode: Mode) -> int:
    return (Mode.ENFORCE, Mode.PREVIEW, Mode.OFF).index(mode)
