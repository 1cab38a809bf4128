"""Without a daemon the fence holds; the next daemon takes it over as it was (semantics.md 24, 27)."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import netfence
from daemons import Fenced, Start
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.deadline import wait_for
from harness.fresh import Fresh
from harness.packets import UDP4, UDP6
from harness.topology import Topology, Workload
from hooktools import TCX_NEXT, needs_tcx, take_off
from netfence.api.client import RefusedError
from netfence.dataplane import links, rawprog
from netfence.dataplane.hooks import standin
from netfence.dataplane.links import AttachType
from netfence.dataplane.rawprog import ProgType
from netfence.dataplane.rtnl import Rtnl, get_xdp_programs
from netfence.policy.modes import Reason
from netfence.store import DATABASE, SCHEMA_VERSION
from netfence.v1 import types_pb2

pytestmark = pytest.mark.userspace

OUTSIDE4, OUTSIDE6 = "203.0.113.99", "2001:db8:77::1"
LEARNED4 = "203.0.113.80"
SOURCES = Path(netfence.__file__).parents[1]
POLICY: dict[str, Any] = {
    "default": {
        "mode": "allowlist",
        "allow_cidrs": [OUTSIDE4],
        "dns": {"mode": "allowlist", "allow": ["good.test", "other.test"]},
    }
}


@pytest.fixture
def topology(fresh: Fresh) -> Topology:
    """Give namespaces of the test's own, with a name server."""
    topology = fresh.topology()
    fresh.names(topology, f"good.test. 300 IN A {LEARNED4}", "other.test. 300 IN A 203.0.113.81")
    return topology


def end(daemon: Fenced, how: str) -> None:
    if how == "kill -9":
        daemon.kill()
    else:
        assert daemon.stop() == 0


def query(workload: Workload, server: tuple[str, int], name: str) -> list[str]:
    with Agent(netns=workload.netns) as agent:
        return [str(record.rdata) for record in agent.query(server, name).rr]


def edit_state(daemon: Fenced, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(daemon.directory / "data" / DATABASE)) as state, state:
        state.execute(statement, values)


def schema_version(daemon: Fenced) -> int:
    with closing(sqlite3.connect(f"file:{daemon.directory / 'data' / DATABASE}?mode=ro", uri=True)) as state:
        return int(state.execute("PRAGMA user_version").fetchone()[0])


@pytest.mark.parametrize("how", ["stop", "kill -9"])
@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "clsact"])
def test_an_interface_stays_fenced_and_is_taken_over(topology: Topology, start: Start, how: str, *, tcx: bool) -> None:
    workload = topology.add_veth()
    daemon = start(topology, policy=POLICY, tcx=tcx)
    attached = daemon.attach(interface=workload.host_if, metadata={"tenant": "acme"})
    assert query(workload, attached.dns, "good.test") == [LEARNED4]
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 0
    before = daemon.info(attached.id)
    assert before.attach_mechanism == ("tcx" if tcx else "clsact")

    def enforced() -> tuple[int, int, int]:
        return (
            topology.arrived(workload, UDP4, OUTSIDE4),
            topology.arrived(workload, UDP4, LEARNED4),
            topology.arrived(workload, UDP6, OUTSIDE6),
        )

    end(daemon, how)
    assert enforced() == (3, 3, 0)
    daemon.start()
    assert enforced() == (3, 3, 0)
    after = daemon.info(attached.id)
    for field in ("id", "target", "dns_address", "policy_hash", "policy_version", "attached_at", "metadata", "hook"):
        assert getattr(after, field) == getattr(before, field), field
    assert after.attach_mechanism == before.attach_mechanism
    assert after.packets_blocked >= before.packets_blocked + 6
    if how == "stop":
        assert after.dns_queries_allowed == before.dns_queries_allowed == 1
    assert query(workload, attached.dns, "other.test") == ["203.0.113.81"]
    assert "attached already" in _refused(daemon, interface=workload.host_if)
    daemon.set_policy({"default": {"mode": "block_all"}})
    assert enforced() == (0, 0, 0)
    daemon.detach(attached.id)
    assert enforced() == (3, 3, 3)


def test_a_start_of_the_same_build_compiles_nothing(topology: Topology, start: Start, tmp_path: Path) -> None:
    """It could not: the compiler is broken, as a start of another build finds out."""
    workload = topology.add_veth()
    daemon = start(topology, policy=POLICY)
    attached = daemon.attach(interface=workload.host_if)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "bcc.py").write_text("raise RuntimeError('the compiler is broken')\n")
    daemon._env = {"PYTHONPATH": f"{broken}:{SOURCES}"}
    for how in ("stop", "kill -9"):
        end(daemon, how)
        daemon.start()
        assert [info.id for info in daemon.attachments()] == [attached.id]
        assert topology.arrived(workload, UDP4, OUTSIDE4) == 3
        assert topology.arrived(workload, UDP6, OUTSIDE6) == 0
    daemon.stop()
    daemon.write_config({"dns": {"max_leases": 500, "max_leases_total": 1000}})
    daemon.launch()
    assert "the compiler is broken" in daemon.ended_saying()
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 0
    daemon.write_config({})
    daemon.start()


def test_a_build_that_does_not_compile_leaves_the_state_to_the_one_before(
    topology: Topology, start: Start, tmp_path: Path
) -> None:
    workload = topology.add_veth()
    daemon = start(topology, policy=POLICY)
    attached = daemon.attach(interface=workload.host_if)
    daemon.stop()
    for table in ("saved", "audited"):
        edit_state(daemon, f"DROP TABLE {table}")
    edit_state(daemon, "PRAGMA user_version = 2")  # as a version before this one has it
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "bcc.py").write_text("raise RuntimeError('the compiler is broken')\n")
    daemon._env = {"PYTHONPATH": f"{broken}:{SOURCES}"}
    daemon.write_config({"dns": {"max_leases": 500, "max_leases_total": 1000}})
    daemon.launch()
    assert "the compiler is broken" in daemon.ended_saying()
    assert schema_version(daemon) == 2
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 0
    daemon._env = {}
    daemon.start()
    assert schema_version(daemon) == SCHEMA_VERSION
    assert [info.id for info in daemon.attachments()] == [attached.id]
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 3
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 0


def _refused(daemon: Fenced, **target: Any) -> str:
    with pytest.raises(RefusedError) as raised:
        daemon.attach(**target)
    return str(raised.value)


@pytest.mark.parametrize("how", ["stop", "kill -9"])
def test_a_cgroup_stays_fenced_and_is_taken_over(
    topology: Topology, start: Start, cgroups: Callable[[str], Cgroup], how: str
) -> None:
    group = cgroups("box")
    daemon = start(topology, policy=POLICY)
    attached = daemon.attach(cgroup=group)
    with Agent(netns=topology.host, cgroup=group) as agent:
        agent.udp().sendto(b"x", (OUTSIDE4, 9))
        end(daemon, how)
        with pytest.raises(PermissionError):
            agent.udp(socket.AF_INET6).sendto(b"x", (OUTSIDE6, 9))
        daemon.start()
        with pytest.raises(PermissionError):
            agent.udp(socket.AF_INET6).sendto(b"x", (OUTSIDE6, 9))
        agent.udp().sendto(b"x", (OUTSIDE4, 9))
        assert daemon.reasons(attached.id)[Reason.CONNECT] == 2
        daemon.detach(attached.id)
        agent.udp(socket.AF_INET6).sendto(b"x", (OUTSIDE6, 9))


def test_a_name_denied_after_a_restart_closes_what_it_had_opened_before(topology: Topology, start: Start) -> None:
    workload = topology.add_veth()
    daemon = start(topology, policy=POLICY)
    attached = daemon.attach(interface=workload.host_if)
    query(workload, attached.dns, "good.test")
    daemon.kill()
    daemon.start()
    assert topology.arrived(workload, UDP4, LEARNED4) == 3
    daemon.set_policy({"default": {"mode": "allowlist", "dns": {"mode": "allowlist", "allow": ["other.test"]}}})
    assert topology.arrived(workload, UDP4, LEARNED4) == 0


def test_a_policy_file_edited_meanwhile_is_in_force_after_the_start(topology: Topology, start: Start) -> None:
    workload = topology.add_veth()
    daemon = start(topology, policy=POLICY)
    attached = daemon.attach(interface=workload.host_if)
    daemon.stop()
    daemon.write_policy("default: {mode: denylist}")
    daemon.start()
    wait_for(lambda: daemon.info(attached.id).mode == types_pb2.POLICY_MODE_DENYLIST, "the new policy")
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 3


def test_a_target_deleted_meanwhile_is_cleaned_up(
    topology: Topology, start: Start, cgroups: Callable[[str], Cgroup]
) -> None:
    workload, kept = topology.add_veth(), topology.add_veth()
    group = cgroups("box")
    daemon = start(topology, policy=POLICY)
    daemon.attach(interface=workload.host_if)
    daemon.attach(cgroup=group)
    attached = daemon.attach(interface=kept.host_if)
    daemon.kill()
    topology.host.ip(f"link del {workload.host_if}")
    group.remove()
    daemon.start()
    assert [info.id for info in daemon.attachments()] == [attached.id]
    assert {pin.rpartition("-")[0] for pin in daemon.link_pins()} == {attached.id}


def test_a_renamed_interface_is_found_again(topology: Topology, start: Start) -> None:
    workload = topology.add_veth()
    daemon = start(topology, policy={"default": {"mode": "block_all"}})
    attached = daemon.attach(interface=workload.host_if)
    daemon.kill()
    topology.host.ip(
        f"link set {workload.host_if} down", f"link set {workload.host_if} name other7", "link set other7 up"
    )
    daemon.start()
    assert [(info.id, info.target) for info in daemon.attachments()] == [(attached.id, "other7")]


@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "clsact"])
def test_a_new_interface_of_the_old_name_and_kind_is_a_new_target(
    topology: Topology, start: Start, *, tcx: bool
) -> None:
    """The old one went while no daemon ran: the new one has neither its fence nor its id, and can be attached."""
    old = topology.add_veth()
    daemon = start(topology, policy={"default": {"mode": "block_all"}}, tcx=tcx)
    first = daemon.attach(interface=old.host_if)
    daemon.kill()
    topology.host.ip(f"link del {old.host_if}", f"link add {old.host_if} type veth peer name peer7")
    daemon.start()
    assert daemon.own_events("dropped", first.id)
    assert daemon.attachments() == []
    assert daemon.link_pins() == []
    filters = topology.host.run("tc", "filter", "show", "dev", old.host_if, "ingress", check=False).stdout
    assert "bpf" not in filters
    second = daemon.attach(interface=old.host_if, direction="workload")
    assert second.id != first.id
    daemon.detach(second.id)


def test_an_attach_that_was_never_finished_is_taken_off(topology: Topology, start: Start) -> None:
    workload = topology.add_veth()
    daemon = start(topology, policy={"default": {"mode": "block_all"}})
    attached = daemon.attach(interface=workload.host_if)
    daemon.kill()
    edit_state(daemon, "UPDATE attachments SET policy = NULL")  # as it is until the first policy is in force
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    daemon.start()
    assert daemon.own_events("dropped", attached.id)
    assert daemon.attachments() == []
    assert daemon.link_pins() == []
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 3


@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "clsact"])
def test_what_cannot_be_read_stays_fenced_and_is_told(topology: Topology, start: Start, *, tcx: bool) -> None:
    """Its rules are what the kernel has, its names are refused until it gets a policy, and it can be taken off."""
    workload, other = topology.add_veth(), topology.add_veth()
    daemon = start(topology, policy=POLICY, tcx=tcx)
    attached = daemon.attach(interface=workload.host_if, metadata={"tenant": "acme"})
    untouched = daemon.attach(interface=other.host_if)
    assert query(workload, attached.dns, "good.test") == [LEARNED4]

    def enforced(veth: Workload) -> tuple[int, int]:
        return topology.arrived(veth, UDP4, OUTSIDE4), topology.arrived(veth, UDP6, OUTSIDE6)

    before = {info.id: info for info in daemon.attachments()}
    daemon._policy = None  # nobody gives one
    daemon.write_config({})
    for damage in ("{damaged", "{}"):
        daemon.kill()
        edit_state(daemon, "UPDATE attachments SET policy = ? WHERE id = ?", damage, attached.id)
        assert enforced(workload) == (3, 0)
        daemon.start()
        assert enforced(workload) == enforced(other) == (3, 0)
        assert {told["attachment"] for told in daemon.events("policy_not_read")} == {attached.id}
        assert not daemon.events("not_taken_over")
        after = {info.id: info for info in daemon.attachments()}
        for field in ("target", "dns_address", "metadata", "attached_at", "attach_mechanism", "mode"):
            assert getattr(after[attached.id], field) == getattr(before[attached.id], field), field
        assert after[attached.id].policy_version == ""
        assert after[untouched.id].policy_version == before[untouched.id].policy_version
        with Agent(netns=workload.netns) as agent:
            assert agent.query(attached.dns, "good.test").header.rcode == 5  # REFUSED
        assert query(other, untouched.dns, "good.test") == [LEARNED4]
    daemon.kill()
    daemon._policy = POLICY  # the file that is as it was
    daemon.write_config({})
    daemon.start()
    wait_for(daemon.policy_in_force, "the policy of the file")
    assert "attached already" in _refused(daemon, interface=workload.host_if)
    assert query(workload, attached.dns, "other.test") == ["203.0.113.81"]
    assert enforced(workload) == (3, 0)
    daemon.detach(attached.id)
    assert enforced(workload) == (3, 3)
    assert enforced(other) == (3, 0)


def test_what_cannot_be_read_can_be_taken_off_and_goes_with_its_target(
    topology: Topology, start: Start, cgroups: Callable[[str], Cgroup]
) -> None:
    workload, gone, group = topology.add_veth(), topology.add_veth(), cgroups("box")
    daemon = start(topology, policy=POLICY)
    attached = [
        daemon.attach(interface=workload.host_if),
        daemon.attach(interface=gone.host_if),
        daemon.attach(cgroup=group),
    ]
    daemon._policy = None
    daemon.write_config({})
    daemon.kill()
    edit_state(daemon, "UPDATE attachments SET policy = '{damaged'")
    daemon.start()
    assert {info.id for info in daemon.attachments()} == {each.id for each in attached}
    topology.host.ip(f"link del {gone.host_if}")
    wait_for(lambda: len(daemon.attachments()) == 2, "the one whose target went to be gone")
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 0
    daemon.detach(attached[0].id)
    daemon.detach(attached[2].id)
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 3
    assert daemon.link_pins() == []


@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "clsact"])
def test_a_command_that_was_in_force_and_not_stored_is_undone_and_told(
    topology: Topology, start: Start, *, tcx: bool
) -> None:
    """Killed in between, which the lock of another process on the database makes last."""
    workload, other = topology.add_veth(), topology.add_veth()
    daemon = start(topology, policy=POLICY, tcx=tcx)
    attached = daemon.attach(interface=workload.host_if)
    before = daemon.info(attached.id)
    with closing(sqlite3.connect(daemon.directory / "data" / DATABASE, isolation_level=None)) as state:
        state.execute("BEGIN IMMEDIATE")
        daemon.write_policy(f"default: {{mode: denylist, deny_cidrs: [{OUTSIDE4}]}}")
        wait_for(lambda: topology.arrived(workload, UDP6, OUTSIDE6) == 3, "the new policy to be in force")
        daemon.kill()
        assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    daemon.write_policy(json.dumps(POLICY))  # whoever gave the command does not give it again
    daemon.start()
    assert [told["level"] for told in daemon.own_events("command_undone", attached.id)] == ["warning"]
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 0
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 3
    after = daemon.info(attached.id)
    assert (after.policy_hash, after.policy_version) == (before.policy_hash, before.policy_version)
    daemon.attach(interface=other.host_if)
    daemon.set_policy({"default": {"mode": "denylist"}})
    daemon.kill()
    daemon.start()
    assert len(daemon.events("command_undone")) == 1
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 3


@pytest.mark.parametrize("over", ["before", "meanwhile"])
@pytest.mark.parametrize("how", ["stop", "kill -9"])
def test_what_has_expired_stays_expired(topology: Topology, start: Start, how: str, over: str) -> None:
    """What is stored names it still."""
    workload = topology.add_veth()
    rules = [{"cidr": OUTSIDE4, "ttl": "2s"}, OUTSIDE6]
    daemon = start(topology, policy={"default": {"mode": "allowlist", "allow_cidrs": rules}})
    daemon.attach(interface=workload.host_if)

    def expire() -> None:
        wait_for(lambda: topology.arrived(workload, UDP4, OUTSIDE4) == 0, "the TTL to end")

    if over == "before":
        expire()
    end(daemon, how)
    if over == "meanwhile":
        expire()
    for _ in range(2):
        daemon.start()
        assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
        assert topology.arrived(workload, UDP6, OUTSIDE6) == 3
        end(daemon, how)
    daemon.start()


def test_a_lost_dns_port_is_waited_for_and_the_fence_stays(topology: Topology, start: Start) -> None:
    workload = topology.add_veth()
    daemon = start(topology, policy=POLICY)
    attached = daemon.attach(interface=workload.host_if)
    daemon.kill()
    with topology.host.inside(), closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as thief:
        thief.bind(attached.dns)
        daemon.start()
        (told,) = daemon.own_events("dns_port_lost", attached.id)
        assert told["level"] == "error"
        assert topology.arrived(workload, UDP6, OUTSIDE6) == 0
        assert daemon.info(attached.id).dns_address == "{}:{}".format(*attached.dns)
    wait_for(lambda: daemon.own_events("dns_port_back", attached.id), "the port to be bound again")
    assert query(workload, attached.dns, "good.test") == [LEARNED4]


def test_after_a_reboot_an_interface_of_the_same_name_and_kind_is_fenced_with_its_last_policy(
    topology: Topology, start: Start, cgroups: Callable[[str], Cgroup]
) -> None:
    """A reboot is played: no pins, another boot id, interfaces made anew."""
    workload, other, kind = topology.add_veth(), topology.add_veth(), topology.add_veth()
    daemon = start(topology, policy=POLICY)
    attached = daemon.attach(interface=workload.host_if)
    daemon.attach(interface=other.host_if)
    daemon.attach(interface=kind.host_if)
    daemon.attach(cgroup=cgroups("box"))
    daemon.stop()
    for pin in sorted(daemon.pins.rglob("*"), key=lambda path: len(path.parts), reverse=True):
        pin.rmdir() if pin.is_dir() else pin.unlink()
    edit_state(daemon, "UPDATE attachments SET boot_id = 'the boot before', identity = '9999' WHERE kind = 'interface'")
    edit_state(daemon, "UPDATE attachments SET boot_id = 'the boot before'")
    topology.host.ip(f"link set {other.host_if} down", f"link set {other.host_if} name else0")
    topology.host.ip(f"link del {kind.host_if}", f"link add {kind.host_if} type bridge")
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 3
    daemon.start()
    assert [info.id for info in daemon.attachments()] == [attached.id]
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 0
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 3
    daemon.kill()
    daemon.start()  # and the next restart is an ordinary one
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 0
    daemon.detach(attached.id)


@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "clsact"])
def test_after_a_reboot_the_old_index_of_one_that_is_gone_may_be_anothers(
    topology: Topology, start: Start, *, tcx: bool
) -> None:
    workload, gone = topology.add_veth(), topology.add_veth()
    daemon = start(topology, policy=POLICY, tcx=tcx)
    attached = daemon.attach(interface=workload.host_if)
    lost = daemon.attach(interface=gone.host_if)
    daemon.stop()
    for pin in sorted(daemon.pins.rglob("*"), key=lambda path: len(path.parts), reverse=True):
        pin.rmdir() if pin.is_dir() else pin.unlink()
    for each in (workload, gone):
        topology.host.run("tc", "qdisc", "del", "dev", each.host_if, "clsact", check=False)
    index = topology.host.ip_json("link", "show", workload.host_if)[0]["ifindex"]
    edit_state(daemon, "UPDATE attachments SET boot_id = 'the boot before', identity = '9999'")
    edit_state(daemon, "UPDATE attachments SET identity = ? WHERE id = ?", str(index), lost.id)
    topology.host.ip(f"link del {gone.host_if}")
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 3
    daemon.start()
    assert [info.id for info in daemon.attachments()] == [attached.id]
    assert not daemon.own_events("hook_put_back", attached.id)  # its filter was never off
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 0
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 3


def test_a_daemon_stops_while_a_dns_port_is_lost(topology: Topology, start: Start) -> None:
    workload = topology.add_veth()
    daemon = start(topology, policy=POLICY)
    attached = daemon.attach(interface=workload.host_if)
    daemon.kill()
    with topology.host.inside(), closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as thief:
        thief.bind(attached.dns)
        daemon.start()
        assert daemon.own_events("dns_port_lost", attached.id)
        assert daemon.stop() == 0
    daemon.start()


def test_what_cannot_be_taken_over_does_not_end_the_daemon_and_follows_the_file(
    topology: Topology, start: Start
) -> None:
    workload = topology.add_veth()
    daemon = start(topology, policy=POLICY)
    attached = daemon.attach(interface=workload.host_if)
    daemon.stop()
    # In direction host the daemon must be alone in its cgroup; the test's own process joins it there.
    edit_state(daemon, "UPDATE attachments SET direction = 'host'")
    assert daemon._cgroup is not None
    with Agent(netns=topology.host, cgroup=daemon._cgroup):
        daemon.start()
        assert daemon.own_events("not_taken_over", attached.id)
        daemon.set_policy({"default": {"mode": "block_all"}})
        assert daemon.alive
        assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    daemon.stop()
    edit_state(daemon, "UPDATE attachments SET direction = 'workload'")
    daemon.start()
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0


def test_a_policy_file_that_is_a_circle_of_links_is_waited_out(topology: Topology, start: Start) -> None:
    workload = topology.add_veth()
    daemon = start(topology, policy=POLICY)
    attached = daemon.attach(interface=workload.host_if)
    circle = daemon.policy_file.with_suffix(".circle")
    circle.symlink_to(daemon.policy_file)
    circle.rename(daemon.policy_file)
    daemon.wait_event("policy_file_refused")
    daemon.hang_up()
    wait_for(lambda: len(daemon.events("policy_file_refused")) > 1, "the file to be looked at again")
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 0
    daemon.set_policy({"default": {"mode": "denylist"}})
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 3
    daemon.detach(attached.id)


@needs_tcx
def test_links_that_somebody_detaches_are_put_back(
    topology: Topology, start: Start, cgroups: Callable[[str], Cgroup]
) -> None:
    """Nobody tells of them: the daemon looks."""
    plain, early, group = topology.add_veth(), topology.add_veth(), cgroups("detached")
    topology.queues(early.host_if)
    daemon = start(topology, policy={"default": {"mode": "block_all"}})
    attached = {
        "main": daemon.attach(interface=plain.host_if),
        "xdp": daemon.attach(interface=early.host_if, hook="xdp"),
        "egress": daemon.attach(cgroup=group),
    }
    for hook, each in attached.items():
        take_off(daemon.pins / "links" / f"{each.id}-{hook}")
    assert topology.arrived(plain, UDP4, OUTSIDE4) == 3
    assert topology.arrived(early, UDP4, OUTSIDE4) == 0  # TC stands behind it
    for each in attached.values():
        wait_for(lambda: daemon.own_events("hook_put_back", each.id), "the hook to be put back", 30)  # noqa: B023
    assert topology.arrived(plain, UDP4, OUTSIDE4) == 0
    with Agent(netns=topology.host, cgroup=group) as agent, pytest.raises(PermissionError):
        agent.udp().sendto(b"x", (OUTSIDE4, 9))
    with topology.host.inside(), Rtnl() as netlink:
        assert len(get_xdp_programs(netlink, socket.if_nametoindex(early.host_if))) == 1


@pytest.mark.parametrize(
    "how", [pytest.param("tcx link", marks=needs_tcx), "cgroup link", "clsact qdisc", "clsact filter"]
)
def test_servers_inside_answer_again_after_somebody_took_the_inbound_hook(
    topology: Topology, start: Start, cgroups: Callable[[str], Cgroup], how: str
) -> None:
    """It notes the connections begun from outside, whose answers pass."""
    workload, group = topology.add_veth(), cgroups("server")
    daemon = start(topology, policy={"default": {"mode": "allowlist"}}, tcx="clsact" not in how)
    target: dict[str, Any] = {"cgroup": group} if "cgroup" in how else {"interface": workload.host_if}
    attached = daemon.attach(**target)

    with Agent(netns=workload.netns, cgroup=group) as server, Agent(netns=topology.host) as client:
        listening = server.tcp()
        listening.bind((workload.address4, 0))
        listening.listen()

        def answers() -> bool:
            try:
                client.connect(*listening.name(), timeout_s=0.25).close()
            except TimeoutError:
                return False
            return True

        wait_for(answers, "the inbound hook, which comes last")
        if "link" in how:
            take_off(daemon.pins / "links" / f"{attached.id}-inbound")
            assert not answers()
        elif "qdisc" in how:
            topology.host.run("tc", "qdisc", "del", "dev", workload.host_if, "clsact")
            wait_for(lambda: daemon.own_events("hook_put_back", attached.id), "the hook to be put back")
        else:
            topology.host.run("tc", "filter", "del", "dev", workload.host_if, "egress")
        wait_for(answers, "servers to answer again", 30)
    wait_for(lambda: daemon.own_events("inbound_hook_put_back", attached.id), "a word about it")
    assert bool(daemon.own_events("hook_put_back", attached.id)) == ("qdisc" in how)


@pytest.mark.parametrize("when", ["while the daemon runs", "while it does not"])
@pytest.mark.parametrize("tcx", [pytest.param(True, marks=needs_tcx), False], ids=["tcx", "clsact"])
def test_a_program_that_passes_everything_in_front_of_ours_is_passed(
    topology: Topology, start: Start, when: str, *, tcx: bool
) -> None:
    workload = topology.add_veth()
    daemon = start(topology, policy=POLICY, tcx=tcx)
    attached = daemon.attach(interface=workload.host_if)
    program = rawprog.load_raw(ProgType.SCHED_CLS, rawprog.returning(0), name="somebody")  # TCX_PASS, TC_ACT_OK
    if when == "while it does not":
        daemon.kill()
    pin = daemon.bpffs / "somebody"
    place = ("dev", workload.host_if, "ingress", "prio", "1", "protocol", "all", "handle", "1", "bpf")
    if tcx:
        with topology.host.inside():
            link = links.link_create_tcx(program, socket.if_nametoindex(workload.host_if), AttachType.TCX_INGRESS)
        os.close(program)
    else:
        links.obj_pin(program, pin)
        link = program
        topology.host.run("tc", "filter", "add", *place, "da", "object-pinned", str(pin))
    if when == "while it does not":
        assert topology.arrived(workload, UDP6, OUTSIDE6) == 3  # a hole
        daemon.start()
    wait_for(lambda: topology.arrived(workload, UDP6, OUTSIDE6) == 0, "ours to be first again", 30)
    wait_for(lambda: daemon.own_events("hook_moved_ahead", attached.id), "a word about it")
    (told,) = daemon.own_events("hook_moved_ahead", attached.id)
    assert "(somebody)" in told["passed"][0]
    assert told["in_front"] == []
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 0
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 3
    daemon.restart()
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 0
    daemon.detach(attached.id)
    if not tcx:
        topology.host.run("tc", "filter", "del", *place)
        pin.unlink()
    os.close(link)


@needs_tcx
@pytest.mark.parametrize("until", ["ours is in the old link", "ours is in the new link", "the new link is pinned"])
def test_a_daemon_that_is_killed_while_ours_moves_ahead_leaves_nothing_open(
    topology: Topology, start: Start, until: str
) -> None:
    """The steps of `tcx.move_ahead`; the stand-ins drop when nobody holds their table."""
    workload = topology.add_veth()
    daemon = start(topology, policy=POLICY)
    attached = daemon.attach(interface=workload.host_if)
    pins = wait_for(lambda: len(there := daemon.link_pins()) == 2 and there, "both hooks")
    daemon.kill()
    ours = links.obj_get(next(daemon.pins.glob("programs-*")) / "nf_tc")
    main = daemon.pins / "links" / f"{attached.id}-main"
    with topology.host.inside(), standin.stand_ins(ours, 2) as (first, last):
        old = links.obj_get(main)
        new = links.link_create_tcx(first, socket.if_nametoindex(workload.host_if), AttachType.TCX_INGRESS)
        if until != "ours is in the old link":
            links.link_update(old, last)
            links.link_update(new, ours)
        if until == "the new link is pinned":
            links.obj_pin(new, main.with_name(f"{main.name}_new"))
        assert topology.arrived(workload, UDP4, OUTSIDE4) == 3
    for each in (old, new, ours):
        os.close(each)
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 0
    daemon.start()
    assert daemon.link_pins() == pins
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 0
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 3


@needs_tcx
def test_a_program_that_comes_in_front_is_told_of(topology: Topology, start: Start) -> None:
    workload = topology.add_veth()
    daemon = start(topology, policy={"default": {"mode": "block_all"}})
    attached = daemon.attach(interface=workload.host_if)
    program = rawprog.load_raw(ProgType.SCHED_CLS, rawprog.returning(TCX_NEXT), name="somebody")
    with topology.host.inside():
        link = links.link_create_tcx(program, socket.if_nametoindex(workload.host_if), AttachType.TCX_INGRESS)
    wait_for(lambda: daemon.own_events("programs_in_front", attached.id), "the daemon to see it", 30)
    (told,) = daemon.own_events("programs_in_front", attached.id)
    assert told["level"] == "error"
    assert told["programs"] == [f"tcx: program {links.prog_info(program).id} (somebody)"]
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    os.close(link)
    os.close(program)


def test_a_filter_that_comes_in_front_is_told_of(topology: Topology, start: Start) -> None:
    """On clsact: of one priority the newest runs first."""
    workload = topology.add_veth()
    daemon = start(topology, policy={"default": {"mode": "block_all"}}, tcx=False)
    attached = daemon.attach(interface=workload.host_if)
    program = rawprog.load_raw(ProgType.SCHED_CLS, rawprog.returning(TCX_NEXT), name="somebody")
    pin = daemon.bpffs / "somebody"
    links.obj_pin(program, pin)
    place = ("dev", workload.host_if, "ingress", "prio", "1", "protocol", "all", "handle", "1", "bpf")
    topology.host.run("tc", "filter", "add", *place, "da", "object-pinned", str(pin))
    wait_for(lambda: daemon.own_events("programs_in_front", attached.id), "the daemon to see it", 30)
    (told,) = daemon.own_events("programs_in_front", attached.id)
    assert told["level"] == "error"
    assert told["programs"] == [f"clsact prio 1 handle 0x1: program {links.prog_info(program).id} (somebody)"]
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    topology.host.run("tc", "filter", "del", *place)
    pin.unlink()
    os.close(program)


@pytest.mark.parametrize("note", ["ours", "an older version's"])
def test_a_qdisc_that_others_use_at_the_detach_is_theirs_and_no_start_asks_whose_it_was(
    topology: Topology, start: Start, note: str
) -> None:
    """The note that we made it would else be taken for an attachment that nobody knows, which fails every start."""
    workload = topology.add_veth()
    daemon = start(topology, policy={"default": {"mode": "block_all"}}, tcx=False)
    attached = daemon.attach(interface=workload.host_if)
    theirs = ("filter", "add", "dev", workload.host_if, "egress", "prio", "7", "protocol", "ip", "u32")
    topology.host.run("tc", *theirs, "match", "u32", "0", "0", "flowid", "1:1")
    daemon.detach(attached.id)
    assert daemon.link_pins() == []
    left = daemon.pins / "links" / f"{attached.id}-qdisc"
    if note != "ours":
        left.mkdir()
    for how in ("stop", "kill -9"):
        end(daemon, how)
        daemon.start()
        assert daemon.attachments() == []
    assert "u32" in topology.host.run("tc", "filter", "show", "dev", workload.host_if, "egress").stdout
    again = daemon.attach(interface=workload.host_if)
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    daemon.detach(again.id)
    assert "u32" in topology.host.run("tc", "filter", "show", "dev", workload.host_if, "egress").stdout
    if note != "ours":
        left.rmdir()


def test_clsact_filters_that_somebody_removes_are_put_back(topology: Topology, start: Start) -> None:
    workload = topology.add_veth()
    daemon = start(topology, policy={"default": {"mode": "block_all"}}, tcx=False)
    attached = daemon.attach(interface=workload.host_if)
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    topology.host.run("tc", "qdisc", "del", "dev", workload.host_if, "clsact")
    wait_for(lambda: daemon.own_events("hook_put_back", attached.id), "the hook to be put back")
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
