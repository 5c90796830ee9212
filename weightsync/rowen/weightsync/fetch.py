"""The receiver's side of the wire: ask a publisher, take the bytes, trust none of them.

Called by the engine's weight backend, in the engine's own thread: no thread and no event loop is
started, and nothing of UCX is left behind, whether a fetch succeeds or not.  What comes back is
checked by `rowen.weightsync.delta.unseal` and `rowen.weightsync.receive`, not here.
"""

from __future__ import annotations

import secrets
import socket
from types import TracebackType
from typing import Final, Self

from rowen.weightsync.errors import (
    BY_CODE,
    ProtocolError,
    PublisherUnreachableError,
    WeightSyncError,
)
from rowen.weightsync.messages import (
    REPLY,
    REPLY_BYTES,
    AskCatalogue,
    AskFrame,
    CatalogueReply,
    Deadline,
    FrameReceived,
    FrameReply,
    HeldReply,
    RefusedReply,
    Reply,
    SendFrame,
    receive_message,
    send_message,
)
from rowen.weightsync.ucx import UcxPort, is_loopback
from rowen.weightsync.versions import Catalogue, Document, Have

REPLY_DEADLINE_S: Final = 15.0
"""For one answer; making a full copy of a 135 M-parameter model takes about a second, and a
trainer in the idle scheduling class may be given little of the processor.  Clearly below the
scheduler's ``sync_deadline_s`` (60), so that a stuck publisher ends as a refusal."""
STALL_S: Final = 15.0
"""A transfer that does not move for this long is given up."""
CONNECT_S: Final = 5.0


class PublisherClient:
    """A connection to one publisher, for one update."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        reply_deadline_s: float = REPLY_DEADLINE_S,
        stall_s: float = STALL_S,
    ) -> None:
        """Connect.

        Raises:
            PublisherUnreachableError: nobody listens there.
        """
        self._reply_deadline_s = reply_deadline_s
        self._stall_s = stall_s
        self._loopback = is_loopback(host)
        try:
            self._connection = socket.create_connection((host, port), timeout=CONNECT_S)
        except OSError as error:
            raise PublisherUnreachableError(
                f"no publisher answers at {host}:{port} ({error}); is the trainer running, and "
                "was its address announced?"
            ) from error
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def catalogue(self) -> Catalogue:
        """All tensors of the publisher's version 0.

        Raises:
            PeerLostError, TransferTimeoutError, ProtocolError: nothing was learnt.
        """
        reply = self._ask(AskCatalogue())
        if not isinstance(reply, CatalogueReply):
            raise ProtocolError(f"the publisher answers {reply.kind!r} instead of a catalogue")
        return reply.catalogue

    def fetch(self, have: Have | None, want_version: int) -> bytearray | None:
        """The delta from what is held to the wanted version.

        Args:
            have: verified by the caller; None asks for a full copy.
            want_version: a published version.

        Returns:
            A sealed delta, or None when the publisher says that ``have`` is the wanted version.

        Raises:
            VersionUnknownError, BaseUnknownError, ReplayError, PublisherBusyError: refused.
            PeerLostError, TransferTimeoutError, ProtocolError: broken off.  The caller's weights
            are untouched, and it may connect again at once.
        """
        reply = self._ask(AskFrame(have=have, want=want_version))
        if isinstance(reply, HeldReply):
            return None
        if not isinstance(reply, FrameReply):
            raise ProtocolError(f"the publisher answers {reply.kind!r} instead of a frame")
        frame = bytearray(reply.frame_bytes)
        tag = secrets.randbits(64)
        ucx_port = UcxPort(loopback=self._loopback)
        try:
            self._say(SendFrame.to(ucx_port.address, tag))
            ucx_port.receive(tag, frame, self._connection, self._stall_s)
        finally:
            ucx_port.close()
        self._say(FrameReceived())
        return frame

    def close(self) -> None:
        """Leave; callable again."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _say(self, message: Document) -> None:
        send_message(self._connection, message, Deadline(self._reply_deadline_s))

    def _ask(self, request: Document) -> Reply:
        self._say(request)
        deadline = Deadline(self._reply_deadline_s)
        reply = receive_message(self._connection, REPLY, REPLY_BYTES, deadline)
        if isinstance(reply, RefusedReply):
            raise BY_CODE.get(reply.code, WeightSyncError)(reply.reason)
        return reply


def fetch(
    host: str,
    port: int,
    *,
    have: Have | None,
    want_version: int,
    reply_deadline_s: float = REPLY_DEADLINE_S,
    stall_s: float = STALL_S,
) -> bytearray | None:
    """Connect, fetch one delta and leave; see `PublisherClient.fetch`."""
    with PublisherClient(host, port, reply_deadline_s=reply_deadline_s, stall_s=stall_s) as client:
        return client.fetch(have, want_version)
