"""Our own small rtnetlink client (decision 0007) against pyroute2: both must see the same interfaces and addresses."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pyroute2 import IPRoute

from harness.topology import Topology
from netfence.dataplane import rtnl
from netfence.dataplane.hooks import clsact
from netfence.dataplane.hooks.chain import Side
from netfence.dataplane.rawprog import ProgType, load_raw, returning


def _address(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def test_links_and_addresses(topology: Topology) -> None:
    topology.add_veth()
    topology.add_bridged()
    topology.add_tap()
    topology.add_tun()
    with topology.host.inside(), rtnl.Rtnl() as ours, IPRoute() as theirs:
        mine = {
            (link.ifindex, link.name, link.arphrd, link.kind, link.slave_kind, link.master)
            for link in rtnl.get_links(ours)
        }
        other = set()
        for link in theirs.get_links():
            info = link.get("IFLA_LINKINFO")
            kind = (info.get("IFLA_INFO_KIND") if info else None) or ""
            slave = (info.get("IFLA_INFO_SLAVE_KIND") if info else None) or ""
            other.add(
                (link["index"], link.get("IFLA_IFNAME"), link["ifi_type"], kind, slave, link.get("IFLA_MASTER") or 0)
            )
        assert mine == other
        assert {kind for _, _, _, kind, _, _ in mine} >= {"veth", "bridge", "tun"}

        addresses = {(record.ifindex, record.address) for record in rtnl.get_addresses(ours)}
        assert addresses == {
            (record["index"], _address(record.get("IFA_LOCAL") or record.get("IFA_ADDRESS")))
            for record in theirs.get_addr()
        }
        assert len(addresses) > 8


def test_the_clsact_filter(topology: Topology, tmp_path: Path) -> None:
    marker = tmp_path / "made-the-qdisc"
    workload = topology.add_veth()
    with topology.host.inside(), IPRoute() as theirs:
        ifindex = topology.host.ifindex(workload.host_if)
        program = load_raw(ProgType.SCHED_CLS, returning(-1))
        clsact.attach(program, ifindex, workload.host_if, Side.INGRESS, marker)
        filters = [one for one in theirs.get_filters(index=ifindex, parent=0xFFFFFFF2) if one.get("TCA_OPTIONS")]
        assert len(filters) == 1
        assert filters[0].get("TCA_KIND") == "bpf"
        assert filters[0].get("TCA_OPTIONS").get("TCA_BPF_NAME") == clsact.NAME
        os.close(program)
        clsact.detach(ifindex, Side.INGRESS, marker)
        assert not list(theirs.get_filters(index=ifindex, parent=0xFFFFFFF2))
