"""How many entries each slot has in a table that the kernel adds to and we remove from.

Two numbers per slot, in memory shared with the kernel: it alone writes `added`, we alone `removed`, so that neither has
to wait for the other. What the kernel still lets a slot add goes by their difference.
"""

from __future__ import annotations

from netfence.dataplane.layout import Layout
from netfence.dataplane.maps import Map

_MASK = 0xFFFFFFFF


class Shares:
    """The numbers of one table: `count` is the map with a `struct` (of layout.h) for each slot. Not locked."""

    def __init__(self, count: Map, layout: Layout, struct: str) -> None:
        fields = layout.fields[struct]
        self.memory = memoryview(count.memory())
        self.stride = (layout.sizes[struct] + 7) // 8 * 8
        self._words = self.memory.cast("I")
        self._added, self._removed = fields["added"].offset // 4, fields["removed"].offset // 4

    def of(self, slot: int) -> int:
        """Return how many entries the slot has."""
        at = slot * self.stride // 4
        return (self._words[at + self._added] - self._words[at + self._removed]) & _MASK

    def note_removed(self, slot: int) -> None:
        """Note that an entry of the slot was removed."""
        at = slot * self.stride // 4 + self._removed
        self._words[at] = (self._words[at] + 1) & _MASK
