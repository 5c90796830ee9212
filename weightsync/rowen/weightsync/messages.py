"""The few words that publisher and receiver say over TCP before and after the bytes over UCX.

A message is a length (u32, little-endian) and a JSON object.  Every wait has a deadline, and a
peer that closes, stalls or sends nonsense gives a typed error.

::

    receiver                                publisher
    {"op": "catalogue"}                  →
                                         ←  {"kind": "catalogue", "catalogue": {…}}
    {"op": "fetch", "have": …, "want": v} →
                                         ←  {"kind": "frame", "frame_bytes": n} | {"kind": "held"}
    {"op": "send", "worker": …, "tag": t, …} → (n bytes over UCX follow)
    {"op": "received"}                   →
    either side may say                     {"kind": "refused", "code": …, "reason": …}
"""

from __future__ import annotations

import hashlib
import socket
import struct
import time
from base64 import b64decode, b64encode
from typing import Annotated, Final, Literal, Self, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from rowen.weightsync.errors import PeerLostError, ProtocolError, TransferTimeoutError
from rowen.weightsync.versions import Catalogue, Document, Have, Hex256

_LENGTH = struct.Struct("<I")

REQUEST_BYTES: Final = 1 << 16
"""No request is longer; a worker address is a few hundred bytes."""
REPLY_BYTES: Final = 256 << 20
"""No reply is longer; a catalogue has about 150 bytes per tensor."""


class AskCatalogue(Document):
    op: Literal["catalogue"] = "catalogue"


class AskFrame(Document):
    op: Literal["fetch"] = "fetch"
    have: Have | None
    want: Annotated[int, Field(ge=0)]


class SendFrame(Document):
    op: Literal["send"] = "send"
    worker: Annotated[str, Field(max_length=1 << 15)]
    """The receiver's UCX worker address, base64."""
    worker_sha256: Hex256
    """UCX ends the process that connects to bytes that are no address; so they are checked.  That
    keeps accidents out, not somebody who means harm: the port belongs in a trusted network."""
    tag: Annotated[int, Field(ge=0, lt=2**64)]

    @classmethod
    def to(cls, worker_address: bytes, tag: int) -> Self:
        """Ask for the frame to be sent to this UCX worker."""
        digest = hashlib.sha256(worker_address).hexdigest()
        return cls(worker=b64encode(worker_address).decode(), worker_sha256=digest, tag=tag)

    def worker_address(self) -> bytes:
        """The address, decoded.

        Raises:
            ProtocolError: it is not what the receiver sent.
        """
        try:
            address = b64decode(self.worker, validate=True)
        except ValueError as error:
            raise ProtocolError(f"the worker address is no base64: {error}") from error
        if hashlib.sha256(address).hexdigest() != self.worker_sha256:
            raise ProtocolError("the worker address does not have its checksum")
        return address


class FrameReceived(Document):
    op: Literal["received"] = "received"


Request = Annotated[AskCatalogue | AskFrame | SendFrame | FrameReceived, Field(discriminator="op")]


class CatalogueReply(Document):
    kind: Literal["catalogue"] = "catalogue"
    catalogue: Catalogue


class FrameReply(Document):
    kind: Literal["frame"] = "frame"
    frame_bytes: Annotated[int, Field(gt=0)]


class HeldReply(Document):
    """The receiver holds the wanted version already."""

    kind: Literal["held"] = "held"


class RefusedReply(Document):
    kind: Literal["refused"] = "refused"
    code: str
    reason: str


Reply = Annotated[
    CatalogueReply | FrameReply | HeldReply | RefusedReply, Field(discriminator="kind")
]

REQUEST: Final[TypeAdapter[Request]] = TypeAdapter(Request)
REPLY: Final[TypeAdapter[Reply]] = TypeAdapter(Reply)

M = TypeVar("M")


class Deadline:
    """A point in time that every wait of one exchange is bounded by."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left_s(self, doing: str) -> float:
        """Seconds left.

        Raises:
            TransferTimeoutError: none are; ``doing`` says what was waited for.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TransferTimeoutError(f"{doing}: no progress within {self.seconds:g} s")
        return left


def send_message(connection: socket.socket, message: Document, deadline: Deadline) -> None:
    """Send one message.

    Raises:
        TransferTimeoutError, PeerLostError: the connection is of no further use.
    """
    encoded = message.model_dump_json().encode()
    try:
        connection.settimeout(deadline.left_s("sending a message"))
        connection.sendall(_LENGTH.pack(len(encoded)) + encoded)
    except TimeoutError as error:
        raise TransferTimeoutError(f"no message taken within {deadline.seconds:g} s") from error
    except OSError as error:
        raise PeerLostError(f"the peer is gone: {error}") from error


def receive_message(
    connection: socket.socket, kinds: TypeAdapter[M], limit_bytes: int, deadline: Deadline
) -> M:
    """Receive one message.

    Raises:
        TransferTimeoutError, PeerLostError, ProtocolError: the connection is of no further use.
    """
    (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size, deadline))
    if length > limit_bytes:
        raise ProtocolError(f"the peer announces a message of {length} bytes")
    encoded = _receive_exactly(connection, length, deadline)
    try:
        return kinds.validate_json(bytes(encoded))
    except ValidationError as error:
        raise ProtocolError(f"the peer sends something else than expected: {error}") from error


def _receive_exactly(connection: socket.socket, count: int, deadline: Deadline) -> bytearray:
    received = bytearray(count)
    view = memoryview(received)
    try:
        while view:
            connection.settimeout(deadline.left_s("a message"))
            taken = connection.recv_into(view)
            if taken == 0:
                raise PeerLostError("the peer closed the connection in the middle of an exchange")
            view = view[taken:]
    except TimeoutError as error:
        raise TransferTimeoutError(f"no message within {deadline.seconds:g} s") from error
    except OSError as error:
        raise PeerLostError(f"the peer is gone: {error}") from error
    return received
