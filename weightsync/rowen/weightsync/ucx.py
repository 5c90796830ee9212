"""Bytes over UCX, without threads and without an event loop.

A `UcxPort` is a UCX worker that lives for one transfer and is driven by the thread that waits.
Between transfers nothing of UCX exists: no progress thread wakes in an engine or a trainer (the
thread mode of ucxx wakes a thousand times a second; its blocking mode spins after the first peer).

ucxx's listener binds all interfaces and cannot be told otherwise, so peers meet over a TCP
connection that we bind ourselves (messages.py) and exchange worker addresses there.  That
connection is also how the death of a peer is seen at once.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from typing import Any, Final

from rowen.weightsync.errors import PeerLostError, TransferTimeoutError

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
        """Send a frame to a peer that receives it under ``tag``.

        Args:
            control: becomes readable when the peer has something to say or is gone.
            stall_s: without the end of a message for this long the transfer is given up.
            has_ended: True when the transfer is to be given up early (the publisher closes).

        Raises:
            PeerLostError, TransferTimeoutError: the transfer did not complete.
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
        self._run(requests, control, stall_s, has_ended)

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
        self._run(requests, control, stall_s, lambda: False)

    def close(self) -> None:
        """Cancel what is under way and give everything back; callable again."""
        self._endpoint = None
        if self._worker is not None:
            self._worker.cancel_inflight_requests()
        self._worker = None
        self._context = None

    def _run(
        self,
        requests: Any,
        control: socket.socket,
        stall_s: float,
        has_ended: Callable[[], bool],
    ) -> None:
        under_way: list[Any] = []
        progressed = time.monotonic()
        exhausted = False
        while True:
            while len(under_way) < WINDOW_CHUNKS and not exhausted:
                request = next(requests, None)
                if request is None:
                    exhausted = True
                else:
                    under_way.append(request)
            if not under_way:
                return
            self._progress()
            waiting = [request for request in under_way if not request.completed]
            if len(waiting) < len(under_way):
                self._check([request for request in under_way if request.completed])
                under_way, progressed = waiting, time.monotonic()
                continue
            self._give_up_if_due(control, progressed, stall_s, has_ended)
            if self._worker.arm():
                select.select([self._worker.epoll_file_descriptor, control], [], [], _POLL_S)

    def _progress(self) -> None:
        while self._worker.progress():
            pass

    def _check(self, completed: list[Any]) -> None:
        for request in completed:
            try:
                request.check_error()
            except self._libucxx.UCXError as error:
                raise PeerLostError(f"UCX gave the transfer up: {error}") from error

    def _give_up_if_due(
        self,
        control: socket.socket,
        progressed: float,
        stall_s: float,
        has_ended: Callable[[], bool],
    ) -> None:
        readable, _, _ = select.select([control], [], [], 0)
        if readable and _is_closed(control):
            raise PeerLostError("the peer closed the connection in the middle of a transfer")
        if has_ended():
            raise PeerLostError("the transfer was ended here")
        if time.monotonic() - progressed > stall_s:
            raise TransferTimeoutError(f"the transfer did not move for {stall_s:g} s")


def _is_closed(control: socket.socket) -> bool:
    try:
        control.settimeout(0)
        return control.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


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
