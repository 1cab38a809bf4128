"""Connections begun from outside, where XDP fences: answers pass, and no workload can make one up (semantics.md 6).

XDP cannot mark a packet for the programs that note SYNs; the TC filter behind it does, as it does without XDP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from connection_places import EVERYTHING, FAMILIES, KINDS, WEB, PlaceMaker, Server, Site, address, silent
from harness import packets
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.fence import Fence
from harness.topology import BRIDGE4, BRIDGE6, BRIDGE_IF, Topology
from harness.wire import Tag
from netfence.policy.modes import Mode, Reason
from xdp_tools import fenced_by_xdp, generic_only

HOOKS = ["xdp-native", "xdp-generic"]


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


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_reaches_a_server_inside(site: Site, place_maker: PlaceMaker, family: str, hook: str) -> None:
    with ExitStack() as stack, Agent(netns=site.topology.host) as host:
        if hook == "xdp-generic":
            stack.enter_context(generic_only())
        place = place_maker("interface", site.routed[0], xdp=True)
        assert place.attachment.mechanism == hook
        server, fenced = Server(place, family), place.attachment
        assert not server.reached_from(host)  # start_mode
        fenced.replace(Mode.ALLOWLIST)
        before = fenced.counters()
        assert server.reached_from(host)
        after = fenced.counters()
        assert after.packets[Reason.REPLY] - before.packets[Reason.REPLY] >= 3
        assert after.blocked == before.blocked
        fenced.mode(Mode.BLOCK_ALL)
        assert not server.reached_from(host)


@pytest.mark.parametrize("mode", [Mode.ALLOWLIST, Mode.DISABLED], ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("way", ["routed", "bridged", "same-bridge"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_syn_that_xdp_let_pass_makes_no_entry(
    site: Site, place_maker: PlaceMaker, family: str, kind: str, way: str, mode: Mode, hook: str
) -> None:
    origin = site.routed[0] if way == "routed" else site.bridged[0]
    behind = site.bridged[1] if way == "same-bridge" else site.routed[1]
    server = Server(place_maker(kind, behind, replies="any"), family)
    server.place.attachment.replace(Mode.ALLOWLIST)
    with Agent(netns=origin.netns) as client:
        assert server.reached_from(client)
        with fenced_by_xdp(site.fence, origin.host_if, hook.removeprefix("xdp-"), replies="any") as fenced:
            fenced.replace(mode, allow=EVERYTHING)
            assert not server.reached_from(client)
            assert server.noted == 1
        assert server.reached_from(client)


@pytest.mark.parametrize("way", ["to-itself", "to-itself-bridged", "of-the-host"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_forged_syn_makes_no_entry(site: Site, place_maker: PlaceMaker, family: str, way: str, hook: str) -> None:
    """It names a peer, or the host, as its source; the host routes or bridges it to a fenced workload."""
    forger, neighbour = site.bridged if way != "to-itself" else site.routed
    target = neighbour if way == "of-the-host" else forger
    source = (BRIDGE4 if family == "ipv4" else BRIDGE6) if way == "of-the-host" else WEB[family]
    server = Server(place_maker("cgroup", target, replies="host"), family) if target is neighbour else None
    to_mac = (
        neighbour.inside.mac("eth0")
        if way == "of-the-host"
        else site.topology.host.mac(BRIDGE_IF if forger.bridged else forger.host_if)
    )
    to = address(target, family)
    syn = packets.tcp(int(family[-1]), "S", dport=server.port if server else 8080, sport=443)
    mode = hook.removeprefix("xdp-")
    with (
        silent(forger.netns),
        fenced_by_xdp(site.fence, forger.host_if, mode, replies="host" if server else "any") as fenced,
    ):
        fenced.replace(Mode.ALLOWLIST, allow=[to])
        with fenced.counts(Reason.ALLOW_RULE, 1):
            forger.sender.send(syn.frame(source, to, Tag(), bytes.fromhex(to_mac.replace(":", ""))))
        noted = site.fence.plane._inbound.shares.of(fenced.slot) + (server.noted if server else 0)
        assert noted == 0
