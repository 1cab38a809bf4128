"""Links that hold nothing any more, or another device: the next start is not deceived (semantics.md 23, 24)."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing
from typing import Any, Literal

import pytest

from daemons import Start
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.fresh import Fresh
from harness.needs import needs
from harness.netns import NetNs
from harness.packets import UDP6
from harness.topology import Topology
from hooktools import take_off
from netfence.dataplane import links
from netfence.dataplane.links import AttachType
from netfence.dataplane.rtnl import Rtnl, get_xdp_programs

pytestmark = pytest.mark.userspace

OUTSIDE6 = "2001:db8:77::1"
POLICY: dict[str, Any] = {"default": {"mode": "allowlist"}}


@pytest.fixture
def topology(fresh: Fresh) -> Topology:
    """Give namespaces of the test's own."""
    return fresh.topology()


@pytest.mark.parametrize("running", [True, False], ids=["while-it-runs", "while-it-does-not"])
@pytest.mark.parametrize("kind", [pytest.param("tcx", marks=needs("tcx")), "cgroup"])
def test_links_that_somebody_takes_off_are_put_back_by_the_next_start(
    topology: Topology, start: Start, cgroups: Callable[[str], Cgroup], kind: str, *, running: bool
) -> None:
    """As `bpftool link detach` does: the pins stay, and hold nothing any more."""
    workload, group = topology.add_veth(), cgroups("box")
    daemon = start(topology, policy=POLICY)
    attached = daemon.attach(interface=workload.host_if) if kind == "tcx" else daemon.attach(cgroup=group)

    with Agent(netns=topology.host, cgroup=group) as agent:

        def passes() -> bool:
            if kind == "tcx":
                return topology.arrived(workload, UDP6, OUTSIDE6) > 0
            try:
                agent.udp(socket.AF_INET6).sendto(b"x", (OUTSIDE6, 9))
            except PermissionError:
                return False
            return True

        assert not passes()
        if not running:
            daemon.stop()
        for pin in (daemon.pins / "links").iterdir():
            take_off(pin)
        assert passes()
        if running:
            daemon.stop()
        daemon.start()
        assert not passes()
        assert daemon.own_events("hook_put_back", attached.id)
        daemon.detach(attached.id)
        assert passes()


@needs("tcx")
@pytest.mark.parametrize("hook", ["tc", "xdp"])
def test_another_with_the_index_of_one_that_was_moved_meanwhile_is_not_taken_for_fenced(
    topology: Topology, start: Start, hook: Literal["tc", "xdp"]
) -> None:
    """The links are still in force, on a device of that index in another namespace."""
    moved, other = topology.add_veth(), topology.add_veth()
    daemon = start(topology, policy=POLICY)
    attached = daemon.attach(interface=moved.host_if, hook=hook)
    index = topology.host.ip_json("link", "show", moved.host_if)[0]["ifindex"]
    daemon.stop()
    with closing(NetNs("elsewhere")) as elsewhere:
        topology.host.ip(f"link set {moved.host_if} netns {elsewhere.path}", f"link del {other.host_if}")
        veth = f"link add name {moved.host_if} index {index} type veth peer name eth0 netns {other.inside.path}"
        topology.host.ip(veth, f"link set {moved.host_if} up")
        daemon.start()
        assert _programs(topology.host, index) == (True, hook == "xdp")
        assert _programs(elsewhere, index) == (False, False)
        daemon.detach(attached.id)


def _programs(netns: NetNs, ifindex: int) -> tuple[bool, bool]:
    """Tell whether a device has programs on tcx ingress, and on XDP."""
    with netns.inside(), Rtnl() as netlink:
        return bool(links.prog_query_tcx(ifindex, AttachType.TCX_INGRESS)), bool(get_xdp_programs(netlink, ifindex))
