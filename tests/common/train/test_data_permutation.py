"""The keyed shuffle: one-to-one, pure, different for every key."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion.common.train.permutation import KeyedPermutation

keys = st.binary(min_size=32, max_size=32)


@settings(deadline=None)
@given(size=st.integers(1, 400), key=keys)
def test_it_is_a_bijection_of_the_range(size: int, key: bytes) -> None:
    order = KeyedPermutation(size, key)
    assert sorted(order(index) for index in range(size)) == list(range(size))


@settings(deadline=None)
@given(size=st.integers(1, 2**62), key=keys, data=st.data())
def test_any_index_of_a_huge_range_stays_inside_and_repeats(size: int, key: bytes, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    image = KeyedPermutation(size, key)(index)
    assert 0 <= image < size
    assert KeyedPermutation(size, key)(index) == image


def test_neighbours_are_scattered_and_another_key_gives_another_order() -> None:
    one, other = (KeyedPermutation(10_000, bytes([byte]) * 32) for byte in (1, 2))
    images = [one(index) for index in range(10_000)]
    fixed = sum(image == index for index, image in enumerate(images))
    followed = sum(b == a + 1 for a, b in pairwise(images))
    agreed = sum(image == other(index) for index, image in enumerate(images))
    # A random order has about one of each.
    assert max(fixed, followed, agreed) < 10
    assert abs(sum(images[:1000]) / 1000 - 5000) < 500


@pytest.mark.parametrize(("size", "key_bytes"), [(0, 32), (-1, 32), (5, 16)])
def test_it_refuses_an_empty_range_and_a_short_key(size: int, key_bytes: int) -> None:
    with pytest.raises(ValueError, match=r"at least one element|bytes"):
        KeyedPermutation(size, bytes(key_bytes))


@pytest.mark.parametrize("index", [-1, 5])
def test_it_refuses_an_index_outside(index: int) -> None:
    with pytest.raises(IndexError, match="outside"):
        KeyedPermutation(5, bytes(32))(index)
