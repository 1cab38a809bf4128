"""Ways to lead a packet around the XDP program from another network namespace: the TC filter behind it judges them.

Generic XDP passes over packets that a TC redirect has brought (`skb->redirected`, which crosses a veth); under native
XDP a veth gives packets of a send queue that has no receive queue to the stack directly. Both seen on 6.18.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from harness import packets
from harness.deadline import wait_for
from harness.fence import Attachment, Fence, moved
from harness.needs import needs, without_link_kind
from harness.netns import NetNs, veth
from harness.topology import BRIDGE_IF, BRIDGE_UP_IF, SINK_IF, Topology, Workload
from harness.wire import PacketSender, Tag, on_harness_cpu
from netfence.dataplane import links, rawprog
from netfence.dataplane.hooks import clsact
from netfence.dataplane.hooks.chain import Side
from netfence.dataplane.rawprog import ProgType
from netfence.policy.modes import Mode, Reason
from shape_paths import bridged_port
from xdp_tools import SIOCETHTOOL, XDP_MTU, fenced_by_xdp, queueing, queueing_by_mark, redirecting, turning

pytestmark = pytest.mark.dealt

WEB, CLOSED = "203.0.113.80", "203.0.113.99"
COUNT = 3
ETHTOOL_SCHANNELS = 0x3D


@pytest.fixture(scope="module")
def fence(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fence]:
    with Fence(topology, tmp_path_factory.mktemp("fence")) as made:
        yield made


@contextlib.contextmanager
def running(fence: Fence, netns: NetNs, ifname: str, side: Side, insns: bytes) -> Iterator[None]:
    """Run a program on what leaves, or enters by, an interface of the workload."""
    program = rawprog.load_raw(ProgType.SCHED_CLS, insns)
    marker = fence.plane._bpffs_dir / "workload-qdisc"
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, program)
        stack.enter_context(netns.inside())
        ifindex = socket.if_nametoindex(ifname)
        clsact.attach(program, ifindex, ifname, side, marker)
        stack.callback(clsact.detach, ifindex, side, marker)
        yield


def assert_judged(topology: Topology, fenced: Attachment, workload: Workload, sentinels: int = 0) -> None:
    """Bracketed: what passes is counted once and arrives, what does not is counted once and does not."""
    for mode, reason in (
        (Mode.DENYLIST, Reason.DEFAULT_PASS),
        (Mode.ALLOWLIST, Reason.DEFAULT_DROP),
        (Mode.DISABLED, Reason.DISABLED),
        (Mode.BLOCK_ALL, Reason.BLOCK_ALL),
        (Mode.DENYLIST, Reason.DEFAULT_PASS),
    ):
        fenced.replace(mode)
        with fenced.counts(reason, COUNT + (sentinels if mode is Mode.DISABLED else 0)):
            passes = mode in (Mode.DENYLIST, Mode.DISABLED)
            assert topology.arrived(workload, packets.UDP4, WEB, COUNT) == (COUNT if passes else 0)


@pytest.fixture
def detour(topology: Topology) -> Iterator[Workload]:
    """Give a workload that sends on an interface of its own, `side0`, instead of the one that is fenced."""
    workload = topology.add_bridged()
    netns, sender = workload.inside, workload.sender
    veth((netns, "side0"), (netns, "side1"))
    netns.ip("link set side0 arp off up", "link set side1 arp off up")
    workload.sender = side = PacketSender(netns, "side0")
    yield workload
    side.close()
    workload.sender = sender
    netns.ip("link del side0")


@pytest.mark.parametrize("hook", ["xdp-native", "xdp-generic"])
def test_packets_that_a_redirect_brought(topology: Topology, fence: Fence, detour: Workload, hook: str) -> None:
    with detour.inside.inside():
        out = socket.if_nametoindex("eth0")
    with (
        fenced_by_xdp(fence, detour.host_if, hook.removeprefix("xdp-")) as fenced,
        running(fence, detour.inside, "side0", Side.EGRESS, redirecting(out)),
    ):
        assert_judged(topology, fenced, detour, sentinels=1)


@pytest.fixture
def queues(topology: Topology) -> Iterator[Workload]:
    """Give a bridged workload whose veth has a second send queue, at rest, and whose host end has one receive queue."""
    port = bridged_port(topology, mtu=XDP_MTU)
    netns = NetNs("queues")
    topology.host.ip(
        "link add queues0 numtxqueues 2 numrxqueues 2 type veth"
        f" peer name eth0 numtxqueues 2 numrxqueues 2 netns {netns.path}"
    )
    for each, name in ((topology.host, "queues0"), (netns, "eth0")):
        each.sysctl(f"net/ipv6/conf/{name}/disable_ipv6", "1")
        _use_one_queue(each, name)
        each.ip(f"link set {name} up")
    topology.host.ip(f"link set queues0 master {BRIDGE_IF}")
    sender = PacketSender(netns, "eth0")
    yield replace(port, host_if="queues0", netns=netns, sender=sender)
    sender.close()
    topology.host.ip("link del queues0")  # the end of the namespace would do so too, but at some later time
    netns.close()


def _use_one_queue(netns: NetNs, ifname: str) -> None:
    channels = array.array("I", [ETHTOOL_SCHANNELS, 0, 0, 0, 0, 1, 1, 0, 0])
    with netns.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCETHTOOL, struct.pack("16sP", ifname.encode(), channels.buffer_info()[0]))


@contextlib.contextmanager
def choosing_queues(fence: Fence, netns: NetNs, insns: bytes) -> Iterator[None]:
    """Have a program choose the send queue behind the kernel's own choice, as the classifier of a qdisc."""
    program = rawprog.load_raw(ProgType.SCHED_CLS, insns)
    pin = fence.plane._bpffs_dir / "queueing"
    try:
        links.obj_pin(program, pin)
        netns.run("tc", "qdisc", "add", "dev", "eth0", "root", "handle", "1:", "htb", "default", "1")
        netns.run("tc", "class", "add", "dev", "eth0", "parent", "1:", "classid", "1:1", "htb", "rate", "10gbit")
        netns.run("tc", "filter", "add", "dev", "eth0", "parent", "1:", "bpf", "da", "object-pinned", str(pin))
        yield
    finally:
        os.close(program)
        pin.unlink(missing_ok=True)


@needs("channels of a veth")
def test_packets_of_a_queue_that_nobody_receives(topology: Topology, fence: Fence, queues: Workload) -> None:
    with (
        choosing_queues(fence, queues.inside, queueing(1)),
        fenced_by_xdp(fence, queues.host_if, "native") as fenced,
    ):
        assert_judged(topology, fenced, queues, sentinels=1)


@needs("channels of a veth")
@pytest.mark.parametrize("hook", ["xdp-native", "xdp-generic"])
def test_a_frame_that_comes_back_changed(topology: Topology, fence: Fence, queues: Workload, hook: str) -> None:
    """XDP let it pass, to another interface of the workload, which sends it to elsewhere, around XDP this time.

    All that the kernel keeps of such a packet comes back too, XDP metadata included, and the workload can read and
    write it (seen on 6.18): nothing of it may tell TC that the packet was judged.
    """
    host, netns, sink = topology.host, queues.inside, topology.internet.mac(SINK_IF)
    veth((host, "back0"), (netns, "eth1"))
    host.ip(f"link set back0 master {BRIDGE_IF} up")
    netns.ip("link set eth1 arp off up")
    for mac, port in (
        (netns.mac("eth1"), "back0"),
        (sink, BRIDGE_UP_IF),
    ):  # what is flooded is copied, without metadata
        host.run("bridge", "fdb", "replace", mac, "dev", port, "master", "static")
    with netns.inside():
        out = socket.if_nametoindex("eth0")
    queues.host_mac = bytes.fromhex(netns.mac("eth1").replace(":", ""))
    turned = turning(bytes.fromhex(sink.replace(":", "")), socket.inet_aton(CLOSED), out, queue=1)
    with (
        running(fence, netns, "eth1", Side.INGRESS, turned),
        choosing_queues(fence, netns, queueing_by_mark()),
        fenced_by_xdp(fence, queues.host_if, hook.removeprefix("xdp-")) as fenced,
    ):
        for allow, judged in (([WEB, CLOSED], {"ALLOW_RULE": 2}), ([WEB], {"ALLOW_RULE": 1, "DEFAULT_DROP": 1})):
            fenced.replace(Mode.ALLOWLIST, allow=allow)
            before = fenced.counters()
            arrived = topology.arrived(queues, packets.UDP4, WEB, COUNT)
            counted = {name: count for name, (count, _) in moved(before, fenced.counters()).items() if name != "ARP"}
            assert counted == {name: times * COUNT for name, times in judged.items()}
            assert arrived == (0 if "DEFAULT_DROP" in judged else COUNT)
    host.ip("link del back0")


PAST_TC = "an ifb of the workload marks packets to pass over TC ingress, and the mark crosses a veth (seen on 6.18)"
PAST_BOTH = (
    "an ifb leads them around TC, a classifier around native XDP; this takes CAP_BPF outside the container (6.18)"
)


def hold_in_an_ifb(netns: NetNs) -> Callable[[], int]:
    """Lead what leaves by eth0 through an ifb, which is slow; return what counts the packets that wait there."""
    try:
        netns.ip("link add ifb7 type ifb", "link set ifb7 up")
    except RuntimeError:
        without_link_kind("ifb")
    for line in (
        "qdisc add dev ifb7 root tbf rate 500bit burst 100 latency 40s",
        "qdisc add dev eth0 clsact",
        "filter add dev eth0 egress protocol all u32 match u32 0 0 action mirred egress redirect dev ifb7",
    ):
        netns.run("tc", *line.split())

    def waiting() -> int:
        (queue,) = json.loads(netns.run("tc", "-s", "-j", "qdisc", "show", "dev", "ifb7", "root").stdout)
        return int(queue["qlen"])

    return waiting


def assert_dropped_from_an_ifb(
    topology: Topology, fenced: Attachment, workload: Workload, waiting: Callable[[], int]
) -> None:
    """`skb->tc_skip_classify` is set when an ifb sends a packet on; the next action or TC ingress hook takes it away.

    The packets wait in the ifb's queue until the filter that led them there is gone, so that there is no such action.
    """
    tag = Tag()
    fenced.replace(Mode.ALLOWLIST)
    with fenced.counts(Reason.DEFAULT_DROP, COUNT):
        with on_harness_cpu():
            for _ in range(COUNT):
                workload.sender.send(workload.bytes_of(packets.UDP4, WEB, tag))
        assert waiting()
        workload.inside.run("tc", "filter", "del", "dev", "eth0", "egress")
        wait_for(lambda: not waiting(), "the ifb to send")
        assert topology.meter(workload).arrived(tag) == 0


@pytest.mark.parametrize(
    "hook", ["xdp-native", "xdp-generic", pytest.param("tc", marks=pytest.mark.xfail(reason=PAST_TC))]
)
def test_packets_that_an_ifb_marked(topology: Topology, fence: Fence, hook: str) -> None:
    workload = topology.add_bridged()
    waiting = hold_in_an_ifb(workload.inside)
    fencing = fence.interface(workload.host_if) if hook == "tc" else fenced_by_xdp(fence, workload.host_if, hook[4:])
    with fencing as fenced:
        assert_dropped_from_an_ifb(topology, fenced, workload, waiting)


@needs("channels of a veth")
@pytest.mark.parametrize("hook", [pytest.param("xdp-native", marks=pytest.mark.xfail(reason=PAST_BOTH))])
def test_packets_that_an_ifb_marked_of_a_queue_that_nobody_receives(
    topology: Topology, fence: Fence, queues: Workload, hook: str
) -> None:
    waiting = hold_in_an_ifb(queues.inside)
    with (
        choosing_queues(fence, queues.inside, queueing(1)),
        fenced_by_xdp(fence, queues.host_if, hook[4:]) as fenced,
    ):
        assert_dropped_from_an_ifb(topology, fenced, queues, waiting)
