"""The codec gives back every bit pattern, and refuses bytes that are not its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rowen.weightsync.codec import (
    absolute_values,
    decode_dense,
    decode_gaps,
    encode_dense,
    encode_gaps,
)
from rowen.weightsync.elements import UNSIGNED, Elements, changed_positions
from rowen.weightsync.errors import MalformedDeltaError

ITEM_BYTES = (1, 2, 4, 8)


def random_elements(seed: int, count: int, item_bytes: int) -> Elements:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, count * item_bytes, dtype=np.uint8).view(UNSIGNED[item_bytes])


def apply(section: bytes, old: Elements, changed: int) -> Elements:
    change = decode_gaps(
        memoryview(section), changed=changed, elements=old.size, item_bytes=old.itemsize
    )
    new = old.copy()
    new[change.index_N] = absolute_values(old[change.index_N], change.difference_N)
    return new


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 3000),
    item_bytes=st.sampled_from(ITEM_BYTES),
    density=st.sampled_from((0.0, 0.002, 0.05, 0.6, 1.0)),
    is_small=st.booleans(),
)
def test_a_change_comes_back_bit_by_bit(
    seed: int, count: int, item_bytes: int, density: float, is_small: bool
) -> None:
    old = random_elements(seed, count, item_bytes)
    random = np.random.default_rng(seed + 1)
    new = random_elements(seed + 2, count, item_bytes)
    if is_small:
        new = old + random.integers(0, 3, count).astype(old.dtype) - old.dtype.type(1)
    new = np.where(random.random(count) < density, new, old)
    index = changed_positions(old, new)
    assert np.array_equal(index, np.flatnonzero(old != new))
    section = encode_gaps(index, old[index], new[index])
    assert np.array_equal(apply(section, old, index.size), new)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 2000),
    item_bytes=st.sampled_from(ITEM_BYTES),
)
def test_a_whole_tensor_comes_back_bit_by_bit(seed: int, count: int, item_bytes: int) -> None:
    new = random_elements(seed, count, item_bytes)
    section = memoryview(encode_dense(new))
    assert np.array_equal(decode_dense(section, elements=count, item_bytes=item_bytes), new)


@pytest.mark.parametrize("first", [0, 14 * 256, 15 * 256 - 1, 15 * 256, 1_000_000, 2**31 + 5])
def test_gaps_of_any_length_come_back(first: int) -> None:
    index = np.array([first, first + 1, first + 70_000])
    values = np.zeros(3, np.uint16), np.array([1, 0xFFFF, 0x8000], np.uint16)
    section = memoryview(encode_gaps(index, *values))
    change = decode_gaps(section, changed=3, elements=2**32 - 1, item_bytes=2)
    assert np.array_equal(change.index_N, index)
    assert np.array_equal(change.difference_N, values[1])


def test_one_ulp_changes_at_half_a_percent_cost_under_1_6_bytes_each() -> None:
    random = np.random.default_rng(5)
    count = 2_000_000
    index = np.flatnonzero(random.random(count) < 0.005)
    old = random.integers(0, 2**16, index.size, dtype=np.uint16)
    new = old + random.choice(np.array([1, 0xFFFF], np.uint16), index.size)
    assert len(encode_gaps(index, old, new)) / index.size < 1.6


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_mutated_sections_are_refused_or_stay_inside_the_tensor(
    seed: int, data: st.DataObject
) -> None:
    old = random_elements(seed, 500, 2)
    new = np.where(np.arange(500) % 7 == seed % 7, random_elements(seed + 1, 500, 2), old)
    index = changed_positions(old, new)
    section = bytearray(encode_gaps(index, old[index], new[index]))
    place = data.draw(st.integers(0, len(section) - 1))
    section[place] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(section)))
    try:
        change = decode_gaps(
            memoryview(section)[:cut], changed=index.size, elements=500, item_bytes=2
        )
    except MalformedDeltaError:
        return
    assert change.index_N.size == change.difference_N.size == index.size
    assert np.all(np.diff(change.index_N) > 0)
    assert change.index_N.size == 0 or 0 <= change.index_N[0] <= change.index_N[-1] < 500


def test_a_section_with_another_length_is_refused() -> None:
    new = random_elements(1, 100, 4)
    section = memoryview(encode_dense(new) + b"x")
    with pytest.raises(MalformedDeltaError, match="1 bytes too many"):
        decode_dense(section, elements=100, item_bytes=4)
    with pytest.raises(MalformedDeltaError):
        decode_dense(section[:-1], elements=101, item_bytes=4)


def test_a_plane_that_would_unpack_to_another_size_takes_no_memory() -> None:
    large = encode_dense(np.zeros(50_000_000, np.uint8))
    with pytest.raises(MalformedDeltaError, match="length"):
        decode_dense(memoryview(large), elements=1000, item_bytes=1)
