"""What the kernel tells of drops while somebody watches, and where audit mode lets packets go, hook by hook."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import packets
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.deadline import wait_for
from harness.fence import Attachment, Fence, packed
from harness.topology import Topology, Workload
from harness.wire import Tag
from netfence.dataplane.config import ConfigMap
from netfence.dataplane.flows import AT_ONCE, Flow
from netfence.dataplane.leases import kernel_address
from netfence.policy.modes import Mode, Reason
from shape_paths import bridged_port
from xdp_tools import XDP_MTU, fenced_by_xdp

OUT = {"ipv4": "203.0.113.80", "ipv6": "2001:db8:b::80"}
SHAPES = {"ipv4": packets.UDP4, "ipv6": packets.UDP6}
PORT = 9
COUNT = 3
FLOOD = 2000


@dataclass
class Gate:
    """A fenced way out by which `send` sends so many packets."""

    attachment: Attachment
    send: Callable[[str, int], object]

    def flows(self) -> list[Flow]:
        """Read what was told of this attachment."""
        return [flow for flow in self.attachment.fence.plane.read_flows() if flow.slot == self.attachment.slot]

    def quiet(self) -> None:
        """Read what is left."""
        while self.attachment.fence.plane.read_flows():
            pass

    @property
    def window_s(self) -> float:
        """Tell how long it takes until the attachment has another share of reports."""
        plane = self.attachment.fence.plane
        return float(2.0 ** plane._loaded.layout.constants["FLOW_WINDOW_SHIFT"] / plane.clock.hz)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Have this attachment's drops told of; what was told before is forgotten, and its share used up then."""
        self.attachment.fence.wait_until(time.monotonic() + self.window_s)
        self.quiet()
        self.attachment.fence.plane.watch_slots({self.attachment.slot})
        yield
        self.attachment.fence.plane.watch_slots(())
        self.quiet()


@pytest.fixture(scope="module", params=["tc", "xdp", "cgroup"])
def gate(
    request: pytest.FixtureRequest, topology: Topology, workload: Workload, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gate]:
    with contextlib.ExitStack() as stack:
        fence = stack.enter_context(Fence(topology, tmp_path_factory.mktemp("fence")))
        if request.param == "cgroup":
            yield stack.enter_context(_cgroup_gate(topology, fence, workload))
            return
        if request.param == "xdp":
            sender = bridged_port(topology, mtu=XDP_MTU)
            attachment = stack.enter_context(fenced_by_xdp(fence, sender.host_if, "native"))
        else:
            sender = workload
            attachment = stack.enter_context(fence.interface(sender.host_if))
        yield Gate(attachment, lambda family, count: topology.arrived(sender, SHAPES[family], OUT[family], count))


@contextlib.contextmanager
def _cgroup_gate(topology: Topology, fence: Fence, workload: Workload) -> Iterator[Gate]:
    """Its sockets are connected before the attach: `cgroup_skb` judges, not `connect`."""
    group = Cgroup("flows")
    with topology.internet.inside():
        sink = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)  # else the answer "port unreachable" fails a send
    try:
        sink.bind(("::", PORT))
        with Agent(netns=workload.netns, cgroup=group) as inside:
            sockets = {"ipv4": inside.udp(), "ipv6": inside.udp(socket.AF_INET6)}
            for family, sock in sockets.items():
                sock.connect((OUT[family], PORT))

            def send(family: str, count: int) -> None:
                for _ in range(count):
                    with contextlib.suppress(PermissionError):
                        sockets[family].send(Tag().payload)

            with fence.cgroup(group) as attachment:
                yield Gate(attachment, send)
    finally:
        sink.close()
        group.remove()


# Those with a fence of their own come first: it is not compiled again then (harness/warm.py).


def test_of_what_cannot_be_read_nothing_is_told_that_is_not_known(
    topology: Topology, workload: Workload, tmp_path: Path
) -> None:
    with Fence(topology, tmp_path) as fence, fence.interface(workload.host_if) as attachment:
        attachment.replace(Mode.ALLOWLIST, audit=True)
        fence.plane.watch_slots({attachment.slot})
        frame = workload.bytes_of(packets.UDP4, OUT["ipv4"], Tag())
        half_a_header, no_ip = frame[:38], frame[:12] + b"\x88\xb5" + frame[14:]
        for unread in (half_a_header, no_ip):
            workload.sender.send(unread)
        told: list[Flow] = []

        def both_are_told() -> bool:
            told.extend(fence.plane.read_flows())
            return len(told) == 2

        wait_for(both_are_told, "both to be told of")
        assert [(flow.reason, flow.protocol) for flow in told] == [
            (Reason.TRUNCATED, socket.IPPROTO_UDP),
            (Reason.NOT_IP, 0),
        ]
        for flow in told:
            assert not any(flow.source + flow.destination)
            assert (flow.source_port, flow.destination_port, flow.would) == (0, 0, True)
        assert fence.plane.seen(attachment.slot) == ([], 0)


def test_a_refused_connect_is_told_of(topology: Topology, tmp_path: Path) -> None:
    group = Cgroup("flows-connect")
    with (
        contextlib.closing(_Removed(group)),
        Fence(topology, tmp_path) as fence,
        Agent(netns=topology.host, cgroup=group) as inside,
        fence.cgroup(group) as attachment,
    ):
        attachment.replace(Mode.ALLOWLIST)
        fence.plane.watch_slots({attachment.slot})
        with pytest.raises(PermissionError) as caught:
            inside.tcp().connect((OUT["ipv4"], 443))
        assert caught.value.errno == errno.EPERM
        (flow,) = fence.plane.read_flows()
        assert (flow.reason, flow.protocol, flow.destination_port) == (Reason.CONNECT, socket.IPPROTO_TCP, 443)
        assert flow.destination == kernel_address(packed(OUT["ipv4"]))


class _Removed:
    def __init__(self, group: Cgroup) -> None:
        self.close = group.remove


@pytest.mark.userspace
def test_each_attachment_has_its_own_share_of_what_is_remembered(topology: Topology, tmp_path: Path) -> None:
    greedy, modest = topology.add_veth(), topology.add_veth()
    with Fence(topology, tmp_path) as fence:
        share = fence.plane._loaded.layout.constants["SEEN_PER_SLOT"]
        one, other = fence.interface(greedy.host_if), fence.interface(modest.host_if)
        for each in (one, other):
            each.replace(Mode.ALLOWLIST, audit=True)
        count = share + 10
        frame = greedy.bytes_of(packets.UDP4, "10.0.0.0", Tag())
        assert frame[30:34] == packed("10.0.0.0")
        for number in range(count):
            greedy.sender.send(frame[:30] + packed(f"10.0.{number >> 8}.{number & 255}") + frame[34:])
        wait_for(lambda: one.counters().would_packets[Reason.DEFAULT_DROP] >= count, "all to be judged")
        topology.arrived(modest, packets.UDP4, OUT["ipv4"], COUNT)
        seen, missed = fence.plane.seen(one.slot)
        assert (len(seen), missed, fence.plane.seen_missed(one.slot)) == (share, 10, 10)
        assert [flow.packets for flow in fence.plane.seen(other.slot)[0]] == [COUNT]
        slot = one.slot
        one.detach()
        assert fence.plane.seen(slot) == ([], 0)
        assert [flow.packets for flow in fence.plane.seen(other.slot)[0]] == [COUNT]
        again = fence.interface(greedy.host_if)
        assert again.slot == slot
        again.replace(Mode.ALLOWLIST, audit=True)
        topology.arrived(greedy, packets.UDP4, OUT["ipv4"], COUNT)
        assert [flow.packets for flow in fence.plane.seen(slot)[0]] == [COUNT]  # its share is whole again


@pytest.mark.userspace
def test_what_was_never_audited_is_not_looked_for(
    topology: Topology, workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Fence(topology, tmp_path) as fence:
        attachment = fence.interface(workload.host_if)
        attachment.replace(Mode.BLOCK_ALL)
        topology.arrived(workload, packets.UDP4, OUT["ipv4"], COUNT)
        monkeypatch.setattr(fence.plane._seen._map, "keys", None)  # others may fill it: a walk takes long
        assert fence.plane.seen(attachment.slot) == ([], 0)
        attachment.detach()


@pytest.mark.userspace
def test_what_a_daemon_before_watched_is_not_told(topology: Topology, workload: Workload, tmp_path: Path) -> None:
    with Fence(topology, tmp_path) as fence, fence.interface(workload.host_if) as attachment:
        attachment.replace(Mode.BLOCK_ALL)
        plane = fence.plane
        plane.watch_slots({attachment.slot})
        topology.arrived(workload, packets.UDP4, OUT["ipv4"], COUNT)
        assert len(plane.read_flows()) == COUNT
        ConfigMap(plane._loaded.maps["config"], plane._loaded.layout, plane.clock)  # as the next start makes it
        topology.arrived(workload, packets.UDP4, OUT["ipv4"], COUNT)
        assert plane.read_flows() == []


@pytest.mark.userspace
def test_reports_go_on_when_the_ring_was_full(topology: Topology, workload: Workload, tmp_path: Path) -> None:
    with Fence(topology, tmp_path) as fence, fence.interface(workload.host_if) as attachment:
        attachment.replace(Mode.BLOCK_ALL)
        plane = fence.plane
        plane.watch_slots({attachment.slot})
        room = plane._loaded.layout.constants["FLOWS_BYTES"]
        ring = plane._flows

        def send_until(done: Callable[[], bool]) -> None:
            def sent_and_done() -> bool:
                topology.arrived(workload, packets.UDP4, OUT["ipv4"], 64)
                return done()

            wait_for(sent_and_done, "reports", 60)

        def read() -> list[Flow]:
            some = plane.read_flows()
            assert len(some) <= AT_ONCE
            assert {flow.destination for flow in some} <= {kernel_address(packed(OUT["ipv4"]))}
            assert sorted(flow.at for flow in some) == [flow.at for flow in some]
            return some

        send_until(lambda: ring._written_to[0] - ring._read_to[0] > room - 200)
        told = 0
        while some := read():
            told += len(some)
        assert told > room // 100
        end = ring._written_to[0]
        send_until(lambda: ring._written_to[0] > end + 1000)  # over the end of the ring
        after = read()
        assert after[0].lost or sum(flow.lost for flow in after)  # there was no room for what nobody read


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_drops_are_told_of_while_somebody_watches(gate: Gate, family: str) -> None:
    gate.attachment.replace(Mode.ALLOWLIST)
    gate.send(family, COUNT)
    with gate.watched():
        before = time.monotonic()
        gate.send(family, COUNT)
        told = gate.flows()
        after = time.monotonic()
        assert len(told) == COUNT
        for flow in told:
            assert (flow.reason, flow.would, flow.protocol) == (Reason.DEFAULT_DROP, False, socket.IPPROTO_UDP)
            assert flow.destination == kernel_address(packed(OUT[family]))
            assert any(flow.source) and flow.source != flow.destination  # noqa: PT018 - one thing: it has a source
            assert flow.destination_port == PORT
            assert flow.length > 0
            assert flow.lost == 0
            assert before - 0.1 < flow.at < after + 0.1
        gate.attachment.allow(f"{OUT[family]}/{32 if family == 'ipv4' else 128}")
        gate.send(family, COUNT)
        assert gate.flows() == []  # what passes is nobody's business
    gate.attachment.replace(Mode.BLOCK_ALL)
    gate.send(family, COUNT)
    assert gate.flows() == []


def test_a_flood_of_drops_is_no_flood_of_reports(gate: Gate) -> None:
    gate.attachment.replace(Mode.BLOCK_ALL)
    limit = gate.attachment.fence.plane._loaded.layout.constants["FLOWS_PER_WINDOW"]
    with gate.watched():
        began = time.monotonic()
        before = gate.attachment.counters().packets[Reason.BLOCK_ALL]
        told: list[Flow] = []

        def something_was_lost() -> bool:
            gate.send("ipv4", FLOOD)
            while some := gate.flows():
                told.extend(some)
            return any(flow.lost for flow in told)

        wait_for(something_was_lost, "reports to be kept back and counted")
        dropped = gate.attachment.counters().packets[Reason.BLOCK_ALL] - before
        lost = sum(flow.lost for flow in told)
        plane = gate.attachment.fence.plane
        assert len(told) + lost + plane.kept_back(gate.attachment.slot) == dropped
        assert limit <= len(told) < dropped
        windows = int((time.monotonic() - began) / gate.window_s) + 2
        assert len(told) <= limit * windows * (os.cpu_count() or 1)


def test_what_audit_lets_through_is_told_of_and_remembered(gate: Gate) -> None:
    plane, slot = gate.attachment.fence.plane, gate.attachment.slot
    gate.attachment.replace(Mode.ALLOWLIST, audit=True)
    with gate.watched():
        gate.send("ipv4", COUNT)
        gate.send("ipv6", COUNT)
        assert [flow.would for flow in gate.flows()] == [True] * 2 * COUNT
    seen, missed = plane.seen(slot)
    found = {(one.destination, one.protocol, one.port): one for one in seen}
    for family in OUT:
        one = found[kernel_address(packed(OUT[family])), socket.IPPROTO_UDP, PORT]
        assert one.packets == COUNT
        assert one.bytes > COUNT * 20
    assert (len(found), missed) == (2, 0)
    gate.attachment.replace(Mode.ALLOWLIST)
    gate.send("ipv4", COUNT)
    assert plane.seen(slot)[0] == seen  # what is dropped is not remembered
