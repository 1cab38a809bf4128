"""Frames described and built: Ethernet, VLAN tags, IPv4 with options, IPv6 with extension headers, TCP, UDP, ICMP.

The description is what the oracle reads, the bytes are what the kernel reads. Built with struct, not scapy: the
differential test makes tens of thousands.
"""

from __future__ import annotations

import ipaddress
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

Fragment = Literal["", "first", "later"]
FRAGMENTS: tuple[Fragment, ...] = ("", "first", "later")
SOURCE, DESTINATION = ipaddress.ip_address("192.0.2.10"), ipaddress.ip_address("198.51.100.1")
PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "gre": 47, "esp": 50, "icmpv6": 58, "sctp": 132}
ETHERTYPES = {"arp": 0x0806, "other": 0x88CC}
TAG_TYPES = {"802.1Q": 0x8100, "802.1ad": 0x88A8}
EXTENSIONS = {
    "hopopts": 0,
    "routing": 43,
    "fragment": 44,
    "ah": 51,
    "dstopts": 60,
    "mobility": 135,
    "hip": 139,
    "shim6": 140,
}
FLAGS = {"F": 1, "S": 2, "R": 4, "P": 8, "A": 16}
UPPER_NEEDED = {"tcp": 20, "udp": 8, "icmp": 4, "icmpv6": 4}
FIRST_FRAGMENT_NEEDED = {**UPPER_NEEDED, "tcp": 4}


@dataclass
class Frame:
    """A packet by its meaning. `fragment`: "" none, "first" or "later". `cut`: keep only so many bytes."""

    ethertype: Literal["ip", "arp", "other"] = "ip"
    tags: tuple[str, ...] = ()
    source: Address = SOURCE
    destination: Address = DESTINATION
    protocol: str = "udp"
    source_port: int = 40000
    destination_port: int = 443
    flags: str = ""
    icmp_type: int = 8
    icmp_code: int = 0
    hop_limit: int = 64
    fragment: Fragment = ""
    options: tuple[tuple[int, bytes], ...] = ()
    extensions: tuple[tuple[str, bool], ...] = ()  # kind, and for routing headers: segments left
    bad_version: bool = False
    payload: bytes = b"netfence"
    cut: int | None = None

    @property
    def version(self) -> int:
        return self.destination.version

    def parts(self) -> list[tuple[str, int, int, int]]:
        """List (name, index, offset, bytes that must be there) of every header, in order."""
        found: list[tuple[str, int, int, int]] = [("eth", 0, 0, 14)]
        at = 14
        for index, _ in enumerate(self.tags):
            found.append(("vlan", index, at, 4))
            at += 4
        if self.ethertype != "ip":
            return found
        size = 20 if self.version == 4 else 40
        found.append(("ip", 0, at, size))
        at += size
        if self.version == 4 and self.options:
            found.append(("options", 0, at, len(self._options())))
            at += len(self._options())
        for index, (kind, route) in enumerate(self.extensions):
            size = len(_extension(kind, 0, route=route, later=self.fragment == "later"))
            found.append(("extension", index, at, size))
            at += size
        needed = FIRST_FRAGMENT_NEEDED if self.fragment else UPPER_NEEDED
        found.append(("upper", 0, at, needed.get(self.protocol, 0)))
        return found

    def cut_in(self, name: str, count: int = 0, first: int = 65535) -> bool:
        """Tell whether the cut takes some of the `first` bytes of that header away.

        Of VLAN tags, of any below number `count`; of extension headers, of number `count`.
        """
        if self.cut is None:
            return False
        for part, index, at, size in self.parts():
            needed = min(size, first)
            counted = index < count if part == "vlan" else index == count if part == "extension" else True
            if part == name and counted and self.cut < at + needed:
                return True
        return False

    def _options(self) -> bytes:
        raw = b"".join(
            bytes([kind]) if kind < 2 else bytes([kind, len(body) + 2]) + body for kind, body in self.options
        )
        return raw + bytes(-len(raw) % 4)

    def _upper(self) -> bytes:
        ports = struct.pack("!HH", self.source_port, self.destination_port)
        if self.protocol == "tcp":
            flags = sum(FLAGS[flag] for flag in self.flags)
            return ports + struct.pack("!IIBBHHH", 1, 1, 0x50, flags, 1024, 0, 0) + self.payload
        if self.protocol == "udp":
            return ports + struct.pack("!HH", 8 + len(self.payload), 0) + self.payload
        if self.protocol in ("icmp", "icmpv6"):
            return bytes([self.icmp_type, self.icmp_code]) + bytes(6) + self.payload
        return self.payload

    def _ipv4(self) -> bytes:
        options, upper = self._options(), self._upper()
        header_words = 5 + len(options) // 4
        fragment = {"": 0x4000, "first": 0x2000, "later": 0x2005}[self.fragment]
        version = 5 if self.bad_version else 4
        return (
            struct.pack(
                "!BBHHHBBH4s4s",
                version << 4 | header_words,
                0,
                header_words * 4 + len(upper),
                7,
                fragment,
                self.hop_limit,
                PROTOCOLS[self.protocol],
                0,
                self.source.packed,
                self.destination.packed,
            )
            + options
            + upper
        )

    def _ipv6(self) -> bytes:
        following = [EXTENSIONS[kind] for kind, _ in self.extensions] + [PROTOCOLS[self.protocol]]
        body = b"".join(
            _extension(kind, following[index + 1], route=route, later=self.fragment == "later")
            for index, (kind, route) in enumerate(self.extensions)
        )
        body += self._upper()
        version = 7 if self.bad_version else 6
        head = struct.pack("!IHBB", version << 28, len(body), following[0], self.hop_limit)
        return head + self.source.packed + self.destination.packed + body

    def build(self) -> bytes:
        """Build the frame's bytes, cut where `cut` says."""
        kind = ETHERTYPES.get(self.ethertype) or (0x0800 if self.version == 4 else 0x86DD)
        raw = bytes.fromhex("020000000001020000000002")
        for tag in self.tags:
            raw += struct.pack("!HH", TAG_TYPES[tag], 5)
        raw += struct.pack("!H", kind)
        if self.ethertype == "ip":
            raw += self._ipv4() if self.version == 4 else self._ipv6()
        else:
            raw += bytes(46)
        return raw if self.cut is None else raw[: self.cut]


def _extension(kind: str, following: int, *, route: bool, later: bool) -> bytes:
    if kind == "fragment":
        return struct.pack("!BBHI", following, 0, 5 << 3 if later else 1, 99)
    if kind == "ah":
        return bytes([following, 4]) + bytes(22)
    if kind == "routing":
        return bytes([following, 2, 4, 1 if route else 0]) + bytes(20)
    return bytes([following, 0]) + bytes(6)


def random_frame(rng: random.Random, hosts: Sequence[Address], dns_ports: Sequence[int]) -> Frame:
    """Draw a frame: mostly plain packets to the hosts, with every oddity of semantics.md 6 and 7 mixed in."""
    to = rng.choice(hosts)
    version = to.version
    own = ipaddress.ip_address("192.0.2.10" if version == 4 else "2001:db8:ffff::10")
    protocol = rng.choices(
        ["tcp", "udp", "icmp" if version == 4 else "icmpv6", "gre", "sctp", "esp"], [6, 6, 3, 1, 1, 1]
    )[0]
    frame = Frame(source=own, destination=to, protocol=protocol)
    frame.flags = rng.choice(["S", "SA", "A", "PA", "FA", "R", "RA", "F", "", "SR"])
    frame.source_port, frame.destination_port = rng.choice(
        [(40000, 443), (40001, 53), (68, 67), (546, 547), (8080, 5555)]
    )
    if rng.random() < 0.15:
        frame.destination_port = rng.choice(list(dns_ports))
    frame.icmp_type = rng.choice([8, 128, 131, 132, 133, 134, 135, 136, 137, 143])
    frame.icmp_code = rng.choice([0, 0, 0, 1])
    frame.hop_limit = rng.choice([255, 255, 64, 1])
    frame.tags = rng.choices([(), ("802.1Q",), ("802.1ad", "802.1Q"), ("802.1ad", "802.1Q", "802.1Q")], [8, 1, 1, 1])[0]
    if rng.random() < 0.05:
        frame.ethertype = rng.choice(["arp", "other"])
    if version == 4:
        if rng.random() < 0.15:
            frame.options = rng.choice(
                [
                    ((1, b""), (1, b"")),
                    ((7, bytes(9)),),
                    ((131, bytes(5)),),
                    ((1, b""), (137, bytes(5))),
                    ((148, bytes(2)),),
                ]
            )
        frame.fragment = rng.choices(FRAGMENTS, [8, 1, 1])[0]
    elif rng.random() < 0.3:
        kinds = [rng.choice(list(EXTENSIONS)) for _ in range(rng.choice([1, 1, 2, 3, 6, 7]))]
        kinds = [kind for index, kind in enumerate(kinds) if kind != "fragment" or "fragment" not in kinds[:index]]
        frame.extensions = tuple((kind, rng.random() < 0.3) for kind in kinds)
        if "fragment" in kinds:
            frame.fragment = rng.choice(["first", "later"])
    frame.bad_version = rng.random() < 0.02
    if rng.random() < 0.1:
        frame.cut = rng.randrange(14, len(frame.build()))
    return frame
