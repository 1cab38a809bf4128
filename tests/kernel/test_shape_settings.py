"""Addresses and packets that get special care, under the settings that bear on them, on a bridged veth.

The cloud metadata address, link-local addresses, DHCP, neighbour discovery with a host that solicits from its global
address, the own DNS server at an IPv6 address, and VLAN tags on the way out of a bridge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from scapy.layers.inet import TCP, UDP

from harness import packets
from harness.fence import Fence, packed
from harness.packets import Shape
from harness.topology import BRIDGE6, BRIDGE_UP_IF, METADATA4, METADATA6, Topology, Workload
from netfence.dataplane.target import Direction
from netfence.policy.modes import Mode, Reason
from shape_cases import DESTINATION, EVERYTHING, FRAGMENT, NA, NS, OWN_DNS4, OWN_PORT, Case, anywhere, icmp6, v4, v6
from shape_paths import COUNT, PathTaken, bridged_port, fenced


@pytest.fixture(scope="module")
def fence(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fence]:
    with Fence(topology, tmp_path_factory.mktemp("fence")) as made:
        yield made


@pytest.fixture(scope="module")
def bridged(topology: Topology) -> Workload:
    return bridged_port(topology)


@pytest.fixture
def fenced_port(topology: Topology, fence: Fence, bridged: Workload) -> Iterator[Callable[..., PathTaken]]:
    """Fence the port with settings of a test's own."""
    with ExitStack() as stack:

        def make(**static: Any) -> PathTaken:
            attachment = stack.enter_context(fenced(fence, bridged.host_if, **static))
            return PathTaken(attachment, bridged, topology.meter(bridged), sentinels=1)

        yield make


METADATA_CASES = {
    "ipv4": (Case(packets.UDP4, METADATA4), ["169.254.0.0/15", "0.0.0.0/0"], ["169.254.0.0/16", "169.254.169.254"]),
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


def test_hosts_solicit_from_their_global_address(fence: Fence, fenced_port: Callable[..., PathTaken]) -> None:
    path = fenced_port()
    for to, reason in ((BRIDGE6, Reason.NEIGHBOUR), ("2001:db8:c::77", Reason.DEFAULT_DROP)):
        for name, message in (("na", NA), ("ns", NS)):
            path.attachment.replace(Mode.ALLOWLIST)
            path.expect(Case(icmp6(name, message), to), reason, COUNT)
    fence.plane.set_own_addresses(path.attachment.slot, [packed("2001:db8:c::77")])
    path.expect(Case(icmp6("na", NA), "2001:db8:c::77"), Reason.NEIGHBOUR, COUNT)
    path.expect(Case(icmp6("na", NA), BRIDGE6), Reason.DEFAULT_DROP, COUNT)
    path.expect(Case(icmp6("na", NA, hlim=64), "2001:db8:c::77"), Reason.DEFAULT_DROP, COUNT)
    path.expect(Case(packets.UDP6, "2001:db8:c::77"), Reason.DEFAULT_DROP, COUNT)


def test_the_own_dns_server_at_an_ipv6_address(fenced_port: Callable[..., PathTaken]) -> None:
    path = fenced_port(dns_address=packed("2001:db8:fe::99"), dns_port=53)
    path.attachment.replace(Mode.BLOCK_ALL)
    for each in (UDP(sport=40000, dport=53), TCP(sport=40000, dport=53, flags="S")):
        path.expect(Case(v6("own-dns6", each), "2001:db8:fe::99"), Reason.DNS, COUNT)
        path.expect(Case(v6("own-dns6", DESTINATION(), each), "2001:db8:fe::99"), Reason.DNS, COUNT)
        path.expect(Case(v6("own-dns6", FRAGMENT, each), "2001:db8:fe::99"), Reason.BLOCK_ALL, COUNT)
    path.expect(Case(v4("dns4", UDP(sport=40000, dport=OWN_PORT)), OWN_DNS4), Reason.BLOCK_ALL, COUNT)


@pytest.mark.parametrize(
    "shape", [packets.UDP4_VLAN, packets.UDP4_QINQ, packets.UDP6_QINQ, packets.UDP4_THREE_TAGS], ids=str
)
def test_tags_on_the_way_out_of_a_bridge(topology: Topology, fence: Fence, bridged: Workload, shape: Shape) -> None:
    """The bridge's other port gets the outer tag as it came in: offloaded."""
    with fenced(fence, BRIDGE_UP_IF, Direction.HOST) as attachment:
        path = PathTaken(attachment, bridged, topology.meter(bridged), sentinels=1)
        deep = shape is packets.UDP4_THREE_TAGS
        for mode, allow, judged in (
            (Mode.ALLOWLIST, EVERYTHING, Reason.ALLOW_RULE),
            (Mode.ALLOWLIST, [], Reason.DEFAULT_DROP),
        ):
            attachment.replace(mode, allow)
            with attachment.counts(Reason.VLAN_DEPTH if deep else judged, COUNT):
                arrived, _ = path.send(Case(shape, anywhere(shape)))
            assert arrived == (COUNT if allow and not deep else 0)
