"""One tensor's change to bytes and back, bit-exact for every bit pattern.

A section of a delta is a few *planes*: arrays of bytes that are alike, each compressed by itself.

``gaps`` codes the changed elements: the gap to the one before it (in elements skipped) and the
integer difference new - old (mod 2^bits, zigzag: ±1 become 2 and 1; nine of ten changes of a bf16
weight are ±1 ulp).

* plane 0: the low byte of the gap; nearly uniform at 0.5 % density, so it is stored as it is,
* plane 1: what is left of the gap (high nibble) and the difference (low nibble), 15 meaning "see
  the escapes".  Both have under two bits of entropy, and one Huffman symbol for the two loses half
  of what two symbols would (measured: 1.37 against 1.47 bytes per changed element),
* then the escapes of both, as byte planes from the lowest up.

``dense`` codes all elements, as byte planes: the fallback when a delta does not pay.

What the receiver writes is absolute: `absolute_values` adds the differences to the verified base.
Pure: no I/O, no state.  Decoding trusts nothing: every length is checked before memory is taken.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import zstandard

from rowen.weightsync.elements import UNSIGNED, Elements
from rowen.weightsync.errors import MalformedDeltaError

CodecName = Literal["gaps", "dense"]
Index = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

MAXIMUM_ELEMENTS: Final = 2**32 - 1
"""Elements of one tensor: a plane's stored length is 32 bits."""

_ESCAPE: Final = 15
_LEVEL: Final = 1
"""zstd's level; level 3 came out larger on these planes (fewer literals for the entropy coder)."""
_PLANE = struct.Struct("<I")  # stored bytes of a plane; equal to its length means "as it is"
_HEADER = struct.Struct("<IIBB")  # gap escapes, value escapes, and the byte planes of each


@dataclass(frozen=True, slots=True)
class SparseChange:
    """Decoded ``gaps``: ``index_N`` (int64, sorted, unique) and ``difference_N`` (unsigned)."""

    index_N: Index
    difference_N: Elements


def encode_gaps(index_N: Index, old_N: Elements, new_N: Elements) -> bytes:
    """Code the elements at ``index_N`` (sorted, unique) that change from old to new.

    ``old_N`` and ``new_N`` have one unsigned type and the length of ``index_N``.
    """
    gap_N = np.diff(index_N, prepend=-1) - 1
    rest_N = gap_N >> 8
    zigzag_N = _zigzag(new_N - old_N)
    gap_escapes = rest_N[rest_N >= _ESCAPE].astype(np.uint64)
    value_escapes = zigzag_N[zigzag_N >= _ESCAPE]
    symbol_N = np.minimum(rest_N, _ESCAPE).astype(np.uint8) << np.uint8(4)
    symbol_N |= np.minimum(zigzag_N, _ESCAPE).astype(np.uint8)
    gap_planes, value_planes = _byte_planes(gap_escapes), _byte_planes(value_escapes)
    planes = [(gap_N & 0xFF).astype(np.uint8), symbol_N, *gap_planes, *value_planes]
    header = _HEADER.pack(gap_escapes.size, value_escapes.size, len(gap_planes), len(value_planes))
    return header + _pack_planes(planes)


def decode_gaps(
    section: memoryview, *, changed: int, elements: int, item_bytes: int
) -> SparseChange:
    """Decode what `encode_gaps` made.

    Args:
        section: the bytes, already checked against their checksum.
        changed: how many elements the manifest says it holds (N).
        elements: elements of the tensor; every index is below.
        item_bytes: 1, 2, 4 or 8.

    Raises:
        MalformedDeltaError: lengths do not agree or an index lies outside.  Nothing was changed.
    """
    if len(section) < _HEADER.size or changed > elements:
        raise MalformedDeltaError("a section is shorter than its header or longer than its tensor")
    gap_count, value_count, gap_plane_count, value_plane_count = _HEADER.unpack_from(section)
    if max(gap_count, value_count) > changed or gap_plane_count > 8:
        raise MalformedDeltaError("a section has more escapes than changed elements")
    if value_plane_count > item_bytes:
        raise MalformedDeltaError("a section has more byte planes than its elements have bytes")
    lengths = [changed, changed, *[gap_count] * gap_plane_count, *[value_count] * value_plane_count]
    planes = _unpack_planes(section[_HEADER.size :], lengths)
    low_N, symbol_N = planes[0], planes[1]
    rest_N = (symbol_N >> np.uint8(4)).astype(np.int64)
    zigzag_N = (symbol_N & np.uint8(_ESCAPE)).astype(UNSIGNED[item_bytes])
    gap_escapes = _join_planes(planes[2 : 2 + gap_plane_count], gap_count, 8)
    if np.any(gap_escapes > MAXIMUM_ELEMENTS):
        raise MalformedDeltaError("a section skips more elements than a tensor can have")
    _fill_escapes(rest_N, gap_escapes.astype(np.int64))
    _fill_escapes(zigzag_N, _join_planes(planes[2 + gap_plane_count :], value_count, item_bytes))
    index_N = np.cumsum((rest_N << 8) + low_N + 1) - 1
    if changed and not 0 <= int(index_N[-1]) < elements:
        raise MalformedDeltaError("a section addresses an element outside its tensor")
    return SparseChange(index_N, _unzigzag(zigzag_N))


def encode_dense(new: Elements) -> bytes:
    """Code all elements of a tensor."""
    return _pack_planes(_byte_planes(new, keep_empty=True))


def decode_dense(section: memoryview, *, elements: int, item_bytes: int) -> Elements:
    """Decode what `encode_dense` made; the result is a new array of ``elements``.

    Raises:
        MalformedDeltaError: the lengths do not agree.  Nothing was changed.
    """
    planes = _unpack_planes(section, [elements] * item_bytes)
    return _join_planes(planes, elements, item_bytes)


def absolute_values(base_N: Elements, difference_N: Elements) -> Elements:
    """The values to write, given the verified base's values at the same positions."""
    value_N: Elements = base_N + difference_N  # unsigned arrays wrap
    return value_N


def _zigzag(difference_N: Elements) -> Elements:
    one = difference_N.dtype.type(1)
    sign_N = difference_N >> difference_N.dtype.type(8 * difference_N.itemsize - 1)
    zigzag_N: Elements = (difference_N << one) ^ (np.zeros_like(sign_N) - sign_N)
    return zigzag_N


def _unzigzag(zigzag_N: Elements) -> Elements:
    one = zigzag_N.dtype.type(1)
    difference_N: Elements = (zigzag_N >> one) ^ (np.zeros_like(zigzag_N) - (zigzag_N & one))
    return difference_N


def _byte_planes(values: Elements, *, keep_empty: bool = False) -> list[Bytes]:
    """Byte planes from the lowest up, without the highest ones that are all zero."""
    planes = [
        np.ascontiguousarray(values.view(np.uint8)[offset :: values.itemsize])
        for offset in range(values.itemsize)
    ]
    while planes and not keep_empty and not planes[-1].any():
        planes.pop()
    return planes


def _join_planes(planes: list[Bytes], count: int, item_bytes: int) -> Elements:
    joined = np.zeros((count, item_bytes), np.uint8)
    for offset, plane in enumerate(planes):
        joined[:, offset] = plane
    return joined.reshape(-1).view(UNSIGNED[item_bytes])


def _fill_escapes(values_N: Elements | Index, escapes: Elements | Index) -> None:
    places = np.flatnonzero(values_N == _ESCAPE)
    if places.size != escapes.size:
        raise MalformedDeltaError("a section has another number of escapes than it announces")
    values_N[places] = escapes


def _pack_planes(planes: list[Bytes]) -> bytes:
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)
    parts: list[bytes] = []
    for plane in planes:
        stored = compressor.compress(plane.data)
        if len(stored) >= plane.size:
            stored = plane.tobytes()
        parts += (_PLANE.pack(len(stored)), stored)
    return b"".join(parts)


def _unpack_planes(section: memoryview, lengths: list[int]) -> list[Bytes]:
    planes: list[Bytes] = []
    offset = 0
    for length in lengths:
        if offset + _PLANE.size > len(section):
            raise MalformedDeltaError("a section ends inside a plane's header")
        (stored,) = _PLANE.unpack_from(section, offset)
        offset += _PLANE.size
        if offset + stored > len(section):
            raise MalformedDeltaError("a section ends inside a plane")
        planes.append(_unpack_plane(section[offset : offset + stored], length))
        offset += stored
    if offset != len(section):
        raise MalformedDeltaError(f"a section has {len(section) - offset} bytes too many")
    return planes


def _unpack_plane(stored: memoryview, length: int) -> Bytes:
    if len(stored) == length:
        return np.frombuffer(stored, np.uint8)
    try:
        if zstandard.frame_content_size(stored) != length:
            raise MalformedDeltaError("a plane does not have the length that the manifest gives it")
        plane = zstandard.ZstdDecompressor().decompress(stored, max_output_size=length)
    except zstandard.ZstdError as error:
        raise MalformedDeltaError(f"a plane is no zstd frame: {error}") from error
    return np.frombuffer(plane, np.uint8)
