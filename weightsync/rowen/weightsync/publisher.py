"""The trainer's side: take each new version's weights, hand out deltas to whoever asks.

::

    publisher = Publisher("smollm2", dict(model.named_parameters()), dtype=torch.bfloat16)
    ...
    published = publisher.publish(dict(model.named_parameters()), version=1)
    # announce published.version and publisher.address to the scheduler

`Publisher.publish` is synchronous: when it returns, the version can be fetched and the tensors may
change again.  Everything else happens in daemon threads that sleep while nobody fetches; they
never keep a trainer from exiting.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from rowen.weightsync.delta import Manifest
from rowen.weightsync.elements import dtype_name, elements_of
from rowen.weightsync.errors import (
    BaseUnknownError,
    PeerLostError,
    ProtocolError,
    PublisherBusyError,
    ReplayError,
    VersionUnknownError,
    WeightSyncError,
)
from rowen.weightsync.messages import (
    REQUEST,
    REQUEST_BYTES,
    AskCatalogue,
    AskFrame,
    CatalogueReply,
    Deadline,
    FrameReceived,
    FrameReply,
    HeldReply,
    RefusedReply,
    SendFrame,
    receive_message,
    send_message,
)
from rowen.weightsync.store import RETAINED_VERSIONS, NamedElements, VersionStore
from rowen.weightsync.ucx import UcxPort, is_loopback

if TYPE_CHECKING:
    import torch

    NamedTensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]

logger = logging.getLogger(__name__)

MAXIMUM_RECEIVERS: Final = 16
"""Connections served at a time; more are refused as busy and come again."""
PEER_DEADLINE_S: Final = 30.0
"""A receiver that says nothing for this long is dropped."""
STALL_S: Final = 10.0
"""A transfer that does not move for this long is given up."""


@dataclass(frozen=True, slots=True)
class Published:
    """What became of one version."""

    version: int
    base_version: int
    full_bytes: int
    """Bytes of all tensors."""
    delta_bytes: int
    """Bytes that a receiver of the version before has to move, manifest included."""
    changed: int
    """Elements whose bits changed."""
    elements: int
    """Elements of all tensors."""
    encode_s: float
    manifest: Manifest


class Publisher:
    """Hands out the versions of one model.  Thread-safe; also a context manager."""

    def __init__(
        self,
        model_id: str,
        initial: NamedTensors,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        dtype: torch.dtype | None = None,
        retained_versions: int = RETAINED_VERSIONS,
    ) -> None:
        """Take version 0 and listen.

        Args:
            model_id: any name; it goes into the chain, so receivers refuse another model's deltas.
            initial: the weights that engines load from the checkpoint, by checkpoint name, bit by
                bit (after rounding to ``dtype``); tied weights once, as ``named_parameters`` has
                them.  Copied: about one model in host memory, two once all tensors have changed.
            host: address to listen on.  With a loopback address UCX stays on loopback, too.
            port: 0 takes a free one; see `address`.
            dtype: floating-point tensors are rounded to it (to nearest, as ``Tensor.to`` does),
                one at a time: float32 master weights for engines that serve bfloat16.  None
                publishes each tensor as it is.
            retained_versions: deltas kept; a receiver further behind takes a full copy.

        Raises:
            UnsupportedTensorError: a tensor cannot be published.
            OSError: the address cannot be listened on.  Nothing was started by either.
        """
        self._dtype = dtype
        named = self._elements(initial)
        self._store = VersionStore(model_id, named, retained_versions=retained_versions)
        self._listener = socket.create_server((host, port), backlog=MAXIMUM_RECEIVERS)
        self._address: tuple[str, int] = self._listener.getsockname()[:2]
        self._loopback = is_loopback(host)
        self._places = threading.BoundedSemaphore(MAXIMUM_RECEIVERS)
        self._closed = threading.Event()
        self._peers: dict[threading.Thread, socket.socket] = {}
        self._accepting = threading.Thread(target=self._accept, name="rowen-publisher", daemon=True)
        self._accepting.start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that receivers fetch from."""
        return self._address

    @property
    def newest_version(self) -> int:
        """The version published last, 0 before the first."""
        return self._store.newest.version

    def publish(self, named_tensors: NamedTensors, version: int) -> Published:
        """Make these weights the newest version; return when they can be fetched.

        Args:
            named_tensors: all tensors of version 0, with the same shapes; must not change while
                this runs.
            version: larger than every version before; gaps are allowed.

        Raises:
            VersionOrderError: the version is not newer.
            UnsupportedTensorError: a tensor is missing, unknown, sharded or of another form.
            After either the newest version is what it was and goes on being served.
        """
        started = time.perf_counter()
        step = self._store.publish(self._elements(named_tensors), version)
        published = Published(
            version=version,
            base_version=step.base.version,
            full_bytes=self._store.full_bytes,
            delta_bytes=len(step.frame),
            changed=step.changed,
            elements=sum(tensor.elements for tensor in step.tensors.values()),
            encode_s=time.perf_counter() - started,
            manifest=step.manifest,
        )
        logger.info(
            "published version=%d base=%d changed=%d delta_bytes=%d full_bytes=%d encode_s=%.3f",
            version,
            published.base_version,
            published.changed,
            published.delta_bytes,
            published.full_bytes,
            published.encode_s,
        )
        return published

    def close(self) -> None:
        """Stop listening and end transfers; callable again.  Receivers see a lost peer."""
        if self._closed.is_set():
            return
        self._closed.set()
        # Closing alone does not wake a thread that sits in accept() or recv().
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join(timeout=STALL_S)
        self._listener.close()
        peers = dict(self._peers)
        for connection in peers.values():
            with suppress(OSError):  # the receiver left by itself
                connection.shutdown(socket.SHUT_RDWR)
        for thread in peers:
            thread.join(timeout=STALL_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _elements(self, named_tensors: NamedTensors) -> Iterator[NamedElements]:
        pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
        for name, tensor in pairs:
            if self._dtype is not None and tensor.is_floating_point():
                tensor = tensor.detach().to(self._dtype)
            yield NamedElements(
                name=name,
                shape=tuple(tensor.shape),
                dtype=dtype_name(tensor.dtype),
                elements=elements_of(name, tensor),
            )

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed.is_set():
                    return
                logger.exception("cannot accept receivers; trying again")
                self._closed.wait(1.0)
                continue
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="rowen-publisher-peer", daemon=True
            )
            self._peers[thread] = connection
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._answer_or_refuse(connection)
        except PeerLostError:
            logger.debug("a receiver left")
        except WeightSyncError as error:
            logger.warning("gave up a receiver reason=%s detail=%s", error.code, error)
        except Exception:
            logger.exception("a receiver could not be served")
        finally:
            del self._peers[threading.current_thread()]

    def _answer_or_refuse(self, connection: socket.socket) -> None:
        try:
            if not self._places.acquire(blocking=False):
                raise PublisherBusyError(
                    f"{MAXIMUM_RECEIVERS} receivers are being served; try again"
                )
            try:
                self._answer(connection)
            finally:
                self._places.release()
        except WeightSyncError as error:
            if not isinstance(error, PeerLostError):
                refused = RefusedReply(code=error.code, reason=str(error))
                send_message(connection, refused, Deadline(PEER_DEADLINE_S))
            raise

    def _answer(self, connection: socket.socket) -> None:
        """Answer requests until the receiver leaves."""
        while not self._closed.is_set():
            deadline = Deadline(PEER_DEADLINE_S)
            request = receive_message(connection, REQUEST, REQUEST_BYTES, deadline)
            if isinstance(request, AskCatalogue):
                reply = CatalogueReply(catalogue=self._store.catalogue)
                send_message(connection, reply, deadline)
            elif isinstance(request, AskFrame):
                self._hand_out(connection, request)
            else:
                raise ProtocolError(f"{request.op!r} was not asked for")

    def _hand_out(self, connection: socket.socket, request: AskFrame) -> None:
        try:
            frame = self._store.frame(request.have, request.want)
        except (BaseUnknownError, ReplayError, VersionUnknownError) as error:
            # The receiver may ask for something else on the same connection.
            refused = RefusedReply(code=error.code, reason=str(error))
            send_message(connection, refused, Deadline(PEER_DEADLINE_S))
            return
        deadline = Deadline(PEER_DEADLINE_S)
        if frame is None:
            send_message(connection, HeldReply(), deadline)
            return
        send_message(connection, FrameReply(frame_bytes=len(frame)), deadline)
        answer = receive_message(connection, REQUEST, REQUEST_BYTES, deadline)
        if not isinstance(answer, SendFrame):
            raise ProtocolError(f"{answer.op!r} instead of a worker address")
        worker = answer.worker_address()
        port = UcxPort(loopback=self._loopback)
        try:
            port.send(worker, answer.tag, frame, connection, STALL_S, self._closed.is_set)
            answer = receive_message(connection, REQUEST, REQUEST_BYTES, Deadline(PEER_DEADLINE_S))
            if not isinstance(answer, FrameReceived):
                raise ProtocolError(f"{answer.op!r} instead of a receipt")
        finally:
            port.close()
