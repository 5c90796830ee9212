"""What a version of a model *is*: names, shapes, dtypes, checksums, and its place in a chain.

The chain binds every version to all before it, and to the weights rather than to the way they
were sent: a receiver that went 0 → 1 → 2 and one that took a merged 0 → 2 hold the same chain
hash, and hold it only if every tensor of the model has the bits that the publisher had.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from rowen.weightsync.errors import ModelMismatchError

Hex128 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
"""An xxh3-128: guards against accidents, not against an attacker."""
Hex256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256."""

ITEM_BYTES: Final[dict[str, int]] = {
    **dict.fromkeys(("bool", "uint8", "int8"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"), 1),
    **dict.fromkeys(("bfloat16", "float16", "int16", "uint16"), 2),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float64", "int64", "uint64"), 8),
}
"""Bytes per element of every dtype that may be published."""


class Document(BaseModel):
    """Base of all that goes over a wire: nothing unknown, nothing changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorState(Document):
    """One tensor of one version, in checkpoint coordinates."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    dtype: str
    xxh3_128: Hex128

    @property
    def elements(self) -> int:
        """Number of elements; a scalar has one."""
        return math.prod(self.shape)

    def same_form(self, other: TensorState) -> bool:
        """Equal name, shape and dtype, whatever the values."""
        return (self.name, self.shape, self.dtype) == (other.name, other.shape, other.dtype)


class Link(Document):
    """One step of the chain: a version and the digest of all its tensors."""

    version: Annotated[int, Field(ge=0)]
    state: Hex256


class Have(Document):
    """What a receiver holds and has verified."""

    version: Annotated[int, Field(ge=0)]
    chain: Hex256


class Catalogue(Document):
    """Version 0 of a model, the anchor of its chain: every tensor, unchanged ones too."""

    format: Literal["rowen.catalogue/1"] = "rowen.catalogue/1"
    model_id: str
    tensors: tuple[TensorState, ...]

    @property
    def link(self) -> Link:
        """The chain's first link."""
        return Link(version=0, state=state_hash(self.tensors))

    @property
    def chain(self) -> str:
        """The chain hash of version 0."""
        return chain_hash(root_hash(self.model_id), [self.link])

    def indexed(self) -> dict[str, TensorState]:
        """Tensors by name.

        Raises:
            ModelMismatchError: a name occurs twice or a dtype is unknown.
        """
        by_name = {tensor.name: tensor for tensor in self.tensors}
        if len(by_name) != len(self.tensors):
            raise ModelMismatchError(f"the catalogue of {self.model_id!r} names a tensor twice")
        unknown = sorted({tensor.dtype for tensor in self.tensors} - ITEM_BYTES.keys())
        if unknown:
            raise ModelMismatchError(f"the catalogue of {self.model_id!r} has dtypes {unknown}")
        return by_name

    @classmethod
    def of(cls, model_id: str, tensors: Iterable[TensorState]) -> Self:
        """Build from tensors in any order."""
        return cls(model_id=model_id, tensors=tuple(sorted(tensors, key=lambda each: each.name)))


def state_hash(tensors: Iterable[TensorState]) -> str:
    """SHA-256 over every tensor's name, dtype, shape and checksum, in the order of names."""
    digest = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda each: each.name):
        line = [tensor.name, tensor.dtype, list(tensor.shape), tensor.xxh3_128]
        digest.update(json.dumps(line, separators=(",", ":")).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def root_hash(model_id: str) -> str:
    """Where a model's chain begins, before version 0."""
    return hashlib.sha256(f"rowen.chain/1\n{model_id}".encode()).hexdigest()


def chain_hash(previous: str, links: Iterable[Link]) -> str:
    """Continue a chain hash over further versions."""
    for link in links:
        line = f"{previous}\n{link.version}\n{link.state}"
        previous = hashlib.sha256(line.encode()).hexdigest()
    return previous


def with_changes(
    tensors: Mapping[str, TensorState], results: Iterable[TensorState]
) -> dict[str, TensorState]:
    """The tensors of the next version: those that changed replaced, the others kept."""
    return {**tensors, **{result.name: result for result in results}}
