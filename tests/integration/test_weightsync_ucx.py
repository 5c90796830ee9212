"""Versions cross a real UCX transport between two processes, also when one of them dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from base64 import b64encode
from collections.abc import Iterator

import pytest
import torch

from rowen.weightsync.delta import unseal
from rowen.weightsync.errors import PeerLostError, TransferTimeoutError
from rowen.weightsync.fetch import PublisherClient, fetch
from rowen.weightsync.messages import (
    REPLY,
    AskFrame,
    Deadline,
    RefusedReply,
    SendFrame,
    receive_message,
    send_message,
)
from rowen.weightsync.publisher import Publisher
from rowen.weightsync.receive import Holding, check_base, decode

ELEMENTS = 24_000_000
"""48 MB as bf16 and hardly compressible: a dozen messages, so a transfer has a middle."""

PUBLISHER = """
    import sys, torch
    from rowen.weightsync.publisher import Publisher

    random = torch.Generator().manual_seed(3)
    first = torch.randint(-2**15, 2**15, ({elements},), dtype=torch.int16, generator=random)
    publisher = Publisher("m", {{"w": first}})
    second = first.clone()
    second[::200] += 1
    publisher.publish({{"w": second}}, version=1)
    print(publisher.address[1], flush=True)
    sys.stdin.read()
"""

Process = subprocess.Popen[str]


@pytest.fixture
def publisher() -> Iterator[tuple[Process, int]]:
    """A publisher in a process of its own, with versions 0 and 1, and its port."""
    script = textwrap.dedent(PUBLISHER.format(elements=ELEMENTS))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the publisher died while starting"
    yield process, int(line)
    process.kill()
    process.communicate()


def test_versions_cross_again_and_again_bit_by_bit(publisher: tuple[Process, int]) -> None:
    _, port = publisher
    threads = threading.active_count()
    for _ in range(3):
        with PublisherClient("127.0.0.1", port) as client:
            catalogue = client.catalogue()
            full = client.fetch(None, 1)
            step = client.fetch(Holding.of(catalogue).have, 1)
        assert full is not None
        assert step is not None
        (whole,) = decode(unseal(full), _no_base)
        base = whole.value_N.copy()
        base[::200] -= 1
        manifest = unseal(step).manifest
        assert check_base(manifest, Holding.of(catalogue)).chain == manifest.chain
        (update,) = decode(unseal(step), lambda _, index_N, held=base: held[index_N])
        assert update.index_N is not None
        base[update.index_N] = update.value_N
        assert (base == whole.value_N).all()
        assert len(step) < len(full) / 50
    assert threading.active_count() == threads


def _no_base(name: str, index_N: object) -> object:
    raise AssertionError(f"a full copy asked for the base of {name}")


@pytest.mark.parametrize("repetition", range(3))
def test_a_publisher_killed_in_the_middle_is_a_typed_error(
    publisher: tuple[Process, int], repetition: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, port = publisher
    chunks = _count_chunks(monkeypatch, lambda: os.kill(process.pid, signal.SIGKILL), repetition)
    with pytest.raises(PeerLostError):
        fetch("127.0.0.1", port, have=None, want_version=1)
    assert chunks


def test_a_publisher_that_stops_moving_runs_into_the_deadline(
    publisher: tuple[Process, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, port = publisher
    _count_chunks(monkeypatch, lambda: os.kill(process.pid, signal.SIGSTOP), 1)
    with pytest.raises(TransferTimeoutError):
        fetch("127.0.0.1", port, have=None, want_version=1, stall_s=1.0)


def test_a_publisher_that_does_not_answer_runs_into_the_deadline(
    publisher: tuple[Process, int],
) -> None:
    process, port = publisher
    os.kill(process.pid, signal.SIGSTOP)
    with PublisherClient("127.0.0.1", port, reply_deadline_s=0.5) as client:
        with pytest.raises(TransferTimeoutError):
            client.catalogue()
        os.kill(process.pid, signal.SIGCONT)
    assert fetch("127.0.0.1", port, have=None, want_version=1)


def _count_chunks(monkeypatch: pytest.MonkeyPatch, act: object, at: int) -> list[int]:
    """Call ``act`` when the receiver asks for its ``at``-th message."""
    from rowen.weightsync import ucx

    asked: list[int] = []
    original = ucx._array

    def counting(view: memoryview) -> object:
        if len(asked) == at:
            act()  # type: ignore[operator] # a callable without arguments
        asked.append(len(view))
        return original(view)

    monkeypatch.setattr(ucx, "_array", counting)
    return asked


def test_eight_receivers_at_once_all_arrive(publisher: tuple[Process, int]) -> None:
    _, port = publisher
    frames: list[bytes] = []

    def receive() -> None:
        with PublisherClient("127.0.0.1", port) as client:
            frame = client.fetch(Holding.of(client.catalogue()).have, 1)
        frames.append(bytes(frame or b""))

    threads = [threading.Thread(target=receive) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(frames) == 8
    assert len(set(frames)) == 1


def test_a_receiver_killed_in_the_middle_does_not_disturb_the_next() -> None:
    random = torch.Generator().manual_seed(3)
    weights = torch.randint(-(2**15), 2**15, (ELEMENTS,), dtype=torch.int16, generator=random)
    script = textwrap.dedent("""
        import os, signal, sys
        from rowen.weightsync import fetch, ucx
        original, asked = ucx._array, []
        def counting(view):
            if len(asked) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            asked.append(1)
            return original(view)
        ucx._array = counting
        fetch.fetch("127.0.0.1", int(sys.argv[1]), have=None, want_version=0)
    """)
    with Publisher("m", {"w": weights}) as publisher:
        port = str(publisher.address[1])
        for _ in range(2):
            died = subprocess.run([sys.executable, "-c", script, port], timeout=60, check=False)
            assert died.returncode == -signal.SIGKILL
        assert fetch(*publisher.address, have=None, want_version=0)


def test_a_trainer_that_exits_without_closing_does_not_hang() -> None:
    script = textwrap.dedent("""
        import torch
        from rowen.weightsync.fetch import fetch
        from rowen.weightsync.publisher import Publisher
        publisher = Publisher("m", {"w": torch.zeros(1000)})
        assert fetch(*publisher.address, have=None, want_version=0)
    """)
    ended = subprocess.run(
        [sys.executable, "-c", script], timeout=60, check=False, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_worker_address_that_is_none_does_not_bring_the_trainer_down() -> None:
    with Publisher("m", {"w": torch.zeros(1000)}) as publisher:
        for worker in ("", "eA==", "no base64", b64encode(bytes(200)).decode()):
            with socket.create_connection(publisher.address) as connection:
                deadline = Deadline(20)
                send_message(connection, AskFrame(have=None, want=0), deadline)
                receive_message(connection, REPLY, 1 << 20, deadline)
                message = SendFrame(worker=worker, worker_sha256="0" * 64, tag=1)
                send_message(connection, message, deadline)
                reply = receive_message(connection, REPLY, 1 << 20, deadline)
                assert isinstance(reply, RefusedReply)
                assert "worker address" in reply.reason
        assert fetch(*publisher.address, have=None, want_version=0)
