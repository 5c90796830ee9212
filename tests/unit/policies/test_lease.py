"""The lease document."""

from __future__ import annotations

import json

import pytest

from rowen.policies.lease import (
    DEFAULT_LEASE_MS,
    EngineId,
    EngineKind,
    EngineLease,
    Grant,
    LeaseError,
    decode_lease,
    encode_lease,
    epoch_key,
    lease_key,
)

LEASE = EngineLease(
    engine_id=EngineId("node-1.rollout"),
    url="http://127.0.0.1:8001",
    kind=EngineKind.OPPORTUNISTIC,
    model="rowen",
    node="node-1",
    grant=Grant.THROTTLED,
    fencing_epoch=3,
    sequence_cap=0,
)


def test_a_lease_reads_back_as_it_was_written() -> None:
    assert decode_lease(encode_lease(LEASE)) == LEASE
    assert decode_lease(encode_lease(LEASE).encode()) == LEASE
    assert LEASE.lease_ms == DEFAULT_LEASE_MS


def test_the_wire_form_is_plain_json_with_plain_words() -> None:
    assert json.loads(encode_lease(LEASE)) == {
        "engine_id": "node-1.rollout",
        "url": "http://127.0.0.1:8001",
        "kind": "opportunistic",
        "model": "rowen",
        "node": "node-1",
        "grant": "throttled",
        "fencing_epoch": 3,
        "sequence_cap": 0,
        "lease_ms": 2000,
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("grant", "yes"),
        ("fencing_epoch", 0),
        ("sequence_cap", -1),
        ("url", "ftp://host"),
        ("engine_id", "a b"),
        ("surprise", 1),
    ],
)
def test_a_document_that_is_no_lease_is_refused_by_field(field: str, value: object) -> None:
    stored = json.dumps(LEASE.model_dump(mode="json") | {field: value})
    with pytest.raises(LeaseError, match=f"lease: {field}: "):
        decode_lease(stored)


@pytest.mark.parametrize("stored", ["", "[]", "null", "{", b"\xff"])
def test_garbage_is_refused(stored: str | bytes) -> None:
    with pytest.raises(LeaseError, match="lease: "):
        decode_lease(stored)


def test_the_keys_are_those_of_the_contract() -> None:
    assert lease_key("e") == "rowen:lease:e"
    assert epoch_key("e") == "rowen:epoch:e"
