"""Sorting in pieces is sorting."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netfence.policy import ordering
from netfence.policy.ordering import sort_in_pieces


@given(st.lists(st.binary(max_size=5)))
def test_sorts_as_sorted_does(keys: list[bytes]) -> None:
    # With ranges of 3 keys even a short list goes the long way.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordering, "RANGE", 3)
        assert sort_in_pieces(keys) == sorted(keys)


@pytest.mark.parametrize("shape", ["random", "sorted", "reversed", "equal", "one-network"])
def test_sorts_many_keys_of_every_shape(shape: str) -> None:
    seeded = random.Random(1)
    keys = [seeded.randbytes(5) for _ in range(3 * ordering.RANGE)]
    if shape in ("sorted", "reversed"):
        keys.sort(reverse=shape == "reversed")
    elif shape == "equal":
        keys = keys[:1] * len(keys)
    elif shape == "one-network":
        keys = [b"\x0a\x00" + key[:2] + b"\x20" for key in keys]
    assert sort_in_pieces(keys) == sorted(keys)


def test_no_range_is_much_bigger_than_aimed_at() -> None:
    """What keeps the GIL short: the lists that are sorted in one call."""
    seeded = random.Random(2)
    keys = [seeded.randbytes(5) for _ in range(100_000)]
    sizes = [len(part) for part in ordering._dealt(keys)]
    assert sum(sizes) == len(keys)
    assert max(sizes) <= 3 * ordering.RANGE
