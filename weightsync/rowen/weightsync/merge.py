"""Several deltas in a row as one, without the weights: integer differences simply add up.

Lets a receiver that is k versions behind move each changed element once.  Pure: no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rowen.weightsync.codec import (
    Index,
    SparseChange,
    decode_dense,
    decode_gaps,
    encode_dense,
    encode_gaps,
)
from rowen.weightsync.delta import Delta, Section
from rowen.weightsync.elements import Elements
from rowen.weightsync.versions import ITEM_BYTES, TensorState


@dataclass(frozen=True, slots=True)
class _Whole:
    """A tensor that some delta replaced as a whole."""

    values: Elements


def merge(
    deltas: Sequence[Delta],
    base: Mapping[str, TensorState],
    result: Mapping[str, TensorState],
) -> list[Section]:
    """Merge deltas that follow one another into the sections of one delta.

    Args:
        deltas: in order; the first leads on from ``base``, the last arrives at ``result``.
        base: the tensors before.
        result: the tensors after.

    Returns:
        One section per tensor whose checksum differs between base and result, in name order.
    """
    merged: dict[str, SparseChange | _Whole] = {}
    for delta in deltas:
        for tensor, section in delta.sections():
            name, elements = tensor.result.name, tensor.result.elements
            item_bytes = ITEM_BYTES[tensor.result.dtype]
            if tensor.codec == "dense":
                merged[name] = _Whole(
                    decode_dense(section, elements=elements, item_bytes=item_bytes)
                )
                continue
            change = decode_gaps(
                section, changed=tensor.changed, elements=elements, item_bytes=item_bytes
            )
            merged[name] = _add(merged.get(name), change)
    return [
        _section(result[name], merged[name])
        for name in sorted(merged)
        if result[name] != base[name]
    ]


def _add(earlier: SparseChange | _Whole | None, later: SparseChange) -> SparseChange | _Whole:
    if earlier is None:
        return later
    if isinstance(earlier, _Whole):
        earlier.values[later.index_N] += later.difference_N
        return earlier
    index = np.concatenate((earlier.index_N, later.index_N))
    difference = np.concatenate((earlier.difference_N, later.difference_N))
    order = np.argsort(index, kind="stable")
    index, difference = index[order], difference[order]
    first = np.flatnonzero(np.diff(index, prepend=-1))
    if not first.size:
        return earlier
    total = np.add.reduceat(difference, first, dtype=difference.dtype)  # wraps, as it must
    kept = total != 0
    return SparseChange(index[first][kept], total[kept])


def _section(result: TensorState, change: SparseChange | _Whole) -> Section:
    if isinstance(change, _Whole):
        return whole_section(result, change.values)
    nothing = np.zeros_like(change.difference_N)
    return changed_section(result, change.index_N, nothing, change.difference_N)


def whole_section(result: TensorState, values: Elements) -> Section:
    """A section that replaces all elements of a tensor."""
    return Section(result, "dense", values.size, encode_dense(values))


def changed_section(
    result: TensorState, index_N: Index, old_N: Elements, new_N: Elements
) -> Section:
    """A section that changes the elements at ``index_N`` from ``old_N`` to ``new_N``."""
    return Section(result, "gaps", int(index_N.size), encode_gaps(index_N, old_N, new_N))
