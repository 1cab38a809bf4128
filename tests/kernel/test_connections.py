"""Connections that run: cut by a revocation, outliving their lease, and those begun from outside.

Where flags and order decide, packets are made one by one; where a kernel's TCP must live with the verdicts, two agents
talk. What must not arrive is counted at the internet's end behind a sentinel (`Meter`).
"""

from __future__ import annotations

import itertools
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import pytest

from harness import packets
from harness.agent import Agent, RemoteSocket, family_of
from harness.cgroup import Cgroup
from harness.fence import Attachment, Fence
from harness.netns import NetNs
from harness.packets import Shape
from harness.services import tcp_echo
from harness.topology import BRIDGE4, BRIDGE6, BRIDGE_IF, INTERNET_IF, UP_IF, Topology, Workload
from harness.wire import PacketSender, Tag, on_harness_cpu
from netfence.policy.modes import Mode, Reason

FAMILIES = ["ipv4", "ipv6"]
WEB = {"ipv4": "203.0.113.80", "ipv6": "2001:db8:b::80"}
NET = {"ipv4": "203.0.113.0/24", "ipv6": "2001:db8:b::/64"}
ANY = {"ipv4": "0.0.0.0", "ipv6": "::"}
EVERYTHING = ["0.0.0.0/0", "::/0"]
ECHO = 7
REFUSED_S = 0.25  # a SYN is sent again after a second; what an unloaded veth has not brought by then does not come
SERVER, PEER = 8080, 443
Replies = Literal["off", "host", "any"]


@dataclass
class Place:
    """A workload's program, and the fence around it: its interface, or its cgroup."""

    attachment: Attachment
    agent: Agent
    workload: Workload


@pytest.fixture(scope="module")
def fence(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fence]:
    with Fence(topology, tmp_path_factory.mktemp("fence")) as made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def _echo(topology: Topology) -> Iterator[None]:
    with tcp_echo(topology.internet, "::", ECHO):
        yield


@pytest.fixture(scope="module")
def other(topology: Topology) -> Workload:
    return topology.add_veth()


@pytest.fixture(scope="module")
def ports(topology: Topology) -> tuple[Workload, Workload]:
    """Two workloads on one bridge.

    They know each other's hardware address: an advertisement to a neighbour's global address is none that always passes.
    """
    made = topology.add_bridged(), topology.add_bridged()
    for here, there in (made, made[::-1]):
        assert here.netns is not None
        assert there.netns is not None
        mac = there.netns.mac("eth0")
        for to in (there.address4, there.address6):
            here.netns.ip(f"neigh replace {to} lladdr {mac} dev eth0 nud permanent")
    return made


@pytest.fixture(scope="module")
def host_agent(topology: Topology) -> Iterator[Agent]:
    with Agent(netns=topology.host) as running:
        yield running


@pytest.fixture(scope="module")
def internet_agent(topology: Topology) -> Iterator[Agent]:
    with Agent(netns=topology.internet) as running:
        yield running


PlaceMaker = Callable[..., Place]


@pytest.fixture
def place_maker(fence: Fence, cgroups: Callable[[str], Cgroup]) -> Iterator[PlaceMaker]:
    """Give a maker of fenced programs: kind ("interface" or "cgroup"), workload, keywords of `Static`."""
    numbers = itertools.count()
    with ExitStack() as stack:

        def make(kind: str, workload: Workload, **static: object) -> Place:
            group = cgroups(f"place{next(numbers)}")
            agent = stack.enter_context(Agent(netns=workload.netns, cgroup=group))
            made = fence.interface(workload.host_if, **static) if kind == "interface" else fence.cgroup(group, **static)
            return Place(stack.enter_context(made), agent, workload)

        yield make


KINDS = ["interface", "cgroup"]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, place_maker: PlaceMaker, workload: Workload) -> Place:
    return place_maker(request.param, workload)


def assert_talks(connection: RemoteSocket) -> None:
    tag = Tag()
    connection.send(tag.payload)
    assert connection.recv() == tag.payload


def is_refused(agent: Agent, host: str, port: int) -> bool:
    """Tell whether a TCP connection is not made: refused at once by a cgroup, never answered through an interface."""
    try:
        agent.connect(host, port, timeout_s=REFUSED_S).close()
    except (PermissionError, TimeoutError):
        return True
    return False


# -- revocation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Something that lets an address pass, its revocation, the reason thereafter, and the revocation taken back."""

    mode: Mode
    open: Callable[[Attachment, str], object]
    shut: Callable[[Attachment, str], object]
    reason: Reason
    undo: Callable[[Attachment, str], object]


ALLOW: Callable[[Attachment, str], object] = lambda a, family: a.allow(NET[family])  # noqa: E731
LEASE: Callable[[Attachment, str], object] = lambda a, family: a.lease(WEB[family])  # noqa: E731
UNLEASE: Callable[[Attachment, str], object] = lambda a, family: a.revoke(WEB[family])  # noqa: E731
DENY: Callable[[Attachment, str], object] = lambda a, family: a.deny(WEB[family])  # noqa: E731
UNDENY: Callable[[Attachment, str], object] = lambda a, family: a.remove(WEB[family])  # noqa: E731
CUTS = {
    "rule-removed": Cut(Mode.ALLOWLIST, ALLOW, lambda a, f: a.remove(NET[f]), Reason.DEFAULT_DROP, ALLOW),
    "denied": Cut(Mode.ALLOWLIST, ALLOW, DENY, Reason.DENY_RULE, UNDENY),
    "denied-in-denylist": Cut(Mode.DENYLIST, lambda _, __: None, DENY, Reason.DENY_RULE, UNDENY),
    "block_all": Cut(
        Mode.ALLOWLIST,
        ALLOW,
        lambda a, _: a.mode(Mode.BLOCK_ALL),
        Reason.BLOCK_ALL,
        lambda a, _: a.mode(Mode.ALLOWLIST),
    ),
    "replaced": Cut(
        Mode.ALLOWLIST,
        ALLOW,
        lambda a, _: a.replace(Mode.ALLOWLIST),
        Reason.DEFAULT_DROP,
        lambda a, f: a.replace(Mode.ALLOWLIST, allow=[NET[f]]),
    ),
    "lease-closed": Cut(Mode.ALLOWLIST, LEASE, UNLEASE, Reason.DEFAULT_DROP, LEASE),
    "leased-and-denied": Cut(Mode.ALLOWLIST, LEASE, DENY, Reason.DENY_RULE, UNDENY),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_a_running_connection_is_cut_with_the_next_packet(
    topology: Topology, place: Place, family: str, cut: Cut
) -> None:
    fenced, tag = place.attachment, Tag()
    fenced.replace(cut.mode)
    cut.open(fenced, family)
    with place.agent.connect(WEB[family], ECHO) as connection:
        assert_talks(connection)
        cut.shut(fenced, family)
        before = fenced.counters().packets
        connection.send(tag.payload)
        assert topology.meter().arrived(tag) == 0
        after = fenced.counters().packets
        assert after[cut.reason] > before[cut.reason]
        assert sum(after[:16]) == sum(before[:16]), "something passed"
        assert is_refused(place.agent, WEB[family], ECHO)
        cut.undo(fenced, family)
        assert connection.recv() == tag.payload  # the kernel sent it again


# -- leases ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def leased(fence: Fence, workload: Workload) -> Iterator[Attachment]:
    with fence.interface(workload.host_if, established_idle_s=0.5, established_max_s=1.5) as attachment:
        attachment.replace(Mode.ALLOWLIST)
        yield attachment


def assert_passes(
    topology: Topology, workload: Workload, fenced: Attachment, shape: Shape, to: str, why: Reason
) -> None:
    with fenced.counts(why, 2):
        assert topology.arrived(workload, shape, to, 2) == 2


def assert_drops(
    topology: Topology, workload: Workload, fenced: Attachment, shape: Shape, to: str, why: Reason
) -> None:
    with fenced.counts(why, 2):
        assert topology.arrived(workload, shape, to, 2) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_packets_without_syn_outlive_the_lease(
    topology: Topology, workload: Workload, leased: Attachment, family: str
) -> None:
    number, to = int(family[-1]), WEB[family]
    expiry = leased.lease(to, ttl_s=0.4)
    assert_passes(topology, workload, leased, packets.tcp(number, "S"), to, Reason.LEASE)
    assert_passes(topology, workload, leased, packets.udp(number), to, Reason.LEASE)
    assert time.monotonic() < expiry, "the machine is too slow for this test's lease"
    leased.fence.wait_until(expiry)
    for flags in ("A", "PA", "FA", "R", "RA", "F", ""):
        assert_passes(topology, workload, leased, packets.tcp(number, flags), to, Reason.ESTABLISHED)
    for flags in ("S", "SA", "SF", "SR", "SPA"):
        assert_drops(topology, workload, leased, packets.tcp(number, flags), to, Reason.DEFAULT_DROP)
    icmp, fragment = (
        (packets.ICMP4, packets.UDP4_LATER_FRAGMENT) if number == 4 else (packets.ICMP6, packets.UDP6_LATER_FRAGMENT)
    )
    for shape in (packets.udp(number), icmp, fragment):
        assert_drops(topology, workload, leased, shape, to, Reason.DEFAULT_DROP)
    leased.deny(to)
    assert_drops(topology, workload, leased, packets.tcp(number, "A"), to, Reason.DENY_RULE)
    leased.remove(to)
    leased.lease(to)
    assert_passes(topology, workload, leased, packets.tcp(number, "S"), to, Reason.LEASE)
    leased.revoke(to)
    assert_drops(topology, workload, leased, packets.tcp(number, "A"), to, Reason.DEFAULT_DROP)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("used", [None, "udp"], ids=["unused", "udp-only"])
def test_a_lease_that_no_tcp_used_ends_with_its_expiry(
    topology: Topology, workload: Workload, leased: Attachment, used: str | None, family: str
) -> None:
    number, to = int(family[-1]), WEB[family]
    expiry = leased.lease(to, ttl_s=0.3)
    if used:
        assert_passes(topology, workload, leased, packets.udp(number), to, Reason.LEASE)
    leased.fence.wait_until(expiry)
    assert_drops(topology, workload, leased, packets.tcp(number, "A"), to, Reason.DEFAULT_DROP)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_established_connection_ends_when_it_is_idle(
    topology: Topology, workload: Workload, leased: Attachment, family: str
) -> None:
    number, to = int(family[-1]), WEB[family]
    ack = packets.tcp(number, "A")
    expiry = leased.lease(to, ttl_s=0.3)
    assert_passes(topology, workload, leased, ack, to, Reason.LEASE)
    leased.fence.wait_until(expiry)
    assert_passes(topology, workload, leased, ack, to, Reason.ESTABLISHED)
    leased.fence.wait_until(time.monotonic() + leased.static.established_idle_s)
    assert_drops(topology, workload, leased, ack, to, Reason.DEFAULT_DROP)
    assert_drops(topology, workload, leased, ack, to, Reason.DEFAULT_DROP)  # a dropped packet is no use


@pytest.mark.parametrize("family", FAMILIES)
def test_an_established_connection_ends_at_the_longest_time_past_expiry(
    topology: Topology, workload: Workload, leased: Attachment, family: str
) -> None:
    number, to = int(family[-1]), WEB[family]
    ack = packets.tcp(number, "A")
    expiry = leased.lease(to, ttl_s=0.3)
    assert_passes(topology, workload, leased, ack, to, Reason.LEASE)
    end = expiry + leased.static.established_max_s
    passed = 0
    while time.monotonic() < end - 0.3:  # never idle
        passed += topology.arrived(workload, ack, to, 1)
        leased.fence.wait_until(time.monotonic() + 0.05)
    assert passed > 3
    leased.fence.wait_until(end)
    assert_drops(topology, workload, leased, ack, to, Reason.DEFAULT_DROP)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_outlives_its_lease_and_a_new_one_is_refused(place: Place, family: str) -> None:
    fenced, to = place.attachment, WEB[family]
    fenced.replace(Mode.ALLOWLIST)
    expiry = fenced.lease(to, ttl_s=0.5)
    with place.agent.connect(to, ECHO) as connection:
        assert_talks(connection)
        fenced.fence.wait_until(expiry)
        before = fenced.counters().packets[Reason.ESTABLISHED]
        assert_talks(connection)
        assert fenced.counters().packets[Reason.ESTABLISHED] > before
        assert is_refused(place.agent, to, ECHO)
        with place.agent.udp(family_of(to)) as sock:
            if fenced.direction is None:
                with pytest.raises(PermissionError):
                    sock.sendto(b"x", (to, 9))
            else:
                with fenced.counts(Reason.DEFAULT_DROP, 1, besides=[Reason.ESTABLISHED]):
                    sock.sendto(b"x", (to, 9))
        fenced.lease(to)
        place.agent.connect(to, ECHO).close()
        assert_talks(connection)


# -- connections begun from outside ----------------------------------------------------------------------------------


def address(workload: Workload, family: str) -> str:
    return workload.address4 if family == "ipv4" else workload.address6


@dataclass
class Server:
    """A server inside a workload."""

    place: Place
    family: str

    def __post_init__(self) -> None:
        agent = self.place.agent
        self.listening = agent.tcp(socket.AF_INET if self.family == "ipv4" else socket.AF_INET6)
        self.listening.bind((ANY[self.family], 0))
        self.listening.listen()
        self.host, self.port = address(self.place.workload, self.family), self.listening.name()[1]

    def reached_from(self, client: Agent) -> bool:
        """Tell whether a client gets a whole conversation."""
        try:
            connection = client.connect(self.host, self.port, timeout_s=REFUSED_S)
        except (TimeoutError, PermissionError):
            return False
        with connection, self.listening.accept() as accepted:
            connection.send(b"hello")
            assert accepted.recv() == b"hello"
            accepted.send(b"welcome")
            assert connection.recv() == b"welcome"
        return True

    @property
    def noted(self) -> int:
        """How many connections begun from outside the kernel holds for it."""
        return self.place.attachment.fence.plane._inbound.count(self.place.attachment.slot)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_reaches_a_server_inside(
    place_maker: PlaceMaker, workload: Workload, host_agent: Agent, kind: str, family: str
) -> None:
    place = place_maker(kind, workload)
    server, fenced = Server(place, family), place.attachment
    assert not server.reached_from(host_agent)  # start_mode
    for mode, reason in ((Mode.ALLOWLIST, Reason.REPLY), (Mode.DENYLIST, Reason.DEFAULT_PASS)):
        fenced.replace(mode)
        before = fenced.counters()
        assert server.reached_from(host_agent)
        after = fenced.counters()
        assert after.packets[reason] - before.packets[reason] >= 3
        assert after.blocked == before.blocked
        fenced.mode(Mode.BLOCK_ALL)
        assert not server.reached_from(host_agent)
    fenced.replace(Mode.ALLOWLIST)
    assert server.reached_from(host_agent)
    with pytest.raises((PermissionError, TimeoutError)):  # what may answer may still not begin
        place.agent.connect(WEB[family], ECHO, timeout_s=REFUSED_S)


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_reaches_a_server_inside_when_replies_are_off(
    place_maker: PlaceMaker, workload: Workload, host_agent: Agent, kind: str
) -> None:
    server = Server(place_maker(kind, workload, replies="off"), "ipv4")
    server.place.attachment.replace(Mode.ALLOWLIST)
    assert not server.reached_from(host_agent)
    server.place.attachment.allow("198.51.100.0/24")
    assert server.reached_from(host_agent)
    assert server.noted == 0


@pytest.mark.parametrize("mode", [Mode.ALLOWLIST, Mode.DENYLIST], ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_deny_rule_or_block_all_ends_a_connection_begun_from_outside(
    place_maker: PlaceMaker, workload: Workload, host_agent: Agent, kind: str, family: str, mode: Mode
) -> None:
    server = Server(place_maker(kind, workload), family)
    fenced = server.place.attachment
    fenced.replace(mode)
    with host_agent.connect(server.host, server.port) as connection, server.listening.accept() as accepted:
        accepted.send(b"one")
        assert connection.recv() == b"one"
        peer = connection.name()[0]
        steps: list[tuple[Callable[[], None], Callable[[], None], Reason]] = [
            (lambda: fenced.deny(peer), lambda: fenced.remove(peer), Reason.DENY_RULE),
            (lambda: fenced.mode(Mode.BLOCK_ALL), lambda: fenced.mode(mode), Reason.BLOCK_ALL),
        ]
        for shut, undo, reason in steps:
            shut()
            before = fenced.counters().packets[reason]
            accepted.send(b"two")
            with pytest.raises(TimeoutError):
                connection.recv(timeout_s=0.1)
            assert fenced.counters().packets[reason] > before
            undo()
            assert connection.recv() == b"two"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_routed_peer_is_answered_with_any_only(
    place_maker: PlaceMaker, workload: Workload, internet_agent: Agent, kind: str, family: str
) -> None:
    for replies, reached in (("host", False), ("any", True), ("off", False)):
        server = Server(place_maker(kind, workload, replies=replies), family)
        server.place.attachment.replace(Mode.ALLOWLIST)
        assert server.reached_from(internet_agent) == reached
        assert server.noted == int(reached)
        server.place.attachment.detach()


@pytest.mark.parametrize("mode", [Mode.ALLOWLIST, Mode.DISABLED], ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("way", ["routed", "bridged", "same-bridge"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_syn_through_a_fenced_interface_makes_no_entry(
    topology: Topology,
    fence: Fence,
    place_maker: PlaceMaker,
    workload: Workload,
    other: Workload,
    ports: tuple[Workload, Workload],
    family: str,
    kind: str,
    way: str,
    mode: Mode,
) -> None:
    """Two workloads could else agree on a connection in the direction that neither may open."""
    origin = workload if way == "routed" else ports[0]
    server = Server(place_maker(kind, ports[1] if way == "same-bridge" else other, replies="any"), family)
    server.place.attachment.replace(Mode.ALLOWLIST)
    with Agent(netns=origin.netns) as client:
        assert server.reached_from(client)  # nothing fences the client: a peer like any other
        assert server.noted == 1
        with fence.interface(origin.host_if, replies="any") as fenced:
            fenced.replace(mode, allow=EVERYTHING)
            assert not server.reached_from(client)
            assert server.noted == 1
        assert server.reached_from(client)
    if way == "routed":
        assert topology.arrived(workload, packets.UDP4, WEB["ipv4"]) == 3


@pytest.mark.parametrize("mode", [Mode.ALLOWLIST, Mode.DISABLED], ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fenced_workload_cannot_forge_a_syn_of_the_host(
    fence: Fence,
    place_maker: PlaceMaker,
    ports: tuple[Workload, Workload],
    kind: str,
    family: str,
    mode: Mode,
) -> None:
    """On a bridge nobody checks sources: a neighbour's SYN with the host's address would open the host to the server."""
    forger = ports[0]
    server = Server(place_maker(kind, ports[1], replies="host"), family)
    server.place.attachment.replace(Mode.ALLOWLIST)
    host = BRIDGE4 if family == "ipv4" else BRIDGE6
    assert ports[1].netns is not None
    to_mac = bytes.fromhex(ports[1].netns.mac("eth0").replace(":", ""))
    with fence.interface(forger.host_if, replies="host") as fenced:
        fenced.replace(mode, allow=EVERYTHING)
        shape = packets.tcp(int(family[-1]), "S", dport=server.port, sport=22)
        with fenced.counts(Reason.ALLOW_RULE if mode is Mode.ALLOWLIST else Reason.DISABLED, 1):
            forger.sender.send(shape.frame(host, server.host, Tag(), to_mac))
        assert server.noted == 0


# -- SYNs made by hand -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def from_internet(topology: Topology) -> Iterator[Callable[[Workload, str, str], None]]:
    """Give a sender of single TCP packets from the internet to SERVER of a workload: workload, family, flags."""
    sender = PacketSender(topology.internet, INTERNET_IF)
    to_mac = bytes.fromhex(topology.host.mac(UP_IF).replace(":", ""))

    def send(workload: Workload, family: str, flags: str) -> None:
        shape = packets.tcp(int(family[-1]), flags, dport=SERVER, sport=PEER)
        with on_harness_cpu():
            sender.send(shape.frame(WEB[family], address(workload, family), Tag(), to_mac))

    yield send
    sender.close()


@pytest.mark.parametrize("flags", ["SA", "A", "PA", "FA", "R", "F", ""], ids=lambda flags: flags or "none")
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_a_syn_makes_an_entry(
    topology: Topology,
    fence: Fence,
    workload: Workload,
    from_internet: Callable[[Workload, str, str], None],
    family: str,
    flags: str,
) -> None:
    answer = packets.tcp(int(family[-1]), "A", dport=PEER, sport=SERVER)
    with fence.interface(workload.host_if, replies="any") as fenced:
        fenced.replace(Mode.ALLOWLIST)
        from_internet(workload, family, flags)
        assert fence.plane._inbound.count(fenced.slot) == 0
        assert_drops(topology, workload, fenced, answer, WEB[family], Reason.DEFAULT_DROP)
        from_internet(workload, family, "S")
        assert fence.plane._inbound.count(fenced.slot) == 1
        assert topology.arrived(workload, answer, WEB[family], 2) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_only_answers_of_that_very_connection_pass(
    topology: Topology,
    fence: Fence,
    workload: Workload,
    from_internet: Callable[[Workload, str, str], None],
    family: str,
) -> None:
    number, to = int(family[-1]), WEB[family]
    with fence.interface(workload.host_if, replies="any") as fenced:
        fenced.replace(Mode.ALLOWLIST)
        from_internet(workload, family, "S")
        # The kernel inside knows no such port and has answered with RST, which is REPLY too: hence from here on.
        for flags in ("SA", "A", "PA", "FA", "RA"):
            shape = packets.tcp(number, flags, dport=PEER, sport=SERVER)
            assert_passes(topology, workload, fenced, shape, to, Reason.REPLY)
        drops = [packets.tcp(number, flags, dport=PEER, sport=SERVER) for flags in ("S", "F", "", "P")]
        drops += [packets.tcp(number, "A", dport=PEER, sport=SERVER + 1)]
        drops += [packets.tcp(number, "A", dport=PEER + 1, sport=SERVER)]
        drops += [packets.udp(number, dport=PEER, sport=SERVER)]
        for shape in drops:
            assert_drops(topology, workload, fenced, shape, to, Reason.DEFAULT_DROP)
        elsewhere = "203.0.113.81" if number == 4 else "2001:db8:b::81"
        shape = packets.tcp(number, "A", dport=PEER, sport=SERVER)
        assert_drops(topology, workload, fenced, shape, elsewhere, Reason.DEFAULT_DROP)
        fenced.deny(to)
        assert_drops(topology, workload, fenced, shape, to, Reason.DENY_RULE)
        fenced.replace(Mode.BLOCK_ALL)
        assert_drops(topology, workload, fenced, shape, to, Reason.BLOCK_ALL)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_begun_from_outside_ends_when_idle(
    topology: Topology,
    fence: Fence,
    workload: Workload,
    from_internet: Callable[[Workload, str, str], None],
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number, to = int(family[-1]), WEB[family]
    ack = packets.tcp(number, "A", dport=PEER, sport=SERVER)
    idle_s, handshake_s = 0.6, 0.3
    monkeypatch.setattr(fence.plane.config, "handshake_idle", fence.plane.clock.span(handshake_s))
    for answered, lasts_s in ((False, handshake_s), (True, idle_s)):
        with fence.interface(workload.host_if, replies="any", established_idle_s=idle_s) as fenced:
            fenced.replace(Mode.ALLOWLIST)
            with silent(workload.netns, topology.internet):
                from_internet(workload, family, "S")
                if answered:
                    assert_passes(topology, workload, fenced, ack, to, Reason.REPLY)
                    fence.wait_until(time.monotonic() + (handshake_s + idle_s) / 2)
                    assert_passes(topology, workload, fenced, ack, to, Reason.REPLY)
                fence.wait_until(time.monotonic() + lasts_s)
                assert_drops(topology, workload, fenced, ack, to, Reason.DEFAULT_DROP)


@contextmanager
def silent(*namespaces: NetNs | None) -> Iterator[None]:
    """Keep kernels from resetting connections that they do not know."""
    chain = "chain output { type filter hook output priority 0; tcp flags rst drop; }"
    with ExitStack() as stack:
        for each in namespaces:
            assert each is not None
            each.run("nft", f"table inet silence {{ {chain}; }}")
            stack.callback(each.run, "nft", "delete table inet silence")
        yield


@pytest.mark.parametrize("mode", [Mode.ALLOWLIST, Mode.DISABLED], ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("way", ["routed", "bridged"])
@pytest.mark.parametrize("replies", ["host", "any"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_workload_cannot_forge_a_syn_to_itself(
    topology: Topology,
    fence: Fence,
    workload: Workload,
    ports: tuple[Workload, Workload],
    from_internet: Callable[[Workload, str, str], None],
    family: str,
    replies: Replies,
    way: str,
    mode: Mode,
) -> None:
    """It sends a SYN "from" the peer to its own address; the host routes it back, out of the same interface."""
    forger = workload if way == "routed" else ports[0]
    device = forger.host_if if way == "routed" else BRIDGE_IF
    to_mac = bytes.fromhex(topology.host.mac(device).replace(":", ""))
    own = address(forger, family)
    syn = packets.tcp(int(family[-1]), "S", dport=SERVER, sport=PEER)
    assert forger.netns is not None
    with fence.interface(forger.host_if, replies=replies) as fenced, silent(forger.netns):
        fenced.replace(mode, allow=[own])
        with fenced.counts(Reason.ALLOW_RULE if mode is Mode.ALLOWLIST else Reason.DISABLED, 1):
            forger.sender.send(syn.frame(WEB[family], own, Tag(), to_mac))
        assert fence.plane._inbound.count(fenced.slot) == 0
        from_internet(forger, family, "S")
        assert fence.plane._inbound.count(fenced.slot) == int(replies == "any")


def test_the_table_of_connections_is_bounded_for_each_attachment(
    topology: Topology,
    fence: Fence,
    place_maker: PlaceMaker,
    workload: Workload,
    other: Workload,
    internet_agent: Agent,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bound = fence.plane._loaded.layout.constants["INBOUND_PER_SLOT"]
    handshake_s = 0.5
    monkeypatch.setattr(fence.plane.config, "handshake_idle", fence.plane.clock.span(handshake_s))
    flooded = Server(place_maker("interface", workload, replies="any"), "ipv4")
    spared = Server(place_maker("interface", other, replies="any"), "ipv4")
    for server in (flooded, spared):
        server.place.attachment.replace(Mode.ALLOWLIST)
        assert server.reached_from(internet_agent)
    sender = PacketSender(topology.internet, INTERNET_IF)
    to_mac = bytes.fromhex(topology.host.mac(UP_IF).replace(":", ""))
    frame = bytearray(packets.tcp(4, "S", dport=SERVER).frame(WEB["ipv4"], flooded.host, Tag(), to_mac))
    with silent(workload.netns), on_harness_cpu():
        for port in range(10_000, 10_000 + bound + 500):
            struct.pack_into("!H", frame, 14 + 20, port)
            sender.send(frame)
    sender.close()
    assert flooded.noted == bound
    assert not flooded.reached_from(internet_agent)
    assert spared.reached_from(internet_agent)
    assert spared.noted == 2
    fence.wait_until(time.monotonic() + handshake_s)
    monkeypatch.setattr(fence.plane, "_scanned", float("-inf"))
    fence.run(fence.plane.sweep(flooded.place.attachment.slot))
    assert flooded.noted < bound
    assert flooded.reached_from(internet_agent)


def test_detach_forgets_the_connections(
    fence: Fence, workload: Workload, from_internet: Callable[[Workload, str, str], None]
) -> None:
    with fence.interface(workload.host_if, replies="any") as fenced:
        fenced.replace(Mode.ALLOWLIST)
        from_internet(workload, "ipv4", "S")
        assert fence.plane._inbound.count(fenced.slot) == 1
    assert fence.plane._inbound.count(fenced.slot) == 0
