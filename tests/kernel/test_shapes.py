"""Packets of every shape (semantics.md 6 and 7): judged by their address, always passed, or never guessed at.

Each case of `shape_cases` runs on these paths: the ingress hook of a bridged veth, of a bridged tap and of a routed
tun, the egress hook of a veth, native XDP of a bridged veth and of a bridged tap, and generic XDP. A VLAN tag is
"offloaded" (in `skb->vlan_tci`) on ingress, where the kernel takes the outer tag out before the hook, and in the data
under XDP and on egress from AF_PACKET; `test_shape_settings` and `test_xdp` have it otherwise. So no vlan link is
needed, which this kernel may lack.

What cannot be made: headers that `bpf_skb_pull_data` refuses to give (reason `unreadable`) want an allocation to fail.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness import packets
from harness.fence import Fence
from harness.topology import Topology, Workload
from harness.wire import Tag
from netfence.dataplane.target import Direction
from netfence.policy.modes import Mode, Reason
from shape_cases import ANY4, CASES, EVERYTHING, Case
from shape_paths import (
    COUNT,
    NOBODY,
    OWN_DNS,
    PathTaken,
    attach_foreign_dns,
    bridged_port,
    bridged_tap,
    fenced,
    way_out,
)
from xdp_tools import XDP_MTU, fenced_by_xdp


@pytest.fixture(scope="module")
def fence(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fence]:
    with Fence(topology, tmp_path_factory.mktemp("fence")) as made:
        yield made


@pytest.fixture(scope="module")
def bridged(topology: Topology, fence: Fence) -> Workload:
    attach_foreign_dns(fence, topology)
    return bridged_port(topology)


@pytest.fixture(scope="module")
def path(request: pytest.FixtureRequest, topology: Topology, fence: Fence, bridged: Workload) -> Iterator[PathTaken]:
    if request.param == "veth-egress":
        with way_out(topology) as (workload, meter), fenced(fence, workload.host_if, Direction.HOST) as attachment:
            yield PathTaken(attachment, workload, meter, sentinels=1)
        return
    if request.param.startswith("xdp"):
        _, mode, kind = request.param.split("-")
        port = bridged_tap(topology) if kind == "tap" else bridged_port(topology, mtu=XDP_MTU)
        with fenced_by_xdp(fence, port.host_if, mode, **OWN_DNS) as attachment:
            yield PathTaken(attachment, port, topology.meter(port), sentinels=1)
        return
    if request.param == "tap-ingress":
        workload = bridged_tap(topology)
    else:
        workload = topology.add_tun() if request.param == "tun-ingress" else bridged
    with fenced(fence, workload.host_if) as attachment:
        yield PathTaken(attachment, workload, topology.meter(workload), sentinels=int(workload.bridged))


def fits_tun(case: Case) -> bool:
    """Without an Ethernet header there are no tags and types, and tun itself refuses what has no IP version."""
    each = case.shape
    return not each.vlans and each.ethertype is None and "version" not in each.name


XDP_PATHS = ["xdp-native-veth", "xdp-native-tap", "xdp-generic-veth"]
PATHS = ["veth-ingress", "tap-ingress", "tun-ingress", "veth-egress", *XDP_PATHS]
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
@pytest.mark.parametrize("path", L2_PATHS, indirect=True)
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
