"""One delta as one run of bytes: a manifest (JSON, checked by SHA-256) and the sections it names.

::

    magic 8 | manifest bytes u64 | SHA-256 of the manifest 32 | manifest, zstd | sections

The same bytes travel over UCX and may lie in a file.  No pickle; nothing is executed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import xxhash
import zstandard
from pydantic import Field, StringConstraints, ValidationError

from rowen.weightsync.codec import CodecName
from rowen.weightsync.errors import ChecksumError, MalformedDeltaError
from rowen.weightsync.versions import (
    ITEM_BYTES,
    Document,
    Hex256,
    Link,
    TensorState,
)

Hex64 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]

MAXIMUM_MANIFEST_BYTES: Final = 256 << 20
"""A manifest line is about 300 bytes, so this is a model of nearly a million tensors."""

_MAGIC: Final = b"ROWNDLT1"
_HEAD = struct.Struct("<8sQ32s")


class TensorDelta(Document):
    """One changed tensor: where its section lies, what it is checked with, what it must give."""

    result: TensorState
    codec: CodecName
    changed: Annotated[int, Field(ge=0)]
    offset: Annotated[int, Field(ge=0)]
    section_bytes: Annotated[int, Field(ge=0)]
    section_xxh3_64: Hex64


class Manifest(Document):
    """What a delta leads from and to."""

    format: Literal["rowen.delta/1"] = "rowen.delta/1"
    model_id: str
    version: Annotated[int, Field(ge=0)]
    chain: Hex256
    """The chain hash that the receiver must arrive at."""
    base_version: int | None
    """None in a full copy."""
    base_chain: Hex256 | None
    links: tuple[Link, ...]
    """The versions after the base up to this one; from version 0 on in a full copy."""
    tensors: tuple[TensorDelta, ...]
    payload_bytes: Annotated[int, Field(ge=0)]

    @property
    def is_full(self) -> bool:
        """A copy of all tensors, for a receiver whose base is unknown or lost."""
        return self.base_version is None


@dataclass(frozen=True, slots=True)
class Section:
    """A coded tensor on its way into a delta."""

    result: TensorState
    codec: CodecName
    changed: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Delta:
    """A delta whose structure and checksums hold; whether its base does is not known yet."""

    manifest: Manifest
    payload: memoryview

    def sections(self) -> Iterator[tuple[TensorDelta, memoryview]]:
        """Each changed tensor with its bytes."""
        for tensor in self.manifest.tensors:
            yield tensor, self.payload[tensor.offset : tensor.offset + tensor.section_bytes]


def seal(
    *,
    model_id: str,
    base_version: int | None,
    base_chain: str | None,
    links: Sequence[Link],
    chain: str,
    sections: Sequence[Section],
) -> tuple[Manifest, bytes]:
    """Put sections and their manifest together."""
    tensors: list[TensorDelta] = []
    offset = 0
    for section in sections:
        tensors.append(
            TensorDelta(
                result=section.result,
                codec=section.codec,
                changed=section.changed,
                offset=offset,
                section_bytes=len(section.data),
                section_xxh3_64=xxhash.xxh3_64_hexdigest(section.data),
            )
        )
        offset += len(section.data)
    manifest = Manifest(
        model_id=model_id,
        version=links[-1].version,
        chain=chain,
        base_version=base_version,
        base_chain=base_chain,
        links=tuple(links),
        tensors=tuple(tensors),
        payload_bytes=offset,
    )
    encoded = zstandard.ZstdCompressor(level=3).compress(manifest.model_dump_json().encode())
    head = _HEAD.pack(_MAGIC, len(encoded), hashlib.sha256(encoded).digest())
    return manifest, b"".join((head, encoded, *(section.data for section in sections)))


def unseal(frame: bytes | bytearray | memoryview) -> Delta:
    """Check everything about a delta that needs no base: lengths, checksums, manifest, order.

    Raises:
        MalformedDeltaError: truncated, foreign, or a manifest that contradicts itself.
        ChecksumError: the manifest or a section is not what was sent.
        Nothing was changed by either.
    """
    view = memoryview(frame).toreadonly()
    if len(view) < _HEAD.size:
        raise MalformedDeltaError(f"a delta of {len(view)} bytes is shorter than its head")
    magic, manifest_bytes, expected = _HEAD.unpack_from(view)
    if magic != _MAGIC:
        raise MalformedDeltaError("these bytes are no delta of format rowen.delta/1")
    start = _HEAD.size + manifest_bytes
    if manifest_bytes > MAXIMUM_MANIFEST_BYTES or start > len(view):
        raise MalformedDeltaError("a delta ends inside its manifest")
    encoded = view[_HEAD.size : start]
    if hashlib.sha256(encoded).digest() != expected:
        raise ChecksumError("a delta's manifest does not have its checksum")
    manifest = _read_manifest(encoded)
    payload = view[start:]
    _check_structure(manifest, len(payload))
    delta = Delta(manifest, payload)
    for tensor, section in delta.sections():
        if xxhash.xxh3_64_hexdigest(section) != tensor.section_xxh3_64:
            raise ChecksumError(f"the section of {tensor.result.name!r} is not what was sent")
    return delta


def _read_manifest(encoded: memoryview) -> Manifest:
    try:
        if not 0 <= zstandard.frame_content_size(encoded) <= MAXIMUM_MANIFEST_BYTES:
            raise MalformedDeltaError("a delta's manifest does not say its size or is too large")
        return Manifest.model_validate_json(zstandard.ZstdDecompressor().decompress(encoded))
    except (zstandard.ZstdError, ValidationError) as error:
        raise MalformedDeltaError(f"a delta's manifest is not valid: {error}") from error


def _check_structure(manifest: Manifest, payload_bytes: int) -> None:
    if manifest.payload_bytes != payload_bytes:
        raise MalformedDeltaError(
            f"a delta announces {manifest.payload_bytes} payload bytes and has {payload_bytes}"
        )
    if (manifest.base_version is None) != (manifest.base_chain is None):
        raise MalformedDeltaError("a delta names only one of base version and base chain")
    earlier = -1 if manifest.base_version is None else manifest.base_version
    for link in manifest.links:
        if link.version <= earlier:
            raise MalformedDeltaError("a delta's links do not ascend")
        earlier = link.version
    if not manifest.links or earlier != manifest.version:
        raise MalformedDeltaError("a delta's links do not end at its version")
    offset = 0
    for tensor in manifest.tensors:
        if tensor.offset != offset:
            raise MalformedDeltaError(f"the section of {tensor.result.name!r} is out of place")
        offset += tensor.section_bytes
        _check_tensor(tensor, is_full=manifest.is_full)
    if offset != payload_bytes:
        raise MalformedDeltaError("a delta's sections do not fill its payload")
    if len({tensor.result.name for tensor in manifest.tensors}) != len(manifest.tensors):
        raise MalformedDeltaError("a delta names a tensor twice")


def _check_tensor(tensor: TensorDelta, *, is_full: bool) -> None:
    name, elements = tensor.result.name, tensor.result.elements
    if tensor.result.dtype not in ITEM_BYTES:
        raise MalformedDeltaError(f"{name!r} has the unknown dtype {tensor.result.dtype!r}")
    if tensor.changed > elements or (tensor.codec == "dense" and tensor.changed != elements):
        raise MalformedDeltaError(f"{name!r} changes {tensor.changed} of {elements} elements")
    if is_full and tensor.codec != "dense":
        raise MalformedDeltaError(f"{name!r} needs a base inside a full copy")
