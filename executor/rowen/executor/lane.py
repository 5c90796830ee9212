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
from typing import Final, Literal, NamedTuple

LaneRole = Literal["probe", "daemon", "gate", "reader"]

LANE_BYTES: Final = 4096
"""Size of the file: one page."""

LANE_VERSION: Final = 1
"""Raised whenever a byte of the layout changes meaning; other versions are refused."""

UNLIMITED: Final = 2**31 - 1
"""A cap or budget that does not bind."""

CLOSE_SAMPLES: Final = 64
"""How many of the newest close-to-idle times the gate record holds."""

_MAGIC: Final = b"ROWNLANE"
_HEADER = struct.Struct("<8sIIIIIIII")  # magic, version, file bytes, 3 x (offset, bytes) as u32
_SEQUENCE = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I4x")
_PROBE = struct.Struct("<QQIIdQddQQQQ")
_DAEMON = struct.Struct("<QQIIIIQQ")
_GATE = struct.Struct(f"<QIIQQQQQQQQQ{CLOSE_SAMPLES}I{CLOSE_SAMPLES}I")

_PROBE_OFFSET: Final = 512
_DAEMON_OFFSET: Final = 768
_GATE_OFFSET: Final = 1024
_FRAME_BYTES: Final = 2 * _SEQUENCE.size + _CHECKSUM.size

_READ_ATTEMPTS: Final = 40
"""Attempts before LaneTorn; after the first ten each waits, together about 2 ms."""
_READ_PAUSE_S: Final = 50e-6

_F_OFD_SETLK: Final = getattr(fcntl, "F_OFD_SETLK", 37)
"""Linux's open-file-description lock; 37 on every architecture (asm-generic/fcntl.h)."""


class LaneError(Exception):
    """The lane cannot be used.  Nothing was written; a gate that sees this is closed."""


class LaneTorn(LaneError):
    """A record stayed half-written through all attempts (its writer died or sleeps inside it)."""


class ProbeReading(NamedTuple):
    """What the serving engine last said.  A never-written record has ``heartbeat_ns`` 0."""

    heartbeat_ns: int
    requests_waiting: int
    requests_running: int
    oldest_waiting_age_ms: float
    """Age, at the heartbeat, of the oldest request that was never scheduled; 0 without one."""
    prefill_tokens_waiting: int
    kv_used_ratio: float
    step_started_ns: int
    """When the step in flight began; 0 between steps."""
    step_predicted_ms: float
    """Predicted time of the step in flight (of the last one, between steps); 0 before a fit."""
    steps_total: int
    busy_ns_total: int
    """Time with any request running or waiting since the engine started."""
    changed_ns: int = 0
    """When the engine last went from idle to busy or back."""
    writer_pid: int = 0

    @property
    def is_busy(self) -> bool:
        """Whether any request runs or waits."""
        return self.requests_running + self.requests_waiting > 0


class DaemonReading(NamedTuple):
    """What the daemon last decided.  A never-written record has ``heartbeat_ns`` 0."""

    heartbeat_ns: int
    gate_open: bool
    token_budget: int
    """Tokens per step of the rollout engine; UNLIMITED does not bind, 0 closes."""
    sequence_cap: int
    """Sequences in a step of the rollout engine; UNLIMITED does not bind, 0 closes."""
    block_cap: int
    """KV blocks the rollout engine may hold; UNLIMITED does not bind."""
    epoch: int
    changed_ns: int = 0
    """When ``gate_open`` last flipped."""
    writer_pid: int = 0


class GateReading(NamedTuple):
    """What the rollout engine last did.  A never-written record has ``heartbeat_ns`` 0."""

    heartbeat_ns: int
    is_open: bool
    is_computing: bool
    """A step is being computed and not held: closed and computing means a layer still runs."""
    closings_total: int
    close_to_idle_us: int
    """The last close-to-idle time, and the largest since the engine started; see README."""
    close_to_idle_max_us: int
    steps_total: int
    tokens_total: int
    """Tokens (prompt and new) that went through the model."""
    close_to_idle_ring_us: tuple[int, ...] = ()
    """The newest close-to-idle times, at most CLOSE_SAMPLES, oldest first."""
    close_to_idle_wall_ring_us: tuple[int, ...] = ()
    """The same closings by the clock on the wall, time off the core included."""
    samples_total: int = 0
    """Closings that met a running step; each gave one sample."""
    epoch_seen: int = 0
    """The daemon's epoch that the gate last read."""
    open_ns_total: int = 0
    writer_pid: int = 0


_RECORDS: Final = {
    "probe": (_PROBE_OFFSET, _PROBE.size, "serving engine's probe"),
    "daemon": (_DAEMON_OFFSET, _DAEMON.size, "daemon"),
    "gate": (_GATE_OFFSET, _GATE.size, "rollout engine's gate"),
}
_PROBE_AND_DAEMON_BYTES: Final = _DAEMON_OFFSET + _DAEMON.size + _FRAME_BYTES - _PROBE_OFFSET
assert _PROBE_OFFSET + _PROBE.size + _FRAME_BYTES <= _DAEMON_OFFSET
assert _DAEMON_OFFSET + _DAEMON.size + _FRAME_BYTES <= _GATE_OFFSET
assert _GATE_OFFSET + _GATE.size + _FRAME_BYTES <= LANE_BYTES


def _header() -> bytes:
    numbers: list[int] = []
    for offset, size, _ in _RECORDS.values():
        numbers += [offset, size]
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


def _frame(sequence: int, payload: bytes) -> bytes:
    number = _SEQUENCE.pack(sequence)
    return number + payload + _CHECKSUM.pack(zlib.crc32(payload, sequence & 0xFFFFFFFF)) + number


def _payload(content: bytes, start: int, size: int) -> bytes | None:
    """Cut the payload out of a framed record; None when the record is half-written."""
    end = start + _SEQUENCE.size + size
    number = content[start : start + _SEQUENCE.size]
    payload = content[start + _SEQUENCE.size : end]
    after = end + _CHECKSUM.size
    if number != content[after : after + _SEQUENCE.size]:
        return None
    checksum: int = _CHECKSUM.unpack_from(content, end)[0]
    sequence: int = _SEQUENCE.unpack(number)[0]
    return payload if zlib.crc32(payload, sequence & 0xFFFFFFFF) == checksum else None


class Lane:
    """An open lane in one role.  Not thread-safe for writing; readers may share it."""

    def __init__(self, path: Path, role: LaneRole, descriptor: int) -> None:
        self.path = path
        self.role = role
        self._descriptor = descriptor
        self._sequence = int(time.monotonic_ns())  # differs from any number left in the file
        self._gate_was_open: bool | None = None
        self._gate_changed_ns = 0

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
        for offset, size, _ in _RECORDS.values():
            frame = _frame(0, bytes(size))
            content[offset : offset + len(frame)] = frame
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
        return _decode_probe(self._read("probe"))

    def read_daemon(self) -> DaemonReading:
        """The daemon's record; raises as ``read_probe``."""
        return _decode_daemon(self._read("daemon"))

    def read_gate(self) -> GateReading:
        """The gate's record; raises as ``read_probe``."""
        return _decode_gate(self._read("gate"))

    def read_probe_and_daemon(self) -> tuple[ProbeReading, DaemonReading]:
        """Both records that a gate needs, by one system call; raises as ``read_probe``."""
        content = self._pread(_PROBE_OFFSET, _PROBE_AND_DAEMON_BYTES)
        probe = _payload(content, 0, _PROBE.size)
        daemon = _payload(content, _DAEMON_OFFSET - _PROBE_OFFSET, _DAEMON.size)
        return (
            _decode_probe(probe) if probe is not None else self.read_probe(),
            _decode_daemon(daemon) if daemon is not None else self.read_daemon(),
        )

    def write_probe(self, reading: ProbeReading) -> None:
        """Publish the probe's record as given.

        Raises:
            LaneError: the write failed; readers see the record before, or a torn one.
        """
        self._write("probe", _encode_probe(reading))

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
        self._write(
            "daemon",
            _DAEMON.pack(
                now_ns,
                self._gate_changed_ns,
                int(gate_open),
                token_budget,
                sequence_cap,
                block_cap,
                epoch,
                os.getpid(),
            ),
        )

    def write_gate(self, reading: GateReading) -> None:
        """Publish the gate's record as given; raises as ``write_probe``."""
        self._write("gate", _encode_gate(reading))

    def _pread(self, offset: int, size: int) -> bytes:
        try:
            content = os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise LaneError(f"the lane {self.path} cannot be read: {error.strerror}") from error
        if len(content) != size:
            raise LaneError(f"the lane {self.path} was truncated; the daemon must make a new one")
        return content

    def _read(self, record: str) -> bytes:
        offset, size, writer = _RECORDS[record]
        for attempt in range(_READ_ATTEMPTS):
            payload = _payload(self._pread(offset, size + _FRAME_BYTES), 0, size)
            if payload is not None:
                return payload
            if attempt >= 10:
                time.sleep(_READ_PAUSE_S)
        raise LaneTorn(f"the record of the {writer} in {self.path} stayed half-written")

    def _write(self, record: str, payload: bytes) -> None:
        assert record == self.role, f"a {self.role} must not write the {record} record"
        self._sequence += 1
        try:
            os.pwrite(self._descriptor, _frame(self._sequence, payload), _RECORDS[record][0])
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
    offset, size, writer = _RECORDS[role]
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, offset, size, 0)
    try:
        fcntl.fcntl(descriptor, _F_OFD_SETLK, lock)
    except OSError as error:
        raise LaneError(
            f"the lane {path} already has a living {writer}; stop it, or give this one "
            "a lane of its own"
        ) from error


def _encode_probe(reading: ProbeReading) -> bytes:
    return _PROBE.pack(
        reading.heartbeat_ns,
        reading.changed_ns,
        reading.requests_waiting,
        reading.requests_running,
        reading.oldest_waiting_age_ms,
        reading.prefill_tokens_waiting,
        reading.kv_used_ratio,
        reading.step_predicted_ms,
        reading.step_started_ns,
        reading.steps_total,
        reading.busy_ns_total,
        reading.writer_pid,
    )


def _decode_probe(payload: bytes) -> ProbeReading:
    (
        heartbeat_ns,
        changed_ns,
        waiting,
        running,
        oldest_ms,
        prefill_tokens,
        kv_used_ratio,
        predicted_ms,
        started_ns,
        steps,
        busy_ns,
        pid,
    ) = _PROBE.unpack(payload)
    return ProbeReading(
        heartbeat_ns,
        waiting,
        running,
        oldest_ms,
        prefill_tokens,
        kv_used_ratio,
        started_ns,
        predicted_ms,
        steps,
        busy_ns,
        changed_ns,
        pid,
    )


def _decode_daemon(payload: bytes) -> DaemonReading:
    heartbeat_ns, changed_ns, is_open, tokens, sequences, blocks, epoch, pid = _DAEMON.unpack(
        payload
    )
    return DaemonReading(
        heartbeat_ns, is_open == 1, tokens, sequences, blocks, epoch, changed_ns, pid
    )


def _encode_gate(reading: GateReading) -> bytes:
    ring = reading.close_to_idle_ring_us
    wall = reading.close_to_idle_wall_ring_us
    assert len(ring) == len(wall) <= CLOSE_SAMPLES
    rest = (0,) * (CLOSE_SAMPLES - len(ring))
    return _GATE.pack(
        reading.heartbeat_ns,
        int(reading.is_open),
        int(reading.is_computing),
        reading.closings_total,
        reading.close_to_idle_us,
        reading.close_to_idle_max_us,
        reading.steps_total,
        reading.tokens_total,
        reading.samples_total,
        reading.epoch_seen,
        reading.open_ns_total,
        reading.writer_pid,
        *ring,
        *rest,
        *wall,
        *rest,
    )


def _decode_gate(payload: bytes) -> GateReading:
    numbers = _GATE.unpack(payload)
    heartbeat_ns, is_open, is_computing, closings, last_us, max_us = numbers[:6]
    steps, tokens, samples, epoch, open_ns, pid = numbers[6:12]
    kept = min(samples, CLOSE_SAMPLES)
    return GateReading(
        heartbeat_ns,
        is_open == 1,
        is_computing == 1,
        closings,
        last_us,
        max_us,
        steps,
        tokens,
        numbers[12 : 12 + kept],
        numbers[12 + CLOSE_SAMPLES : 12 + CLOSE_SAMPLES + kept],
        samples,
        epoch,
        open_ns,
        pid,
    )
