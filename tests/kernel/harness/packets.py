"""Packets as named values.

A `Shape` says what a packet looks like, not whom it is for: `shape.packet(...)` gives the bytes from the IP header on
(for tun), `shape.frame(...)` the whole Ethernet frame. Module-level names are the shapes that tests are written with;
`udp()` and `tcp()` make more. `ALL` lists the fixed ones by name, for `pytest.mark.parametrize`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6MLReport2,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)

from harness.wire import Tag, arp_sentinel

ETHERTYPE = {4: 0x0800, 6: 0x86DD}
DOT1Q = 0x8100
DOT1AD = 0x88A8
LLDP = 0x88CC
ETHERNET_BYTES = 14
VLAN_BYTES = 4

Build = Callable[[str, str, bytes], Any]  # source address, destination address, payload → scapy packet from IP on


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of packet.

    `vlans` are (EtherType, VLAN id) from the outside in; `cut` leaves only so many bytes behind the Ethernet and VLAN
    headers; `ethertype` replaces the one that the IP version gives.
    """

    name: str
    family: int
    build: Build
    vlans: tuple[tuple[int, int], ...] = ()
    cut: int | None = None
    ethertype: int | None = None

    def packet(self, source: str, destination: str, tag: Tag) -> bytes:
        """Build the bytes from the IP header on."""
        return _built(self.build, source, destination).replace(_ANY.payload, tag.payload)[: self.cut]

    def frame(self, source: str, destination: str, tag: Tag, to_mac: bytes) -> bytes:
        """Build a frame from the tag's own MAC to `to_mac` (6 bytes)."""
        headers = to_mac + tag.mac
        for ethertype, vlan in self.vlans:
            headers += ethertype.to_bytes(2) + vlan.to_bytes(2)
        ethertype = self.ethertype or ETHERTYPE[self.family]
        return headers + ethertype.to_bytes(2) + self.packet(source, destination, tag)

    def tagged(self, *vlans: tuple[int, int]) -> Shape:
        """Give the same packet inside VLAN tags."""
        names = "-".join(f"{ethertype:x}" for ethertype, _ in vlans)
        return replace(self, name=f"{self.name}-vlan-{names}", vlans=vlans)

    def truncated(self, to_bytes: int, what: str) -> Shape:
        """Give the same packet with only its first `to_bytes` bytes (from the IP header on)."""
        return replace(self, name=f"{self.name}-cut-{what}", cut=to_bytes)

    def __str__(self) -> str:
        return self.name


_ANY = Tag()


@functools.cache
def _built(build: Build, source: str, destination: str) -> bytes:
    """Have scapy build a packet once (0.7 ms, emulated ten times that), since the checksum is the same for all tags."""
    return bytes(build(source, destination, _ANY.payload))


def ip(family: int, source: str, destination: str, **fields: Any) -> Any:
    """Build the IP header of either family."""
    return (IP if family == 4 else IPv6)(src=source, dst=destination, **fields)


def udp(family: int, dport: int = 9, sport: int = 40000, **ip_fields: Any) -> Shape:
    """Make a UDP shape; `ip_fields` go to scapy's IP or IPv6."""

    def build(source: str, destination: str, payload: bytes) -> Any:
        return ip(family, source, destination, **ip_fields) / UDP(sport=sport, dport=dport) / payload

    return Shape(f"udp{family}-{dport}" if dport != 9 else f"udp{family}", family, build)


def tcp(family: int, flags: str, dport: int = 443, sport: int = 40000) -> Shape:
    """Make a TCP shape; flags as scapy writes them ("S", "SA", "A", "PA", "R")."""

    def build(source: str, destination: str, payload: bytes) -> Any:
        segment = TCP(sport=sport, dport=dport, flags=flags, seq=1, ack=1 if "A" in flags else 0)
        return ip(family, source, destination) / segment / payload

    return Shape(f"tcp{family}-{flags.lower()}", family, build)


def ipv4(name: str, **fields: Any) -> Shape:
    """Make a UDP-in-IPv4 shape with IP header fields of its own."""
    return replace(udp(4, **fields), name=name)


def ipv6_behind(name: str, *headers: Callable[[], Any], **fields: Any) -> Shape:
    """Make a UDP-in-IPv6 shape with extension headers in between."""

    def build(source: str, destination: str, payload: bytes) -> Any:
        packet = ip(6, source, destination, **fields)
        for header in headers:
            packet /= header()
        return packet / UDP(sport=40000, dport=9) / payload

    return Shape(name, 6, build)


def _icmp(family: int) -> Shape:
    def build(source: str, destination: str, payload: bytes) -> Any:
        echo = ICMP(id=7, seq=1) if family == 4 else ICMPv6EchoRequest(id=7, seq=1)
        return ip(family, source, destination) / echo / payload

    return Shape(f"icmp{family}-echo", family, build)


def _later_fragment4(source: str, destination: str, payload: bytes) -> Any:
    # Reads as UDP to port 53 if somebody takes the payload of a later fragment for a header.
    return IP(src=source, dst=destination, frag=185, proto=17) / (b"\x9c\x40\x00\x35\x00\x20\x00\x00" + payload)


def _later_fragment6(source: str, destination: str, payload: bytes) -> Any:
    header = IPv6ExtHdrFragment(offset=185, m=0, id=7, nh=17)
    return IPv6(src=source, dst=destination) / header / (b"\x9c\x40\x00\x35\x00\x20\x00\x00" + payload)


def _unknown_protocol(source: str, destination: str, payload: bytes) -> Any:
    return IP(src=source, dst=destination, proto=253) / payload


def _first_fragment6() -> Any:
    return IPv6ExtHdrFragment(offset=0, m=1, id=7)


def _destination_options() -> Any:
    return IPv6ExtHdrDestOpt()


def _hop_by_hop() -> Any:
    return IPv6ExtHdrHopByHop()


def _routing(segments_left: int) -> Callable[[], Any]:
    def header() -> Any:
        return IPv6ExtHdrRouting(type=0, segleft=segments_left, addresses=["2001:db8:dead::1"])

    return header


def _solicitation(source: str, destination: str, _: bytes) -> Any:
    return IPv6(src=source, dst=destination, hlim=255) / ICMPv6ND_NS(tgt=source)


def _listener_report(source: str, destination: str, _: bytes) -> Any:
    return IPv6(src=source, dst=destination, hlim=1) / IPv6ExtHdrHopByHop() / ICMPv6MLReport2()


def _mapped(_: str, destination: str, payload: bytes) -> Any:
    # The destination is an IPv4 address in IPv6 clothes; a mapped source would be refused by the kernel itself.
    return IPv6(src="2001:db8::bad", dst=f"::ffff:{destination}") / UDP(sport=40000, dport=9) / payload


def _bad_header_length(source: str, destination: str, payload: bytes) -> Any:
    return IP(src=source, dst=destination, ihl=3) / UDP(sport=40000, dport=9) / payload


def _source_route(kind: int) -> bytes:
    return bytes([kind, 7, 4, 198, 51, 100, 77, 0])  # type, length, pointer, one hop, end of options


UDP4 = udp(4)
UDP6 = udp(6)
TCP4_SYN, TCP4_SYN_ACK, TCP4_ACK = tcp(4, "S"), tcp(4, "SA"), tcp(4, "A")
TCP6_SYN, TCP6_SYN_ACK, TCP6_ACK = tcp(6, "S"), tcp(6, "SA"), tcp(6, "A")
ICMP4 = _icmp(4)
ICMP6 = _icmp(6)
PROTOCOL_253 = Shape("ipv4-protocol-253", 4, _unknown_protocol)

UDP4_VLAN, UDP6_VLAN = (shape.tagged((DOT1Q, 7)) for shape in (UDP4, UDP6))
UDP4_QINQ, UDP6_QINQ = (shape.tagged((DOT1AD, 7), (DOT1Q, 8)) for shape in (UDP4, UDP6))
UDP4_QINQ_8100 = UDP4.tagged((DOT1Q, 7), (DOT1Q, 8))
UDP4_THREE_TAGS = UDP4.tagged((DOT1AD, 7), (DOT1Q, 8), (DOT1Q, 9))

UDP4_FIRST_FRAGMENT = ipv4("udp4-first-fragment", flags="MF")
UDP4_LATER_FRAGMENT = Shape("udp4-later-fragment", 4, _later_fragment4)
UDP6_FIRST_FRAGMENT = ipv6_behind("udp6-first-fragment", _first_fragment6)
UDP6_LATER_FRAGMENT = Shape("udp6-later-fragment", 6, _later_fragment6)

UDP4_OPTIONS = ipv4("udp4-options", options=b"\x94\x04\x00\x00")  # router alert
UDP4_LSRR = ipv4("udp4-lsrr", options=_source_route(131))
UDP4_SSRR = ipv4("udp4-ssrr", options=_source_route(137))

UDP6_HOP_BY_HOP = ipv6_behind("udp6-hop-by-hop", _hop_by_hop)
UDP6_DESTINATION_OPTIONS = ipv6_behind("udp6-destination-options", _destination_options)
UDP6_CHAIN = ipv6_behind("udp6-chain", _hop_by_hop, _destination_options, _routing(0), _first_fragment6)
UDP6_LONG_CHAIN = ipv6_behind("udp6-long-chain", _hop_by_hop, *[_destination_options] * 12)
UDP6_ROUTING_DONE = ipv6_behind("udp6-routing-done", _routing(0))
UDP6_ROUTING_LEFT = ipv6_behind("udp6-routing-left", _routing(1))

MAPPED = Shape("ipv4-mapped", 6, _mapped)  # give it an IPv4 destination

UDP4_CUT_IP = UDP4.truncated(12, "ip")
UDP4_CUT_UDP = UDP4.truncated(24, "udp")
UDP6_CUT_IP = UDP6.truncated(20, "ip")
UDP6_CUT_UDP = UDP6.truncated(44, "udp")
IPV4_BAD_HEADER_LENGTH = Shape("ipv4-bad-header-length", 4, _bad_header_length)

NOT_IP = replace(UDP4, name="not-ip", ethertype=LLDP)
IPV4_AS_IPV6 = replace(UDP4, name="ipv4-as-ipv6", ethertype=ETHERTYPE[6])

NEIGHBOUR_SOLICITATION = Shape("neighbour-solicitation", 6, _solicitation)
LISTENER_REPORT = Shape("listener-report", 6, _listener_report)
DHCP4 = replace(udp(4, dport=67, sport=68), name="dhcp4")  # to 255.255.255.255
DHCP6 = replace(udp(6, dport=547, sport=546), name="dhcp6")  # to ff02::1:2

ALL: dict[str, Shape] = {shape.name: shape for shape in list(globals().values()) if isinstance(shape, Shape)}

arp = arp_sentinel  # the frame that always passes
