"""The lane: one small file through which probe, daemon and gate see each other.

The serving engine's probe, the node daemon and the rollout engine's gate each own one record of
the file and read the other two.  Every record has one writer, which the kernel proves (an
open-file-description lock on the record's bytes, freed when the writer dies, however it dies).

Records are seqlocks: a sequence number before and after the payload, and a checksum over it.  A
reader that sees two different numbers or a wrong checksum reads again, a bounded number of
times, and then raises LaneTorn; it never returns a half-written record.

Everything goes through ``pread`` and ``pwrite`` on the shared page cache, not through a mapping:
a store into a mapped page whose file was truncated raises SIGBUS and would kill the serving
engine.  A ``pread`` costs 0.5 µs and cannot do harm (both records: under 2 µs with decoding).
The bytes are allocated when the file is made, so a full disk cannot fail a later write.

All times are ``time.monotonic_ns()``, which all processes of a machine share.
"""

from __future__ import annotations

import fcntl
import os
import struct
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any, Final, Literal

from rowen.executor.readings import (
    CLOSE_SAMPLES,
    UNLIMITED,
    DaemonReading,
    GateReading,
    ProbeReading,
)

__all__ = [
    "CLOSE_SAMPLES",
    "LANE_BYTES",
    "LANE_VERSION",
    "UNLIMITED",
    "DaemonReading",
    "GateReading",
    "Lane",
    "LaneError",
    "LaneRole",
    "LaneTorn",
    "ProbeReading",
]

LaneRole = Literal["probe", "daemon", "gate", "reader"]

LANE_BYTES: Final = 4096
"""Size of the file: one page."""

LANE_VERSION: Final = 1
"""Raised whenever a byte of the layout changes meaning; other versions are refused."""

_MAGIC: Final = b"ROWNLANE"
_HEADER = struct.Struct("<8sIIIIIIII")  # magic, version, file bytes, 3 x (offset, bytes) as u32
_PROBE_FIELDS: Final = "QIIdQdQdQQQQ"  # in the order of the readings below, little-endian
_DAEMON_FIELDS: Final = "Q?3xIIIQQQ"
_GATE_FIELDS: Final = f"Q??6xQQQQQQQQQQ{CLOSE_SAMPLES}I{CLOSE_SAMPLES}I"
_FRAME_BEFORE, _FRAME_AFTER = "Q", "I4xQ"  # sequence | payload | checksum, sequence

_PROBE_OFFSET: Final = 512
_DAEMON_OFFSET: Final = 768
_GATE_OFFSET: Final = 1024

_READ_ATTEMPTS: Final = 40
"""Attempts before LaneTorn; after the first ten each waits, together about 2 ms."""
_READ_PAUSE_S: Final = 50e-6

_F_OFD_SETLK: Final = getattr(fcntl, "F_OFD_SETLK", 37)
"""Linux's open-file-description lock; 37 on every architecture (asm-generic/fcntl.h)."""


class LaneError(Exception):
    """The lane cannot be used.  Nothing was written; a gate that sees this is closed."""


class LaneTorn(LaneError):
    """A record stayed half-written through all attempts (its writer died or sleeps inside it)."""


_SAMPLES_TOTAL: Final = GateReading._fields.index("samples_total")


class _Record:
    """Where one record lies and how its bytes read."""

    def __init__(self, offset: int, fields: str, writer: str) -> None:
        self.offset = offset
        self.writer = writer
        self.fields = struct.Struct("<" + fields)
        self.frame = struct.Struct("<" + _FRAME_BEFORE + fields + _FRAME_AFTER)
        self.payload = slice(8, 8 + self.fields.size)
        self.end = offset + self.frame.size

    def wrap(self, sequence: int, payload: bytes) -> bytes:
        checksum = zlib.crc32(payload, sequence & 0xFFFFFFFF)
        return struct.pack("<Q", sequence) + payload + struct.pack("<I4xQ", checksum, sequence)

    def unwrap(self, content: bytes) -> tuple[Any, ...] | None:
        """The numbers of a framed record; None when it is half-written."""
        numbers = self.frame.unpack(content)
        sequence = numbers[0]
        if sequence != numbers[-1]:
            return None
        if zlib.crc32(content[self.payload], sequence & 0xFFFFFFFF) != numbers[-2]:
            return None
        return numbers[1:-2]


_PROBE: Final = _Record(_PROBE_OFFSET, _PROBE_FIELDS, "serving engine's probe")
_DAEMON: Final = _Record(_DAEMON_OFFSET, _DAEMON_FIELDS, "daemon")
_GATE: Final = _Record(_GATE_OFFSET, _GATE_FIELDS, "rollout engine's gate")
_RECORDS: Final = {"probe": _PROBE, "daemon": _DAEMON, "gate": _GATE}
assert _PROBE.end <= _DAEMON_OFFSET
assert _DAEMON.end <= _GATE_OFFSET
assert _GATE.end <= LANE_BYTES

_BOTH_BYTES: Final = _DAEMON.end - _PROBE_OFFSET
_DAEMON_IN_BOTH: Final = _DAEMON_OFFSET - _PROBE_OFFSET


def _header() -> bytes:
    numbers: list[int] = []
    for record in _RECORDS.values():
        numbers += [record.offset, record.fields.size]
    return _HEADER.pack(_MAGIC, LANE_VERSION, LANE_BYTES, *numbers)


def _check_header(path: Path, content: bytes, file_bytes: int) -> None:
    if not content.startswith(_MAGIC):
        raise LaneError(f"{path} is no Rowen lane; point the lane setting at a path of its own")
    if len(content) < _HEADER.size or file_bytes != LANE_BYTES:
        raise LaneError(
            f"the lane {path} has {file_bytes} bytes instead of {LANE_BYTES} (truncated); "
            "remove it and restart the daemon, which makes a new one"
        )
    version = _HEADER.unpack_from(content)[1]
    if version != LANE_VERSION:
        raise LaneError(
            f"the lane {path} has layout version {version}, this Rowen reads {LANE_VERSION}; "
            "remove it and start daemon and engines from one release"
        )
    if content[: _HEADER.size] != _header():
        raise LaneError(f"the lane {path} has record sizes of another build; remove it")


class Lane:
    """An open lane in one role.  Not thread-safe for writing; readers may share it."""

    def __init__(self, path: Path, role: LaneRole, descriptor: int) -> None:
        self.path = path
        self.role = role
        self._descriptor = descriptor
        self._sequence = int(time.monotonic_ns())  # differs from any number left in the file
        self._gate_was_open: bool | None = None
        self._gate_changed_ns = 0
        # One attribute, replaced whole: threads may share a reader.
        self._newest: tuple[bytes, tuple[ProbeReading, DaemonReading]] | None = None

    @staticmethod
    def create(path: str | Path) -> None:
        """Make the lane file, whole or not at all; a valid one stays as it is.

        A truncated or older lane is replaced by a new one (readers of the old one notice within
        a second and follow).

        Raises:
            LaneError: the folder is missing or full, or the path holds something that is no
                lane.  The path is as it was.
        """
        path = Path(path)
        try:
            Lane.open(path, role="reader").close()
            return
        except LaneError:
            if path.exists() and not _is_ours(path):
                raise
        content = bytearray(LANE_BYTES)
        content[: _HEADER.size] = _header()
        for record in _RECORDS.values():
            content[record.offset : record.end] = record.wrap(0, bytes(record.fields.size))
        temporary = ""
        try:
            descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.posix_fallocate(file.fileno(), 0, LANE_BYTES)
            os.replace(temporary, path)
        except OSError as error:
            if temporary and os.path.exists(temporary):
                os.unlink(temporary)
            raise LaneError(f"the lane {path} cannot be made: {error.strerror}") from error

    @classmethod
    def open(cls, path: str | Path, *, role: LaneRole) -> Lane:
        """Open a lane to write one record (``reader``: none) and read all.

        Raises:
            LaneError: missing, foreign, truncated or of another version, or the role's record
                already has a living writer.  Nothing was changed.
        """
        path = Path(path)
        try:
            flags = os.O_RDONLY if role == "reader" else os.O_RDWR
            descriptor = os.open(path, flags | os.O_CLOEXEC)
        except OSError as error:
            raise LaneError(f"the lane {path} cannot be opened: {error.strerror}") from error
        try:
            try:
                content = os.pread(descriptor, _HEADER.size, 0)
                _check_header(path, content, os.fstat(descriptor).st_size)
            except OSError as error:
                raise LaneError(f"the lane {path} cannot be read: {error.strerror}") from error
            if role != "reader":
                _lock_record(path, descriptor, role)
        except LaneError:
            os.close(descriptor)
            raise
        return cls(path, role, descriptor)

    def close(self) -> None:
        """Close the file; the role's record may then have a new writer."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def is_current(self) -> bool:
        """Whether the path still names the file that is open here (not deleted or replaced)."""
        try:
            named, opened = os.stat(self.path), os.fstat(self._descriptor)
        except OSError:
            return False
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)

    def read_probe(self) -> ProbeReading:
        """The probe's record.

        Raises:
            LaneTorn: half-written through all attempts.
            LaneError: truncated or unreadable.
        """
        return ProbeReading._make(self._read(_PROBE))

    def read_daemon(self) -> DaemonReading:
        """The daemon's record; raises as ``read_probe``."""
        return DaemonReading._make(self._read(_DAEMON))

    def read_gate(self) -> GateReading:
        """The gate's record; raises as ``read_probe``."""
        numbers = self._read(_GATE)
        scalars, rings = numbers[: -2 * CLOSE_SAMPLES], numbers[-2 * CLOSE_SAMPLES :]
        kept = min(scalars[_SAMPLES_TOTAL], CLOSE_SAMPLES)
        ring_us, wall_us = rings[:kept], rings[CLOSE_SAMPLES : CLOSE_SAMPLES + kept]
        return GateReading._make((*scalars, ring_us, wall_us))

    def read_probe_and_daemon(self) -> tuple[ProbeReading, DaemonReading]:
        """Both records that a gate needs, by one system call; raises as ``read_probe``."""
        content = self._pread(_PROBE_OFFSET, _BOTH_BYTES)
        newest = self._newest
        if newest is not None and newest[0] == content:
            return newest[1]
        probe = _PROBE.unwrap(content[: _PROBE.frame.size])
        daemon = _DAEMON.unwrap(content[_DAEMON_IN_BOTH:])
        if probe is None or daemon is None:
            return self.read_probe(), self.read_daemon()
        readings = ProbeReading._make(probe), DaemonReading._make(daemon)
        self._newest = content, readings
        return readings

    def write_probe(self, reading: ProbeReading) -> None:
        """Publish the probe's record as given.

        Raises:
            LaneError: the write failed; readers see the record before, or a torn one.
        """
        self._write(_PROBE, _PROBE.fields.pack(*reading))

    def write_daemon(
        self,
        *,
        gate_open: bool,
        token_budget: int = UNLIMITED,
        sequence_cap: int = UNLIMITED,
        block_cap: int = UNLIMITED,
        epoch: int,
    ) -> None:
        """Publish the daemon's word, stamped with the present; raises as ``write_probe``.

        Call it at every tick: the stamp is the heartbeat.
        """
        now_ns = time.monotonic_ns()
        if gate_open != self._gate_was_open:
            self._gate_was_open = gate_open
            self._gate_changed_ns = now_ns
        reading = DaemonReading(
            now_ns,
            gate_open,
            token_budget,
            sequence_cap,
            block_cap,
            epoch,
            self._gate_changed_ns,
            os.getpid(),
        )
        self._write(_DAEMON, _DAEMON.fields.pack(*reading))

    def write_gate(self, reading: GateReading) -> None:
        """Publish the gate's record as given; raises as ``write_probe``.

        Both rings hold at most CLOSE_SAMPLES times and as many as ``samples_total`` says.
        """
        *scalars, ring_us, wall_us = reading
        assert len(ring_us) == len(wall_us) == min(reading.samples_total, CLOSE_SAMPLES)
        rest = (0,) * (CLOSE_SAMPLES - len(ring_us))
        self._write(_GATE, _GATE.fields.pack(*scalars, *ring_us, *rest, *wall_us, *rest))

    def _pread(self, offset: int, size: int) -> bytes:
        try:
            content = os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise LaneError(f"the lane {self.path} cannot be read: {error.strerror}") from error
        if len(content) != size:
            raise LaneError(f"the lane {self.path} was truncated; the daemon must make a new one")
        return content

    def _read(self, record: _Record) -> tuple[Any, ...]:
        for attempt in range(_READ_ATTEMPTS):
            numbers = record.unwrap(self._pread(record.offset, record.frame.size))
            if numbers is not None:
                return numbers
            if attempt >= 10:
                time.sleep(_READ_PAUSE_S)
        raise LaneTorn(f"the record of the {record.writer} in {self.path} stayed half-written")

    def _write(self, record: _Record, payload: bytes) -> None:
        assert _RECORDS.get(self.role) is record, f"the {self.role} must not write that record"
        self._sequence += 1
        try:
            os.pwrite(self._descriptor, record.wrap(self._sequence, payload), record.offset)
        except OSError as error:
            raise LaneError(f"the lane {self.path} cannot be written: {error.strerror}") from error


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
    except OSError:
        return False
    return start in (_MAGIC, b"")  # an empty file is a lane that was truncated to nothing


def _lock_record(path: Path, descriptor: int, role: str) -> None:
    record = _RECORDS[role]
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, record.offset, record.frame.size, 0)
    try:
        fcntl.fcntl(descriptor, _F_OFD_SETLK, lock)
    except OSError as error:
        raise LaneError(
            f"the lane {path} already has a living {record.writer}; stop it, or give this one "
            "a lane of its own"
        ) from error
