"""Ways to lead a packet around the XDP program from another network namespace: the TC filter behind it judges them.

Generic XDP passes over packets that a TC redirect has brought (`skb->redirected`, which crosses a veth); under native
XDP a veth gives packets of a send queue that has no receive queue to the stack directly. Both seen on 6.18.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from harness import packets
from harness.fence import Attachment, Fence
from harness.netns import NetNs, veth
from harness.topology import Topology, Workload
from harness.wire import PacketSender
from netfence.dataplane import links, rawprog
from netfence.dataplane.hooks import clsact
from netfence.dataplane.hooks.chain import Side
from netfence.dataplane.rawprog import ProgType
from netfence.policy.modes import Mode, Reason
from xdp_tools import fenced_by_xdp, queueing, redirecting

WEB = "203.0.113.80"
COUNT = 3


@pytest.fixture(scope="module")
def fence(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fence]:
    with Fence(topology, tmp_path_factory.mktemp("fence")) as made:
        yield made


@contextlib.contextmanager
def on_egress(fence: Fence, netns: NetNs, ifname: str, insns: bytes) -> Iterator[None]:
    """Run a program on what leaves an interface of the workload."""
    program = rawprog.load_raw(ProgType.SCHED_CLS, insns)
    marker = fence.plane._bpffs_dir / "workload-qdisc"
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, program)
        stack.enter_context(netns.inside())
        ifindex = socket.if_nametoindex(ifname)
        clsact.attach(program, ifindex, ifname, Side.EGRESS, marker)
        stack.callback(clsact.detach, ifindex, Side.EGRESS, marker)
        yield


def assert_judged(topology: Topology, fenced: Attachment, workload: Workload) -> None:
    """Bracketed: what passes is counted once and arrives, what does not is counted once and does not."""
    for mode, reason in (
        (Mode.DENYLIST, Reason.DEFAULT_PASS),
        (Mode.ALLOWLIST, Reason.DEFAULT_DROP),
        (Mode.DISABLED, Reason.DISABLED),
        (Mode.BLOCK_ALL, Reason.BLOCK_ALL),
        (Mode.DENYLIST, Reason.DEFAULT_PASS),
    ):
        fenced.replace(mode)
        with fenced.counts(reason, COUNT):
            passes = mode in (Mode.DENYLIST, Mode.DISABLED)
            assert topology.arrived(workload, packets.UDP4, WEB, COUNT) == (COUNT if passes else 0)


@pytest.fixture
def detour(topology: Topology) -> Iterator[Workload]:
    """Give a workload that sends on an interface of its own, `side0`, instead of the one that is fenced."""
    workload = topology.add_veth()
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
        on_egress(fence, detour.inside, "side0", redirecting(out)),
    ):
        assert_judged(topology, fenced, detour)


def test_packets_of_a_queue_that_nobody_receives(topology: Topology, fence: Fence) -> None:
    """The queue is chosen behind the kernel's own choice, by a classifier of a qdisc; this takes CAP_BPF."""
    workload = topology.add_veth()
    netns = workload.inside
    (link,) = netns.ip_json("-d", "link", "show", "dev", "eth0")
    assert link["num_tx_queues"] > 1, "the veth must have a second send queue"
    program = rawprog.load_raw(ProgType.SCHED_CLS, queueing(1))
    pin = fence.plane._bpffs_dir / "queueing"
    try:
        links.obj_pin(program, pin)
        netns.run("tc", "qdisc", "add", "dev", "eth0", "root", "handle", "1:", "htb", "default", "1")
        netns.run("tc", "class", "add", "dev", "eth0", "parent", "1:", "classid", "1:1", "htb", "rate", "10gbit")
        netns.run("tc", "filter", "add", "dev", "eth0", "parent", "1:", "bpf", "da", "object-pinned", str(pin))
        with fenced_by_xdp(fence, workload.host_if, "native") as fenced:
            assert_judged(topology, fenced, workload)
    finally:
        os.close(program)
        pin.unlink(missing_ok=True)
