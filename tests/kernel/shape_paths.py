"""Ways through a fence on which a frame of any shape comes out as it went in, and a sender for each.

The frames are for a hardware address that nobody has, so that no kernel on the way answers what it should only pass on.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from harness.fence import Attachment, Fence, moved
from harness.netns import veth
from harness.packets import VLAN_BYTES
from harness.topology import BRIDGE_IF, BRIDGE_UP_IF, SINK_IF, Topology, Workload
from harness.wire import Meter, PacketSender, Sniffer, Tag
from netfence.dataplane.target import Direction
from netfence.policy.modes import Reason, is_drop
from shape_cases import FOREIGN_PORT, OWN_DNS4, OWN_DNS6, OWN_PORT, Case

COUNT = 3
BIG_MTU = 9000
OWN_DNS: dict[str, Any] = {"dns_address": ipaddress.ip_address(OWN_DNS4).packed, "dns_port": OWN_PORT}
NOBODY = bytes.fromhex("02deadbeef01")


@dataclass
class PathTaken:
    """One way for frames through a fence."""

    attachment: Attachment
    workload: Workload
    meter: Meter
    sentinels: int  # that pass the fence themselves

    def send(self, case: Case, *, judged_by_xdp: bool = False) -> tuple[int, int]:
        """Send COUNT packets; return how many arrived and how many bytes were sent (as the kernel counts them)."""
        tag = Tag()
        packet = self.workload.bytes_of(case.shape, case.to, tag)
        size = len(packet)
        if case.shape.vlans and self.attachment.direction is Direction.WORKLOAD and not judged_by_xdp:
            size -= VLAN_BYTES  # the outer tag is out of the data by then
        return self.meter.transmit(self.workload.sender, tag, [packet] * COUNT), COUNT * size

    def expect(self, case: Case, reason: Reason, passing: int, *, audit: bool = False) -> None:
        """Assert that the packets are counted under that reason, and that what passes arrives."""
        extra = self.sentinels if reason is Reason.DISABLED else 0
        before = self.attachment.counters()
        # XDP counts what it drops; what it lets pass the TC filter behind it counts.
        dropped = is_drop(reason) and not audit
        arrived, octets = self.send(case, judged_by_xdp=dropped and self.attachment.static.xdp)
        found = moved(before, self.attachment.counters())
        name = ("would " if audit and is_drop(reason) else "") + reason.name
        if reason is not Reason.ARP:
            found.pop("ARP", None)
        assert {key: count for key, (count, _) in found.items()} == {name: COUNT + extra}
        if not extra:
            assert found[name][1] == octets, "bytes"
        assert arrived == (0 if dropped else passing), name


def fenced(fence: Fence, name: str, direction: Direction = Direction.WORKLOAD, **static: Any) -> Attachment:
    """Fence an interface of the host, its DNS server at OWN_DNS4 unless said otherwise."""
    return fence.interface(name, direction, **{**OWN_DNS, **static})


def attach_foreign_dns(fence: Fence, topology: Topology) -> None:
    """Attach others, whose DNS servers are foreign to what is under test."""
    for address, port in ((OWN_DNS4, FOREIGN_PORT), (OWN_DNS6, 53)):
        fence.interface(topology.add_veth().host_if, dns_address=ipaddress.ip_address(address).packed, dns_port=port)


def bridged_port(topology: Topology, mtu: int = BIG_MTU) -> Workload:
    """Make a veth port of the bridge, with big frames, whose workload's kernel sends nothing by itself."""
    made = topology.add_bridged()
    made.host_mac = NOBODY
    assert made.netns is not None
    made.netns.sysctl("net/ipv6/conf/eth0/disable_ipv6", "1")
    made.netns.ip(f"link set eth0 arp off mtu {mtu}")
    topology.host.ip(f"link set {made.host_if} mtu {mtu}")
    topology.host.ip(*[f"link set {each} mtu {BIG_MTU}" for each in (BRIDGE_UP_IF, BRIDGE_IF)])
    topology.internet.ip(f"link set {SINK_IF} mtu {BIG_MTU}")
    return made


def bridged_tap(topology: Topology) -> Workload:
    """Make a tap a port of the bridge, which must be there."""
    made = topology.add_tap()
    topology.host.sysctl(f"net/ipv6/conf/{made.host_if}/disable_ipv6", "1")
    topology.host.ip(f"link set {made.host_if} master {BRIDGE_IF}")
    made.bridged, made.host_mac = True, NOBODY
    return made


@contextmanager
def way_out(topology: Topology) -> Iterator[tuple[Workload, Meter]]:
    """Make a veth that leads out of the host and nowhere else."""
    veth((topology.host, "out0"), (topology.internet, "in0"))
    for netns, name in ((topology.host, "out0"), (topology.internet, "in0")):
        netns.sysctl(f"net/ipv6/conf/{name}/disable_ipv6", "1")
        netns.ip(f"link set {name} arp off mtu {BIG_MTU} up")
    topology.internet.ip("link set in0 promisc on")
    sender, sniffer = PacketSender(topology.host, "out0"), Sniffer(topology.internet, "in0")
    try:
        workload = Workload("out0", "192.0.2.99", "2001:db8:99::2", sender, NOBODY, netns=topology.host)
        yield workload, Meter(sniffer, sender)
    finally:
        sender.close()
        sniffer.close()
