"""An immutable map whose small changes are cheap: the storage of both rule tables.

A big map is cut into shards by hash; a change copies the shards that it touches and shares all others. So a one-rule
command on 100,000 rules copies some 400 entries, two versions are compared by skipping the shards they share, and no
single C call (a dict's growth, a copy) holds the GIL for long. Refuses to know what it stores; keys and values must be
immutable, and a value is never None (`changed` means removal by it).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Generic, TypeVar, cast

K = TypeVar("K")
V = TypeVar("V")

SMALL: Final = 1024
"""Up to so many entries one dict does: copying it takes some 10 µs, and a thousand small policies stay small."""

SHARDS: Final = 256
"""Shards of a big map (a power of two): 400 entries each at 100,000, 4000 at a million."""


class PersistentMap(Mapping[K, V]):
    """An immutable mapping; iteration order is not defined. Make one with `Builder` or `changed`."""

    __slots__ = ("_len", "_mask", "_shards")

    def __init__(self, shards: tuple[dict[K, V], ...] = ({},)) -> None:
        """Take over the shards (a power of two of dicts, filled by hash); nobody may change them afterwards."""
        self._shards = shards
        self._mask = len(shards) - 1
        self._len = sum(map(len, shards))

    def __getitem__(self, key: K) -> V:
        return self._shards[hash(key) & self._mask][key]

    # Mapping's own `get` goes through an exception on a miss, and misses are the common case of every lookup here.
    def get(self, key: K, default: V | None = None) -> V | None:  # type: ignore[override]
        """Return the value or the default."""
        return self._shards[hash(key) & self._mask].get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._shards[hash(key) & self._mask]

    def __iter__(self) -> Iterator[K]:
        for shard in self._shards:
            yield from shard

    def __len__(self) -> int:
        return self._len

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PersistentMap):
            return NotImplemented
        if self._len != other._len:
            return False
        if self._mask == other._mask:
            return all(map(operator.eq, self._shards, other._shards))
        return all(other.get(key) == value for key, value in self.pairs())

    __hash__ = None  # type: ignore[assignment]  # compared by content, too big to be a key

    def pairs(self) -> Iterator[tuple[K, V]]:
        """Iterate over (key, value), shard by shard."""
        for shard in self._shards:
            yield from shard.items()

    def changed(self, changes: Mapping[K, V | None]) -> PersistentMap[K, V]:
        """Return the map with these values set and the keys whose value is None removed (absent ones are no fault)."""
        if self._mask == 0 and self._len + len(changes) > SMALL:
            spread: Builder[K, V] = Builder(self._len + len(changes))
            spread.update(self.pairs())
            return spread.build().changed(changes)
        mask = self._mask
        fresh: dict[int, dict[K, V]] = {}
        for key, value in changes.items():
            index = hash(key) & mask
            shard = fresh.get(index)
            if shard is None:
                shard = fresh[index] = self._shards[index].copy()
            if value is None:
                shard.pop(key, None)
            else:
                shard[key] = value
        shards = list(self._shards)
        for index, shard in fresh.items():
            shards[index] = shard
        return PersistentMap(tuple(shards))

    def differences(self, older: PersistentMap[K, V]) -> Iterator[tuple[K, V | None]]:
        """Yield every key whose value here is not what it was in `older`, with the value here (None: not here)."""
        if self._mask != older._mask:
            yield from self._differences_spread(older)
            return
        for ours, theirs in zip(self._shards, older._shards, strict=True):
            if ours is theirs:
                continue
            for key, value in ours.items():
                if theirs.get(key) != value:
                    yield key, value
            for key in theirs:
                if key not in ours:
                    yield key, None

    def _differences_spread(self, older: PersistentMap[K, V]) -> Iterator[tuple[K, V | None]]:
        for key, value in self.pairs():
            if older.get(key) != value:
                yield key, value
        for key in older:
            if key not in self:
                yield key, None


class Builder(Generic[K, V]):
    """A map in the making, for bulk: fill it through `shard`, then `build` once."""

    __slots__ = ("_mask", "_shards")

    def __init__(self, expected: int) -> None:
        """Choose the number of shards for about `expected` entries."""
        self._shards: list[dict[K, V]] = [{} for _ in range(SHARDS if expected > SMALL else 1)]
        self._mask = len(self._shards) - 1

    def shard(self, key: K) -> dict[K, V]:
        """Return the dict in which this key lives."""
        return self._shards[hash(key) & self._mask]

    def update(self, items: Iterable[tuple[K, V]]) -> None:
        """Set many values; a later one for the same key replaces an earlier one."""
        shards, mask = self._shards, self._mask
        for key, value in items:
            shards[hash(key) & mask][key] = value

    def build(self) -> PersistentMap[K, V]:
        """Return the map; the builder must not be used any more."""
        return PersistentMap(tuple(self._shards))


_EMPTY: Final[PersistentMap[object, object]] = PersistentMap()


def empty_map() -> PersistentMap[K, V]:
    """Return the empty map: one object for everybody."""
    return cast("PersistentMap[K, V]", _EMPTY)
