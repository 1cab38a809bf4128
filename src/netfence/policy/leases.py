"""Leases of one attachment: which addresses DNS answers have opened, until when, and which names hold them.

Owns semantics.md 5 in its pure part. Mutable, one owner, no clock and no I/O: the owner opens and closes what the book
says in the kernel. A holder is a queried name, or a word of the owner's for what the control plane opened. Refuses to
know limits of the kernel's tables: the owner asks `would_add` first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence

from netfence.policy.limits import MAX_HOLDS, MAX_NAMES_PER_LEASE


def lease_expiry(now: float, ttl_s: float, min_s: float, grace_s: float, max_s: float) -> float:
    """Return when a lease asked for at `now` ends: clamp(TTL, min, max) + grace. TTL 0 gives the minimum."""
    return now + max(min_s, min(ttl_s, max_s)) + grace_s


class _Lease:
    """An address: its expiry, and what each holder asked for, least recently asked first."""

    __slots__ = ("expiry", "holds")

    def __init__(self) -> None:
        self.expiry = 0.0
        self.holds: dict[str, float] = {}


class LeaseBook:
    """The leases of one attachment."""

    def __init__(self) -> None:
        self._leases: dict[bytes, _Lease] = {}
        self._by_name: dict[str, set[bytes]] = {}
        self._hold_count = 0
        # Every lease that is not in `_due` has an entry here, at its expiry or an earlier time: a renewed lease
        # is put back when its old time comes up. Entries of forgotten addresses stay until then.
        self._queue: list[tuple[float, bytes]] = []
        self._due: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, address: object) -> bool:
        return address in self._leases

    def would_add(self, addresses: Iterable[bytes]) -> int:
        """Return how many leases a `hold` for each of these addresses would add: the new ones, each once."""
        return len({address for address in addresses if address not in self._leases})

    def hold(self, name: str, address: bytes, expiry: float) -> float:
        """Note that `name` holds the packed address until `expiry`; return the expiry of the lease.

        Renewing never shortens: a lease ends at the latest time that was asked for. At most MAX_NAMES_PER_LEASE names
        per address and about MAX_HOLDS in all are remembered; beyond, the name of this address that asked longest ago
        is forgotten, whereby the lease may later be dropped too early, never kept too long.
        """
        lease = self._leases.get(address)
        if lease is None:
            lease = self._leases[address] = _Lease()
            self._enqueue(expiry, address)
        holds = lease.holds
        asked = holds.pop(name, None)  # and in again, as the most recent
        if asked is None:
            if len(holds) >= MAX_NAMES_PER_LEASE or (holds and self._hold_count >= MAX_HOLDS):
                self._unhold(lease, next(iter(holds)), address)
            self._by_name.setdefault(name, set()).add(address)
            self._hold_count += 1
            holds[name] = expiry
        else:
            holds[name] = max(asked, expiry)
        if expiry > lease.expiry:
            lease.expiry = expiry
            if address in self._due:
                self._due.discard(address)
                self._enqueue(expiry, address)
        return lease.expiry

    def _enqueue(self, expiry: float, address: bytes) -> None:
        heapq.heappush(self._queue, (expiry, address))
        if len(self._queue) > 2 * len(self._leases) + 64:  # mostly entries of forgotten addresses
            self._queue = [(lease.expiry, key) for key, lease in self._leases.items() if key not in self._due]
            heapq.heapify(self._queue)

    def _unhold(self, lease: _Lease, name: str, address: bytes) -> None:
        """Forget one hold, in both directions."""
        del lease.holds[name]
        self._hold_count -= 1
        held = self._by_name[name]
        held.discard(address)
        if not held:
            del self._by_name[name]

    def drop_names(
        self, keep: Callable[[str], bool], shortened: Callable[[bytes, float], None] | None = None
    ) -> list[bytes]:
        """Drop the holds of every name that `keep` refuses (asked once per name); return the addresses left without.

        Those addresses are forgotten: close them in the kernel. Where other names still hold an address but asked for
        less, its expiry becomes theirs; `shortened` is then called with the address and its new expiry.
        """
        gone: list[bytes] = []
        touched: set[bytes] = set()
        for name in [name for name in self._by_name if not keep(name)]:
            for address in list(self._by_name[name]):
                lease = self._leases[address]
                self._unhold(lease, name, address)
                touched.add(address)
        for address in touched:
            lease = self._leases[address]
            if not lease.holds:
                self.forget(address)
                gone.append(address)
                continue
            left = max(lease.holds.values())
            if left < lease.expiry:
                lease.expiry = left
                if address not in self._due:
                    self._enqueue(left, address)
                if shortened is not None:
                    shortened(address, left)
        return gone

    def expired(self, now: float) -> list[bytes]:
        """Return the addresses whose lease is over at `now`; they stay in the book until `forget`.

        They are told again with every call: a lease that the kernel keeps for established connections (semantics.md
        5) keeps its holders, so that denying them cuts those connections.
        """
        queue = self._queue
        while queue and queue[0][0] <= now:
            _, address = heapq.heappop(queue)
            lease = self._leases.get(address)
            if lease is None or address in self._due:
                continue
            if lease.expiry <= now:
                self._due.add(address)
            else:
                heapq.heappush(queue, (lease.expiry, address))
        return [address for address in self._due if self._leases[address].expiry <= now]

    def forget(self, address: bytes) -> None:
        """Remove a lease and its holds; an unknown address is no fault."""
        lease = self._leases.get(address)
        if lease is None:
            return
        for name in list(lease.holds):
            self._unhold(lease, name, address)
        del self._leases[address]
        self._due.discard(address)

    def addresses(self) -> Iterator[bytes]:
        """Iterate over the addresses in the book."""
        return iter(self._leases)

    def names_of(self, address: bytes) -> Sequence[str]:
        """Return the names that hold the address, least recently asked first; none for an unknown one."""
        lease = self._leases.get(address)
        return () if lease is None else tuple(lease.holds)

    def names(self) -> Iterator[str]:
        """Iterate over the names that hold an address."""
        return iter(self._by_name)

    def addresses_of(self, name: str) -> Sequence[bytes]:
        """Return the addresses that the name holds, in no order."""
        return tuple(self._by_name.get(name, ()))

    def expiry(self, address: bytes) -> float | None:
        """Return when the lease of the address ends; None without a lease."""
        lease = self._leases.get(address)
        return None if lease is None else lease.expiry

    def export(self) -> Iterator[tuple[bytes, str, float]]:
        """Yield every hold as (address, name, expiry): what `restore` takes."""
        for address, lease in self._leases.items():
            for name, expiry in lease.holds.items():
                yield address, name, expiry

    @classmethod
    def restore(cls, holds: Iterable[tuple[bytes, str, float]]) -> LeaseBook:
        """Make a book from what `export` gave; the caller has converted the times to this boot's clock."""
        book = cls()
        for address, name, expiry in holds:
            book.hold(name, address, expiry)
        return book
