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


@pytest.mark.parametrize(
    ("mechanism", "hook"),
    [pytest.param("tcx", "tc", marks=needs("tcx")), pytest.param("tcx", "xdp", marks=needs("tcx")), ("clsact", "tc")],
    ids=["tcx", "xdp", "clsact"],
)
def test_another_with_the_index_of_one_that_went_meanwhile_is_a_new_target(
    topology: Topology, start: Start, mechanism: str, hook: Literal["tc", "xdp"]
) -> None:
    """Told from one that was renamed, which stays fenced, by our hooks: those go with the device."""
    renamed, gone = topology.add_veth(), topology.add_veth()
    daemon = start(topology, policy=POLICY, tcx=mechanism == "tcx")
    kept, lost = (daemon.attach(interface=one.host_if, hook=hook) for one in (renamed, gone))
    index = topology.host.ip_json("link", "show", gone.host_if)[0]["ifindex"]
    daemon.kill()
    topology.host.ip(
        f"link set {renamed.host_if} down", f"link set {renamed.host_if} name other7", "link set other7 up"
    )
    topology.host.ip(f"link del {gone.host_if}", f"link add name other8 index {index} type veth peer name peer8")
    daemon.start()
    assert [(info.id, info.target) for info in daemon.attachments()] == [(kept.id, "other7")]
    assert not daemon.own_events("hook_put_back", kept.id)
    assert [told["now"] for told in daemon.own_events("target_replaced", lost.id)] == ["other8"]
    assert daemon.own_events("dropped", lost.id)
    assert {pin.rpartition("-")[0] for pin in daemon.link_pins()} == {kept.id}
    if mechanism == "tcx":
        assert _programs(topology.host, index) == (False, False)
    else:
        assert "bpf" not in topology.host.run("tc", "filter", "show", "dev", "other8", "ingress", check=False).stdout
    new = daemon.attach(interface="other8", direction="workload")
    assert new.id != lost.id
    daemon.detach(new.id)
    daemon.detach(kept.id)


@needs("tcx")
def test_another_name_without_our_hooks_is_not_taken_for_ours_and_is_told(topology: Topology, start: Start) -> None:
    """The price: somebody who may take hooks off can make an interface a stranger by renaming it too."""
    workload, same = topology.add_veth(), topology.add_veth()
    daemon = start(topology, policy=POLICY)
    attached, stays = (daemon.attach(interface=one.host_if) for one in (workload, same))
    daemon.kill()
    for pin in (daemon.pins / "links").iterdir():
        take_off(pin)
    topology.host.ip(f"link set {workload.host_if} down", f"link set {workload.host_if} name other7")
    daemon.start()
    assert [info.id for info in daemon.attachments()] == [stays.id]  # name, index and kind are its
    assert topology.arrived(same, UDP6, OUTSIDE6) == 0
    assert daemon.own_events("target_replaced", attached.id)


def _programs(netns: NetNs, ifindex: int) -> tuple[bool, bool]:
    """Tell whether a device has programs on tcx ingress, and on XDP."""
    with netns.inside(), Rtnl() as netlink:
        return bool(links.prog_query_tcx(ifindex, AttachType.TCX_INGRESS)), bool(get_xdp_programs(netlink, ifindex))
