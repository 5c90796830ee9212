"""The publisher takes a trainer's tensors as they come, and speaks only where it was told to."""

from __future__ import annotations

import socket

import pytest
import torch

from rowen.weightsync.errors import (
    PeerLostError,
    ProtocolError,
    PublisherUnreachableError,
    UnsupportedTensorError,
    VersionUnknownError,
)
from rowen.weightsync.fetch import PublisherClient
from rowen.weightsync.messages import (
    REPLY,
    AskFrame,
    Deadline,
    FrameReceived,
    receive_message,
    send_message,
)
from rowen.weightsync.publisher import Publisher


def weights(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a": torch.full((4, 8), value), "b": torch.arange(6, dtype=torch.int64)}


def test_float_tensors_are_rounded_to_the_engines_dtype_and_integers_kept() -> None:
    with Publisher("m", weights(), dtype=torch.bfloat16) as publisher:
        assert publisher.publish(weights(1.0 + 1e-6), version=1).changed == 0
        published = publisher.publish(weights(1.0 + 2**-7), version=7)
        assert (published.base_version, published.version, published.changed) == (1, 7, 32)
        assert published.full_bytes == 4 * 8 * 2 + 6 * 8
        assert publisher.newest_version == 7
        assert published.manifest.tensors[0].result.dtype == "bfloat16"


def test_tensors_may_change_after_publish_returns() -> None:
    tensors = weights()
    with Publisher("m", tensors) as publisher:
        tensors["a"].fill_(2.0)
        assert publisher.publish(tensors, version=1).changed == 32
        tensors["a"].fill_(3.0)
        assert publisher.publish(weights(2.0), version=2).changed == 0


def test_views_of_any_layout_are_published_as_the_tensor_they_show() -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    with Publisher("m", {"t": base.t()}) as publisher:
        assert publisher.publish({"t": base.t().contiguous()}, version=1).changed == 0


def test_tensors_that_cannot_be_published_are_named() -> None:
    with pytest.raises(UnsupportedTensorError, match="'s' is sharded, sparse"):
        Publisher("m", {"s": torch.eye(3).to_sparse()})
    with pytest.raises(UnsupportedTensorError, match="16-byte elements"):
        Publisher("m", {"c": torch.zeros(2, dtype=torch.complex128)})


def test_it_listens_on_loopback_only_and_frees_its_port() -> None:
    publisher = Publisher("m", weights())
    host, port = publisher.address
    assert host == "127.0.0.1"
    with PublisherClient(host, port) as client:
        assert [tensor.name for tensor in client.catalogue().tensors] == ["a", "b"]
    publisher.close()
    publisher.close()
    with pytest.raises(PublisherUnreachableError, match=f"{host}:{port}"):
        PublisherClient(host, port)
    with socket.create_server((host, port)):
        pass


def test_a_refusal_arrives_as_the_error_it_is_and_the_publisher_lives_on() -> None:
    with Publisher("m", weights()) as publisher:
        with PublisherClient(*publisher.address) as client, pytest.raises(VersionUnknownError):
            client.fetch(None, 5)
        with socket.create_connection(publisher.address) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            connection.settimeout(10)
            assert b"refused" in connection.recv(4096)
        with socket.create_connection(publisher.address) as connection:
            send_message(connection, FrameReceived(), Deadline(10))
            reply = receive_message(connection, REPLY, 1 << 20, Deadline(10))
            assert reply.kind == "refused"
            assert reply.code == ProtocolError.code
        with PublisherClient(*publisher.address) as client:
            assert client.catalogue() == publisher._store.catalogue


def test_a_receiver_that_leaves_in_the_middle_does_no_harm() -> None:
    with Publisher("m", weights()) as publisher:
        with socket.create_connection(publisher.address) as connection:
            send_message(connection, AskFrame(have=None, want=0), Deadline(10))
        with PublisherClient(*publisher.address) as client:
            assert client.catalogue().model_id == "m"


def test_a_publisher_that_closes_is_a_lost_peer() -> None:
    publisher = Publisher("m", weights())
    with PublisherClient(*publisher.address) as client:
        client.catalogue()
        publisher.close()
        with pytest.raises(PeerLostError):
            client.catalogue()
