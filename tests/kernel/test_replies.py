"""Connections begun from outside: answers pass, and no workload can make one up (semantics.md 6, replies)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from connection_places import (
    ECHO,
    EVERYTHING,
    FAMILIES,
    KINDS,
    REFUSED_S,
    WEB,
    PlaceMaker,
    Server,
    Site,
)
from harness import packets
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.fence import Fence
from harness.services import tcp_echo
from harness.topology import BRIDGE4, BRIDGE6, Topology, Workload
from harness.wire import Tag
from netfence.policy.modes import Mode, Reason


@pytest.fixture(scope="module")
def fence(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fence]:
    with Fence(topology, tmp_path_factory.mktemp("fence")) as made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def _echo(topology: Topology) -> Iterator[None]:
    with tcp_echo(topology.internet, "::", ECHO):
        yield


@pytest.fixture
def place_maker(fence: Fence, cgroups: Callable[[str], Cgroup]) -> Iterator[PlaceMaker]:
    with ExitStack() as stack:
        yield PlaceMaker(fence, cgroups, stack)


@pytest.fixture(scope="module")
def site(topology: Topology, fence: Fence) -> Site:
    return Site.build(topology, fence)


@pytest.fixture(scope="module")
def host_agent(topology: Topology) -> Iterator[Agent]:
    with Agent(netns=topology.host) as running:
        yield running


@pytest.fixture(scope="module")
def internet_agent(topology: Topology) -> Iterator[Agent]:
    with Agent(netns=topology.internet) as running:
        yield running


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
    site: Site, place_maker: PlaceMaker, family: str, kind: str, way: str, mode: Mode
) -> None:
    """Two workloads could else agree on a connection in the direction that neither may open."""
    origin = site.routed[0] if way == "routed" else site.bridged[0]
    behind = site.bridged[1] if way == "same-bridge" else site.routed[1]
    server = Server(place_maker(kind, behind, replies="any"), family)
    server.place.attachment.replace(Mode.ALLOWLIST)
    with Agent(netns=origin.netns) as client:
        assert server.reached_from(client)  # nothing fences the client: a peer like any other
        assert server.noted == 1
        with site.fence.interface(origin.host_if, replies="any") as fenced:
            fenced.replace(mode, allow=EVERYTHING)
            assert not server.reached_from(client)
            assert server.noted == 1
        assert server.reached_from(client)


@pytest.mark.parametrize("mode", [Mode.ALLOWLIST, Mode.DISABLED], ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fenced_workload_cannot_forge_a_syn_of_the_host(
    site: Site, place_maker: PlaceMaker, kind: str, family: str, mode: Mode
) -> None:
    """On a bridge nobody checks sources: a neighbour's SYN "from the host" would open the host to the server."""
    forger, neighbour = site.bridged
    server = Server(place_maker(kind, neighbour, replies="host"), family)
    server.place.attachment.replace(Mode.ALLOWLIST)
    host = BRIDGE4 if family == "ipv4" else BRIDGE6
    assert neighbour.netns is not None
    to_mac = bytes.fromhex(neighbour.netns.mac("eth0").replace(":", ""))
    with site.fence.interface(forger.host_if, replies="host") as fenced:
        fenced.replace(mode, allow=EVERYTHING)
        shape = packets.tcp(int(family[-1]), "S", dport=server.port, sport=22)
        with fenced.counts(Reason.ALLOW_RULE if mode is Mode.ALLOWLIST else Reason.DISABLED, 1):
            forger.sender.send(shape.frame(host, server.host, Tag(), to_mac))
        assert server.noted == 0
