"""The XDP hook: what only it has. Verdicts, shapes and random packets run under XDP in the tests of those."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest

from harness import packets
from harness.agent import Agent, receive_exactly
from harness.fence import Attachment, Fence
from harness.netns import NetNs
from harness.packets import DOT1AD, DOT1Q, ETHERNET_BYTES
from harness.topology import BRIDGE_IF, Topology, Workload
from harness.tuntap import IFF_NO_PI, IFF_TAP
from harness.wire import Tag
from hooktools import take_off
from netfence.dataplane import links, rtnl
from netfence.dataplane.hooks import tcx, xdp
from netfence.dataplane.hooks.chain import Side
from netfence.dataplane.links import AttachType
from netfence.dataplane.rtnl import Rtnl
from netfence.errors import PreconditionError
from netfence.policy.modes import Mode, Reason
from shape_cases import Case
from shape_paths import BIG_MTU, OWN_DNS, PathTaken, bridged_port
from test_big_packets import BIG_CASES, IFF_VNET_HDR, BareSender, raw_tuntap
from test_xdp_around import running
from xdp_tools import SIOCETHTOOL, XDP_MTU, fenced_by_xdp, foreign_xdp, tagging

WEB = {"ipv4": "203.0.113.80", "ipv6": "2001:db8:b::80"}
SHAPES = {"ipv4": packets.UDP4, "ipv6": packets.UDP6}
MODES = ["xdp-native", "xdp-generic"]
COUNT = 3
CHUNK = 500_000
ETHTOOL_GTSO = 0x1E


@pytest.fixture(scope="module")
def fence(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fence]:
    with Fence(topology, tmp_path_factory.mktemp("fence")) as made:
        yield made


@pytest.fixture(scope="module")
def bridged(topology: Topology) -> Workload:
    return bridged_port(topology, mtu=XDP_MTU)


def mode_of(hook: str) -> str:
    return hook.removeprefix("xdp-")


def programs(fence: Fence, workload: Workload) -> list[list[int]]:
    """List the programs of the tcx chains (where the kernel has them) and of XDP on the host's side."""
    with fence.topology.host.inside(), Rtnl() as netlink:
        ifindex = socket.if_nametoindex(workload.host_if)
        found = [rtnl.get_xdp_programs(netlink, ifindex)]
        if fence.plane.features["tcx"] == "yes":
            found += [links.prog_query_tcx(ifindex, each) for each in (AttachType.TCX_INGRESS, AttachType.TCX_EGRESS)]
    return found


def assert_nothing_left(fence: Fence, workload: Workload, left: int = 0) -> None:
    assert sum(map(len, programs(fence, workload))) == left
    assert not list((fence.plane._bpffs_dir / "links").iterdir())


def segments(netns: NetNs, ifname: str) -> bool:
    """Tell whether an interface takes TCP packets that are yet to be cut (ETHTOOL_GTSO)."""
    value = array.array("B", struct.pack("=II", ETHTOOL_GTSO, 0))
    with netns.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCETHTOOL, struct.pack("16sP", ifname.encode(), value.buffer_info()[0]))
    return bool(struct.unpack("=II", value.tobytes())[1])


@pytest.mark.parametrize("hook", MODES)
@pytest.mark.parametrize("kind", ["veth", "tap", "tap-waiting"])
@pytest.mark.parametrize("family", SHAPES)
def test_drops_are_bracketed(topology: Topology, fence: Fence, family: str, kind: str, hook: str) -> None:
    workload = topology.add_veth() if kind == "veth" else topology.add_tap()
    if kind == "tap-waiting":  # then XDP has the bytes before a packet is made of them
        assert workload.device is not None
        workload.device.let_writes_wait()
    shape, to = SHAPES[family], WEB[family]
    size = len(workload.bytes_of(shape, to, Tag()))

    def expect(reason: Reason, arrived: int) -> None:
        with fenced.counts(reason, COUNT, COUNT * size):
            assert topology.arrived(workload, shape, to, COUNT) == arrived

    with fenced_by_xdp(fence, workload.host_if, mode_of(hook)) as fenced:
        expect(Reason.START, 0)
        fenced.replace(Mode.ALLOWLIST)
        expect(Reason.DEFAULT_DROP, 0)
        fenced.allow(to)
        expect(Reason.ALLOW_RULE, COUNT)
        fenced.remove(to)
        expect(Reason.DEFAULT_DROP, 0)
    assert topology.arrived(workload, shape, to, COUNT) == COUNT
    assert_nothing_left(fence, workload)


@pytest.mark.parametrize("mode", [xdp.NATIVE, xdp.GENERIC], ids=["native", "generic"])
def test_a_foreign_program_keeps_its_place_and_is_named(
    topology: Topology, fence: Fence, workload: Workload, mode: int
) -> None:
    with foreign_xdp(topology.host, workload.host_if, mode) as theirs:
        told = rf"attach xdp on {workload.host_if}: it has XDP program {theirs} \(somebody\).* --hook tc"
        with pytest.raises(PreconditionError, match=told):
            fence.interface(workload.host_if, xdp=True)
        assert_nothing_left(fence, workload, left=1)
        with fence.interface(workload.host_if) as fenced:  # as the message says
            fenced.replace(Mode.ALLOWLIST)
            with fenced.counts(Reason.DEFAULT_DROP, COUNT):
                assert topology.arrived(workload, packets.UDP4, WEB["ipv4"], COUNT) == 0
    with fenced_by_xdp(fence, workload.host_if, "native"):
        pass


def test_an_mtu_that_is_too_large_is_refused(topology: Topology, fence: Fence) -> None:
    workload = topology.add_veth()
    workload.inside.ip(f"link set eth0 mtu {BIG_MTU}")
    with pytest.raises(PreconditionError, match=rf"attach xdp on {workload.host_if}: .*MTU is too large.*--hook tc"):
        fence.interface(workload.host_if, xdp=True)
    assert_nothing_left(fence, workload)
    workload.inside.ip(f"link set eth0 mtu {XDP_MTU}")
    with fenced_by_xdp(fence, workload.host_if, "native"):
        with pytest.raises(RuntimeError, match="mtu greater than device maximum"):
            workload.inside.ip(f"link set eth0 mtu {BIG_MTU}")
        assert (workload.inside.ip_json("link", "show", "dev", "eth0"))[0]["mtu"] == XDP_MTU


def test_a_link_that_somebody_takes_off_opens_nothing_and_is_put_back(
    topology: Topology, fence: Fence, workload: Workload
) -> None:
    with fenced_by_xdp(fence, workload.host_if, "native") as fenced:
        fenced.replace(Mode.ALLOWLIST)
        take_off(fence.plane._bpffs_dir / "links" / f"{fenced.name}-xdp")
        assert programs(fence, workload)[0] == []

        def put_back() -> bool:
            return fence.run(fence.plane.put_back(fenced.slot, fenced.target, fenced.direction, fenced.name))

        def dropped() -> None:
            with fenced.counts(Reason.DEFAULT_DROP, COUNT):
                assert topology.arrived(workload, packets.UDP4, WEB["ipv4"], COUNT) == 0

        dropped()
        assert not put_back()
        assert programs(fence, workload)[0] == [links.prog_info(fence.plane._loaded.programs["nf_xdp"]).id]
        dropped()
        assert put_back()


@pytest.mark.parametrize("hook", MODES)
def test_the_mode_in_force_is_told(topology: Topology, fence: Fence, workload: Workload, hook: str) -> None:
    with fenced_by_xdp(fence, workload.host_if, mode_of(hook)) as fenced, topology.host.inside():
        assert fence.plane._hooks.mechanism(socket.if_nametoindex(workload.host_if), fenced.name) == hook
        put_back = fence.plane.put_back(fenced.slot, fenced.target, fenced.direction, fenced.name)
        assert fence.run(put_back), "it is in force"


def test_a_device_without_native_xdp_gets_the_generic_one(topology: Topology, fence: Fence) -> None:
    """The loopback is such a device; that nothing is to be fenced there is not the hook's to know."""
    pin = fence.plane._bpffs_dir / "links" / "loopback-xdp"
    with topology.host.inside():
        assert xdp.attach(fence.plane._loaded.programs["nf_xdp"], 1, "lo", pin) == "xdp-generic"
        try:
            assert xdp.in_force(pin, 1) == "xdp-generic"
        finally:
            xdp.detach(pin)


TAGS = {
    "over-none": (packets.UDP6, DOT1Q),
    "over-one": (packets.UDP4_VLAN, DOT1AD),
    "over-two": (packets.UDP6_QINQ, DOT1Q),  # a third tag: XDP lets pass what has an address that may, TC counts tags
}


@pytest.mark.parametrize("hook", MODES)
@pytest.mark.parametrize("name", TAGS)
def test_tags_that_xdp_does_not_see_hide_nothing(
    topology: Topology, fence: Fence, bridged: Workload, name: str, hook: str
) -> None:
    """The outer tag is out of band (`skb->vlan_tci`), as a VLAN device of the workload leaves it."""
    shape, pushed = TAGS[name]
    to = WEB[f"ipv{shape.family}"]
    with (
        fenced_by_xdp(fence, bridged.host_if, mode_of(hook)) as fenced,
        running(fence, bridged.inside, "eth0", Side.EGRESS, tagging(pushed, 7)),
    ):
        passes = (Reason.VLAN_DEPTH, 0) if name == "over-two" else (Reason.DEFAULT_PASS, COUNT)
        for mode, reason, arrived in (
            (Mode.DENYLIST, *passes),
            (Mode.ALLOWLIST, Reason.DEFAULT_DROP, 0),
            (Mode.DENYLIST, *passes),
        ):
            fenced.replace(mode)
            with fenced.counts(reason, COUNT):
                assert topology.arrived(bridged, shape, to, COUNT) == arrived


@pytest.mark.parametrize("hook", MODES)
@pytest.mark.parametrize("family", SHAPES)
def test_a_tcp_stream_passes(
    topology: Topology, fence: Fence, workload: Workload, agent: Agent, family: str, hook: str
) -> None:
    """Native XDP of a veth switches segmentation offload of the other end off; generic XDP gets packets to be cut."""
    to, total = WEB[family], 2_000_000
    assert segments(workload.inside, "eth0")
    with topology.internet.inside():
        server = socket.create_server((to, 0), family=socket.AF_INET6 if ":" in to else socket.AF_INET)
    with server, fenced_by_xdp(fence, workload.host_if, mode_of(hook)) as fenced:
        assert segments(workload.inside, "eth0") == (hook == "xdp-generic")
        fenced.replace(Mode.ALLOWLIST, allow=[to])
        with agent.connect(to, server.getsockname()[1]) as client:
            accepted, _ = server.accept()
            accepted.settimeout(5.0)
            with accepted:
                received = 0
                while received < total:
                    sent = client.send(bytes(min(CHUNK, total - received)))
                    while sent > 0:
                        taken = len(accepted.recv(sent))
                        received, sent = received + taken, sent - taken
                accepted.sendall(b"done")
                assert receive_exactly(client, 4, 5.0) == b"done"
        counted = fenced.counters()
        assert counted.blocked == (0, 0)
        assert counted.bytes[Reason.ALLOW_RULE] >= total
    assert segments(workload.inside, "eth0")


@pytest.mark.parametrize("case", BIG_CASES, ids=str)
def test_big_frames_of_a_vm(topology: Topology, fence: Fence, bridged: Workload, case: Case) -> None:
    """The VM says that only the Ethernet header is linear; the kernel makes it whole for us."""
    with raw_tuntap(topology, "vnet1", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) as descriptor:
        topology.host.sysctl("net/ipv6/conf/vnet1/disable_ipv6", "1")
        topology.host.ip(f"link set vnet1 mtu {BIG_MTU} master {BRIDGE_IF} up")
        sender = BareSender(lambda packet: os.write(descriptor, packet), ETHERNET_BYTES)
        vm = replace(bridged, host_if="vnet1", sender=sender)
        with fenced_by_xdp(fence, "vnet1", "native", **OWN_DNS) as fenced:
            assert_big_frames(topology, fenced, vm, bridged, case)


def assert_big_frames(topology: Topology, fenced: Attachment, vm: Workload, bridged: Workload, case: Case) -> None:
    path = PathTaken(fenced, vm, topology.meter(bridged), sentinels=0)
    for allow, judged in ((["0.0.0.0/0", "::/0"], Reason.ALLOW_RULE), ([], Reason.DEFAULT_DROP)):
        fenced.replace(Mode.ALLOWLIST, allow)
        path.expect(case, judged if case.reason is None else case.reason, COUNT)


def test_tcx_stands_behind_it(fence: Fence, workload: Workload) -> None:
    """So a foreign TC program in front of ours is told as ever; before XDP itself there can be none."""
    with fenced_by_xdp(fence, workload.host_if, "native") as fenced, fence.topology.host.inside():
        assert fence.plane.front(fenced.target, fenced.direction, fenced.name) == []
        if fence.plane.features["tcx"] == "yes":
            ours = links.prog_info(fence.plane._loaded.programs["nf_tc"]).id
            assert tcx.in_front(socket.if_nametoindex(workload.host_if), Side.INGRESS, ours) == ()
