"""The `counters` map: packets and bytes per slot and reason, summed over CPUs."""

from __future__ import annotations

from dataclasses import dataclass

from netfence.dataplane.layout import Layout
from netfence.dataplane.maps import Map, possible_cpus, u32
from netfence.policy.modes import FIRST_DROP, REASON_COUNT


@dataclass(frozen=True, slots=True)
class Counters:
    """What passed and what was dropped, indexed by `Reason`; `would_*`: what audit mode let pass all the same."""

    packets: tuple[int, ...]
    bytes: tuple[int, ...]
    would_packets: tuple[int, ...]
    would_bytes: tuple[int, ...]

    @property
    def allowed(self) -> tuple[int, int]:
        """Packets and bytes that passed, audited ones included."""
        return (
            sum(self.packets[:FIRST_DROP]) + sum(self.would_packets),
            sum(self.bytes[:FIRST_DROP]) + sum(self.would_bytes),
        )

    @property
    def blocked(self) -> tuple[int, int]:
        """Packets and bytes that were dropped."""
        return sum(self.packets[FIRST_DROP:]), sum(self.bytes[FIRST_DROP:])


class CounterMap:
    """Reads and clears a slot's counters."""

    def __init__(self, counters: Map, layout: Layout) -> None:
        self._map = counters
        self._words = layout.sizes["counters"] // 8
        fields = layout.fields["counters"]
        self._real, self._would = (fields[name].offset // 8 for name in ("real", "would"))
        self._lost = (fields["reported"].offset + layout.fields["reported"]["lost"].offset) // 4

    def read(self, slot: int) -> Counters:
        """Sum the counters of all CPUs."""
        words = memoryview(self._lookup(slot)).cast("Q")
        cpus = [words[at : at + self._words].tolist() for at in range(0, len(words), self._words)]
        total = [sum(column) for column in zip(*cpus, strict=True)]
        # Each `struct count` is packets, then bytes.
        ends = ((at + which, at + 2 * REASON_COUNT) for at in (self._real, self._would) for which in (0, 1))
        columns = [total[start:end:2] for start, end in ends]
        return Counters(*map(tuple, columns))

    def kept_back(self, slot: int) -> int:
        """Count the reports kept back since the last one; the next one tells how many, and the count begins anew."""
        words = memoryview(self._lookup(slot)).cast("I")
        return sum(words[at + self._lost] for at in range(0, len(words), 2 * self._words))

    def _lookup(self, slot: int) -> bytes:
        raw = self._map.lookup(u32(slot))
        if raw is None:
            message = f"slot {slot} has no counters"
            raise LookupError(message)
        return raw

    def clear(self, slot: int) -> None:
        """Set all to zero, for the next attachment of this slot."""
        self._map.update(u32(slot), bytes(self._words * 8 * possible_cpus()))
