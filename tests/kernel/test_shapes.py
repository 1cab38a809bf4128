"""Packets of every shape (semantics.md 6 and 7): judged by their address, always passed, or never guessed at.

A `Case` is a packet and the reasons it must meet. Each runs on four paths: the ingress hook of a bridged veth, of a
bridged tap and of a routed tun, and the egress hook of a veth; the bridge hands every frame on as it is. A VLAN tag is
"offloaded" (in `skb->vlan_tci`) on ingress, where the kernel takes the outer tag out before the hook, and in the data on
egress from AF_PACKET; `test_tags_on_the_way_out_of_a_bridge` has the offloaded ones on egress. So no vlan link is needed,
which this kernel may lack.

What cannot be made: a header that `bpf_skb_pull_data` refuses to give (reason `unreadable`) wants an allocation to fail.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
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
from harness.agent import Agent
from harness.fence import Attachment, Fence, moved
from harness.netns import NetNs, veth
from harness.packets import DOT1AD, DOT1Q, ETHERNET_BYTES, VLAN_BYTES, Shape
from harness.topology import (
    BRIDGE6,
    BRIDGE_IF,
    BRIDGE_UP_IF,
    METADATA4,
    METADATA6,
    SINK_IF,
    Topology,
    Workload,
)
from harness.tuntap import IFF_NO_PI, IFF_TAP, IFF_TUN, TUNSETIFF
from harness.wire import Meter, PacketSender, Sniffer, Tag, on_harness_cpu
from netfence.dataplane import rtnl
from netfence.dataplane.rtnl import Rtnl
from netfence.dataplane.target import Direction
from netfence.policy.modes import Mode, Reason, is_drop

COUNT = 3
ANY4, ANY6 = "203.0.113.99", "2001:db8:77::1"
EVERYTHING = ["0.0.0.0/0", "::/0"]
OWN_DNS4, OWN_DNS6, OWN_PORT = "198.51.100.254", "2001:db8:fe::53", 11000
FOREIGN_PORT = 11007
NOBODY = bytes.fromhex("02deadbeef01")  # the frames' destination: every kernel on the way leaves them alone
JUDGED = (Reason.ALLOW_RULE, Reason.DEFAULT_PASS, Reason.DEFAULT_DROP, Reason.DENY_RULE, Reason.BLOCK_ALL)


@dataclass(frozen=True)
class Case:
    """A packet, whom it is for, and one reason for all modes but `disabled` (None: the policy judges it by `to`)."""

    shape: Shape
    to: str
    reason: Reason | None = None

    def __str__(self) -> str:
        return self.shape.name


# -- the cases -------------------------------------------------------------------------------------------------------


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
TCP_SYN = TCP(sport=40000, dport=443, flags="S")
UDP_ = UDP(sport=40000, dport=9)

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
    v4("ipv4-in-ipv4", IP(src="10.0.0.1", dst="10.0.0.2") / UDP_), v4("udp4-to-53", UDP(sport=40000, dport=53)),
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
        *[raw6(f"udp6-routing-left-type-{kind}", 43, extension(17, "routing", 1, kind) + udp_bytes()) for kind in (2, 3, 4)],
        raw6("udp6-routing-left-behind-options", 60, extension(43) + extension(17, "routing", 1) + udp_bytes()),
        v6("udp6-routing-left-before-fragment", IPv6ExtHdrRouting(segleft=1, addresses=["::1"]) / FRAGMENT / UDP_),
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
        packets.IPV4_BAD_HEADER_LENGTH, moving("ipv4-header-of-60-in-less", packets.UDP4.truncated(40, "x"), put(0, b"\x4f")),
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


# -- the paths -------------------------------------------------------------------------------------------------------


@dataclass
class PathTaken:
    """One way for frames through a fence."""

    attachment: Attachment
    workload: Workload
    meter: Meter
    sentinels: int  # that pass the fence themselves

    def send(self, case: Case) -> tuple[int, int]:
        """Send COUNT packets; return how many arrived and how many bytes were sent (as the kernel counts them)."""
        tag = Tag()
        packet = self.workload.bytes_of(case.shape, case.to, tag)
        size = len(packet)
        if case.shape.vlans and self.attachment.direction is Direction.WORKLOAD:
            size -= VLAN_BYTES  # the outer tag is out of the data by then
        return self.meter.transmit(self.workload.sender, tag, [packet] * COUNT), COUNT * size

    def expect(self, case: Case, reason: Reason, passing: int, *, audit: bool = False) -> None:
        """Assert that the packets are counted under that reason, and that what passes arrives."""
        extra = self.sentinels if reason is Reason.DISABLED else 0
        before = self.attachment.counters()
        arrived, octets = self.send(case)
        found = moved(before, self.attachment.counters())
        name = ("would " if audit and is_drop(reason) else "") + reason.name
        if reason is not Reason.ARP:
            found.pop("ARP", None)
        assert {key: count for key, (count, _) in found.items()} == {name: COUNT + extra}
        if not extra:
            assert found[name][1] == octets, "bytes"
        assert arrived == (0 if is_drop(reason) and not audit else passing), name


@pytest.fixture(scope="module")
def fence(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fence]:
    with Fence(topology, tmp_path_factory.mktemp("fence")) as made:
        yield made


@pytest.fixture(scope="module")
def bridged(topology: Topology) -> Workload:
    """A veth port of the bridge whose workload's kernel sends nothing by itself."""
    made = topology.add_bridged()
    made.host_mac = NOBODY
    assert made.netns is not None
    made.netns.sysctl("net/ipv6/conf/eth0/disable_ipv6", "1")
    made.netns.ip("link set eth0 arp off mtu 9000")
    topology.host.ip(*[f"link set {each} mtu 9000" for each in (made.host_if, BRIDGE_UP_IF, BRIDGE_IF)])
    topology.internet.ip(f"link set {SINK_IF} mtu 9000")
    return made


@pytest.fixture(scope="module")
def way_out(topology: Topology) -> Iterator[tuple[Workload, Meter]]:
    """A veth that leads out of the host and nowhere else."""
    veth((topology.host, "out0"), (topology.internet, "in0"))
    for netns, name in ((topology.host, "out0"), (topology.internet, "in0")):
        netns.sysctl(f"net/ipv6/conf/{name}/disable_ipv6", "1")
        netns.ip(f"link set {name} arp off mtu 9000 up")
    topology.internet.ip("link set in0 promisc on")
    with ExitStack() as stack:
        sender = PacketSender(topology.host, "out0")
        stack.callback(sender.close)
        sniffer = Sniffer(topology.internet, "in0")
        stack.callback(sniffer.close)
        yield (
            Workload("out0", "192.0.2.99", "2001:db8:99::2", sender, NOBODY, netns=topology.host),
            Meter(sniffer, sender),
        )


@pytest.fixture(scope="module")
def tap(topology: Topology, bridged: Workload) -> Workload:
    made = topology.add_tap()
    topology.host.sysctl(f"net/ipv6/conf/{made.host_if}/disable_ipv6", "1")
    topology.host.ip(f"link set {made.host_if} master {BRIDGE_IF}")
    made.bridged, made.host_mac = True, bridged.host_mac
    return made


STATIC = {"dns_address": ipaddress.ip_address(OWN_DNS4).packed, "dns_port": OWN_PORT}


@pytest.fixture(scope="module", autouse=True)
def _others(fence: Fence, topology: Topology) -> None:
    """Attachments whose DNS servers are foreign to those under test."""
    for address, port in ((OWN_DNS4, FOREIGN_PORT), (OWN_DNS6, 53)):
        fence.interface(topology.add_veth().host_if, dns_address=ipaddress.ip_address(address).packed, dns_port=port)


@pytest.fixture(scope="module")
def path(
    request: pytest.FixtureRequest,
    topology: Topology,
    fence: Fence,
    bridged: Workload,
    tap: Workload,
    way_out: tuple[Workload, Meter],
) -> Iterator[PathTaken]:
    workload, direction = bridged, Direction.WORKLOAD
    if request.param == "tap-ingress":
        workload = tap
    elif request.param == "tun-ingress":
        workload = topology.add_tun()
    elif request.param == "veth-egress":
        workload, direction = way_out[0], Direction.HOST
    meter = way_out[1] if request.param == "veth-egress" else topology.meter(workload)
    with fence.interface(workload.host_if, direction, **STATIC) as attachment:
        yield PathTaken(attachment, workload, meter, sentinels=int(request.param != "tun-ingress"))


def fits_tun(case: Case) -> bool:
    """Without an Ethernet header there are no tags and types, and tun itself refuses what has no IP version."""
    each = case.shape
    return not each.vlans and each.ethertype is None and "version" not in each.name


PATHS = ["veth-ingress", "tap-ingress", "tun-ingress", "veth-egress"]
L2_PATHS = [name for name in PATHS if name != "tun-ingress"]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("path", L2_PATHS, indirect=True)
def test_shape(path: PathTaken, case: Case) -> None:
    assert_judged_in_every_mode(path, case)


@pytest.mark.parametrize("case", [each for each in CASES if fits_tun(each)], ids=str)
@pytest.mark.parametrize("path", ["tun-ingress"], indirect=True)
def test_shape_without_ethernet(path: PathTaken, case: Case) -> None:
    assert_judged_in_every_mode(path, case)


def assert_judged_in_every_mode(path: PathTaken, case: Case) -> None:
    """Bracketed by mode `disabled`, in which everything passes; what passes must arrive as it does then."""
    fenced = path.attachment
    fenced.replace(Mode.DISABLED)
    passing, _ = path.send(case)
    assert passing == COUNT or not path.sentinels, "nothing can be said where even an open fence lets nothing arrive"
    path.expect(case, Reason.DISABLED, passing)
    policies: list[tuple[Mode, list[str], list[str], Reason]] = [
        (Mode.ALLOWLIST, EVERYTHING, [], Reason.ALLOW_RULE),
        (Mode.ALLOWLIST, [], [], Reason.DEFAULT_DROP),
        (Mode.DENYLIST, [], [], Reason.DEFAULT_PASS),
        (Mode.DENYLIST, [], EVERYTHING, Reason.DENY_RULE),
        (Mode.BLOCK_ALL, EVERYTHING, [], Reason.BLOCK_ALL),
    ]
    for mode, allow, deny, judged in policies:
        reason = judged if case.reason is None else case.reason
        for audit in (False, True):
            fenced.replace(mode, allow, deny, audit=audit)
            path.expect(case, reason, passing, audit=audit)
    fenced.replace(Mode.DISABLED)
    path.expect(case, Reason.DISABLED, passing)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_an_ipv4_mapped_destination_meets_the_ipv4_rules(path: PathTaken) -> None:
    case = Case(packets.MAPPED, ANY4)
    path.attachment.replace(Mode.DISABLED)
    passing, _ = path.send(case)
    path.attachment.replace(Mode.ALLOWLIST, allow=["::/0"])
    path.expect(case, Reason.DEFAULT_DROP, passing)
    path.attachment.replace(Mode.ALLOWLIST, allow=[ANY4], deny=["::/0"])
    path.expect(case, Reason.ALLOW_RULE, passing)
    path.attachment.replace(Mode.ALLOWLIST, allow=["::/0"], deny=[f"::ffff:{ANY4}/128"])
    path.expect(case, Reason.DENY_RULE, passing)


@pytest.mark.parametrize("name", ["request", "in-a-vlan", "for-nobody"])
@pytest.mark.parametrize("path", ["veth-ingress", "tap-ingress", "veth-egress"], indirect=True)
def test_arp_always_passes(path: PathTaken, name: str) -> None:
    tag = Tag()
    frame = packets.arp(tag)
    if name == "in-a-vlan":
        frame = frame[:12] + b"\x81\0\0\7" + frame[12:]
    elif name == "for-nobody":
        frame = NOBODY + frame[6:]
    for mode in (Mode.BLOCK_ALL, Mode.ALLOWLIST, Mode.DENYLIST):
        path.attachment.replace(mode, deny=EVERYTHING)
        with path.attachment.counts(Reason.ARP, COUNT + path.sentinels):
            assert path.meter.transmit(path.workload.sender, tag, [frame] * COUNT) == COUNT


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fenced_port(topology: Topology, fence: Fence, bridged: Workload) -> Iterator[Callable[..., PathTaken]]:
    """Fence the bridged veth with settings of a test's own."""
    with ExitStack() as stack:

        def make(**static: Any) -> PathTaken:
            attachment = stack.enter_context(fence.interface(bridged.host_if, **{**STATIC, **static}))
            return PathTaken(attachment, bridged, topology.meter(bridged), sentinels=1)

        yield make


METADATA_CASES = {
    "ipv4": (Case(packets.UDP4, METADATA4), ["169.254.0.0/15", "160.0.0.0/3", "0.0.0.0/0"], ["169.254.0.0/16", "169.254.169.254"]),
    "ipv6": (Case(packets.UDP6, METADATA6), ["fd00:ec2::/63", "fc00::/7", "::/0"], ["fd00:ec2::/64", "fd00:ec2::254"]),
    "mapped": (Case(packets.MAPPED, METADATA4), ["169.254.0.0/15", "::/0"], ["169.254.0.0/16", "169.254.169.254"]),
    "ipv4-fragment": (Case(packets.UDP4_LATER_FRAGMENT, METADATA4), ["0.0.0.0/1"], ["169.254.169.0/24"]),
}  # fmt: skip


@pytest.mark.parametrize("link_local", [False, True], ids=["", "link-local-allowed"])
@pytest.mark.parametrize("name", METADATA_CASES)
def test_the_metadata_address_wants_a_rule_of_its_own(
    fenced_port: Callable[..., PathTaken], name: str, *, link_local: bool
) -> None:
    case, short, long = METADATA_CASES[name]
    path = fenced_port(allow_link_local=link_local)
    path.attachment.lease(case.to)  # DNS rebinding must not open it
    for mode in (Mode.DENYLIST, Mode.ALLOWLIST):
        path.attachment.replace(mode)
        path.expect(case, Reason.METADATA, COUNT)
        for rule in short:
            path.attachment.replace(mode, allow=[rule])
            path.expect(case, Reason.METADATA, COUNT)
        for rule in long:
            path.attachment.replace(mode, allow=[rule, *short])
            path.expect(case, Reason.ALLOW_RULE, COUNT)
            path.attachment.deny(rule)
            path.expect(case, Reason.DENY_RULE, COUNT)
        path.attachment.replace(mode, audit=True)
        path.expect(case, Reason.METADATA, COUNT, audit=True)
    path.attachment.replace(Mode.BLOCK_ALL, allow=long)
    path.expect(case, Reason.BLOCK_ALL, COUNT)
    path.attachment.replace(Mode.DISABLED)
    path.expect(case, Reason.DISABLED, COUNT)


@pytest.mark.parametrize(
    "case",
    [Case(packets.UDP4, "169.254.7.7"), Case(packets.UDP6, "fe80::7"), Case(packets.UDP4_VLAN, "169.254.1.1")],
    ids=str,
)
def test_link_local_passes_where_the_setting_says_so(fenced_port: Callable[..., PathTaken], case: Case) -> None:
    path = fenced_port(allow_link_local=True)
    path.attachment.replace(Mode.ALLOWLIST)
    path.expect(case, Reason.LINK_LOCAL, COUNT)
    path.expect(Case(packets.UDP4, "169.253.0.1"), Reason.DEFAULT_DROP, COUNT)
    path.expect(Case(packets.UDP6, "fec0::7"), Reason.DEFAULT_DROP, COUNT)
    path.expect(Case(packets.UDP6, "ff02::fb"), Reason.DEFAULT_DROP, COUNT)
    path.attachment.deny(case.to)
    path.expect(case, Reason.DENY_RULE, COUNT)
    path.attachment.replace(Mode.BLOCK_ALL)
    path.expect(case, Reason.BLOCK_ALL, COUNT)


@pytest.mark.parametrize("case", [Case(packets.DHCP4, "255.255.255.255"), Case(packets.DHCP6, "ff02::1:2")], ids=str)
def test_dhcp_is_judged_where_the_setting_says_so(fenced_port: Callable[..., PathTaken], case: Case) -> None:
    path = fenced_port(allow_dhcp=False)
    path.attachment.replace(Mode.ALLOWLIST)
    path.expect(case, Reason.DEFAULT_DROP, COUNT)
    path.attachment.allow(case.to)
    path.expect(case, Reason.ALLOW_RULE, COUNT)


def test_hosts_solicit_from_their_global_address(fenced_port: Callable[..., PathTaken]) -> None:
    path = fenced_port()
    for to, reason in ((BRIDGE6, Reason.NEIGHBOUR), ("2001:db8:c::77", Reason.DEFAULT_DROP)):
        for name, message in (("na", NA), ("ns", NS)):
            path.attachment.replace(Mode.ALLOWLIST)
            path.expect(Case(icmp6(name, message), to), reason, COUNT)
    path.attachment.fence.plane.set_own_addresses(path.attachment.slot, [ipaddress.ip_address("2001:db8:c::77").packed])
    path.expect(Case(icmp6("na", NA), "2001:db8:c::77"), Reason.NEIGHBOUR, COUNT)
    path.expect(Case(icmp6("na", NA), BRIDGE6), Reason.DEFAULT_DROP, COUNT)
    path.expect(Case(icmp6("na", NA, hlim=64), "2001:db8:c::77"), Reason.DEFAULT_DROP, COUNT)
    path.expect(Case(packets.UDP6, "2001:db8:c::77"), Reason.DEFAULT_DROP, COUNT)


def test_the_own_dns_server_at_an_ipv6_address(fenced_port: Callable[..., PathTaken]) -> None:
    path = fenced_port(dns_address=ipaddress.ip_address("2001:db8:fe::99").packed, dns_port=53)
    path.attachment.replace(Mode.BLOCK_ALL)
    for each in (UDP(sport=40000, dport=53), TCP(sport=40000, dport=53, flags="S")):
        path.expect(Case(v6("own-dns6", each), "2001:db8:fe::99"), Reason.DNS, COUNT)
        path.expect(Case(v6("own-dns6", DESTINATION(), each), "2001:db8:fe::99"), Reason.DNS, COUNT)
        path.expect(Case(v6("own-dns6", FRAGMENT, each), "2001:db8:fe::99"), Reason.BLOCK_ALL, COUNT)
    path.expect(Case(v4("dns4", UDP(sport=40000, dport=OWN_PORT)), OWN_DNS4), Reason.BLOCK_ALL, COUNT)


@pytest.mark.parametrize(
    "shape_", [packets.UDP4_VLAN, packets.UDP4_QINQ, packets.UDP6_QINQ, packets.UDP4_THREE_TAGS], ids=str
)
def test_tags_on_the_way_out_of_a_bridge(topology: Topology, fence: Fence, bridged: Workload, shape_: Shape) -> None:
    """The bridge's other port gets the outer tag as it came in: offloaded."""
    with fence.interface(BRIDGE_UP_IF, Direction.HOST, **STATIC) as attachment:
        path = PathTaken(attachment, bridged, topology.meter(bridged), sentinels=1)
        deep = shape_ is packets.UDP4_THREE_TAGS
        for mode, allow, judged in (
            (Mode.ALLOWLIST, EVERYTHING, Reason.ALLOW_RULE),
            (Mode.ALLOWLIST, [], Reason.DEFAULT_DROP),
        ):
            attachment.replace(mode, allow)
            with attachment.counts(Reason.VLAN_DEPTH if deep else judged, COUNT):
                arrived, _ = path.send(Case(shape_, anywhere(shape_)))
            assert arrived == (COUNT if allow and not deep else 0)


# -- headers outside the linear data, and big packets ----------------------------------------------------------------

PACKET_VNET_HDR, SOL_PACKET = 15, 263
IFF_VNET_HDR = 0x4000
BIG = 5000  # above a page: below, the kernel makes it all linear


class BareSender:
    """Sends frames whose linear part ends where we say (virtio_net_hdr.hdr_len)."""

    def __init__(self, write: Callable[[bytes], object], linear: int) -> None:
        self._write, self._linear = write, linear

    def send(self, packet: bytes) -> None:
        self._write(struct.pack("=BBHHHH", 0, 0, self._linear, 0, 0, 0) + packet)


BIG_CASES = [
    Case(v4("big-udp4", UDP_ / bytes(BIG)), ANY4),
    Case(v6("big-udp6", UDP_ / bytes(BIG)), ANY6),
    Case(v4("big-udp4-options", UDP_ / bytes(BIG), options=b"\x94\x04\x00\x00" * 10), ANY4),
    Case(
        v4("big-udp4-lsrr", UDP_ / bytes(BIG), options=b"\x01\x83\x07\x04\xcb\x00\x71\x50"), ANY4, Reason.SOURCE_ROUTE
    ),
    Case(raw6("big-udp6-chain", 60, chain6(6) + bytes(BIG)), ANY6),
    Case(
        raw6("big-udp6-routing", 60, extension(43) + extension(17, "routing", 1) + bytes(BIG)),
        ANY6,
        Reason.SOURCE_ROUTE,
    ),
    Case(v4("big-udp4", UDP_ / bytes(BIG)).tagged((DOT1Q, 7)), ANY4),
    Case(v6("big-udp6", UDP_ / bytes(BIG)).tagged((DOT1AD, 7), (DOT1Q, 7)), ANY6),
    Case(v4("big-own-dns4", UDP(sport=40000, dport=OWN_PORT) / bytes(BIG)), OWN_DNS4, Reason.DNS),
]
LINEAR = {"ethernet": ETHERNET_BYTES, "half-ip": ETHERNET_BYTES + 10, "ip": ETHERNET_BYTES + 22}


@pytest.mark.parametrize("case", BIG_CASES, ids=str)
@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("side", ["ingress", "egress"])
def test_headers_outside_the_linear_data_are_read(
    topology: Topology,
    fence: Fence,
    bridged: Workload,
    way_out: tuple[Workload, Meter],
    side: str,
    linear: str,
    case: Case,
) -> None:
    workload, meter = (bridged, topology.meter(bridged)) if side == "ingress" else way_out
    assert workload.netns is not None
    with workload.netns.inside():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    with sock:
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sock.bind(("eth0" if side == "ingress" else workload.host_if, 0))

        def write(packet: bytes) -> None:
            try:
                sock.send(packet)
            except OSError as error:
                assert error.errno == errno.ENOBUFS, error  # so an egress filter's drop looks to the sender

        big = replace(workload, sender=BareSender(write, LINEAR[linear]))
        _judged_right(fence, big, meter, Direction.WORKLOAD if side == "ingress" else Direction.HOST, case)


@pytest.mark.parametrize("case", BIG_CASES, ids=str)
def test_headers_outside_the_linear_data_of_a_tap_are_read(
    topology: Topology, fence: Fence, bridged: Workload, case: Case
) -> None:
    with raw_tuntap(topology, "vnet0", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) as descriptor:
        topology.host.sysctl("net/ipv6/conf/vnet0/disable_ipv6", "1")
        topology.host.ip(f"link set vnet0 mtu 9000 master {BRIDGE_IF} up")
        sender = BareSender(lambda packet: os.write(descriptor, packet), ETHERNET_BYTES)
        workload = replace(bridged, host_if="vnet0", sender=sender)
        _judged_right(fence, workload, topology.meter(bridged), Direction.WORKLOAD, case)


def _judged_right(fence: Fence, workload: Workload, meter: Meter, direction: Direction, case: Case) -> None:
    with fence.interface(workload.host_if, direction, **STATIC) as attachment:
        path = PathTaken(attachment, workload, meter, sentinels=0)
        for allow, judged in ((EVERYTHING, Reason.ALLOW_RULE), ([], Reason.DEFAULT_DROP)):
            attachment.replace(Mode.ALLOWLIST, allow)
            path.expect(case, judged if case.reason is None else case.reason, COUNT)


@contextmanager
def raw_tuntap(topology: Topology, name: str, flags: int) -> Iterator[int]:
    """Make a tun or tap with flags of our own in the host; gives its descriptor."""
    with topology.host.inside():
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
            yield descriptor
        finally:
            os.close(descriptor)


TUN_FRAMES = {
    "ipv4-as-ipv6": (0x86DD, packets.UDP4, b"", Reason.NOT_IP),
    "ipv6-as-ipv4": (0x0800, packets.UDP6, b"", Reason.NOT_IP),
    "unknown-type": (0x88CC, packets.UDP4, b"", Reason.NOT_IP),
    "ipv4": (0x0800, packets.UDP4, b"", Reason.ALLOW_RULE),
    "vlan": (0x8100, packets.UDP4, b"\0\7\x08\0", Reason.ALLOW_RULE),
    "three-tags": (0x8100, packets.UDP4, b"\0\7\x81\0\0\7\x81\0\0\7\x08\0", Reason.VLAN_DEPTH),
}


@pytest.mark.parametrize("name", TUN_FRAMES)
def test_what_a_tun_says_of_its_packets_is_not_believed(topology: Topology, fence: Fence, name: str) -> None:
    """With packet information the workload itself names the EtherType."""
    ethertype, each, tags, reason = TUN_FRAMES[name]
    with raw_tuntap(topology, "info0", IFF_TUN) as descriptor:
        topology.host.sysctl("net/ipv6/conf/info0/disable_ipv6", "1")
        topology.host.ip("link set info0 up")
        with fence.interface("info0", **STATIC) as attachment:
            attachment.replace(Mode.ALLOWLIST, EVERYTHING)
            source, to = ("192.0.2.5", ANY4) if each.family == 4 else ("2001:db8:99::5", ANY6)
            packet = struct.pack("!HH", 0, ethertype) + tags + each.packet(source, to, Tag())
            with attachment.counts(reason, COUNT), on_harness_cpu():
                for _ in range(COUNT):
                    os.write(descriptor, packet)


UDP_SEGMENT = 103
RTM_SETLINK, IFLA_GSO_MAX_SIZE, IFLA_GSO_IPV4_MAX_SIZE = 19, 41, 63


@pytest.fixture(scope="module")
def inside(workload: Workload) -> Iterator[Agent]:
    with Agent(netns=workload.netns) as running:
        yield running


@pytest.mark.parametrize(
    ("reason", "arrived"), [(Reason.ALLOW_RULE, 1), (Reason.DEFAULT_DROP, 0)], ids=["pass", "drop"]
)
@pytest.mark.parametrize("to", [ANY4, ANY6], ids=["ipv4", "ipv6"])
def test_segmented_packets_count_each_segment(
    topology: Topology, fence: Fence, workload: Workload, inside: Agent, to: str, reason: Reason, arrived: int
) -> None:
    segments, size, tag = 40, 1000, Tag()
    headers = ETHERNET_BYTES + (28 if to == ANY4 else 48)
    with (
        fence.interface(workload.host_if) as fenced,
        inside.udp(socket.AF_INET if to == ANY4 else socket.AF_INET6) as sock,
    ):
        fenced.replace(Mode.ALLOWLIST, allow=[to] if arrived else [])
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)
        with fenced.counts(reason, segments, headers + segments * size):
            sock.sendto(tag.payload.ljust(segments * size, b"."), (to, 9))
        assert topology.meter().arrived(tag) == arrived


@pytest.mark.parametrize("limit", [65536, 150_000], ids=["64k", "big-tcp"])
@pytest.mark.parametrize("to", ["203.0.113.80", "2001:db8:b::80"], ids=["ipv4", "ipv6"])
def test_a_tcp_stream_in_big_packets_passes_and_is_counted_by_segments(
    topology: Topology, fence: Fence, inside: Agent, to: str, limit: int, workload: Workload
) -> None:
    """Above 64 KiB ("BIG TCP", Linux 6.3 for IPv4) the length field of the IP header is 0, or a jumbo option stands there."""
    assert workload.netns is not None
    total, mss = 2_000_000, 1000
    for netns, device in ((workload.netns, "eth0"), (topology.host, workload.host_if)):
        _set_gso_limit(netns, device, limit)
    with topology.internet.inside():
        server = socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET)
    with server, fence.interface(workload.host_if) as fenced:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        server.bind((to, 0))
        server.listen()
        fenced.replace(Mode.ALLOWLIST, allow=[to])
        with inside.tcp(server.family) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, mss)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            client.connect((to, server.getsockname()[1]))
            accepted, _ = server.accept()
            with accepted:
                received = _transfer(client, accepted, total)
        counted = fenced.counters()
    assert received == total
    assert counted.blocked == (0, 0), moved(type(counted)(*[(0,) * 32] * 4), counted)
    assert counted.packets[Reason.ALLOW_RULE] >= total / mss
    assert counted.bytes[Reason.ALLOW_RULE] >= total


def _set_gso_limit(netns: NetNs, device: str, limit: int) -> None:
    """Set gso_max_size and gso_ipv4_max_size, the second of which iproute2 before 6.3 does not know."""
    with netns.inside(), Rtnl() as netlink:
        head = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, socket.if_nametoindex(device), 0, 0)
        for attribute in (IFLA_GSO_MAX_SIZE, IFLA_GSO_IPV4_MAX_SIZE):
            netlink.request(RTM_SETLINK, head + rtnl.attribute(attribute, struct.pack("=I", limit)))


def _transfer(client: Any, accepted: socket.socket, total: int) -> int:
    """Send so many bytes and count what comes out; the answer is shorter where the stream stalls."""
    received, sent = 0, 0
    accepted.settimeout(2.0)
    while received < total:
        if sent < total:
            sent += client.send(bytes(min(500_000, total - sent)))
        try:
            received += len(accepted.recv(1 << 20))
        except TimeoutError:
            break
    return received
