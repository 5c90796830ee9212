"""From a delta's bytes to the absolute values to write, refusing all that does not fit the base.

Called by the engine's weight backend (and by anything else that holds a model).  Nothing here
writes weights: the caller gets indices and values, writes them, and proves the result with
`check_result`.  So every refusal leaves the receiver exactly as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from rowen.weightsync.codec import Index, absolute_values, decode_dense, decode_gaps
from rowen.weightsync.delta import Delta, Manifest
from rowen.weightsync.elements import Elements
from rowen.weightsync.errors import ChecksumError, ModelMismatchError, ReplayError, WrongBaseError
from rowen.weightsync.versions import (
    ITEM_BYTES,
    Catalogue,
    Have,
    TensorState,
    chain_hash,
    root_hash,
    state_hash,
    with_changes,
)


@dataclass(frozen=True, slots=True)
class Holding:
    """A version that a receiver holds, verified: every tensor's checksum is known."""

    model_id: str
    version: int
    chain: str
    tensors: Mapping[str, TensorState]

    @property
    def have(self) -> Have:
        """What to tell a publisher."""
        return Have(version=self.version, chain=self.chain)

    @classmethod
    def of(cls, catalogue: Catalogue) -> Holding:
        """Version 0, for a receiver whose tensors have been compared with the catalogue."""
        return cls(catalogue.model_id, 0, catalogue.chain, catalogue.indexed())


class ReadsBase(Protocol):
    """Gives the base's elements at flat positions of one tensor."""

    def __call__(self, name: str, index_N: Index) -> Elements: ...


@dataclass(frozen=True, slots=True)
class TensorUpdate:
    """Absolute values for one tensor: at ``index_N``, or all of them when that is None."""

    result: TensorState
    index_N: Index | None
    value_N: Elements


def check_base(manifest: Manifest, holding: Holding | None) -> Holding:
    """Refuse a delta that does not lead on from what is held; return what would be held after it.

    Args:
        manifest: of a delta that `unseal` accepted.
        holding: what the receiver has verified, or None when it knows nothing; then only a full
            copy is accepted.

    Raises:
        ReplayError: the delta ends at or before the held version of the same base.
        WrongBaseError: the delta starts from another version or another chain.
        ModelMismatchError: the delta changes names, shapes or dtypes, or belongs to another model.
        ChecksumError: the links do not lead to the chain hash, or the tensors not to the state.
        Nothing was changed by any of them.
    """
    previous = _previous_chain(manifest, holding)
    results = [tensor.result for tensor in manifest.tensors]
    if manifest.is_full:
        if holding is not None:
            _check_full_form(manifest, holding)
        tensors = {result.name: result for result in results}
    else:
        assert holding is not None  # _previous_chain refused otherwise
        for result in results:
            _check_form(result, holding.tensors)
        tensors = with_changes(holding.tensors, results)
    if chain_hash(previous, manifest.links) != manifest.chain:
        raise ChecksumError(f"the links of version {manifest.version} do not give its chain hash")
    if state_hash(tensors.values()) != manifest.links[-1].state:
        raise ChecksumError(f"the tensors of version {manifest.version} do not give its state")
    return Holding(manifest.model_id, manifest.version, manifest.chain, tensors)


def decode(delta: Delta, read_base: ReadsBase) -> Iterator[TensorUpdate]:
    """Decode every section of a delta whose base `check_base` accepted.

    Raises:
        MalformedDeltaError: a section cannot be decoded.  Nothing was changed, if the caller
            collects all updates before it writes the first one.
    """
    for tensor, section in delta.sections():
        result = tensor.result
        item_bytes = ITEM_BYTES[result.dtype]
        if tensor.codec == "dense":
            dense = decode_dense(section, elements=result.elements, item_bytes=item_bytes)
            yield TensorUpdate(result, None, dense)
            continue
        change = decode_gaps(
            section, changed=tensor.changed, elements=result.elements, item_bytes=item_bytes
        )
        base_N = read_base(result.name, change.index_N)
        yield TensorUpdate(result, change.index_N, absolute_values(base_N, change.difference_N))


def check_result(result: TensorState, digest: str) -> None:
    """Refuse a written tensor whose checksum is not the announced one.

    Raises:
        ChecksumError: the tensor was written but is wrong; the caller has to undo it.
    """
    if digest != result.xxh3_128:
        raise ChecksumError(
            f"{result.name!r} has checksum {digest} after the update instead of {result.xxh3_128}"
        )


def _previous_chain(manifest: Manifest, holding: Holding | None) -> str:
    if manifest.is_full:
        return root_hash(manifest.model_id)
    assert manifest.base_chain is not None  # unseal refuses a base version without its chain
    if holding is None:
        raise WrongBaseError(
            f"version {manifest.version} needs base {manifest.base_version}, and no base is "
            "verified here; fetch a full copy"
        )
    if (manifest.base_version, manifest.base_chain) != (holding.version, holding.chain):
        if manifest.version <= holding.version:
            raise ReplayError(
                f"version {manifest.version} is not newer than version {holding.version} held here"
            )
        raise WrongBaseError(
            f"version {manifest.version} needs base {manifest.base_version} of chain "
            f"{manifest.base_chain[:12]}, held is {holding.version} of chain {holding.chain[:12]}; "
            "fetch from the held version or a full copy"
        )
    if manifest.model_id != holding.model_id:
        raise ModelMismatchError(
            f"version {manifest.version} is of model {manifest.model_id!r}, held is "
            f"{holding.model_id!r}"
        )
    return manifest.base_chain


def _check_form(result: TensorState, held: Mapping[str, TensorState]) -> None:
    known = held.get(result.name)
    if known is None:
        raise ModelMismatchError(f"the delta has tensor {result.name!r}, which the model has not")
    if not known.same_form(result):
        raise ModelMismatchError(
            f"{result.name!r} is {result.dtype}{list(result.shape)} in the delta and "
            f"{known.dtype}{list(known.shape)} in the model"
        )


def _check_full_form(manifest: Manifest, holding: Holding) -> None:
    for tensor in manifest.tensors:
        _check_form(tensor.result, holding.tensors)
    missing = holding.tensors.keys() - {tensor.result.name for tensor in manifest.tensors}
    if missing:
        raise ModelMismatchError(f"a full copy lacks {len(missing)} tensors, as {min(missing)!r}")
