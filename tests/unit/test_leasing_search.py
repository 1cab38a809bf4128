"""Leases of names asked for with a search domain end when the whole name is denied (semantics.md 5, 8)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

from netfence.leasing import LeaseLimits, Leases, LeaseTable
from netfence.policy.commands import AllowDomain, BulkUpdate, DenyDomain, DnsSpec, DomainSpec, apply
from netfence.policy.policy import EMPTY
from netfence.policy.search import search_suffixes

ADDRESS = bytes([203, 0, 113, 80])
LIMITS = LeaseLimits(300, 60, 3600, 10, search_suffixes(["corp.example"]))


class Kernel:
    def __init__(self) -> None:
        self.open: set[bytes] = set()

    def open_leases(self, slot: int, addresses: Sequence[bytes], expiry: float) -> None:
        assert slot == 1
        assert expiry > time.monotonic()
        self.open.update(addresses)

    def close_leases(self, slot: int, addresses: Iterable[bytes]) -> None:
        assert slot == 1
        self.open.difference_update(addresses)

    def shorten_lease(self, slot: int, address: bytes, expiry: float) -> None:
        raise AssertionError((slot, address, expiry))

    async def sweep(self, slot: int) -> set[bytes]:
        assert slot == 1
        return set()


def test_denying_the_whole_name_closes_what_its_stripped_name_allowed() -> None:
    dns = DnsSpec(mode=2, allow=[DomainSpec("db", False)], deny=[], upstreams=[])
    bulk = BulkUpdate(mode=2, allow_cidrs=[], deny_cidrs=[], dns=dns, audit=False)
    old = apply(EMPTY, bulk, 0.0)
    kernel = Kernel()
    leases = Leases(1, kernel, LIMITS, LeaseTable(100))
    leases.open("db.corp.example", [ADDRESS], 300)

    unrelated = apply(old, AllowDomain("other.test", False), 0.0)
    asyncio.run(leases.drop_denied(old, unrelated))
    assert kernel.open == {ADDRESS}  # still allowed, by its stripped name

    denied = apply(unrelated, DenyDomain("db.corp.example", False), 0.0)
    asyncio.run(leases.drop_denied(unrelated, denied))
    assert kernel.open == set()
