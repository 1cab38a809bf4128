"""The leases of one attachment, in the kernel and in the book at once (semantics.md 5, 8, 26).

Owns the order of the two: opened in the kernel before they are booked, forgotten by the book before they are closed
there. Whether a name may open anything is decided by `attachment`; the book itself is pure (`policy.leases`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from netfence.errors import ExhaustedError, NetfenceError
from netfence.policy.leases import LeaseBook, lease_expiry
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import Policy

PROXY = "\0proxy"  # holder of leases the control plane ordered; no name reads like this
UNKNOWN = "\0unknown"  # holder of leases found in the kernel after a restart
MANY = 500  # holders from which judging them is worth a thread
CHUNK = 512  # holders dropped in one go on the event loop, about 1 ms


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


class Leases:
    """The leases of the attachment in `slot`; use it only on the event loop."""

    def __init__(self, slot: int, kernel: LeaseKernel, limits: LeaseLimits) -> None:
        self._slot, self._kernel, self._limits = slot, kernel, limits
        self._book = LeaseBook()

    def addresses(self) -> Iterator[bytes]:
        """Iterate over the packed addresses that are booked."""
        return self._book.addresses()

    def adopt(self, leases: Mapping[bytes, float]) -> None:
        """Book leases (packed address → expiry) that the kernel has already, for a holder that nobody knows."""
        for address, expiry in leases.items():
            self._book.hold(UNKNOWN, address, expiry)

    def open(self, holder: str, addresses: Sequence[bytes], ttl_s: float) -> None:
        """Open leases for an answer's packed addresses, or renew them; microseconds each.

        Raises ExhaustedError when no room is left, or what the kernel raises, and has then opened none of them.
        """
        limits, book = self._limits, self._book
        now = time.monotonic()
        expiry = lease_expiry(now, ttl_s, limits.min_s, limits.grace_s, limits.max_s)
        try:
            self._make_room(addresses, now)
            self._kernel.open_leases(self._slot, addresses, expiry)  # renewals never shorten, there as here
        except NetfenceError:
            self._kernel.close_leases(self._slot, [address for address in addresses if address not in book])
            raise
        for address in addresses:
            book.hold(holder, address, expiry)

    async def drop_denied(self, old: Policy, new: Policy) -> None:
        """Drop the holds that `new` does not allow and close the leases that nothing holds any more.

        `new` is in force already, so that no denied name can get a new hold meanwhile.
        """
        holders = {holder for _, holder, _ in self._book.export()}
        if new.dns.mode is not old.dns.mode:
            denied = list(holders)
        elif len(holders) > MANY or UNKNOWN in holders:
            denied = await asyncio.to_thread(_denied, old, new, holders)
        else:
            denied = _denied(old, new, holders)
        for start in range(0, len(denied), CHUNK):
            self._drop(frozenset(denied[start : start + CHUNK]))
            await asyncio.sleep(0)

    async def sweep(self, now: float) -> None:
        """Forget what the kernel's sweep removed. `now` is monotonic seconds."""
        removed = await self._kernel.sweep(self._slot)
        for address in self._book.expired(now):  # one opened again meanwhile is not among them
            if address in removed:
                self._book.forget(address)

    def _drop(self, denied: frozenset[str]) -> None:
        shortened: list[tuple[bytes, float]] = []
        free = self._book.drop_names(lambda holder: holder not in denied, lambda *lease: shortened.append(lease))
        self._kernel.close_leases(self._slot, free)
        for address, expiry in shortened:  # another name holds it still, but not for so long
            self._kernel.shorten_lease(self._slot, address, expiry)

    def _make_room(self, addresses: Sequence[bytes], now: float) -> None:
        book, limit = self._book, self._limits.max_leases
        excess = len(book) + book.would_add(addresses) - limit
        if excess <= 0:
            return
        wanted = set(addresses)
        gone = [address for address in book.expired(now) if address not in wanted][: max(excess, CHUNK)]
        self._kernel.close_leases(self._slot, gone)
        for address in gone:
            book.forget(address)
        if len(book) + book.would_add(addresses) > limit:
            raise ExhaustedError(
                f"open {len(addresses)} addresses: the attachment has {len(book)} live leases of"
                f" dns.max_leases={limit}; raise dns.max_leases, or lower dns.max_lease"
            )


def keeps(policy: Policy, holder: str) -> bool:
    """Tell whether the policy lets this holder have leases."""
    if holder == PROXY:
        return policy.dns.mode is DnsMode.PROXY and (policy.mode is not Mode.BLOCK_ALL or policy.audit)
    return policy.judge_name(holder).allowed


def _denied(old: Policy, new: Policy, holders: Iterable[str]) -> list[str]:
    """Return the holders that `new` denies. Of those we do not know we know only that `old` allowed them."""
    return [holder for holder in holders if (_tighter(old, new) if holder == UNKNOWN else not keeps(new, holder))]


def _tighter(old: Policy, new: Policy) -> bool:
    """Tell whether `new` may deny a name that `old` allowed; both have the same DNS mode."""
    if new.mode is Mode.BLOCK_ALL and not new.audit:
        return True
    before, after = set(old.dns.domains.rules()), set(new.dns.domains.rules())
    return any(rule.allow for rule in before - after) or any(not rule.allow for rule in after - before)
