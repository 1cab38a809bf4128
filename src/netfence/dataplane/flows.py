"""What the kernel tells of packets that were dropped, or that audit mode let through all the same.

Owns the ring of reports (`flows`), written only while somebody watches and only so often (`NF_FLOWS_PER_WINDOW`), and
the table of destinations that audit let through (`seen`), which a restart finds again. Who wants to know is not its
business. Addresses are the kernel's 16 bytes, IPv4 as ::ffff:a.b.c.d, all zero where not known.
"""

from __future__ import annotations

import mmap
import threading
from typing import NamedTuple

from netfence.dataplane.clock import Clock
from netfence.dataplane.config import network_port
from netfence.dataplane.layout import Layout
from netfence.dataplane.maps import Map, u32
from netfence.dataplane.shares import Shares

AT_ONCE = 512
"""Reports read in one call: two milliseconds of work. More than that in a row are a flood, and what does not fit the
ring meanwhile is counted."""

_BUSY = 1 << 31  # of a record's length: being written (kernel/bpf/ringbuf.c)
_DISCARDED = 1 << 30
_HEADER = 8  # bytes before a record


class Flow(NamedTuple):
    """A packet that was dropped, or (`would`) that audit let pass; a refused connect() has length 0.

    `at` is monotonic seconds to some ms, `reason` a `policy.modes.Reason`, ports are 0 where there are none, `lost`
    counts reports of this slot and CPU that were kept back since the one before.
    """

    slot: int
    at: float
    would: bool
    reason: int
    protocol: int
    source: bytes
    destination: bytes
    source_port: int
    destination_port: int
    length: int
    lost: int


class Seen(NamedTuple):
    """A destination that audit let through, with what went there; `port` 0 where there is none."""

    destination: bytes
    protocol: int
    port: int
    packets: int
    bytes: int


class FlowRing:
    """The reader of the ring; there is one. Not for use by several threads."""

    def __init__(self, flows: Map, layout: Layout, clock: Clock) -> None:
        self._fd, self._size, self._clock = flows.fd, flows.spec.max_entries, clock
        self._flow = layout.packer(
            "flow",
            "at",
            "slot",
            "length",
            "lost",
            "source_port",
            "destination_port",
            "reason",
            "would",
            "protocol",
            "source",
            "destination",
        )
        page = mmap.PAGESIZE
        # Ours to write: how far we have read. The kernel's: how far it has written, and the data, twice in a row, so
        # that a record which goes over the end lies in one piece.
        self._mine = mmap.mmap(self._fd, page)
        self._theirs = mmap.mmap(self._fd, page + 2 * self._size, prot=mmap.PROT_READ, offset=page)
        self._read_to = memoryview(self._mine).cast("Q")
        self._written_to = memoryview(self._theirs)[:8].cast("Q")
        self._words = memoryview(self._theirs)[page:].cast("I")
        self._data = memoryview(self._theirs)[page:]
        self._read_to[0] = self._written_to[0]  # what nobody was there to read is of no use now

    def read(self) -> list[Flow]:
        """Return what was reported since, oldest first, at most `AT_ONCE`."""
        found: list[Flow] = []
        at, end = self._read_to[0], self._written_to[0]
        seconds, unpack = self._clock.seconds, self._flow.unpack
        while at < end and len(found) < AT_ONCE:
            place = at % self._size
            length = self._words[place // 4]
            if length & _BUSY:
                break
            size = length & ~_DISCARDED
            if not length & _DISCARDED and size == self._flow.size:
                start = place + _HEADER
                when, slot, total, lost, source_port, port, reason, would, protocol, source, to = unpack(
                    self._data[start : start + size]
                )
                ports = network_port(source_port), network_port(port)
                found.append(Flow(slot, seconds(when), bool(would), reason, protocol, source, to, *ports, total, lost))
            at += (size + _HEADER + 7) // 8 * 8
        self._read_to[0] = at
        return found


class SeenMap:
    """The `seen` map and how many entries each slot has in it; walks block."""

    def __init__(self, seen: Map, count: Map, layout: Layout) -> None:
        self._map = seen
        self._key = layout.packer("seen_key", "slot", "destination", "port", "protocol")
        self._value = layout.packer("seen", "packets", "bytes")
        self._shares = Shares(count, layout, "seen_count")
        self._lock = threading.Lock()  # two walks at once would lose a count

    def read(self, slot: int) -> tuple[list[Seen], int]:
        """Return the slot's destinations, and the packets for whose destinations there was no room."""
        found = []
        for key in self._keys(slot):
            value = self._map.lookup(key)
            if value is not None:
                _, destination, port, protocol = self._key.unpack(key)
                found.append(Seen(destination, protocol, network_port(port), *self._value.unpack(value)))
        return found, self.missed(slot)

    def missed(self, slot: int) -> int:
        """Return the slot's packets for whose destinations there was no room."""
        return self._shares.missed(slot)

    def clear(self, slot: int) -> None:
        """Forget all that the slot has; nothing may be added meanwhile but what is to be forgotten too."""
        with self._lock:
            for key in self._keys(slot):
                if self._map.delete(key):
                    self._shares.note_removed(slot)  # one by one: who dies here takes one entry of the share, not all
            self._shares.forget_missed(slot)

    def _keys(self, slot: int) -> list[bytes]:
        if not self._shares.of(slot):  # most were never audited, and a walk may be long
            return []
        prefix = u32(slot)
        return [key for key in self._map.keys() if key.startswith(prefix)]  # noqa: SIM118 - a Map is no dict
