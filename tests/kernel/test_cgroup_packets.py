"""The packet filter of a cgroup, which stands behind `connect`: what never asks `connect`, nesting, and coming back.

Sockets that shall meet `cgroup_skb` and not `connect` are connected before the attach.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6

from cgroup_inside import DISCARD, ECHO, EVERYTHING, FAMILIES, OTHER, WEB, Inside, assert_talks, services
from harness.agent import Agent, family_of
from harness.cgroup import Cgroup
from harness.fence import Fence
from harness.topology import METADATA4, METADATA6, Topology, Workload
from harness.wire import Tag
from netfence.dataplane.cgroups import resolve_cgroup
from netfence.policy.modes import Mode, Reason

UDP_SEGMENT, IP_OPTIONS, IPV6_RTHDR = 103, 4, 57


@pytest.fixture(scope="module")
def fence(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fence]:
    with Fence(topology, tmp_path_factory.mktemp("fence")) as made, services(topology):
        yield made


@pytest.fixture
def inside(topology: Topology, fence: Fence, workload: Workload, cgroups: Callable[[str], Cgroup]) -> Iterator[Inside]:
    group = cgroups("fenced")
    with Agent(netns=workload.netns, cgroup=group) as agent, ExitStack() as stack:
        yield Inside(topology, fence, group, agent, stack)


@pytest.mark.parametrize("family", FAMILIES)
def test_old_sockets_meet_the_packet_filter(inside: Inside, family: str) -> None:
    datagrams = inside.connected(WEB[family])
    stream = inside.connected(WEB[family], ECHO, socket.SOCK_STREAM)
    assert inside.sends(datagrams) == 3
    assert_talks(stream)
    fenced = inside.fenced()
    with fenced.counts(Reason.START, 3):
        assert inside.sends(datagrams) == 0
    fenced.replace(Mode.ALLOWLIST)
    with fenced.counts(Reason.DEFAULT_DROP, 3):
        assert inside.sends(datagrams) == 0
    stream.send(b"late")
    with pytest.raises(TimeoutError):
        stream.recv(timeout_s=0.1)
    assert fenced.counters().packets[Reason.DEFAULT_DROP] > 3
    fenced.replace(Mode.ALLOWLIST, allow=[WEB[family]])
    assert stream.recv() == b"late"
    with fenced.counts(Reason.ALLOW_RULE, 3):
        assert inside.sends(datagrams) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_raw_icmp(inside: Inside, family: str) -> None:
    tag = Tag()
    if family == "ipv4":
        raw, echo = inside.agent.open(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP), ICMP(id=7)
    else:
        raw = inside.agent.open(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        echo = ICMPv6EchoRequest(id=7, cksum=1)  # the kernel computes it
    message = bytes(echo / tag.payload)
    fenced = inside.fenced()
    fenced.replace(Mode.ALLOWLIST)
    with fenced.counts(Reason.DEFAULT_DROP, 1), pytest.raises(PermissionError):
        raw.sendto(message, (WEB[family], 0))
    assert inside.topology.meter().arrived(tag) == 0
    fenced.allow(WEB[family])
    with fenced.counts(Reason.ALLOW_RULE, 1):
        raw.sendto(message, (WEB[family], 0))
    assert inside.topology.meter().arrived(tag) == 1


def test_raw_packets_are_judged_by_their_own_header_not_by_sendto(inside: Inside, workload: Workload) -> None:
    raw = inside.agent.open(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    tag = Tag()

    def datagram(to: str, **fields: object) -> bytes:
        return bytes(IP(src=workload.address4, dst=to, **fields) / UDP(sport=40000, dport=DISCARD) / tag.payload)

    fenced = inside.fenced()
    fenced.replace(Mode.ALLOWLIST, allow=[WEB["ipv4"]])
    with fenced.counts(Reason.ALLOW_RULE, 1):
        raw.sendto(datagram(WEB["ipv4"]), (WEB["ipv4"], 0))
    for to, reason in ((OTHER["ipv4"], Reason.DEFAULT_DROP), (METADATA4, Reason.METADATA)):
        with fenced.counts(reason, 1), pytest.raises(PermissionError):
            raw.sendto(datagram(to), (WEB["ipv4"], 0))
        with fenced.counts(reason, 1), pytest.raises(PermissionError):
            raw.sendto(datagram(to, frag=100), (WEB["ipv4"], 0))
    assert inside.topology.meter().arrived(tag) == 1


def test_raw_ipv6_packets_are_judged_by_their_own_header(inside: Inside, workload: Workload) -> None:
    raw = inside.agent.open(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
    tag = Tag()

    def datagram(to: str) -> bytes:
        return bytes(IPv6(src=workload.address6, dst=to) / UDP(sport=40000, dport=DISCARD) / tag.payload)

    fenced = inside.fenced()
    fenced.replace(Mode.ALLOWLIST, allow=[WEB["ipv6"]])
    with fenced.counts(Reason.ALLOW_RULE, 1):
        raw.sendto(datagram(WEB["ipv6"]), (WEB["ipv6"], 0))
    for to, reason in (
        (OTHER["ipv6"], Reason.DEFAULT_DROP),
        (METADATA6, Reason.METADATA),
        ("::ffff:" + WEB["ipv4"], Reason.DEFAULT_DROP),
    ):
        with fenced.counts(reason, 1), pytest.raises(PermissionError):
            raw.sendto(datagram(to), (WEB["ipv6"], 0))
    assert inside.topology.meter().arrived(tag) == 1


def test_a_raw_packet_to_the_loopback_with_a_foreign_source_makes_no_reply_entry(inside: Inside) -> None:
    """A raw socket could forge a SYN from anybody through the loopback, were that trusted (semantics.md 6)."""
    raw = inside.agent.open(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    server = inside.agent.tcp()
    server.bind(("127.0.0.1", 0))
    fenced = inside.fenced(replies="any")
    fenced.replace(Mode.ALLOWLIST)
    port = server.name()[1]
    segment = struct.pack("!HHIIBBHHH", ECHO, port, 1, 0, 0x50, 0x02, 1024, 0, 0)
    with fenced.counts(Reason.LOOPBACK, 1):
        raw.sendto(bytes(IP(src=WEB["ipv4"], dst="127.0.0.1", proto=6) / segment), ("127.0.0.1", 0))
    assert inside.fence.plane._inbound.shares.of(fenced.slot) == 0
    answer = struct.pack("!HHIIBBHHH", port, ECHO, 1, 2, 0x50, 0x10, 1024, 0, 0)
    with fenced.counts(Reason.DEFAULT_DROP, 1), pytest.raises(PermissionError):
        raw.sendto(bytes(IP(src="127.0.0.1", dst=WEB["ipv4"], proto=6) / answer), (WEB["ipv4"], 0))


def test_source_routes_set_by_socket_option(inside: Inside, workload: Workload) -> None:
    routed4 = inside.connected(WEB["ipv4"])
    routed6 = inside.connected(WEB["ipv6"])
    fenced = inside.fenced()
    fenced.replace(Mode.ALLOWLIST, allow=EVERYTHING)
    for sock in (routed4, routed6):
        with fenced.counts(Reason.ALLOW_RULE, 1):
            sock.send(b"direct")
    gateway = socket.inet_aton(str(ipaddress.ip_address(workload.address4) - 1))  # a strict route's hop is a neighbour
    hop6 = socket.inet_pton(socket.AF_INET6, OTHER["ipv6"])
    segments = struct.pack("!BBBBBBH", 0, 4, 4, 1, 1, 0, 0) + bytes(16) + hop6  # RFC 8754: the next one is the last
    cases = [
        (routed4, socket.IPPROTO_IP, IP_OPTIONS, bytes([131, 7, 4]) + gateway + b"\0"),
        (routed4, socket.IPPROTO_IP, IP_OPTIONS, bytes([137, 7, 4]) + gateway + b"\0"),
        (routed6, socket.IPPROTO_IPV6, IPV6_RTHDR, segments),
    ]
    for sock, level, option, value in cases:
        sock.setsockopt(level, option, value)
        with fenced.counts(Reason.SOURCE_ROUTE, 3):
            assert inside.sends(sock) == 0


@pytest.mark.parametrize(
    ("reason", "arrived"), [(Reason.ALLOW_RULE, 1), (Reason.DEFAULT_DROP, 0)], ids=["pass", "drop"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_segmented_datagrams_count_each_segment(inside: Inside, family: str, reason: Reason, arrived: int) -> None:
    segments, size = 10, 1000
    sock = inside.connected(WEB[family])
    sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)
    fenced = inside.fenced()
    fenced.replace(Mode.ALLOWLIST, allow=[WEB[family]] if arrived else [])
    tag = Tag()
    headers = 28 if family == "ipv4" else 48
    with fenced.counts(reason, segments, headers + segments * size), suppress(PermissionError):
        sock.send(tag.payload.ljust(segments * size, b"."))
    assert inside.topology.meter().arrived(tag) == arrived


# -- nesting and coming back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_nested_cgroups_must_both_allow(
    topology: Topology, fence: Fence, workload: Workload, cgroups: Callable[[str], Cgroup], family: str
) -> None:
    outer_group = cgroups("outer")
    inner_group = cgroups("outer/inner")
    with Agent(netns=workload.netns, cgroup=inner_group) as agent, ExitStack() as stack:
        inside = Inside(topology, fence, inner_group, agent, stack)
        sock = inside.connected(WEB[family])
        outer = stack.enter_context(fence.cgroup(outer_group))
        inner = inside.fenced()
        for outer_allows, inner_allows in ((True, True), (True, False), (False, True), (False, False), (True, True)):
            outer.replace(Mode.ALLOWLIST, allow=[WEB[family]] if outer_allows else [])
            inner.replace(Mode.ALLOWLIST, allow=[WEB[family]] if inner_allows else [])
            both = outer_allows and inner_allows
            assert inside.sends(sock) == (3 if both else 0)
            with agent.udp(family_of(WEB[family])) as other:
                if both:
                    other.connect((WEB[family], DISCARD))
                else:
                    with pytest.raises(PermissionError):
                        other.connect((WEB[family], DISCARD))
        assert outer.counters().packets[Reason.ALLOW_RULE] >= 6
        assert inner.counters().packets[Reason.ALLOW_RULE] >= 6
        inner.detach()
        assert inside.sends(sock) == 3
        outer.replace(Mode.ALLOWLIST)
        with outer.counts(Reason.DEFAULT_DROP, 3):
            assert inside.sends(sock) == 0


def test_a_fenced_cgroup_holds_those_below_it(
    topology: Topology, fence: Fence, workload: Workload, cgroups: Callable[[str], Cgroup]
) -> None:
    outer_group = cgroups("above")
    with Agent(netns=workload.netns, cgroup=cgroups("above/below")) as agent, ExitStack() as stack:
        inside = Inside(topology, fence, outer_group, agent, stack)
        sock = inside.connected(WEB["ipv4"])
        fenced = inside.fenced()
        with fenced.counts(Reason.START, 3):
            assert inside.sends(sock) == 0
        fenced.replace(Mode.ALLOWLIST, allow=[WEB["ipv4"]])
        with fenced.counts(Reason.ALLOW_RULE, 3):
            assert inside.sends(sock) == 3


def test_an_attach_again_starts_in_start_mode(inside: Inside, cgroups: Callable[[str], Cgroup]) -> None:
    """Cgroup storage keeps its old value over detach and re-attach: it must not bring an old slot back (design.md)."""
    sock = inside.connected(WEB["ipv4"])
    first = inside.fence.cgroup(inside.group)
    first.replace(Mode.DISABLED)
    assert inside.sends(sock) == 3
    first.detach()
    assert inside.sends(sock) == 3
    stranger = inside.stack.enter_context(inside.fence.cgroup(cgroups("stranger")))  # gets the slot that became free
    assert stranger.slot == first.slot
    stranger.replace(Mode.DISABLED)
    again = inside.fenced()
    assert again.slot != first.slot
    with stranger.counts(Reason.DISABLED, 0), again.counts(Reason.START, 3):
        assert inside.sends(sock) == 0
    with pytest.raises(PermissionError):
        inside.connected(WEB["ipv4"])
    again.replace(Mode.ALLOWLIST, allow=[WEB["ipv4"]])
    with again.counts(Reason.ALLOW_RULE, 3):
        assert inside.sends(sock) == 3


def test_detach_frees_the_cgroup_and_the_next_attachment_counts_from_zero(inside: Inside) -> None:
    sock = inside.connected(WEB["ipv4"])
    fenced = inside.fence.cgroup(inside.group)
    assert inside.sends(sock) == 0
    fenced.detach()
    assert inside.sends(sock) == 3
    inside.connected(WEB["ipv4"]).close()
    again = inside.fenced()
    assert again.slot == fenced.slot
    assert sum(again.counters().packets) == 0


def test_detach_leaves_no_slot_in_the_cgroups_storage(inside: Inside) -> None:
    """The storage comes back with the first program attached again; until its slot is written: start_mode."""
    fenced = inside.fence.cgroup(inside.group)
    fenced.replace(Mode.DISABLED)
    fenced.detach()
    plane, target = inside.fence.plane, resolve_cgroup(str(inside.group.path))
    plane._hooks.attach_cgroup(target, "again")
    try:
        slot = plane._loaded.maps["cgroup_slot"].lookup(target.cgroup_id.to_bytes(8, sys.byteorder))
        assert slot is not None
        assert int.from_bytes(slot[:4], sys.byteorder) == 0
        with pytest.raises(PermissionError):
            inside.connected(WEB["ipv4"])
    finally:
        plane._hooks.detach_cgroup("again")
        target.close()
