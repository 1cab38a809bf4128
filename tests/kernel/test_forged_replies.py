"""SYNs made by hand: what makes an entry in the table of connections begun from outside, and what it lets pass."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TypeAlias

import pytest

from connection_places import FAMILIES, WEB, PlaceMaker, Server, Site, address, assert_drops, assert_passes, silent
from harness import packets
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.fence import Fence
from harness.topology import BRIDGE_IF, INTERNET_IF, UP_IF, Topology, Workload
from harness.wire import PacketSender, Tag, on_harness_cpu
from netfence.policy.modes import Mode, Reason

SERVER, PEER = 8080, 443
FromInternet: TypeAlias = Callable[[Workload, str, str], None]


@pytest.fixture(scope="module")
def fence(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fence]:
    with Fence(topology, tmp_path_factory.mktemp("fence")) as made:
        yield made


@pytest.fixture
def place_maker(fence: Fence, cgroups: Callable[[str], Cgroup]) -> Iterator[PlaceMaker]:
    with ExitStack() as stack:
        yield PlaceMaker(fence, cgroups, stack)


@pytest.fixture(scope="module")
def site(topology: Topology, fence: Fence) -> Site:
    return Site.build(topology, fence)


@pytest.fixture(scope="module")
def internet_agent(topology: Topology) -> Iterator[Agent]:
    with Agent(netns=topology.internet) as running:
        yield running


@pytest.fixture(scope="module")
def from_internet(topology: Topology) -> Iterator[FromInternet]:
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
    from_internet: FromInternet,
    family: str,
    flags: str,
) -> None:
    answer = packets.tcp(int(family[-1]), "A", dport=PEER, sport=SERVER)
    with fence.interface(workload.host_if, replies="any") as fenced:
        fenced.replace(Mode.ALLOWLIST)
        from_internet(workload, family, flags)
        assert fence.plane._inbound.shares.of(fenced.slot) == 0
        assert_drops(topology, workload, fenced, answer, WEB[family], Reason.DEFAULT_DROP)
        from_internet(workload, family, "S")
        assert fence.plane._inbound.shares.of(fenced.slot) == 1
        assert topology.arrived(workload, answer, WEB[family], 2) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_only_answers_of_that_very_connection_pass(
    topology: Topology,
    fence: Fence,
    workload: Workload,
    from_internet: FromInternet,
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
    from_internet: FromInternet,
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


@pytest.mark.parametrize("mode", [Mode.ALLOWLIST, Mode.DISABLED], ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("way", ["routed", "bridged"])
@pytest.mark.parametrize("replies", ["host", "any"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_workload_cannot_forge_a_syn_to_itself(
    site: Site,
    from_internet: FromInternet,
    family: str,
    replies: str,
    way: str,
    mode: Mode,
) -> None:
    """It sends a SYN "from" the peer to its own address; the host routes it back, out of the same interface."""
    fence, forger = site.fence, site.routed[0] if way == "routed" else site.bridged[0]
    device = forger.host_if if way == "routed" else BRIDGE_IF
    to_mac = bytes.fromhex(site.topology.host.mac(device).replace(":", ""))
    own = address(forger, family)
    syn = packets.tcp(int(family[-1]), "S", dport=SERVER, sport=PEER)
    assert forger.netns is not None
    with fence.interface(forger.host_if, replies=replies) as fenced, silent(forger.netns):
        fenced.replace(mode, allow=[own])
        with fenced.counts(Reason.ALLOW_RULE if mode is Mode.ALLOWLIST else Reason.DISABLED, 1):
            forger.sender.send(syn.frame(WEB[family], own, Tag(), to_mac))
        assert fence.plane._inbound.shares.of(fenced.slot) == 0
        from_internet(forger, family, "S")
        assert fence.plane._inbound.shares.of(fenced.slot) == int(replies == "any")


def test_the_table_of_connections_is_bounded_for_each_attachment(
    site: Site, place_maker: PlaceMaker, internet_agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology, fence, (workload, other) = site.topology, site.fence, site.routed
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
            sender.send(bytes(frame))
    sender.close()
    assert flooded.noted == bound
    missed = fence.plane.inbound_missed(flooded.place.attachment.slot)
    assert missed == 500 + 1  # the connection of `reached_from` has a place too
    assert fence.plane.inbound_missed(spared.place.attachment.slot) == 0
    assert not flooded.reached_from(internet_agent)
    assert spared.reached_from(internet_agent)
    assert spared.noted == 2
    fence.wait_until(time.monotonic() + handshake_s)
    monkeypatch.setattr(fence.plane, "_scanned", float("-inf"))
    fence.run(fence.plane.sweep(flooded.place.attachment.slot))
    assert flooded.noted < bound
    assert flooded.reached_from(internet_agent)


def test_detach_forgets_the_connections(fence: Fence, workload: Workload, from_internet: FromInternet) -> None:
    with fence.interface(workload.host_if, replies="any") as fenced:
        fenced.replace(Mode.ALLOWLIST)
        from_internet(workload, "ipv4", "S")
        assert fence.plane._inbound.shares.of(fenced.slot) == 1
        fence.plane._inbound.shares._long_words[fenced.slot * 2 + 1] = 7
        assert fence.plane.inbound_missed(fenced.slot) == 7
    assert fence.plane._inbound.shares.of(fenced.slot) == 0
    assert fence.plane.inbound_missed(fenced.slot) == 0
