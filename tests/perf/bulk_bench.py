"""Whom `test_bulk.py` compares: our data plane and `nft -f`, each with a workload on a host of its own (path_bench.py).

A set is RULES elements of both families and a mark, which is an address that only this set holds. Whether the kernel
has the set is told by packets: to its mark one passes, to the mark of the set before it one is dropped, and both are
counted. Texts are made beforehand; that of nft lies in a file, and starting nft is in its time, as for whoever uses it.
"""

from __future__ import annotations

import asyncio
import functools
import random
import socket
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from measure import FULL
from netfence.policy.commands import AllowCidr, BulkUpdate, CidrSpec, apply
from netfence.policy.modes import Mode
from netfence.policy.policy import EMPTY, Policy
from path_bench import Counted, Fence, Filter, Nft

RULES = 100_000 if FULL else 20_000
TICK_S = 0.001
MARKS, FIRST_MARK, DISCARD = "203.0.113", 100, 9


@functools.lru_cache(maxsize=1)  # contestants take turns: all of a round have the same
def texts(seed: int) -> list[str]:
    """Return RULES distinct prefixes, three fifths of them IPv4; no mark is in one of them."""
    rng = random.Random(seed)
    four: set[str] = {f"{MARKS}.0/24"}
    while len(four) <= RULES * 6 // 10:
        four.add(f"{rng.randrange(1, 224)}.{rng.randrange(256)}.{rng.randrange(256)}.0/24")
    six: set[str] = set()
    while len(six) < RULES - RULES * 6 // 10:
        six.add(f"2001:db8:{rng.randrange(65536):x}:{rng.randrange(65536):x}::/64")
    return [*sorted(four - {f"{MARKS}.0/24"}), *sorted(six)]


def mark(number: int) -> str:
    """Return the address that tells one set from the others."""
    return f"{MARKS}.{FIRST_MARK + number}"


class Bulk(Filter):
    """A contestant: replaces its set, or adds to it one element more; `last` is the mark that came last."""

    last = 0

    def replace(self) -> float:
        """Put a new set with a new mark in the place of the old one; return how long it took, in ms."""
        gone, self.last = self.last, self.last + 1
        took = self._replace(texts(self.last), mark(self.last))
        self._check(passes=mark(self.last), drops=mark(gone))
        return took

    def add(self) -> float:
        """Add the next mark to the set, a whole one; return how long it took, in ms."""
        if not self.last:
            self.replace()
        self.last += 1
        took = self._add(mark(self.last))
        self._check(passes=mark(self.last), drops=mark(self.last + 1))
        return took

    @abstractmethod
    def _replace(self, prefixes: Sequence[str], marked: str) -> float: ...

    @abstractmethod
    def _add(self, marked: str) -> float: ...

    def _check(self, passes: str, drops: str) -> None:
        before = self.counted()
        with self.workload.inside.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for each in (passes, drops):
                sock.sendto(b"", (each, DISCARD))
        after = self.counted()
        assert before is not None
        assert after is not None
        moved = Counted(after.passed - before.passed, after.dropped - before.dropped)
        assert moved == Counted(1, 1), f"{type(self).__name__}: {passes} must pass and {drops} must not: {moved}"


class BulkFence(Fence, Bulk):
    """Ours, as the daemon does it: the policy in a thread, then the kernel; `blocked` is what the event loop paid."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.blocked: list[float] = []
        self._policy: Policy | None = None

    def _replace(self, prefixes: Sequence[str], marked: str) -> float:
        return self._plane.run(self._replace_in_loop([CidrSpec(text, 0) for text in (*prefixes, f"{marked}/32")]))

    async def _replace_in_loop(self, specs: Sequence[CidrSpec]) -> float:
        bulk = BulkUpdate(mode=int(Mode.ALLOWLIST), allow_cidrs=specs, deny_cidrs=[], dns=None, audit=False)
        stop = asyncio.Event()
        gap = asyncio.create_task(_longest_gap(stop))
        await asyncio.sleep(5 * TICK_S)
        start = time.perf_counter()
        policy = await asyncio.to_thread(apply, EMPTY, bulk, time.monotonic())
        await self._plane.plane.apply(self._slot, policy, self._policy)
        elapsed = time.perf_counter() - start
        stop.set()
        self.blocked.append(await gap)
        self._policy = policy
        assert len(policy.cidrs) == len(specs)
        return elapsed * 1000

    def _add(self, marked: str) -> float:
        return self._plane.run(self._add_in_loop(AllowCidr(f"{marked}/32")))

    async def _add_in_loop(self, command: AllowCidr) -> float:
        assert self._policy is not None
        start = time.perf_counter()
        policy = apply(self._policy, command, time.monotonic())
        await self._plane.plane.apply(self._slot, policy, self._policy)
        elapsed = time.perf_counter() - start
        self._policy = policy
        return elapsed * 1000


async def _longest_gap(stop: asyncio.Event) -> float:
    """Tell the longest time the loop kept a timer waiting, in ms."""
    longest = 0.0
    while not stop.is_set():
        before = time.perf_counter()
        await asyncio.sleep(TICK_S)
        longest = max(longest, time.perf_counter() - before - TICK_S)
    return longest * 1000


class BulkNftInterval(Nft, Bulk):
    """nftables sets of networks: flushed and filled again in one transaction."""

    flags = "flags interval;"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._run_file(
            f"""
            table inet fence {{
                set allowed4 {{ type ipv4_addr; {self.flags} }}
                set allowed6 {{ type ipv6_addr; {self.flags} }}
                chain forward {{
                    type filter hook forward priority 0; policy accept;
                    iifname != "{self.workload.host_if}" accept
                    ip6 daddr @allowed6 accept
                    ip daddr @allowed4 counter accept
                    counter drop
                }}
            }}
            """,
            "nft", "-f",
        )  # fmt: skip

    def element(self, prefix: str) -> str:
        """Return what stands for a prefix in the set."""
        return prefix

    def _replace(self, prefixes: Sequence[str], marked: str) -> float:
        four = [self.element(prefix) for prefix in prefixes if ":" not in prefix]
        six = [self.element(prefix) for prefix in prefixes if ":" in prefix]
        return self._timed(
            "flush set inet fence allowed4\nflush set inet fence allowed6\n"
            f"add element inet fence allowed4 {{ {', '.join([*four, marked])} }}\n"
            f"add element inet fence allowed6 {{ {', '.join(six)} }}\n"
        )

    def _add(self, marked: str) -> float:
        return self._timed(f"add element inet fence allowed4 {{ {marked} }}\n")

    def _timed(self, text: str) -> float:
        path = self._directory / "change.nft"
        path.write_text(text)
        start = time.perf_counter()
        self.topology.host.run("nft", "-f", str(path))
        return (time.perf_counter() - start) * 1000


class BulkNftHash(BulkNftInterval):
    """nftables sets of as many addresses, which is all that a hash can hold."""

    flags = ""

    def element(self, prefix: str) -> str:
        """Return one address of the network."""
        address, _, _ = prefix.partition("/")
        return f"{address}1" if address.endswith("::") else f"{address.removesuffix('.0')}.1"


CONTESTANTS: dict[str, type[Bulk]] = {
    "netfence": BulkFence,
    "nft-hash": BulkNftHash,
    "nft-interval": BulkNftInterval,
}
