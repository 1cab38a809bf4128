"""The persistent map against a dict, small and sharded, and what it shares."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netfence.policy import pmap
from netfence.policy.pmap import SMALL, Builder, PersistentMap, empty_map

CHANGES = st.lists(
    st.dictionaries(st.integers(0, 30), st.one_of(st.none(), st.integers(1, 3)), max_size=8), max_size=12
)


def built(pairs: dict[int, int]) -> PersistentMap[int, int]:
    builder: Builder[int, int] = Builder(len(pairs))
    builder.update(pairs.items())
    return builder.build()


@pytest.mark.parametrize("small", [1000, 5], ids=["one-dict", "grows-into-shards"])
@given(CHANGES)
def test_behaves_like_a_dict(small: int, steps: list[dict[int, int | None]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pmap, "SMALL", small)
        model: dict[int, int] = {}
        versions: list[tuple[PersistentMap[int, int], dict[int, int]]] = [(empty_map(), {})]
        for changes in steps:
            versions.append((versions[-1][0].changed(changes), model := model.copy()))
            for key, value in changes.items():
                if value is None:
                    model.pop(key, None)
                else:
                    model[key] = value
        for store, expected in versions:  # all of them: no version may have changed another
            assert dict(store.pairs()) == expected
            assert set(store) == set(expected)
            assert len(store) == len(expected)
            assert all(store.get(key) == expected.get(key) for key in range(31))
            assert all((key in store) == (key in expected) for key in range(31))
            assert store == built(expected)


@given(CHANGES, CHANGES)
def test_differences_lead_from_one_version_to_the_other(
    left: list[dict[int, int | None]], right: list[dict[int, int | None]]
) -> None:
    base: PersistentMap[int, int] = built(dict.fromkeys(range(5), 1))
    old, new = base, base
    for changes in left:
        old = old.changed(changes)
    for changes in right:
        new = new.changed(changes)
    difference = dict(new.differences(old))
    assert old.changed(difference) == new
    assert all(old.get(key) != value for key, value in difference.items())


def test_differences_between_one_dict_and_shards() -> None:
    small, big = built({1: 1, 2: 2}), built(dict.fromkeys(range(2, SMALL + 3), 2))
    assert small.changed(dict(big.differences(small))) == big
    assert dict(small.differences(big))[5] is None


def test_a_small_change_of_a_big_map_shares_all_shards_but_one() -> None:
    big = built(dict.fromkeys(range(10 * SMALL), 1))
    changed = big.changed({7: 2})
    copied = [ours for ours, theirs in zip(changed._shards, big._shards, strict=True) if ours is not theirs]
    assert len(copied) == 1
    assert (big[7], changed[7]) == (1, 2)


def test_missing_keys() -> None:
    store: PersistentMap[int, int] = empty_map()
    with pytest.raises(KeyError):
        store[1]
    assert store.get(1) is None
    assert store.get(1, 5) == 5
    assert 1 not in store
    assert store != {}
    with pytest.raises(TypeError):
        hash(store)
