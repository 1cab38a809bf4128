"""A fenced cgroup: `connect` and `sendmsg` fail at once, and the packet filter stands behind them for all else.

The program inside is an `Agent` in a workload's namespace and in a cgroup of the test's own. Sockets that shall meet
`cgroup_skb` and not `connect` are connected before the attach.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6

from harness.agent import Agent, RemoteSocket, family_of
from harness.cgroup import Cgroup
from harness.fence import Attachment, Fence
from harness.services import tcp_echo
from harness.topology import METADATA4, METADATA6, Topology, Workload
from harness.wire import Tag
from netfence.policy.modes import Mode, Reason

FAMILIES = ["ipv4", "ipv6"]
WEB = {"ipv4": "203.0.113.80", "ipv6": "2001:db8:b::80"}
OTHER = {"ipv4": "203.0.113.81", "ipv6": "2001:db8:b::81"}
LOOPBACK = {"ipv4": "127.0.0.1", "ipv6": "::1"}
UNSPECIFIED = {"ipv4": "0.0.0.0", "ipv6": "::"}
EVERYTHING = ["0.0.0.0/0", "::/0"]
ECHO, DISCARD = 7, 9
UDP_SEGMENT, IP_OPTIONS, IPV6_RTHDR, TCP_FASTOPEN_CONNECT = 103, 4, 57, 30
LIST_MODES = [Mode.ALLOWLIST, Mode.DENYLIST]


@dataclass
class Inside:
    """A process in a cgroup, and how to fence that."""

    topology: Topology
    fence: Fence
    group: Cgroup
    agent: Agent
    stack: ExitStack

    def fenced(self, **static: object) -> Attachment:
        return self.stack.enter_context(self.fence.cgroup(self.group, **static))

    def connected(self, host: str, port: int = DISCARD, kind: int = socket.SOCK_DGRAM) -> RemoteSocket:
        """Connect; before the attach, so that `connect` has no say."""
        sock = self.agent.open(family_of(host), kind)
        sock.connect((host, port))
        return sock

    def sends(self, sock: RemoteSocket, count: int = 3) -> int:
        """Send datagrams on a connected socket and count those that reach the internet."""
        tag = Tag()
        for _ in range(count):
            with suppress(PermissionError):
                sock.send(tag.payload)
        return self.topology.meter().arrived(tag)


@pytest.fixture(scope="module")
def fence(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fence]:
    with Fence(topology, tmp_path_factory.mktemp("fence")) as made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def _services(topology: Topology) -> Iterator[None]:
    """Echo TCP everywhere in the internet, and swallow datagrams, so that no error comes back for them."""
    with topology.internet.inside():
        sink = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with sink, tcp_echo(topology.internet, "::", ECHO):
        sink.bind(("::", DISCARD))
        yield


@pytest.fixture
def inside(topology: Topology, fence: Fence, workload: Workload, cgroups: Callable[[str], Cgroup]) -> Iterator[Inside]:
    group = cgroups("fenced")
    with Agent(netns=workload.netns, cgroup=group) as agent, ExitStack() as stack:
        yield Inside(topology, fence, group, agent, stack)


def assert_talks(connection: RemoteSocket) -> None:
    tag = Tag()
    connection.send(tag.payload)
    assert connection.recv() == tag.payload


@pytest.mark.parametrize("mode", [Mode.ALLOWLIST, Mode.DENYLIST, Mode.BLOCK_ALL], ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_connect_is_refused_at_once_and_counts_once(inside: Inside, family: str, kind: int, mode: Mode) -> None:
    fenced = inside.fenced()
    fenced.replace(Mode.ALLOWLIST, allow=EVERYTHING)
    inside.connected(WEB[family], ECHO, kind).close()
    fenced.replace(mode, deny=EVERYTHING if mode is Mode.DENYLIST else [])
    with inside.agent.open(family_of(WEB[family]), kind) as sock:
        for _ in range(3):
            with fenced.counts(Reason.CONNECT, 1), pytest.raises(PermissionError) as refused:
                sock.connect((WEB[family], ECHO))
            assert refused.value.errno == errno.EPERM
        fenced.replace(Mode.ALLOWLIST, allow=EVERYTHING)
        sock.connect((WEB[family], ECHO))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_permitted_connect_counts_as_nothing(inside: Inside, family: str) -> None:
    fenced = inside.fenced()
    fenced.replace(Mode.ALLOWLIST, allow=EVERYTHING)
    with fenced.counts(Reason.CONNECT, 0):
        inside.connected(WEB[family]).close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_permitted_connection_counts_packets_only(inside: Inside, family: str) -> None:
    fenced = inside.fenced()
    fenced.replace(Mode.ALLOWLIST, allow=EVERYTHING)
    before = fenced.counters()
    with inside.connected(WEB[family], ECHO, socket.SOCK_STREAM) as connection:
        assert_talks(connection)
    after = fenced.counters()
    assert after.packets[Reason.ALLOW_RULE] - before.packets[Reason.ALLOW_RULE] >= 3
    assert after.blocked == before.blocked


@pytest.mark.parametrize("family", FAMILIES)
def test_unconnected_datagrams_are_refused_at_once(inside: Inside, family: str) -> None:
    fenced = inside.fenced()
    fenced.replace(Mode.ALLOWLIST, allow=[OTHER[family]])
    tag = Tag()
    with inside.agent.udp(family_of(WEB[family])) as sock:
        with fenced.counts(Reason.CONNECT, 1), pytest.raises(PermissionError):
            sock.sendto(tag.payload, (WEB[family], DISCARD))
        with fenced.counts(Reason.ALLOW_RULE, 1):
            sock.sendto(tag.payload, (OTHER[family], DISCARD))
        fenced.lease(WEB[family])
        with fenced.counts(Reason.LEASE, 1):
            sock.sendto(tag.payload, (WEB[family], DISCARD))
        fenced.revoke(WEB[family])
        with fenced.counts(Reason.CONNECT, 1), pytest.raises(PermissionError):
            sock.sendto(tag.payload, (WEB[family], DISCARD))
    assert inside.topology.meter().arrived(tag) == 2


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_ipv4_mapped_destinations_are_judged_as_ipv4(inside: Inside, kind: int) -> None:
    fenced = inside.fenced()
    mapped = "::ffff:" + WEB["ipv4"]
    fenced.replace(Mode.ALLOWLIST, allow=["::/0"])
    with inside.agent.open(socket.AF_INET6, kind) as sock:
        with fenced.counts(Reason.CONNECT, 1), pytest.raises(PermissionError):
            sock.connect((mapped, ECHO))
        fenced.replace(Mode.ALLOWLIST, allow=[WEB["ipv4"]], deny=["::/0"])
        sock.connect((mapped, ECHO))


def test_mapped_unconnected_datagrams_are_judged_as_ipv4(inside: Inside) -> None:
    fenced = inside.fenced()
    to = ("::ffff:" + WEB["ipv4"], DISCARD)
    fenced.replace(Mode.ALLOWLIST, allow=["::/0"])
    with inside.agent.udp(socket.AF_INET6) as sock:
        with fenced.counts(Reason.CONNECT, 1), pytest.raises(PermissionError):
            sock.sendto(b"x", to)
        fenced.replace(Mode.ALLOWLIST, allow=[WEB["ipv4"]], deny=["::/0"])
        with fenced.counts(Reason.ALLOW_RULE, 1):
            sock.sendto(b"x", to)


@pytest.mark.parametrize("address", [METADATA4, METADATA6, f"::ffff:{METADATA4}"])
def test_the_metadata_address_is_refused_in_denylist(inside: Inside, address: str) -> None:
    fenced = inside.fenced()
    fenced.replace(Mode.DENYLIST, allow=EVERYTHING)
    with inside.agent.tcp(family_of(address)) as sock:
        with fenced.counts(Reason.CONNECT, 1), pytest.raises(PermissionError):
            sock.connect((address, ECHO))
        fenced.allow(address)
        sock.connect((address, ECHO))


@pytest.mark.parametrize("family", FAMILIES)
def test_audit_lets_connect_pass_and_reports_it(inside: Inside, family: str) -> None:
    fenced = inside.fenced()
    fenced.replace(Mode.ALLOWLIST, audit=True)
    with fenced.counts(Reason.CONNECT, 1, would=True):
        sock = inside.connected(WEB[family])
    with fenced.counts(Reason.DEFAULT_DROP, 3, would=True):
        assert inside.sends(sock) == 3


def test_fast_open_does_not_go_around_connect(inside: Inside) -> None:
    fenced = inside.fenced()
    fenced.replace(Mode.ALLOWLIST)
    with inside.agent.tcp() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        with pytest.raises(PermissionError):
            sock.connect((WEB["ipv4"], ECHO))
            sock.send(b"x")


# -- loopback --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", LIST_MODES, ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("to", [LOOPBACK, UNSPECIFIED], ids=["loopback", "unspecified"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loopback_passes_in_list_modes_and_not_in_block_all(
    inside: Inside, family: str, to: dict[str, str], mode: Mode
) -> None:
    server = inside.agent.tcp(family_of(to[family]))
    server.bind((LOOPBACK[family], 0))
    server.listen()
    port = server.name()[1]
    fenced = inside.fenced()
    for again in range(2):
        fenced.replace(mode, deny=[] if again else EVERYTHING)  # always passes: not even a deny rule stops it
        before = fenced.counters()
        with inside.agent.connect(to[family], port) as connection, server.accept() as accepted:
            connection.send(b"to myself")
            assert accepted.recv() == b"to myself"
        assert fenced.counters().packets[Reason.LOOPBACK] > before.packets[Reason.LOOPBACK]
        fenced.mode(Mode.BLOCK_ALL)
        with pytest.raises(PermissionError):
            inside.agent.connect(to[family], port)


def test_loopback_does_not_pass_before_the_first_policy(inside: Inside) -> None:
    before = inside.connected("127.0.0.1")
    fenced = inside.fenced()
    with pytest.raises(PermissionError):
        inside.agent.connect("127.0.0.1", ECHO)
    with fenced.counts(Reason.START, 1), suppress(PermissionError):
        before.send(b"x")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.53", "::1", "::ffff:127.0.0.1"])
def test_port_53_of_the_loopback_is_judged_like_any_other(inside: Inside, host: str) -> None:
    fenced = inside.fenced()
    fenced.replace(Mode.ALLOWLIST)
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with inside.agent.open(family_of(host), kind) as sock:
            with fenced.counts(Reason.CONNECT, 1), pytest.raises(PermissionError):
                sock.connect((host, 53))
    with inside.agent.udp(family_of(host)) as sock:
        with fenced.counts(Reason.CONNECT, 1), pytest.raises(PermissionError):
            sock.sendto(b"x", (host, 53))
        fenced.replace(Mode.ALLOWLIST, allow=["127.0.0.0/8", "::1"])
        with fenced.counts(Reason.ALLOW_RULE, 1):
            sock.sendto(b"x", (host, 53))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_port_53_of_the_loopback_on_an_old_socket(inside: Inside, host: str) -> None:
    old, free = inside.connected(host, 53), inside.connected(host, 54)
    fenced = inside.fenced()
    fenced.replace(Mode.ALLOWLIST)
    with fenced.counts(Reason.DEFAULT_DROP, 1), pytest.raises(PermissionError):
        old.send(b"x")
    with fenced.counts(Reason.LOOPBACK, 1):
        free.send(b"x")


# -- DNS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 11000), ("127.53.0.1", 53), ("::1", 53), (WEB["ipv4"], 11000)]
)
def test_the_own_dns_server_is_reached_in_every_mode(inside: Inside, host: str, port: int) -> None:
    packed = socket.inet_pton(family_of(host), host)
    fenced = inside.fenced(dns_address=packed, dns_port=port)
    sock = inside.connected(host, port)  # start_mode

    def asks() -> None:
        with suppress(ConnectionRefusedError):  # nobody listens; it may say so
            sock.send(b"query")

    asks()  # whatever the last error was, it is gone now
    for mode in (None, Mode.BLOCK_ALL, Mode.ALLOWLIST, Mode.DENYLIST):
        if mode is not None:
            fenced.replace(mode, deny=EVERYTHING)
        before = fenced.counters().packets[Reason.DNS]
        asks()
        asks()
        assert fenced.counters().packets[Reason.DNS] > before
        inside.connected(host, port).close()
    assert fenced.counters().blocked == (0, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", WEB["ipv4"], WEB["ipv6"]])
def test_another_attachments_dns_server_is_not_reached(
    inside: Inside, cgroups: Callable[[str], Cgroup], host: str
) -> None:
    packed = socket.inet_pton(family_of(host), host)
    old = inside.connected(host, 11001)
    fenced = inside.fenced(dns_address=packed, dns_port=11000)
    inside.stack.enter_context(inside.fence.cgroup(cgroups("other"), dns_address=packed, dns_port=11001))
    for mode in (Mode.ALLOWLIST, Mode.DENYLIST, Mode.BLOCK_ALL):
        fenced.replace(mode, allow=EVERYTHING)
        with fenced.counts(Reason.FOREIGN_DNS, 1), pytest.raises(PermissionError):
            old.send(b"query")
        with fenced.counts(Reason.CONNECT, 1), pytest.raises(PermissionError):
            inside.connected(host, 11001)
    fenced.replace(Mode.DISABLED)
    with fenced.counts(Reason.DISABLED, 1):
        old.send(b"query")


# -- what never asks connect -----------------------------------------------------------------------------------------


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
    with pytest.raises(TimeoutError):
        stream.send(b"late")
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
    assert inside.fence.plane._inbound.count(fenced.slot) == 0
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
