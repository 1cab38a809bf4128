"""`attach --hook xdp` through the daemon: what it takes and refuses, what is told of it, taking over, and every end."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from daemons import Fenced, Start
from harness.agent import Agent
from harness.deadline import wait_for
from harness.fresh import Fresh
from harness.packets import UDP4, UDP6
from harness.topology import Topology
from hooktools import take_off
from netfence.api.client import RefusedError
from netfence.dataplane.rtnl import Rtnl, get_xdp_programs
from netfence.v1 import daemon_pb2

OUTSIDE4, OUTSIDE6, LEARNED4 = "203.0.113.99", "2001:db8:77::1", "203.0.113.80"
POLICY: dict[str, Any] = {
    "default": {
        "mode": "allowlist",
        "allow_cidrs": [OUTSIDE4],
        "dns": {"mode": "allowlist", "allow": ["good.test"]},
    }
}

pytestmark = pytest.mark.dealt


@pytest.fixture
def topology(fresh: Fresh) -> Topology:
    """Give namespaces of the test's own, with a name server."""
    topology = fresh.topology()
    fresh.names(topology, f"good.test. 300 IN A {LEARNED4}")
    return topology


def end(daemon: Fenced, how: str) -> None:
    if how == "kill -9":
        daemon.kill()
    else:
        assert daemon.stop() == 0


def refused(daemon: Fenced, interface: str, **how: Any) -> str:
    with pytest.raises(RefusedError) as raised:
        daemon.attach(interface=interface, hook="xdp", **how)
    return str(raised.value)


@pytest.mark.parametrize("how", [pytest.param("stop", marks=pytest.mark.userspace), "kill -9"])
@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "clsact"])
@pytest.mark.parametrize("kind", ["veth", pytest.param("tap", marks=pytest.mark.userspace)])
def test_it_stays_fenced_and_is_taken_over(topology: Topology, start: Start, kind: str, how: str, *, tcx: bool) -> None:
    workload = topology.add_veth() if kind == "veth" else topology.add_tap()
    daemon = start(topology, policy=POLICY, tcx=tcx)
    attached = daemon.attach(interface=workload.host_if, hook="xdp")
    topology.queues(workload.host_if)
    before = daemon.info(attached.id)
    assert (before.hook, before.attach_mechanism) == (daemon_pb2.HOOK_XDP, "xdp-native")
    assert "xdp workload (xdp-native)" in daemon.cli("list").stdout
    learned = 0
    if workload.netns is not None:
        with Agent(netns=workload.netns) as agent:
            assert [str(one.rdata) for one in agent.query(attached.dns, "good.test").rr] == [LEARNED4]
        learned = 3

    def enforced() -> tuple[int, int, int]:
        return (
            topology.arrived(workload, UDP4, OUTSIDE4),
            topology.arrived(workload, UDP4, LEARNED4),
            topology.arrived(workload, UDP6, OUTSIDE6),
        )

    pins = [pin for pin in daemon.link_pins() if not pin.endswith("qdisc")]
    assert f"{attached.id}-xdp" in pins
    assert enforced() == (3, learned, 0)
    end(daemon, how)
    assert enforced() == (3, learned, 0)
    daemon.start()
    assert [pin for pin in daemon.link_pins() if not pin.endswith("qdisc")] == pins
    assert not daemon.events("hook_put_back")
    assert enforced() == (3, learned, 0)
    after = daemon.info(attached.id)
    for field in ("id", "hook", "attach_mechanism", "dns_address", "policy_hash", "attached_at"):
        assert getattr(after, field) == getattr(before, field), field
    assert after.packets_blocked >= before.packets_blocked + 9
    daemon.detach(attached.id)
    assert not daemon.link_pins()
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 3


@pytest.mark.userspace
def test_auto_never_chooses_it(topology: Topology, start: Start) -> None:
    daemon = start(topology, policy=POLICY)
    info = daemon.info(daemon.attach(interface=topology.add_veth().host_if).id)
    assert info.hook == daemon_pb2.HOOK_TC
    daemon.detach(info.id)


@pytest.mark.userspace
def test_what_it_is_not_made_for_is_refused_and_leaves_nothing(topology: Topology, start: Start) -> None:
    daemon = start(topology, policy=POLICY)
    tun, veth = topology.add_tun(), topology.add_veth()
    topology.host.ip("link add plain0 type bridge")
    assert "XDP cannot judge a tun interface (without Ethernet header) as TC does; use --hook tc" in refused(
        daemon, tun.host_if
    )
    assert "XDP cannot judge a bridge interface as TC does; use --hook tc" in refused(
        daemon, "plain0", direction="workload"
    )
    assert "XDP sees only what comes in" in refused(daemon, veth.host_if, direction="host")
    veth.inside.ip("link set eth0 mtu 9000")
    assert "the MTU is too large for XDP" in refused(daemon, veth.host_if)
    assert not daemon.link_pins()
    assert not daemon.attachments()
    assert topology.arrived(veth, UDP6, OUTSIDE6) == 3
    daemon.detach(daemon.attach(interface=veth.host_if).id)  # as the message says


@pytest.mark.userspace
def test_a_device_that_goes_takes_everything_with_it(topology: Topology, start: Start) -> None:
    daemon = start(topology, policy=POLICY)
    workload = topology.add_veth()
    daemon.attach(interface=workload.host_if, hook="xdp")
    topology.queues(workload.host_if)
    topology.host.ip(f"link del {workload.host_if}")
    wait_for(lambda: not daemon.attachments(), "the attachment to go")
    wait_for(lambda: not daemon.link_pins(), "its pins to go")
    again = topology.add_veth()
    daemon.detach(daemon.attach(interface=again.host_if, hook="xdp").id)


def test_a_device_that_went_while_nobody_looked(topology: Topology, start: Start) -> None:
    daemon = start(topology, policy=POLICY)
    workload = topology.add_veth()
    daemon.attach(interface=workload.host_if, hook="xdp")
    topology.queues(workload.host_if)
    daemon.kill()
    topology.host.ip(f"link del {workload.host_if}")
    daemon.start()
    assert not daemon.attachments()
    assert not daemon.link_pins()


def test_while_it_is_off_nothing_is_open_and_the_next_start_puts_it_back(topology: Topology, start: Start) -> None:
    daemon = start(topology, policy=POLICY)
    workload = topology.add_veth()
    attached = daemon.attach(interface=workload.host_if, hook="xdp")
    topology.queues(workload.host_if)
    daemon.kill()
    take_off(daemon.pins / "links" / f"{attached.id}-xdp")
    assert (topology.arrived(workload, UDP4, OUTSIDE4), topology.arrived(workload, UDP6, OUTSIDE6)) == (3, 0)
    daemon.start()
    (told,) = daemon.own_events("hook_put_back", attached.id)
    assert "unless only XDP was missing: TC fenced it then" in told["effect"]
    with topology.host.inside(), Rtnl() as netlink:
        assert get_xdp_programs(netlink, socket.if_nametoindex(workload.host_if))
    assert (topology.arrived(workload, UDP4, OUTSIDE4), topology.arrived(workload, UDP6, OUTSIDE6)) == (3, 0)
    assert daemon.info(attached.id).packets_blocked >= 6
    daemon.detach(attached.id)


@pytest.mark.userspace
def test_tc_fences_alone_where_xdp_was_taken_off_and_is_refused(topology: Topology, start: Start) -> None:
    daemon = start(topology, policy=POLICY)
    workload = topology.add_veth()
    attached = daemon.attach(interface=workload.host_if, hook="xdp")
    topology.queues(workload.host_if)
    tc = daemon.attach(interface=topology.add_veth().host_if)
    daemon.stop()
    take_off(daemon.pins / "links" / f"{attached.id}-xdp")
    workload.inside.ip("link set eth0 mtu 9000")
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 0
    daemon.start()
    assert "MTU is too large" in daemon.wait_event("xdp_not_attached")["error"]
    assert not daemon.events("not_taken_over")
    info = daemon.info(attached.id)
    assert (info.hook, info.attach_mechanism) == (daemon_pb2.HOOK_XDP, daemon.info(tc.id).attach_mechanism)
    assert (topology.arrived(workload, UDP4, OUTSIDE4), topology.arrived(workload, UDP6, OUTSIDE6)) == (3, 0)
    workload.inside.ip("link set eth0 mtu 1500")
    daemon.restart()
    assert daemon.info(attached.id).attach_mechanism == "xdp-native"
    daemon.set_policy({"default": {"mode": "block_all"}})
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    for each in (attached, tc):
        daemon.detach(each.id)
    assert not daemon.link_pins()
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 3
