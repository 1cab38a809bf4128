"""Packets of every shape (semantics.md 6 and 7), each with the reason it must meet: named values, no test.

A `Case` without a reason is judged by its address. The lists are by the sentence of semantics.md that they hold us to.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from scapy.layers.inet import IP, TCP, UDP
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

from harness import packets
from harness.packets import DOT1AD, DOT1Q, Shape
from netfence.policy.modes import Reason

ANY4, ANY6 = "203.0.113.99", "2001:db8:77::1"
EVERYTHING = ["0.0.0.0/0", "::/0"]
OWN_DNS4, OWN_DNS6, OWN_PORT = "198.51.100.254", "2001:db8:fe::53", 11000
FOREIGN_PORT = 11007


@dataclass(frozen=True)
class Case:
    """A packet, whom it is for, and one reason for all modes but `disabled` (None: the policy judges it by `to`)."""

    shape: Shape
    to: str
    reason: Reason | None = None

    def __str__(self) -> str:
        return self.shape.name


def shape(name: str, family: int, build: Callable[[str, str], Any]) -> Shape:
    """Make a shape from a builder that leaves the payload to us."""
    return Shape(name, family, lambda source, to, payload: build(source, to) / payload)


def icmp6(name: str, message: Callable[[str], Any], *headers: Callable[[], Any], hlim: int = 255) -> Shape:
    """Make an ICMPv6 message of its source, with IPv6 extension headers before it."""

    def build(source: str, to: str) -> Any:
        packet = IPv6(src=source, dst=to, hlim=hlim)
        for header in headers:
            packet /= header()
        return packet / message(source)

    return shape(name, 6, build)


def v4(name: str, upper: Any = None, **fields: Any) -> Shape:
    upper = UDP(sport=40000, dport=9) if upper is None else upper
    return shape(name, 4, lambda source, to: IP(src=source, dst=to, **fields) / upper)


def v6(name: str, *headers: Any, **fields: Any) -> Shape:
    def build(source: str, to: str) -> Any:
        packet = IPv6(src=source, dst=to, **fields)
        for header in headers:
            packet /= header
        return packet

    return shape(name, 6, build)


def raw6(name: str, first: int, body: bytes) -> Shape:
    """IPv6 with bytes behind it, for headers that scapy does not know."""
    return v6(name, body, nh=first)


def extension(following: int, kind: str = "options", left: int = 0, routing_type: int = 0) -> bytes:
    """One 8-byte extension header; "ah" 12 bytes."""
    if kind == "ah":
        return bytes([following, 1]) + bytes(10)
    return (
        bytes([following, 0, routing_type, left]) + bytes(4)
        if kind == "routing"
        else bytes([following, 0, 1, 4]) + bytes(4)
    )


def udp_bytes(dport: int = 9, sport: int = 40000) -> bytes:
    return struct.pack("!HHHH", sport, dport, 40, 0)


def chain6(count: int) -> bytes:
    """So many destination options, then UDP."""
    return b"".join(extension(60 if index < count - 1 else 17) for index in range(count)) + udp_bytes()


def moving(name: str, base: Shape, edit: Callable[[bytearray], None]) -> Shape:
    """Change the bytes of a built packet; no checksum is corrected."""

    def build(source: str, to: str, payload: bytes) -> bytes:
        packet = bytearray(bytes(base.build(source, to, payload)))
        edit(packet)
        return bytes(packet)

    return replace(base, name=name, build=build)


def put(offset: int, value: bytes) -> Callable[[bytearray], None]:
    def edit(packet: bytearray) -> None:
        packet[offset : offset + len(value)] = value

    return edit


def anywhere(each: Shape) -> str:
    return ANY4 if each.family == 4 or each is packets.MAPPED else ANY6


FRAGMENT = IPv6ExtHdrFragment(offset=0, m=1, id=7)
NS, NA, RS = (
    lambda source: ICMPv6ND_NS(tgt=source),
    lambda source: ICMPv6ND_NA(tgt=source),
    lambda _: ICMPv6ND_RS(),
)
SOLICITED, ALL_NODES, ALL_ROUTERS = "ff02::1:ff00:99", "ff02::1", "ff02::2"
HOP_BY_HOP, DESTINATION = IPv6ExtHdrHopByHop, IPv6ExtHdrDestOpt
PLAIN_UDP = UDP(sport=40000, dport=9)

JUDGED_SHAPES = [
    packets.UDP4, packets.UDP6, packets.TCP4_SYN, packets.TCP4_ACK, packets.TCP6_SYN, packets.TCP6_ACK,
    packets.ICMP4, packets.ICMP6, packets.PROTOCOL_253, packets.MAPPED,
    packets.UDP4_VLAN, packets.UDP6_VLAN, packets.UDP4_QINQ, packets.UDP6_QINQ, packets.UDP4_QINQ_8100,
    packets.UDP4.tagged((DOT1Q, 0)), packets.UDP4.tagged((DOT1AD, 7)), packets.UDP6.tagged((DOT1AD, 7), (DOT1AD, 8)),
    packets.UDP4_FIRST_FRAGMENT, packets.UDP4_LATER_FRAGMENT, packets.UDP6_FIRST_FRAGMENT, packets.UDP6_LATER_FRAGMENT,
    packets.UDP4_FIRST_FRAGMENT.tagged((DOT1Q, 7)), packets.UDP6_LATER_FRAGMENT.tagged((DOT1Q, 7)),
    v4("tcp4-first-fragment-of-8-bytes", b"\x9c\x40\x01\xbb" + bytes(4), proto=6, flags="MF"),
    packets.UDP4_OPTIONS, v4("udp4-forty-bytes-of-options", options=b"\x07\x27\x04" + bytes(36) + b"\0"),
    v4("udp4-eight-nops", options=b"\x01" * 8), v4("udp4-lsrr-after-the-end", options=b"\x00\x83\x07\x04" + bytes(4)),
    packets.UDP6_HOP_BY_HOP, packets.UDP6_DESTINATION_OPTIONS, packets.UDP6_CHAIN, packets.UDP6_ROUTING_DONE,
    raw6("udp6-six-extension-headers", 60, chain6(6)), raw6("udp6-behind-ah", 51, extension(17, "ah") + udp_bytes()),
    raw6("udp6-behind-mobility", 135, extension(17) + udp_bytes()), raw6("ipv6-no-next-header", 59, b""),
    raw6("udp6-atomic-fragment", 44, bytes([17, 0, 0, 0, 0, 0, 0, 7]) + udp_bytes()),
    raw6("ipv6-esp", 50, bytes(16)), v4("ipv4-gre", b"\0\0\x08\0" + bytes(20), proto=47),
    v4("ipv4-in-ipv4", IP(src="10.0.0.1", dst="10.0.0.2") / PLAIN_UDP), v4("udp4-to-53", UDP(sport=40000, dport=53)),
]  # fmt: skip

MALFORMED = [
    (Reason.VLAN_DEPTH, [
        packets.UDP4_THREE_TAGS, packets.UDP6.tagged(*[(DOT1Q, 7)] * 3), packets.UDP4.tagged(*[(DOT1AD, 7)] * 4),
    ]),
    (Reason.SOURCE_ROUTE, [
        packets.UDP4_LSRR, packets.UDP4_SSRR, packets.UDP4_LSRR.tagged((DOT1Q, 7)),
        v4("udp4-lsrr-behind-others", options=b"\x01\x94\x04\x00\x00\x01\x83\x07\x04\xcb\x00\x71\x50\x00\x00\x00"),
        v4("udp4-lsrr-later-fragment", frag=9, options=b"\x83\x07\x04\xcb\x00\x71\x50\x00"),
        packets.UDP6_ROUTING_LEFT,
        *[raw6(f"udp6-routing-left-type-{kind}", 43, extension(17, "routing", 1, kind) + udp_bytes())
          for kind in (2, 3, 4)],
        raw6("udp6-routing-left-behind-options", 60, extension(43) + extension(17, "routing", 1) + udp_bytes()),
        v6("udp6-routing-left-before-fragment", IPv6ExtHdrRouting(segleft=1, addresses=["::1"]) / FRAGMENT / PLAIN_UDP),
    ]),
    (Reason.EXT_HEADERS, [
        packets.UDP6_LONG_CHAIN, raw6("udp6-seven-extension-headers", 60, chain6(7)),
        v4("udp4-forty-nops", options=b"\x01" * 40),
    ]),
    (Reason.TRUNCATED, [
        packets.UDP4_CUT_IP, packets.UDP6_CUT_IP, packets.UDP4_CUT_UDP, packets.UDP6_CUT_UDP,
        *[packets.TCP4_SYN.truncated(20 + size, f"tcp-{size}") for size in (0, 3, 4, 13, 19)],
        *[packets.TCP6_SYN.truncated(40 + size, f"tcp-{size}") for size in (0, 19)],
        packets.UDP4.truncated(19, "one-byte"), packets.UDP6.truncated(39, "one-byte"),
        packets.ICMP4.truncated(23, "icmp"), packets.ICMP6.truncated(43, "icmp"),
        packets.UDP4_OPTIONS.truncated(22, "options"), packets.UDP4_LSRR.truncated(21, "options"),
        packets.UDP6_HOP_BY_HOP.truncated(44, "extension"), packets.UDP6_CHAIN.truncated(59, "chain"),
        packets.UDP6_LATER_FRAGMENT.truncated(47, "fragment-header"),
        packets.UDP4_FIRST_FRAGMENT.truncated(22, "first-fragment"),
        packets.UDP4_VLAN.truncated(19, "behind-vlan"), packets.UDP6_QINQ.truncated(39, "behind-qinq"),
        packets.IPV4_BAD_HEADER_LENGTH,
        moving("ipv4-header-of-60-in-less", packets.UDP4.truncated(40, "x"), put(0, b"\x4f")),
        moving("ipv4-total-length-below-header", packets.UDP4, put(2, b"\0\x13")),
        moving("ipv4-option-length-zero", packets.UDP4_OPTIONS, put(21, b"\0")),
        moving("ipv4-option-length-one", packets.UDP4_OPTIONS, put(21, b"\x01")),
        moving("ipv6-extension-longer-than-packet", packets.UDP6_HOP_BY_HOP, put(41, b"\x20")),
    ]),
    (Reason.NOT_IP, [
        packets.NOT_IP, packets.IPV4_AS_IPV6, replace(packets.UDP6, name="ipv6-as-ipv4", ethertype=0x0800),
        moving("ipv4-version-5", packets.UDP4, put(0, b"\x55")), moving("ipv6-version-0", packets.UDP6, put(0, b"\0")),
        *[
            replace(packets.UDP4, name=f"ethertype-{number:04x}", ethertype=number)
            for number in (0x0040, 0x0200, 0x8847, 0x8864, 0x88E5, 0x888E, 0x9100, 0x22F3)
        ],
        packets.NOT_IP.tagged((DOT1Q, 7)),
    ]),
]  # fmt: skip

ALWAYS = [
    *[Case(icmp6(f"{name}-to-{to}", message), to, Reason.NEIGHBOUR)
      for name, message in (("ns", NS), ("na", NA), ("rs", RS))
      for to in ("fe80::1", "febf::1", SOLICITED, ALL_NODES, ALL_ROUTERS)],
    Case(icmp6("ns-tagged", NS).tagged((DOT1Q, 7)), SOLICITED, Reason.NEIGHBOUR),
    Case(icmp6("mld2-report", lambda _: ICMPv6MLReport2(), HOP_BY_HOP, hlim=1), "ff02::16", Reason.NEIGHBOUR),
    Case(icmp6("mld-report", lambda _: ICMPv6MLReport(), HOP_BY_HOP, hlim=1), "ff02::1:ff00:7", Reason.NEIGHBOUR),
    Case(icmp6("mld-done", lambda _: ICMPv6MLDone(), HOP_BY_HOP, hlim=1), "ff02::2", Reason.NEIGHBOUR),
    Case(packets.DHCP4, "255.255.255.255", Reason.DHCP),
    Case(packets.DHCP6, "ff02::1:2", Reason.DHCP),
    Case(packets.DHCP4.tagged((DOT1Q, 7)), "255.255.255.255", Reason.DHCP),
    Case(v4("own-dns4", UDP(sport=40000, dport=OWN_PORT)), OWN_DNS4, Reason.DNS),
    Case(v4("own-dns4-tcp", TCP(sport=40000, dport=OWN_PORT, flags="S")), OWN_DNS4, Reason.DNS),
    Case(v4("foreign-dns4", UDP(sport=40000, dport=FOREIGN_PORT)), OWN_DNS4, Reason.FOREIGN_DNS),
    Case(v4("foreign-dns4-tcp", TCP(sport=40000, dport=FOREIGN_PORT, flags="A")), OWN_DNS4, Reason.FOREIGN_DNS),
    Case(v4("foreign-dns4-fragment", UDP(sport=40000, dport=FOREIGN_PORT), flags="MF"), OWN_DNS4, Reason.FOREIGN_DNS),
    Case(v6("foreign-dns6", UDP(sport=40000, dport=53)), OWN_DNS6, Reason.FOREIGN_DNS),
    Case(v6("foreign-dns6-options", DESTINATION(), UDP(sport=40000, dport=53)), OWN_DNS6, Reason.FOREIGN_DNS),
]  # fmt: skip

NEAR_MISSES = [
    Case(icmp6("ns-hop-limit-254", NS, hlim=254), SOLICITED),
    Case(icmp6("ns-hop-limit-1", NS, hlim=1), ALL_NODES),
    Case(icmp6("ns-to-global", NS), ANY6),
    Case(icmp6("na-to-global", NA), ANY6),
    Case(icmp6("ns-to-other-group", NS), "ff02::1:ff"),
    Case(icmp6("ns-to-site-nodes", NS), "ff05::1"),
    Case(icmp6("rs-to-site-routers", RS), "ff05::2"),
    Case(icmp6("ns-code-1", lambda source: ICMPv6ND_NS(code=1, tgt=source)), SOLICITED),
    Case(icmp6("ns-behind-options", NS, HOP_BY_HOP), SOLICITED),
    Case(icmp6("ns-behind-fragment", NS, lambda: IPv6ExtHdrFragment(offset=0, m=0, id=7)), SOLICITED),
    Case(icmp6("ra-to-all-nodes", lambda _: ICMPv6ND_RA()), ALL_NODES),
    Case(icmp6("redirect", lambda _: b"\x89\0\0\0" + bytes(36)), "fe80::1"),
    Case(icmp6("echo-to-all-nodes", lambda _: ICMPv6EchoRequest()), ALL_NODES),
    Case(icmp6("mld-query", lambda _: b"\x82\0\0\0" + bytes(20), HOP_BY_HOP, hlim=1), ALL_NODES),
    Case(icmp6("mld2-report-hop-limit-2", lambda _: ICMPv6MLReport2(), HOP_BY_HOP, hlim=2), "ff02::16"),
    Case(icmp6("mld2-report-to-site", lambda _: ICMPv6MLReport2(), HOP_BY_HOP, hlim=1), "ff05::16"),
    Case(icmp6("mld2-report-to-unicast", lambda _: ICMPv6MLReport2(), HOP_BY_HOP, hlim=1), ANY6),
    Case(icmp6("mld2-report-fragment", lambda _: ICMPv6MLReport2(), lambda: FRAGMENT, hlim=1), "ff02::16"),
    Case(replace(packets.DHCP4, name="dhcp4-to-unicast"), ANY4),
    Case(replace(packets.DHCP4, name="dhcp4-to-subnet-broadcast"), "198.51.100.255"),
    Case(replace(packets.DHCP4, name="dhcp4-to-multicast"), "224.0.0.1"),
    Case(v4("dhcp4-other-source-port", UDP(sport=40000, dport=67)), "255.255.255.255"),
    Case(v4("dhcp4-answer", UDP(sport=67, dport=68)), "255.255.255.255"),
    Case(v4("dhcp4-tcp", TCP(sport=68, dport=67, flags="S")), "255.255.255.255"),
    Case(v4("dhcp4-first-fragment", UDP(sport=68, dport=67), flags="MF"), "255.255.255.255"),
    Case(v4("dhcp4-later-fragment", udp_bytes(67, 68), proto=17, frag=8), "255.255.255.255"),
    Case(replace(packets.DHCP6, name="dhcp6-to-site-servers"), "ff05::1:3"),
    Case(replace(packets.DHCP6, name="dhcp6-to-unicast"), ANY6),
    Case(v6("dhcp6-answer", UDP(sport=547, dport=546)), "ff02::1:2"),
    Case(v6("dhcp6-fragment", FRAGMENT, UDP(sport=546, dport=547)), "ff02::1:2"),
    Case(v4("own-dns4-other-port", UDP(sport=40000, dport=OWN_PORT + 1)), OWN_DNS4),
    Case(v4("own-dns4-other-address", UDP(sport=40000, dport=OWN_PORT)), ANY4),
    Case(v4("own-dns4-first-fragment", UDP(sport=40000, dport=OWN_PORT), flags="MF"), OWN_DNS4),
    Case(v4("own-dns4-later-fragment", udp_bytes(OWN_PORT), proto=17, frag=8), OWN_DNS4),
    Case(v4("own-dns4-protocol", udp_bytes(OWN_PORT), proto=136), OWN_DNS4),
    Case(v4("foreign-dns4-icmp", b"\x08\0\0\0" + struct.pack("!HH", 40000, FOREIGN_PORT), proto=1), OWN_DNS4),
    Case(replace(packets.UDP4, name="udp4-multicast"), "224.0.0.251"),
    Case(replace(packets.UDP4, name="udp4-broadcast"), "255.255.255.255"),
    Case(replace(packets.UDP6, name="udp6-multicast"), "ff02::fb"),
    Case(replace(packets.UDP4, name="udp4-link-local"), "169.254.1.1"),
    Case(replace(packets.UDP6, name="udp6-link-local"), "fe80::1"),
    Case(replace(packets.UDP4, name="udp4-loopback"), "127.0.0.1"),
    Case(replace(packets.UDP6, name="udp6-loopback"), "::1"),
    Case(replace(packets.UDP6, name="udp6-unspecified"), "::"),
    Case(replace(packets.UDP6, name="udp6-beside-metadata"), "fd00:ec2::255"),
    Case(replace(packets.UDP4, name="udp4-beside-metadata"), "169.254.169.253"),
]

CASES = [
    *[Case(each, anywhere(each)) for each in JUDGED_SHAPES],
    *[Case(each, anywhere(each), reason) for reason, shapes in MALFORMED for each in shapes],
    *ALWAYS,
    *NEAR_MISSES,
]
