"""A fenced cgroup: `connect` and `sendmsg` fail at once; its loopback and its DNS server (semantics.md 6 and 8).

The program inside is an `Agent` in a workload's namespace and in a cgroup of the test's own.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest

from cgroup_inside import DISCARD, ECHO, EVERYTHING, FAMILIES, OTHER, WEB, Inside, assert_talks, services
from harness.agent import Agent, family_of
from harness.cgroup import Cgroup
from harness.fence import Fence
from harness.topology import METADATA4, METADATA6, Topology, Workload
from harness.wire import Tag
from netfence.policy.modes import Mode, Reason

LOOPBACK = {"ipv4": "127.0.0.1", "ipv6": "::1"}
UNSPECIFIED = {"ipv4": "0.0.0.0", "ipv6": "::"}
TCP_FASTOPEN_CONNECT = 30
LIST_MODES = [Mode.ALLOWLIST, Mode.DENYLIST]


@pytest.fixture(scope="module")
def fence(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fence]:
    with Fence(topology, tmp_path_factory.mktemp("fence")) as made, services(topology):
        yield made


@pytest.fixture
def inside(topology: Topology, fence: Fence, workload: Workload, cgroups: Callable[[str], Cgroup]) -> Iterator[Inside]:
    group = cgroups("fenced")
    with Agent(netns=workload.netns, cgroup=group) as agent, ExitStack() as stack:
        yield Inside(topology, fence, group, agent, stack)


@pytest.mark.parametrize("mode", [Mode.ALLOWLIST, Mode.DENYLIST, Mode.BLOCK_ALL], ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_connect_is_refused_at_once_and_counts_once(inside: Inside, family: str, kind: int, mode: Mode) -> None:
    fenced = inside.fenced()
    fenced.replace(Mode.ALLOWLIST, allow=EVERYTHING)
    with inside.connected(WEB[family], ECHO, kind) as before:
        # Ended by a reset: the last word of an ordered end would be counted after the switch.
        before.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
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
        with fenced.counts(Reason.CONNECT, 1), pytest.raises(PermissionError):
            sock.connect((WEB["ipv4"], ECHO))


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
        with (
            inside.agent.open(family_of(host), kind) as sock,
            fenced.counts(Reason.CONNECT, 1),
            pytest.raises(PermissionError),
        ):
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
