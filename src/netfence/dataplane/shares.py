"""How many entries each slot has in a table that the kernel adds to and we remove from.

Two numbers per slot, in memory shared with the kernel: it alone writes `added`, we alone `removed`, so that neither has
to wait for the other. What the kernel still lets a slot add goes by their difference; what it had no room for it counts
in `missed`, until `forget_missed`.
"""

from __future__ import annotations

from netfence.dataplane.layout import Layout
from netfence.dataplane.maps import Map

_MASK = 0xFFFFFFFF


class Shares:
    """The numbers of one table: `count` is the map with a `struct` (of layout.h) for each slot. Not locked."""

    def __init__(self, count: Map, layout: Layout, struct: str) -> None:
        fields = layout.fields[struct]
        memory = memoryview(count.memory())
        self._stride = (layout.sizes[struct] + 7) // 8 * 8
        self._words, self._long_words = memory.cast("I"), memory.cast("Q")
        self._missed = fields["missed"].offset // 8
        self._added, self._removed = fields["added"].offset // 4, fields["removed"].offset // 4

    def of(self, slot: int) -> int:
        """Return how many entries the slot has."""
        at = slot * self._stride // 4
        return (self._words[at + self._added] - self._words[at + self._removed]) & _MASK

    def note_removed(self, slot: int) -> None:
        """Note that an entry of the slot was removed."""
        at = slot * self._stride // 4 + self._removed
        self._words[at] = (self._words[at] + 1) & _MASK

    def missed(self, slot: int) -> int:
        """Return how often there was no room for the slot's."""
        return self._long_words[slot * self._stride // 8 + self._missed]

    def forget_missed(self, slot: int) -> None:
        """Begin `missed` at 0 again."""
        self._long_words[slot * self._stride // 8 + self._missed] = 0
