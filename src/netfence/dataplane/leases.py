"""Leases and inbound connections in the kernel: open, close, and remove what is dead.

Owns the `leases` and `inbound` maps. `open` and `close` run on the event loop and take microseconds per address;
`scan_*` walk a whole map and belong in a worker thread.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable, Sequence

from netfence.dataplane.clock import Clock
from netfence.dataplane.failure import explain
from netfence.dataplane.layout import Layout
from netfence.dataplane.maps import Map, u32
from netfence.dataplane.shares import Shares
from netfence.errors import ExhaustedError

_MAPPED = b"\0" * 10 + b"\xff\xff"


def kernel_address(address: bytes) -> bytes:
    """Turn a packed address (4 or 16 bytes) into the kernel's 16 bytes, IPv4 as ::ffff:a.b.c.d."""
    return _MAPPED + address if len(address) == 4 else address


def packed_address(address: bytes) -> bytes:
    """Turn the kernel's 16 bytes into a packed address."""
    return address[12:] if address.startswith(_MAPPED) else address


class LeaseMap:
    """The `leases` map: slot and address → expiry and last use of TCP."""

    def __init__(self, leases: Map, layout: Layout, clock: Clock) -> None:
        self._map, self._clock = leases, clock
        self._key = layout.packer("lease_key", "slot", "address")
        self._value = layout.packer("lease", "expiry", "last_use")

    def open(self, slot: int, addresses: Sequence[bytes], expiry: float) -> None:
        """Let a slot's packets to these packed addresses pass until `expiry` (monotonic seconds); never shortens.

        Raises ExhaustedError when the map is full, with none of the new ones left open.
        """
        until = self._clock.jiffies(expiry)
        fresh: list[bytes] = []
        for address in addresses:
            key = self._key.pack(slot, kernel_address(address))
            found = self._map.lookup(key)
            old_expiry, last_use = self._value.unpack(found) if found else (0, 0)
            if found is None:
                fresh.append(key)
            elif old_expiry >= until:
                continue
            try:
                self._map.update(key, self._value.pack(until, last_use))
            except OSError as error:
                for one in fresh:
                    self._map.delete(one)
                if error.errno in (errno.E2BIG, errno.ENOSPC):
                    message = f"open {len(addresses)} addresses: the lease table is full; raise dns.max_leases_total"
                    raise ExhaustedError(message) from error
                raise explain(f"open {len(addresses)} addresses", error) from error

    def shorten(self, slot: int, address: bytes, expiry: float) -> None:
        """Set an earlier expiry (monotonic seconds) in one update; a lease that is not there is no error."""
        key = self._key.pack(slot, kernel_address(address))
        found = self._map.lookup(key)
        if found is not None:
            _, last_use = self._value.unpack(found)
            self._map.update(key, self._value.pack(self._clock.jiffies(expiry), last_use))

    def close(self, slot: int, addresses: Iterable[bytes]) -> None:
        """Stop letting packets to these addresses pass; those not open are no error."""
        for address in addresses:
            self._map.delete(self._key.pack(slot, kernel_address(address)))

    def expiry(self, slot: int, address: bytes) -> float | None:
        """Tell until when the lease is live (monotonic seconds, past ones too); None without one."""
        found = self._map.lookup(self._key.pack(slot, kernel_address(address)))
        return self._clock.seconds(self._value.unpack(found)[0]) if found else None

    def scan(self, idle: int, longest: int, now: int) -> dict[int, set[bytes]]:
        """Find leases that pass nothing any more: packed addresses by slot. Times in jiffies (semantics.md 5)."""
        dead: dict[int, set[bytes]] = {}
        for key in self._map.keys():  # noqa: SIM118 - a Map is no dict
            found = self._map.lookup(key)
            if found is not None and self._dead(found, idle, longest, now):
                slot, address = self._key.unpack(key)
                dead.setdefault(slot, set()).add(packed_address(address))
        return dead

    def _dead(self, value: bytes, idle: int, longest: int, now: int) -> bool:
        expiry, last_use = self._value.unpack(value)
        return bool(expiry <= now and (now - expiry > longest or now - last_use > idle))

    def remove_dead(self, slot: int, addresses: Iterable[bytes], idle: int, longest: int, now: int) -> set[bytes]:
        """Remove those of these leases that are (still) dead; return them. On the event loop, like `open`."""
        removed: set[bytes] = set()
        for address in addresses:
            key = self._key.pack(slot, kernel_address(address))
            found = self._map.lookup(key)
            if found is not None and self._dead(found, idle, longest, now):
                self._map.delete(key)
                removed.add(address)
        return removed

    def clear(self, slot: int) -> None:
        """Remove every lease of a slot; walks the whole map."""
        prefix = u32(slot)
        gone = [key for key in self._map.keys() if key.startswith(prefix)]  # noqa: SIM118 - a Map is no dict
        for key in gone:
            self._map.delete(key)


class InboundMap:
    """The `inbound` map: TCP connections begun from outside, and how many each slot has."""

    def __init__(self, inbound: Map, count: Map, layout: Layout, clock: Clock) -> None:
        self._map, self._clock = inbound, clock
        self._key = layout.packer("inbound_key", "slot")
        self._value = layout.packer("inbound", "last_use", "state")
        self._open = layout.constants["INBOUND_OPEN"]
        self.shares = Shares(count, layout, "inbound_count")
        self._lock = threading.Lock()  # two walks at once would lose a count

    def sweep(self, idle: int, handshake: int, now: int, *, slot: int | None = None) -> None:
        """Remove connections idle for too long (jiffies), or all of one `slot`. Walks the map; in a worker thread."""
        with self._lock:
            for key in list(self._map.keys()):
                (owner,) = self._key.unpack(key)
                found = self._map.lookup(key)
                if found is None:
                    continue
                last_use, state = self._value.unpack(found)
                limit = idle if state == self._open else handshake
                gone = owner == slot if slot is not None else now - last_use > limit
                if gone and self._map.delete(key):
                    self.shares.note_removed(owner)
            if slot is not None:
                self.shares.forget_missed(slot)
