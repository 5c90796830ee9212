"""Bytes over UCX, without threads and without an event loop.

A `UcxPort` is a UCX worker that lives for one transfer and is driven by the thread that waits.
Between transfers nothing of UCX exists: no progress thread wakes in an engine or a trainer (the
thread mode of ucxx wakes a thousand times a second; its blocking mode spins after the first peer).

ucxx's listener binds all interfaces and cannot be told otherwise, so peers meet over a TCP
connection that we bind ourselves (messages.py) and exchange worker addresses there.  That
connection is also how the death of a peer is seen at once.
"""

from __future__ import annotations

import ipaddress
import os
import select
import socket
from collections.abc import Callable, Iterator
from enum import Enum
from itertools import islice
from typing import Any, Final

from rowen.weightsync.errors import PeerLostError
from rowen.weightsync.messages import Deadline

CHUNK_BYTES: Final = 4 << 20
"""One UCX message; the stall deadline counts anew for each."""
WINDOW_CHUNKS: Final = 2
"""Messages under way at a time, so that one is on the wire while the next is matched."""
_POLL_S: Final = 0.05
"""Upper bound of one sleep, should UCX's event descriptor miss an event."""


class UcxPort:
    """One UCX worker; use it from one thread and `close` it."""

    def __init__(self, *, loopback: bool) -> None:
        """Open a worker.

        Args:
            loopback: listen on the loopback interface only; otherwise UCX's own configuration
                (``UCX_NET_DEVICES``, ``UCX_TLS``) decides.
        """
        libucxx = _load_ucxx()
        options = {"NET_DEVICES": "lo"} if loopback else {}
        self._libucxx = libucxx
        self._context = libucxx.UCXContext(options)
        self._worker = libucxx.UCXWorker(
            self._context, enable_delayed_submission=False, enable_python_future=False
        )
        self._worker.init_blocking_progress_mode()
        self._endpoint: Any = None

    @property
    def address(self) -> bytes:
        """What a peer needs to send here."""
        return bytes(self._worker.address)

    def send(
        self,
        peer_address: bytes,
        tag: int,
        frame: bytes,
        control: socket.socket,
        stall_s: float,
        has_ended: Callable[[], bool],
    ) -> None:
        """Send a frame to a peer that receives it under ``tag``; return when it has spoken.

        That a message is sent says only that UCX took it, and UCX moves on only while somebody
        drives it.  So the worker is driven until the peer's receipt can be read from ``control``.

        Args:
            control: becomes readable when the peer has something to say or is gone.
            stall_s: without any progress for this long the transfer is given up.
            has_ended: True when the transfer is to be given up early (the publisher closes).

        Raises:
            PeerLostError, TransferTimeoutError: the peer has not acknowledged the frame.
        """
        from ucxx.types import Tag

        libucxx = self._libucxx
        self._endpoint = libucxx.UCXEndpoint.create_from_worker_address(
            self._worker, libucxx.UCXAddress.create_from_buffer(peer_address), True
        )
        view = memoryview(frame)
        requests = (
            self._endpoint.tag_send(_array(view[start : start + CHUNK_BYTES]), Tag(tag))
            for start in range(0, len(view), CHUNK_BYTES)
        )
        window = _Window(requests, self._libucxx.UCXError)
        stall = Deadline(stall_s)
        while _control_state(control) is _Control.SILENT:
            if has_ended():
                raise PeerLostError("the publisher closes")
            if window.advance():
                stall = Deadline(stall_s)
            stall.left_s("a transfer that stands still")
            self._drive(control)
        if _control_state(control) is _Control.CLOSED:
            raise PeerLostError("the receiver closed the connection in the middle of a transfer")

    def receive(self, tag: int, frame: bytearray, control: socket.socket, stall_s: float) -> None:
        """Fill ``frame`` from the peer that knows this port's address and ``tag``.

        ``frame`` must stay alive until this port is closed, whatever happens: until then UCX may
        write to it.

        Raises:
            PeerLostError, TransferTimeoutError: the frame is not complete.
        """
        from ucxx.types import Tag

        view = memoryview(frame)
        requests = (
            self._worker.tag_recv(_array(view[start : start + CHUNK_BYTES]), Tag(tag))
            for start in range(0, len(view), CHUNK_BYTES)
        )
        window = _Window(requests, self._libucxx.UCXError)
        stall = Deadline(stall_s)
        while True:
            if window.advance():
                stall = Deadline(stall_s)
            if window.is_done:
                return
            if _control_state(control) is not _Control.SILENT:
                raise PeerLostError("the publisher broke off in the middle of a transfer")
            stall.left_s("a transfer that stands still")
            self._drive(control)

    def close(self) -> None:
        """Cancel what is under way and give everything back; callable again."""
        self._endpoint = None
        if self._worker is not None:
            self._worker.cancel_inflight_requests()
        self._worker = None
        self._context = None

    def _drive(self, control: socket.socket) -> None:
        """Let UCX move on, then sleep until it or the peer has news."""
        moved = False
        while self._worker.progress():
            moved = True
        if not moved and self._worker.arm():
            select.select([self._worker.epoll_file_descriptor, control], [], [], _POLL_S)


def is_loopback(host: str) -> bool:
    """True for addresses that only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Window:
    """A few requests under way at a time, in order."""

    def __init__(self, requests: Iterator[Any], failure: type[Exception]) -> None:
        self._requests = requests
        self._failure = failure
        self._under_way: list[Any] = []
        self.is_done = False

    def advance(self) -> bool:
        """Start what fits and drop what is complete; True when something was.

        Raises:
            PeerLostError: UCX gave a request up.
        """
        waiting = [request for request in self._under_way if not request.completed]
        is_progress = len(waiting) < len(self._under_way)
        try:
            for request in self._under_way:
                if request.completed:
                    request.check_error()
        except self._failure as error:
            raise PeerLostError(f"UCX gave the transfer up: {error}") from error
        self._under_way = waiting
        self._under_way += islice(self._requests, WINDOW_CHUNKS - len(waiting))
        self.is_done = not self._under_way
        return is_progress


class _Control(Enum):
    SILENT = "silent"
    READABLE = "readable"
    CLOSED = "closed"


def _control_state(control: socket.socket) -> _Control:
    control.settimeout(0)
    try:
        return _Control.READABLE if control.recv(1, socket.MSG_PEEK) else _Control.CLOSED
    except BlockingIOError:
        return _Control.SILENT
    except OSError:
        return _Control.CLOSED


def _array(view: memoryview) -> Any:
    from ucxx._lib.arr import Array

    return Array(view)


def _load_ucxx() -> Any:
    """Import ucxx's core without the variable that its import leaves in the environment.

    The import sets UCX_MEMTYPE_CACHE for GPU builds; the CPU build of UCX does not know it and
    warns on standard error at every start.
    """
    was_set = "UCX_MEMTYPE_CACHE" in os.environ
    from ucxx._lib import libucxx

    if not was_set:
        os.environ.pop("UCX_MEMTYPE_CACHE", None)
    return libucxx
