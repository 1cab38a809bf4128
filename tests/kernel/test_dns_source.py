"""Who may ask an attachment's DNS server, and where its answers may go (semantics.md 14, 20).

The server's own address passes in every mode. A query with a forged source would have its question echoed by the
*host*, which nothing fences, to any address the workload likes: a way out of block_all.
"""

from __future__ import annotations

import socket
import struct

import dnslib
import pytest
from scapy.layers.inet import TCP, UDP

from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.daemon import Attached
from harness.fresh import Fresh
from harness.packets import ETHERTYPE, ip
from harness.topology import BRIDGE_IF, DNS4, Topology, Workload
from harness.wire import Tag
from netfence.policy.modes import Reason

VICTIM = {4: "203.0.113.82", 6: "2001:db8:b::82"}
POLICY = {"default": {"mode": "allowlist", "dns": {"mode": "allowlist", "allow": ["*.example.test"]}}}
RECORDS = ["www.example.test. 300 IN A 203.0.113.80"]
PORT = 5555

pytestmark = pytest.mark.dealt


def _secret_query(tag: Tag) -> bytes:
    """Build a query whose name carries the tag's bytes: what is echoed carries them too."""
    name = dnslib.DNSLabel([tag.payload])
    return bytes(dnslib.DNSRecord(q=dnslib.DNSQuestion(name, dnslib.QTYPE.A)).pack())


def _forged(topology: Topology, workload: Workload, attached: Attached, tag: Tag) -> bytes:
    host, port = attached.dns
    to_mac = bytes.fromhex(topology.host.mac(BRIDGE_IF if workload.bridged else workload.host_if).replace(":", ""))
    packet = ip(4, VICTIM[4], host) / UDP(sport=PORT, dport=port) / _secret_query(tag)
    return to_mac + bytes.fromhex("020000000001") + struct.pack("!H", ETHERTYPE[4]) + bytes(packet)


@pytest.mark.parametrize("mode", ["block_all", pytest.param("allowlist", marks=pytest.mark.userspace)])
@pytest.mark.parametrize("kind", ["veth", "bridged", "tap"])
def test_an_answer_never_leaves_by_another_way(fresh: Fresh, kind: str, mode: str) -> None:
    topology = fresh.topology()
    workload: Workload = {"veth": topology.add_veth, "bridged": topology.add_bridged, "tap": topology.add_tap}[kind]()
    fresh.names(topology, *RECORDS)
    daemon = fresh.daemon(topology, policy={"default": {"mode": mode, "dns": {"mode": "allowlist", "allow": []}}})
    attached = daemon.attach(interface=workload.host_if)
    asked = daemon.reasons(attached.id)[Reason.DNS]
    tag = Tag()
    meter = topology.meter()  # at the internet's end: where the victim is
    assert meter.transmit(workload.sender, tag, [_forged(topology, workload, attached, tag)] * 3) == 0
    assert daemon.reasons(attached.id)[Reason.DNS] - asked == 3  # they were sent, and passed the filter
    if workload.netns is not None:  # who asks under its own name is answered
        with Agent(netns=workload.netns) as agent:
            assert agent.query(attached.dns, "nobody.test").header.rcode == dnslib.RCODE.REFUSED
            assert agent.query(attached.dns, "nobody.test", tcp=True).header.rcode == dnslib.RCODE.REFUSED
    assert meter.arrived(tag) == 0


def test_nobody_else_is_answered(fresh: Fresh) -> None:
    topology: Topology = fresh.topology()
    mine, other = topology.add_veth(), topology.add_veth()
    fresh.names(topology, *RECORDS)
    daemon = fresh.daemon(topology, policy=POLICY)
    attached = daemon.attach(interface=mine.host_if)
    with Agent(netns=topology.internet) as outside, Agent(netns=other.netns) as neighbour:
        for stranger in (outside, neighbour):
            for tcp in (False, True):
                with pytest.raises(OSError):  # noqa: PT011 - refused: for them nobody listens there
                    stranger.query(attached.dns, "www.example.test", tcp=tcp, timeout_s=0.4)
    info = daemon.info(attached.id)
    assert (info.dns_queries_allowed, info.dns_queries_blocked) == (0, 0)
    with Agent(netns=mine.netns) as agent:
        assert [str(record.rdata) for record in agent.query(attached.dns, "www.example.test").rr] == ["203.0.113.80"]
        assert [str(record.rdata) for record in agent.query(attached.dns, "www.example.test", tcp=True).rr] == [
            "203.0.113.80"
        ]


def test_a_raw_socket_of_a_cgroup_is_no_exception(fresh: Fresh) -> None:
    """A process with CAP_NET_RAW can write any source address into a packet to its DNS server."""
    topology = fresh.topology()
    workload = topology.add_veth()
    daemon = fresh.daemon(topology)
    group = Cgroup("raw-dns")
    try:
        attached = daemon.attach(cgroup=group)
        with Agent(netns=workload.netns, cgroup=group) as agent:
            assert agent.query(attached.dns, "nobody.test").header.rcode == dnslib.RCODE.REFUSED
            passed = daemon.reasons(attached.id)[Reason.DNS]
            tag = Tag()
            packet = ip(4, VICTIM[4], DNS4) / UDP(sport=PORT, dport=attached.dns[1]) / _secret_query(tag)
            with agent.open(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw, pytest.raises(PermissionError):
                raw.sendto(bytes(packet), (DNS4, 0))
            syn = ip(4, VICTIM[4], DNS4) / TCP(sport=PORT, dport=attached.dns[1], flags="S")
            with agent.open(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw, pytest.raises(PermissionError):
                raw.sendto(bytes(syn), (DNS4, 0))
            assert topology.meter().arrived(tag) == 0
            assert daemon.reasons(attached.id)[Reason.DNS] == passed
            assert daemon.reasons(attached.id)[Reason.BLOCK_ALL] == 2
    finally:
        group.remove()
