"""The leases of one attachment, in the kernel and in the book at once (semantics.md 5, 8, 26).

Owns the order of the two: opened in the kernel before they are booked, forgotten by the book before they are closed
there; an address whose hold went stays noted (`_loose`) until the kernel has closed it, however often that fails.
Whether a name may open anything is decided by `attachment`; the book itself is pure (`policy.leases`).

Owns too how attachments share the kernel's one table (`LeaseTable`): whoever holds less than its equal share may open
more as long as there is room at all; beyond its share it may take only what leaves `RESERVED` of the table free.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from netfence.errors import ExhaustedError, NetfenceError
from netfence.policy.leases import LeaseBook, lease_expiry
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import Policy
from netfence.policy.search import judge_asked

PROXY = "\0proxy"  # holder of leases the control plane ordered; no name reads like this
UNKNOWN = "\0unknown"  # holder of leases found in the kernel after a restart
MANY = 500  # holders from which judging them is worth a thread
CHUNK = 512  # holders or addresses dropped in one go on the event loop, about 1 ms
RESERVED = 0.25  # of dns.max_leases_total: kept for attachments with less than their share, and for those to come


log = structlog.get_logger(__name__)


class LeaseKernel(Protocol):
    """What leases need of the data plane."""

    def open_leases(self, slot: int, addresses: Sequence[bytes], expiry: float) -> None:
        """Open all of these packed addresses until `expiry`, or raise with none of the new ones open."""
        ...

    def close_leases(self, slot: int, addresses: Iterable[bytes]) -> None:
        """Close these packed addresses."""
        ...

    def shorten_lease(self, slot: int, address: bytes, expiry: float) -> None:
        """Let the lease of this packed address end at `expiry`."""
        ...

    async def sweep(self, slot: int) -> set[bytes]:
        """Remove leases that pass nothing any more and return their packed addresses."""
        ...


@dataclass(frozen=True, slots=True)
class LeaseLimits:
    """How long leases live, in seconds, and how many there may be (semantics.md 5, 26)."""

    min_s: float
    grace_s: float
    max_s: float
    max_leases: int
    suffixes: tuple[str, ...] = ()  # of dns.search_domains: holders are names as asked for, judged with these


class LeaseTable:
    """Who has how much of the kernel's lease table, which all attachments share; `total` is its size."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._open = total - int(total * RESERVED)  # what may be taken beyond a share, and what is shared out
        self._used: dict[Leases, int] = {}
        self._sum = 0

    def __len__(self) -> int:
        return self._sum

    def note(self, member: Leases, count: int) -> None:
        """Note that a member has `count` leases now; its first note makes it a member."""
        self._sum += count - self._used.get(member, 0)
        self._used[member] = count

    def leave(self, member: Leases) -> None:
        """Forget a member and its leases; idempotent."""
        self._sum -= self._used.pop(member, 0)

    def refusal(self, member: Leases, more: int) -> str:
        """Tell why a member may not have that many leases more; "" when it may."""
        share = self._open // max(1, len(self._used))
        has = self._used.get(member, 0)
        if more <= 0 or has + more <= share or self._sum + more <= self._open:
            return ""
        return (
            f"it has {has} leases, its share of dns.max_leases_total={self._total} is {share}, and beyond it"
            f" {RESERVED:.0%} of the table stay free for the others; raise dns.max_leases_total"
        )

    def evict(self, now: float) -> int:
        """Close up to `CHUNK` expired leases, first of those who have most; return how many. `now`: monotonic."""
        gone = 0
        for member in sorted(self._used, key=lambda member: self._used[member], reverse=True):
            if gone < CHUNK:
                gone += member.evict(now, CHUNK - gone)
        return gone


class Leases:
    """The leases of the attachment in `slot`; use it only on the event loop."""

    def __init__(self, slot: int, kernel: LeaseKernel, limits: LeaseLimits, table: LeaseTable) -> None:
        self._slot, self._kernel, self._limits, self._table = slot, kernel, limits, table
        self._book = LeaseBook()
        self._loose: set[bytes] = set()  # lost a hold; the kernel has to hear of it yet
        table.note(self, 0)

    def __len__(self) -> int:
        return len(self._book)

    def addresses(self) -> Iterator[bytes]:
        """Iterate over the packed addresses that are booked."""
        return self._book.addresses()

    def names_of(self, address: bytes) -> tuple[str, ...]:
        """Return the names that hold the packed address, the latest last; those of an expired lease too."""
        return tuple(name for name in self._book.names_of(address) if name not in (PROXY, UNKNOWN))

    def held_by(self, name: str) -> tuple[bytes, ...]:
        """Return the packed addresses that answers to the name have opened, sorted; those of expired leases too."""
        return tuple(sorted(self._book.addresses_of(name)))

    def names(self) -> list[str]:
        """Return every name that holds an address."""
        return [name for name in self._book.names() if name not in (PROXY, UNKNOWN)]

    def adopt(self, leases: Mapping[bytes, float]) -> None:
        """Book leases (packed address → expiry) that the kernel has already, for a holder that nobody knows."""
        for address, expiry in leases.items():
            self._book.hold(UNKNOWN, address, expiry)
        self._table.note(self, len(self._book))

    def end(self) -> None:
        """Give the room back: the kernel has none of the leases any more."""
        self._book = LeaseBook()
        self._loose.clear()
        self._table.leave(self)

    def open(self, holder: str, addresses: Sequence[bytes], ttl_s: float) -> None:
        """Open leases for an answer's packed addresses, or renew them; microseconds each.

        Raises ExhaustedError when no room is left, or what the kernel raises, and has then opened none of them.
        """
        limits, book = self._limits, self._book
        now = time.monotonic()
        expiry = lease_expiry(now, ttl_s, limits.min_s, limits.grace_s, limits.max_s)
        try:
            self._make_room(addresses, now)
            self._open(addresses, expiry, now)
        except NetfenceError:
            self._kernel.close_leases(self._slot, [address for address in addresses if address not in book])
            raise
        for address in addresses:
            book.hold(holder, address, expiry)
        self._table.note(self, len(book))

    async def drop_denied(self, old: Policy, new: Policy) -> None:
        """Drop the holds that `new` does not allow and close the leases that nothing holds any more.

        `new` is in force already, so that no denied name can get a new hold meanwhile. All holds are gone afterwards
        in any case; raises NetfenceError when the kernel did not close everything: that is tried again (`sweep`).
        """
        if new.dns.mode is not old.dns.mode:
            self._drop_all()  # in one go: a hold that comes after this one was judged by the new mode
            await self._settle()
            return
        holders = {holder for _, holder, _ in self._book.export()}
        try:
            if len(holders) > MANY or UNKNOWN in holders:
                denied = await asyncio.to_thread(_denied, old, new, holders, self._limits.suffixes)
            else:
                denied = _denied(old, new, holders, self._limits.suffixes)
        except Exception as error:  # no thread, no memory: what cannot be judged is closed
            log.exception("holders_not_judged", slot=self._slot, error=str(error), effect="all leases are closed")
            denied = [holder for _, holder, _ in self._book.export()]
        for start in range(0, len(denied), CHUNK):
            self._drop(frozenset(denied[start : start + CHUNK]))
            await asyncio.sleep(0)
        await self._settle()

    async def sweep(self, now: float) -> None:
        """Forget what the kernel's sweep removed, and close what could not be closed. `now` is monotonic seconds."""
        await self._settle()
        removed = await self._kernel.sweep(self._slot)
        for address in self._book.expired(now):  # one opened again meanwhile is not among them
            if address in removed:
                self._book.forget(address)
        self._table.note(self, len(self._book))

    def evict(self, now: float, most: int, spare: Iterable[bytes] = ()) -> int:
        """Close up to `most` expired leases, none of `spare`; return how many. `now` is monotonic seconds."""
        spared = set(spare)
        gone = [address for address in self._book.expired(now) if address not in spared][:most]
        self._kernel.close_leases(self._slot, gone)
        for address in gone:
            self._book.forget(address)
        self._table.note(self, len(self._book))
        return len(gone)

    def _open(self, addresses: Sequence[bytes], expiry: float, now: float) -> None:
        """Open them in the kernel (renewals never shorten); where its table is full, after closing expired leases."""
        try:
            self._kernel.open_leases(self._slot, addresses, expiry)
        except ExhaustedError:
            if self.evict(now, CHUNK, addresses) + self._table.evict(now) == 0:
                raise
            self._kernel.open_leases(self._slot, addresses, expiry)

    def _drop_all(self) -> None:
        self._loose.update(self._book.addresses())
        self._book = LeaseBook()
        self._table.note(self, 0)

    def _drop(self, denied: frozenset[str]) -> None:
        # Shortened: another name holds it still, but not for so long.
        free = self._book.drop_names(lambda holder: holder not in denied, lambda address, _: self._loose.add(address))
        self._loose.update(free)
        self._table.note(self, len(self._book))
        self._settle_some(list(self._loose))

    async def _settle(self) -> None:
        """Make the kernel follow the book in what is loose, in pieces. Raises NetfenceError when it would not."""
        waiting = list(self._loose)
        for start in range(0, len(waiting), CHUNK):
            self._settle_some(waiting[start : start + CHUNK])
            await asyncio.sleep(0)
        if left := self._loose.intersection(waiting):
            message = f"close {len(left)} revoked addresses: the kernel refused; it is tried again every half minute"
            raise NetfenceError(message)

    def _settle_some(self, addresses: Sequence[bytes]) -> None:
        """Close what nobody holds (any more: it may have a new hold), shorten the rest; failures stay loose."""
        free = [address for address in addresses if address not in self._book]
        try:
            self._kernel.close_leases(self._slot, free)
            self._loose.difference_update(free)
            for address in self._loose.intersection(addresses):
                self._kernel.shorten_lease(self._slot, address, self._book.expiry(address) or 0.0)
                self._loose.discard(address)
        except (NetfenceError, OSError) as error:
            log.warning("leases_not_closed", slot=self._slot, error=str(error))

    def _make_room(self, addresses: Sequence[bytes], now: float) -> None:
        book, limit = self._book, self._limits.max_leases
        more = book.would_add(addresses)
        excess = len(book) + more - limit
        if excess > 0 or self._table.refusal(self, more):
            self.evict(now, max(excess, CHUNK), addresses)
        if len(book) + more > limit:
            raise ExhaustedError(
                f"open {len(addresses)} addresses: the attachment has {len(book)} live leases of"
                f" dns.max_leases={limit}; raise dns.max_leases, or lower dns.max_lease"
            )
        if refusal := self._table.refusal(self, more):
            raise ExhaustedError(f"open {len(addresses)} addresses: {refusal}")


def keeps(policy: Policy, holder: str, suffixes: Iterable[str] = ()) -> bool:
    """Tell whether the policy lets this holder have leases; `suffixes` are of `policy.search.search_suffixes`."""
    if holder == PROXY:
        return policy.dns.mode is DnsMode.PROXY and (policy.mode is not Mode.BLOCK_ALL or policy.audit)
    return judge_asked(policy, holder, suffixes).verdict.allowed


def _denied(old: Policy, new: Policy, holders: Iterable[str], suffixes: Iterable[str]) -> list[str]:
    """Return the holders that `new` denies. Of those we do not know we know only that `old` allowed them."""
    return [
        holder for holder in holders if (_tighter(old, new) if holder == UNKNOWN else not keeps(new, holder, suffixes))
    ]


def _tighter(old: Policy, new: Policy) -> bool:
    """Tell whether `new` may deny a name that `old` allowed; both have the same DNS mode."""
    if new.mode is Mode.BLOCK_ALL and not new.audit:
        return True
    before, after = set(old.dns.domains.rules()), set(new.dns.domains.rules())
    return any(rule.allow for rule in before - after) or any(not rule.allow for rule in after - before)
