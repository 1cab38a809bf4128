"""Frames that scapy's `fuzz` makes, of all shapes, then cut and lied to; a seed repeats them.

What scapy would draw is fixed here and there, or next to nothing would be readable: versions, destinations out of the
policies' world, no offset of fragments.
"""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from scapy import volatile
from scapy.error import Scapy_Exception
from scapy.layers.inet import (
    ICMP,
    IP,
    TCP,
    UDP,
    IPOption,
    IPOption_EOL,
    IPOption_LSRR,
    IPOption_NOP,
    IPOption_Router_Alert,
    IPOption_RR,
    IPOption_Security,
    IPOption_SSRR,
    IPOption_Timestamp,
)
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6MLDone,
    ICMPv6MLReport,
    ICMPv6MLReport2,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, GRE, Dot1AD, Dot1Q, Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Raw, fuzz

from frames import Address

MAX_BYTES = 1500
BUILDS = 3  # of one fuzzed packet, whose random values are others each time
LENGTHS_AT = (14, 16, 18, 20, 22, 24, 38, 54, 55, 58)  # where versions, lengths and options' lengths mostly stand
Draw = random.Random


class _Seeded(random.Random):
    """Stands for the module `random` inside scapy.volatile, whose enumerations seed generators of their own."""

    def Random(self, seed: object = None) -> random.Random:  # noqa: N802 - the module's name for it
        """Make a generator that follows from this one."""
        return random.Random(self.getrandbits(64) if seed is None else str(seed))


class PacketFuzz:
    """An endless supply of frames. `hosts` are destinations that rules speak of, `dns` our DNS server and another's."""

    def __init__(self, seed: str, hosts: Sequence[Address], *dns: tuple[Address, int]) -> None:
        self._rng = _Seeded(seed)
        self._own_dns = str(dns[0][0]), dns[0][1]
        self._hosts = [str(host) for host in hosts]
        self._ports = [*(port for _, port in dns), 53, 67, 68, 546, 547, 443, 40000, 5555, 8080]

    def frames(self) -> Iterator[bytes]:
        """Draw frames: each shape as it is, cut, and with lies."""
        while True:
            for raw in self._built():
                yield raw
                yield raw[: self._rng.randrange(14, len(raw) + 1)] if len(raw) > 14 else raw
                yield self._lied(raw)

    def cut_everywhere(self) -> Iterator[bytes]:
        """Draw one frame and give it cut at every length."""
        raw = next(iter(self._built()))[:200]
        for length in range(14, len(raw) + 1):
            yield raw[:length]

    def _built(self) -> list[bytes]:
        with _scapy_draws_from(self._rng):
            while True:
                with contextlib.suppress(Scapy_Exception, struct.error, ValueError, TypeError, OSError):
                    packet = self._shape()
                    return [bytes(packet)[:MAX_BYTES] for _ in range(BUILDS)]

    def _shape(self) -> Any:
        rng = self._rng
        head: Any = Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:02")
        for _ in range(rng.choice((0, 0, 0, 0, 0, 0, 1, 2, 3))):
            head /= rng.choice((Dot1Q, Dot1AD))(vlan=5)
        kind = rng.random()
        if kind < 0.03:
            return Raw(rng.randbytes(rng.randrange(14, 200)))
        if kind < 0.06:
            return fuzz(head / ARP())
        if kind < 0.09:
            return fuzz(Ether(dst="02:00:00:00:00:01") / Raw(rng.randbytes(60)))
        if kind < 0.25:
            return fuzz(head / self._exception())
        host = rng.choice(self._hosts)
        return fuzz(head / (self._ipv6(host) if ":" in host else self._ipv4(host)))

    def _exception(self) -> Any:
        """Draw what passes for what it is, or nearly: fixed where the exception looks, random where it does not."""
        rng = self._rng
        destination, port = self._own_dns
        flags = rng.choice(("S", "A", "PA", "FA", "RA"))
        peers = [host for host in self._hosts if ":" not in host]
        peers6 = [host for host in self._hosts if ":" in host]
        fields = {"version": 4, "frag": 0, "flags": rng.choice((0, 0, 0, 1, 2, 4))}
        choices: tuple[Callable[[], Any], ...] = (
            lambda: IP(dst="255.255.255.255", **fields) / UDP(sport=68, dport=67),
            lambda: IP(dst=destination, **fields) / rng.choice((UDP, TCP))(dport=port),
            lambda: IP(src="192.0.2.10", dst=rng.choice(peers), **fields) / TCP(sport=40000, dport=443, flags=flags),
            lambda: IP(src="192.0.2.10", dst=rng.choice(peers), **fields) / TCP(sport=8080, dport=5555, flags=flags),
            lambda: (
                IPv6(version=6, src="2001:db8:ffff::10", dst=rng.choice(peers6))
                / TCP(sport=40000, dport=443, flags=flags)
            ),
            lambda: IPv6(version=6, dst="ff02::1:2") / UDP(sport=546, dport=547),
            lambda: IPv6(version=6, dst=rng.choice(_GROUPS), hlim=255) / _typed(rng.choice(_DISCOVERY), code=0),
            lambda: IPv6(version=6, dst="ff02::16", hlim=1) / IPv6ExtHdrHopByHop() / _typed(rng.choice(_REPORTS)),
        )
        return rng.choice(choices)() / Raw(rng.randbytes(rng.choice((0, 8))))

    def _sometimes(self, chance: float, **fields: Any) -> dict[str, Any]:
        """Fix fields with this chance; else scapy draws them."""
        return fields if self._rng.random() < chance else {}

    def _ipv4(self, host: str) -> Any:
        rng = self._rng
        fields = (
            self._sometimes(0.97, version=4) | self._sometimes(0.9, dst=host) | self._sometimes(0.5, src="192.0.2.10")
        )
        fields |= self._sometimes(0.8, frag=0) | self._sometimes(0.7, flags=rng.choice((0, 2)))
        fields |= self._sometimes(0.05, ihl=rng.randrange(16)) | self._sometimes(
            0.1, len=rng.choice((0, 19, 20, 24, 65535))
        )
        if rng.random() < 0.25:
            fields["options"] = [rng.choice(_OPTIONS)(rng) for _ in range(rng.choice((1, 1, 2, 3, 13)))]
        return IP(**fields) / self._upper(version=4)

    def _ipv6(self, host: str) -> Any:
        rng = self._rng
        fields = self._sometimes(0.97, version=6) | self._sometimes(0.9, dst=host)
        fields |= self._sometimes(0.5, src="2001:db8:ffff::10") | self._sometimes(
            0.1, plen=rng.choice((0, 1, 8, 65535))
        )
        fields |= self._sometimes(0.6, hlim=rng.choice((255, 255, 1, 64)))
        packet: Any = IPv6(**fields)
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 3, 6, 7))):
            packet /= self._extension()
        if rng.random() < 0.1:
            following = rng.choice((6, 17, 58, 44, 51, 135, 139, 140, 59, rng.randrange(256)))
            number = rng.choice((51, 135, 139, 140, 253))
            return IPv6(**fields, nh=number) / Raw(bytes([following, rng.choice((0, 1, 4, 255))]) + rng.randbytes(120))
        return packet / self._upper(version=6)

    def _extension(self) -> Any:
        rng = self._rng
        lie = self._sometimes(0.1, len=rng.choice((1, 5, 200, 255)))
        kind = rng.randrange(4)
        if kind == 0:
            return IPv6ExtHdrFragment(**self._sometimes(0.6, offset=0), **self._sometimes(0.5, m=rng.randrange(2)))
        if kind == 1:
            return IPv6ExtHdrRouting(**lie, **self._sometimes(0.7, segleft=0))
        return rng.choice((IPv6ExtHdrHopByHop, IPv6ExtHdrDestOpt))(**lie)

    def _upper(self, version: int) -> Any:
        rng = self._rng
        ports = self._sometimes(0.7, dport=rng.choice(self._ports)) | self._sometimes(
            0.7, sport=rng.choice(self._ports)
        )
        body = Raw(rng.randbytes(rng.choice((0, 1, 8, 30))))
        kind = rng.random()
        if kind < 0.35:
            flags = self._sometimes(0.6, flags=rng.choice(("S", "SA", "A", "PA", "FA", "R", "RA", "")))
            return TCP(**ports, **flags) / body
        if kind < 0.65:
            return UDP(**ports) / body
        if kind < 0.9:
            return rng.choice((_icmp,) if version == 4 else _ICMPV6)() / body
        return rng.choice((SCTP, GRE, _icmp, ICMPv6ND_NS, Raw))() / body

    def _lied(self, raw: bytes) -> bytes:
        """Change a few bytes, mostly where lengths stand."""
        rng, out = self._rng, bytearray(raw)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = min(rng.choice((rng.choice(LENGTHS_AT), rng.randrange(12, 100))), len(out) - 1)
            new = rng.choice((bytes(1), b"\xff", b"\1", rng.randbytes(1), rng.randbytes(2)))
            out[at : at + len(new)] = new
        return bytes(out)


def _icmp() -> Any:
    """Make an ICMP message without the time of day, which scapy would take from the clock."""
    return ICMP(ts_ori=1, ts_rx=2, ts_tx=3)


def _typed(kind: Any, **fields: Any) -> Any:
    """Make an ICMPv6 message whose type is not left to chance."""
    return kind(type=kind().type, **fields)


@contextlib.contextmanager
def _scapy_draws_from(rng: _Seeded) -> Iterator[None]:
    """Let all of scapy draw from one generator: what enumerations make of their own, and the functions of `random`."""
    before, volatile.random = volatile.random, rng
    state = random.getstate()
    random.seed(rng.getrandbits(64))
    try:
        yield
    finally:
        volatile.random = before
        random.setstate(state)


_DISCOVERY = (ICMPv6ND_NS, ICMPv6ND_NA, ICMPv6ND_RS)
_REPORTS = (ICMPv6MLReport, ICMPv6MLDone, ICMPv6MLReport2)
_GROUPS = ("fe80::1", "ff02::1", "ff02::2", "ff02::1:ff00:1", "2001:db8:aaaa::1", "2001:db8::1")
_ICMPV6 = (
    ICMPv6EchoRequest, ICMPv6ND_NS, ICMPv6ND_NA, ICMPv6ND_RS, ICMPv6ND_RA, ICMPv6MLReport, ICMPv6MLDone, ICMPv6MLReport2
)  # fmt: skip
_OPTIONS: Sequence[Callable[[Draw], Any]] = (
    lambda _: IPOption_NOP(),
    lambda _: IPOption_NOP(),
    lambda _: IPOption_EOL(),
    lambda _: IPOption_LSRR(routers=["192.0.2.1"]),
    lambda _: IPOption_SSRR(routers=["192.0.2.1"]),
    lambda _: IPOption_RR(routers=["192.0.2.1"]),
    lambda _: IPOption_Router_Alert(),
    lambda _: IPOption_Security(),
    lambda _: IPOption_Timestamp(),
    lambda rng: IPOption(
        option=rng.randrange(32), copy_flag=rng.randrange(2), length=rng.choice((0, 1, 2, 3, 40, 255))
    ),
)
