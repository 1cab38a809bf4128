"""Packets whose headers are not in the linear data, and packets that are many: GSO, "BIG TCP", segmented datagrams.

A sender with a virtio header (AF_PACKET, tap) says itself how much of its packet is linear, as a VM may. Packets above
a page are needed for that: smaller ones the kernel makes linear anyway.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from scapy.layers.inet import UDP

from harness import needs, packets
from harness.agent import Agent, RemoteSocket
from harness.fence import Fence
from harness.netns import NetNs
from harness.packets import DOT1AD, DOT1Q, ETHERNET_BYTES
from harness.topology import BRIDGE_IF, Topology, Workload
from harness.tuntap import IFF_NO_PI, IFF_TAP, IFF_TUN, TUNSETIFF
from harness.wire import Meter, Tag, on_harness_cpu
from netfence.dataplane import rtnl
from netfence.dataplane.rtnl import Rtnl
from netfence.dataplane.target import Direction
from netfence.policy.modes import Mode, Reason
from shape_cases import (
    ANY4,
    ANY6,
    EVERYTHING,
    OWN_DNS4,
    OWN_PORT,
    PLAIN_UDP,
    Case,
    chain6,
    extension,
    raw6,
    v4,
    v6,
)
from shape_paths import BIG_MTU, COUNT, PathTaken, bridged_port, fenced, way_out

PACKET_VNET_HDR, SOL_PACKET = 15, 263
IFF_VNET_HDR = 0x4000
BIG = 5000  # above a page: below, the kernel makes it all linear
UDP_SEGMENT = 103
RTM_SETLINK, IFLA_GSO_MAX_SIZE, IFLA_GSO_IPV4_MAX_SIZE = 19, 41, 63
GSO_LEGACY_MAX = 65536


@pytest.fixture(scope="module")
def fence(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fence]:
    with Fence(topology, tmp_path_factory.mktemp("fence")) as made:
        yield made


@pytest.fixture(scope="module")
def bridged(topology: Topology) -> Workload:
    return bridged_port(topology)


@pytest.fixture(scope="module")
def out(topology: Topology) -> Iterator[tuple[Workload, Meter]]:
    with way_out(topology) as made:
        yield made


class BareSender:
    """Sends frames whose linear part ends where we say (virtio_net_hdr.hdr_len)."""

    def __init__(self, write: Callable[[bytes], object], linear: int) -> None:
        self._write, self._linear = write, linear

    def send(self, packet: bytes) -> None:
        self._write(struct.pack("=BBHHHH", 0, 0, self._linear, 0, 0, 0) + packet)


BIG_CASES = [
    Case(v4("big-udp4", PLAIN_UDP / bytes(BIG)), ANY4),
    Case(v6("big-udp6", PLAIN_UDP / bytes(BIG)), ANY6),
    Case(v4("big-udp4-options", PLAIN_UDP / bytes(BIG), options=b"\x94\x04\x00\x00" * 10), ANY4),
    Case(
        v4("big-udp4-lsrr", PLAIN_UDP / bytes(BIG), options=b"\x01\x83\x07\x04\xcb\x00\x71\x50"),
        ANY4,
        Reason.SOURCE_ROUTE,
    ),
    Case(raw6("big-udp6-chain", 60, chain6(6) + bytes(BIG)), ANY6),
    Case(
        raw6("big-udp6-routing", 60, extension(43) + extension(17, "routing", 1) + bytes(BIG)),
        ANY6,
        Reason.SOURCE_ROUTE,
    ),
    Case(v4("big-udp4", PLAIN_UDP / bytes(BIG)).tagged((DOT1Q, 7)), ANY4),
    Case(v6("big-udp6", PLAIN_UDP / bytes(BIG)).tagged((DOT1AD, 7), (DOT1Q, 7)), ANY6),
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
    out: tuple[Workload, Meter],
    side: str,
    linear: str,
    case: Case,
) -> None:
    workload, meter = (bridged, topology.meter(bridged)) if side == "ingress" else out
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
                if error.errno != errno.ENOBUFS:  # which is how an egress filter's drop looks
                    raise

        big = replace(workload, sender=BareSender(write, LINEAR[linear]))
        _judged_right(fence, big, meter, Direction.WORKLOAD if side == "ingress" else Direction.HOST, case)


@pytest.mark.parametrize("case", BIG_CASES, ids=str)
def test_headers_outside_the_linear_data_of_a_tap_are_read(
    topology: Topology, fence: Fence, bridged: Workload, case: Case
) -> None:
    with raw_tuntap(topology, "vnet0", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) as descriptor:
        topology.host.sysctl("net/ipv6/conf/vnet0/disable_ipv6", "1")
        topology.host.ip(f"link set vnet0 mtu {BIG_MTU} master {BRIDGE_IF} up")
        sender = BareSender(lambda packet: os.write(descriptor, packet), ETHERNET_BYTES)
        workload = replace(bridged, host_if="vnet0", sender=sender)
        _judged_right(fence, workload, topology.meter(bridged), Direction.WORKLOAD, case)


def _judged_right(fence: Fence, workload: Workload, meter: Meter, direction: Direction, case: Case) -> None:
    with fenced(fence, workload.host_if, direction) as attachment:
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
        with fenced(fence, "info0") as attachment:
            attachment.replace(Mode.ALLOWLIST, EVERYTHING)
            source, to = ("192.0.2.5", ANY4) if each.family == 4 else ("2001:db8:99::5", ANY6)
            packet = struct.pack("!HH", 0, ethertype) + tags + each.packet(source, to, Tag())
            with attachment.counts(reason, COUNT), on_harness_cpu():
                for _ in range(COUNT):
                    os.write(descriptor, packet)


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
        fence.interface(workload.host_if) as attachment,
        inside.udp(socket.AF_INET if to == ANY4 else socket.AF_INET6) as sock,
    ):
        attachment.replace(Mode.ALLOWLIST, allow=[to] if arrived else [])
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)
        whole = not needs.is_before("UDP segments that a veth takes whole")  # else the workload's kernel cuts it first
        with attachment.counts(reason, segments, (headers if whole else headers * segments) + segments * size):
            sock.sendto(tag.payload.ljust(segments * size, b"."), (to, 9))
        assert topology.meter().arrived(tag) == arrived


@pytest.mark.parametrize("limit", [GSO_LEGACY_MAX, 150_000], ids=["64k", "big-tcp"])
@pytest.mark.parametrize("to", ["203.0.113.80", "2001:db8:b::80"], ids=["ipv4", "ipv6"])
def test_a_tcp_stream_in_big_packets_passes_and_is_counted_by_segments(
    topology: Topology, fence: Fence, inside: Agent, to: str, limit: int, workload: Workload
) -> None:
    """Above 64 KiB ("BIG TCP") the length field of the IP header is 0, or a jumbo option stands there."""
    assert workload.netns is not None
    if limit > GSO_LEGACY_MAX:
        needs.wait_for_kernel("BIG TCP over ipv6" if ":" in to else "BIG TCP over ipv4")
    total, mss = 2_000_000, 1000
    for netns, device in ((workload.netns, "eth0"), (topology.host, workload.host_if)):
        _set_gso_limit(netns, device, limit)
    with topology.internet.inside():
        server = socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET)
    with server, fence.interface(workload.host_if) as attachment:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        server.bind((to, 0))
        server.listen()
        attachment.replace(Mode.ALLOWLIST, allow=[to])
        with inside.tcp(server.family) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, mss)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            client.connect((to, server.getsockname()[1]))
            accepted, _ = server.accept()
            with accepted:
                received = _transfer(client, accepted, total)
        counted = attachment.counters()
    assert received == total
    assert counted.blocked == (0, 0), counted
    assert counted.packets[Reason.ALLOW_RULE] >= total / mss
    assert counted.bytes[Reason.ALLOW_RULE] >= total


def _set_gso_limit(netns: NetNs, device: str, limit: int) -> None:
    """Set gso_max_size and gso_ipv4_max_size, the second of which iproute2 before 6.3 does not know."""
    with netns.inside(), Rtnl() as netlink:
        head = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, socket.if_nametoindex(device), 0, 0)
        for attribute in (IFLA_GSO_MAX_SIZE, IFLA_GSO_IPV4_MAX_SIZE):
            netlink.request(RTM_SETLINK, head + rtnl.attribute(attribute, struct.pack("=I", limit)))


def _transfer(client: RemoteSocket, accepted: socket.socket, total: int) -> int:
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
