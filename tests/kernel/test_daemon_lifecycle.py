"""A real daemon from attach to detach: what it does, shows and leaves, and what becomes of targets."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest

from daemons import Fenced, Start
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.daemon import host_port
from harness.deadline import wait_for
from harness.fresh import Fresh
from harness.packets import UDP4, UDP6
from harness.topology import DNS4, Topology, Workload
from harness.unbound import Unbound
from hooktools import needs_tcx
from netfence.api.client import RefusedError
from netfence.dataplane.rtnl import Rtnl, get_xdp_programs
from netfence.policy.modes import Reason
from netfence.v1 import daemon_pb2, daemon_pb2_grpc, types_pb2

pytestmark = pytest.mark.userspace

OUTSIDE4, OUTSIDE6 = "203.0.113.99", "2001:db8:77::1"
OPEN: dict[str, Any] = {"default": {"mode": "disabled"}}
BLOCK: dict[str, Any] = {"default": {"mode": "block_all"}}


@pytest.fixture(scope="module")
def daemon(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fenced]:
    """Give a daemon that lives as long as the test module; a test detaches what it attached."""
    with Fenced(topology, tmp_path_factory.mktemp("netfenced")) as running:
        yield running


def allow(*cidrs: str) -> dict[str, Any]:
    return {"default": {"mode": "allowlist", "allow_cidrs": list(cidrs), "dns": {"mode": "disabled"}}}


def refusal(daemon: Fenced, **target: Any) -> str:
    with pytest.raises(RefusedError) as raised:
        daemon.attach(**target)
    return str(raised.value)


# -- attach, list, detach ----------------------------------------------------------------------------------------------


def test_an_interface_is_fenced_until_it_is_detached(daemon: Fenced, topology: Topology, workload: Workload) -> None:
    daemon.set_policy(allow(f"{OUTSIDE4}/32"))
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 3
    attached = daemon.attach(interface=workload.host_if, metadata={"tenant": "acme"})
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 3
    before = daemon.info(attached.id)
    assert topology.arrived(workload, UDP6, OUTSIDE6, count=4) == 0
    info = daemon.info(attached.id)
    assert info.packets_blocked - before.packets_blocked == 4
    assert daemon.reasons(attached.id)[Reason.DEFAULT_DROP] == 4
    assert (info.target, info.attach_mechanism, dict(info.metadata)) == (workload.host_if, "tcx", {"tenant": "acme"})
    assert (info.type, info.hook) == (types_pb2.ATTACHMENT_TYPE_TC, daemon_pb2.HOOK_TC)
    assert (info.direction, info.mode) == (daemon_pb2.DIRECTION_WORKLOAD, types_pb2.POLICY_MODE_ALLOWLIST)
    assert host_port(info.dns_address) == attached.dns
    daemon.detach(attached.id)
    assert daemon.attachments() == []
    assert daemon.link_pins() == []
    assert topology.arrived(workload, UDP6, OUTSIDE6) == 3


def test_a_cgroup_is_fenced_until_it_is_detached(
    daemon: Fenced, topology: Topology, cgroups: Callable[[str], Cgroup]
) -> None:
    daemon.set_policy(allow(f"{OUTSIDE4}/32"))
    group = cgroups("box")
    attached = daemon.attach(cgroup=group)
    info = daemon.info(attached.id)
    assert (info.target, info.type, info.attach_mechanism) == (
        str(group.path),
        types_pb2.ATTACHMENT_TYPE_CGROUP,
        "cgroup-link",
    )
    with Agent(netns=topology.host, cgroup=group) as agent:
        agent.udp().sendto(b"x", (OUTSIDE4, 9))
        with pytest.raises(PermissionError):
            agent.udp(socket.AF_INET6).sendto(b"x", (OUTSIDE6, 9))
        assert daemon.reasons(attached.id)[Reason.CONNECT] == 1
        daemon.detach(attached.id)
        agent.udp(socket.AF_INET6).sendto(b"x", (OUTSIDE6, 9))


def test_the_command_line_does_it_all(daemon: Fenced, workload: Workload) -> None:
    daemon.set_policy(BLOCK)
    made = daemon.cli_json("attach", "--interface", workload.host_if, "--metadata", "tenant=acme,vm=7")
    (listed,) = daemon.cli_json("list", "--all")["attachments"]
    assert listed["id"] == made["id"]
    assert listed["metadata"] == {"tenant": "acme", "vm": "7"}
    status = daemon.cli_json("status")
    assert status["attachment_count"] == 1
    assert status["control_plane_address"] == f"file:{daemon.policy_file}"
    daemon.cli("detach", "--id", made["id"])
    assert daemon.cli_json("list")["attachments"] == []
    again = daemon.cli("detach", "--id", made["id"], check=False)
    assert again.returncode == 1
    assert again.stderr == f"netfenced: detach: no attachment {made['id']}; see `netfenced list`\n"


def test_config_show_tells_what_the_daemon_has_in_force(daemon: Fenced) -> None:
    """Not what the file says by now, and without being told where the daemon's file is."""
    daemon.write_config({"log_level": "error"})
    shown = daemon.cli_json("config", "show")
    assert shown["log_level"]["value"] == "debug"
    assert str(daemon.config_file) in shown["log_level"]["source"]
    assert shown["data_dir"]["value"] == str(daemon.directory / "data")
    assert shown["enforcement.start_mode"] == {"value": "block_all", "source": "default"}


def test_names_open_addresses_and_queries_are_counted(
    daemon: Fenced, topology: Topology, workload: Workload, agent: Agent, names: Unbound
) -> None:
    names.replace([f"good.test. 300 IN A {OUTSIDE4}", f"bad.test. 300 IN A {OUTSIDE4}"])
    daemon.set_policy({"default": {"mode": "allowlist", "dns": {"mode": "allowlist", "allow": ["good.test"]}}})
    attached = daemon.attach(interface=workload.host_if)
    assert attached.dns[0] == DNS4
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    assert agent.query(attached.dns, "bad.test").header.rcode == 5
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    assert [str(record.rdata) for record in agent.query(attached.dns, "good.test").rr] == [OUTSIDE4]
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 3
    info = daemon.info(attached.id)
    assert (info.dns_queries_allowed, info.dns_queries_blocked) == (1, 1)
    daemon.set_policy({"default": {"mode": "allowlist", "dns": {"mode": "allowlist", "deny": ["good.test"]}}})
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    daemon.detach(attached.id)


def test_a_second_attach_of_the_same_target_is_refused(daemon: Fenced, workload: Workload) -> None:
    attached = daemon.attach(interface=workload.host_if)
    said = refusal(daemon, interface=workload.host_if)
    assert said == f"attach to {workload.host_if}: it is attached already, as {attached.id}; detach it first"
    daemon.detach(attached.id)
    daemon.detach(daemon.attach(interface=workload.host_if).id)


def test_of_two_that_attach_one_target_at_once_one_wins(daemon: Fenced, workload: Workload) -> None:
    def one(_number: int) -> str:
        try:
            return daemon.attach(interface=workload.host_if).id
        except RefusedError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        found = sorted(pool.map(one, range(4)), key=len)
    won = found[:1]
    assert all("detach it first" in said for said in found[1:])
    assert [info.id for info in daemon.attachments()] == won
    daemon.detach(won[0])


def test_each_attachment_has_slot_port_and_policy_of_its_own(daemon: Fenced, topology: Topology) -> None:
    left, right = topology.add_veth(), topology.add_veth()
    rule = {"match": {"interface": left.host_if}, "mode": "disabled"}
    daemon.set_policy({"attachments": [rule], **BLOCK})
    attached = [daemon.attach(interface=each.host_if) for each in (left, right)]
    assert attached[0].dns != attached[1].dns
    assert topology.arrived(left, UDP4, OUTSIDE4) == 3
    assert topology.arrived(right, UDP4, OUTSIDE4) == 0
    for each in attached:
        daemon.detach(each.id)


# -- the policy file ---------------------------------------------------------------------------------------------------


def test_a_changed_file_is_in_force_without_being_asked_for(
    daemon: Fenced, topology: Topology, workload: Workload
) -> None:
    daemon.set_policy(BLOCK)
    attached = daemon.attach(interface=workload.host_if)
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    daemon.set_policy(OPEN)
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 3
    daemon.set_policy(BLOCK)
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    daemon.detach(attached.id)


def test_a_file_with_errors_changes_nothing_and_all_of_them_are_logged(
    daemon: Fenced, topology: Topology, workload: Workload
) -> None:
    daemon.set_policy(OPEN)
    attached = daemon.attach(interface=workload.host_if)
    known = len(daemon.events("policy_file_refused"))
    daemon.write_policy("default:\n  mode: block_al\n  allow_cidrs: [10.0.0.0/33]\n")
    wait_for(lambda: len(daemon.events("policy_file_refused")) > known, "the file to be refused")
    logged = [
        entry["error"].removeprefix(f"{daemon.policy_file}:") for entry in daemon.events("policy_file_error")[-2:]
    ]
    assert logged[0] == "2: default.mode: 'block_al': one of disabled, allowlist, block_all, denylist"
    assert logged[1].startswith("3: default.allow_cidrs[0]: '10.0.0.0/33' is not a CIDR: the prefix length must be")
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 3
    daemon.set_policy(BLOCK)
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    daemon.detach(attached.id)


def test_sighup_reads_the_file_again(daemon: Fenced) -> None:
    known = len(daemon.events("policy_file_loaded"))
    daemon.hang_up()
    wait_for(lambda: len(daemon.events("policy_file_loaded")) > known, "the file to be read again")


def test_without_a_rule_that_matches_everything_is_blocked(
    daemon: Fenced, topology: Topology, workload: Workload
) -> None:
    daemon.set_policy({"attachments": [{"match": {"interface": "other*"}, "mode": "disabled"}]})
    attached = daemon.attach(interface=workload.host_if)
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    assert daemon.info(attached.id).mode == types_pb2.POLICY_MODE_BLOCK_ALL
    daemon.detach(attached.id)


def test_a_ttl_keeps_running_while_other_rules_change(fresh: Fresh, start: Start) -> None:
    topology = fresh.topology()
    workload = topology.add_veth()
    entry: dict[str, Any] = {
        "match": {"interface": workload.host_if},
        "mode": "allowlist",
        "allow_cidrs": [{"cidr": OUTSIDE4, "ttl": "2s"}],
        "dns": {"mode": "disabled"},
    }
    daemon = start(topology, policy={"attachments": [entry]})
    daemon.attach(interface=workload.host_if)
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 3
    for number in range(5):
        daemon.set_policy({"attachments": [entry, {"match": {"interface": f"x{number}"}, "mode": "disabled"}]})
    wait_for(lambda: topology.arrived(workload, UDP4, OUTSIDE4, count=1) == 0, "the TTL to end", 4)


# -- targets -----------------------------------------------------------------------------------------------------------


def test_a_deleted_interface_is_cleaned_up_within_a_second(daemon: Fenced, topology: Topology) -> None:
    workload = topology.add_veth()
    attached = daemon.attach(interface=workload.host_if)
    topology.host.ip(f"link del {workload.host_if}")
    wait_for(lambda: not daemon.attachments(), "the attachment to go", 1.0)
    wait_for(lambda: not daemon.link_pins(), "its pins to go", 1.0)
    with pytest.raises(RefusedError, match="no attachment"):
        daemon.detach(attached.id)

    def port_is_free() -> bool:
        with topology.host.inside(), closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
            try:
                sock.bind(attached.dns)
            except OSError:
                return False
            return True

    wait_for(port_is_free, "its DNS port to be free again", 1.0)


def test_an_interface_moved_to_another_namespace_is_cleaned_up(daemon: Fenced, topology: Topology) -> None:
    workload = topology.add_veth()
    daemon.attach(interface=workload.host_if)
    topology.host.ip(f"link set {workload.host_if} netns {topology.internet.path}")
    wait_for(lambda: not daemon.attachments() and not daemon.link_pins(), "all of it to go", 1.0)
    topology.internet.ip(f"link del {workload.host_if}")


def test_a_removed_cgroup_is_cleaned_up(daemon: Fenced, cgroups: Callable[[str], Cgroup]) -> None:
    group = cgroups("short")
    daemon.attach(cgroup=group)
    group.remove()
    wait_for(lambda: not daemon.attachments(), "the attachment to go", 1.0)
    wait_for(lambda: not daemon.link_pins(), "its pins to go", 1.0)


def test_a_rename_keeps_the_attachment(daemon: Fenced, topology: Topology) -> None:
    workload = topology.add_veth()
    daemon.set_policy(BLOCK)
    attached = daemon.attach(interface=workload.host_if)
    topology.host.ip(
        f"link set {workload.host_if} down", f"link set {workload.host_if} name other7", "link set other7 up"
    )
    wait_for(lambda: daemon.info(attached.id).target == "other7", "the new name")
    daemon.set_policy({"attachments": [{"match": {"interface": "other*"}, "mode": "denylist"}]})
    assert daemon.info(attached.id).mode == types_pb2.POLICY_MODE_DENYLIST
    assert "attached already" in refusal(daemon, interface="other7")
    daemon.detach(attached.id)


def test_a_new_interface_of_the_old_name_is_a_new_target(daemon: Fenced, topology: Topology) -> None:
    topology.host.ip("link add again0 type veth peer name again1", "link set again0 up")
    first = daemon.attach(interface="again0", direction="workload")
    topology.host.ip("link del again0", "link add again0 type veth peer name again1")
    wait_for(lambda: not daemon.attachments(), "the first to go", 1.0)
    second = daemon.attach(interface="again0", direction="workload")
    assert second.id != first.id
    daemon.detach(second.id)
    topology.host.ip("link del again0")


def test_a_thousand_targets_need_no_thousand_waits(daemon: Fenced, topology: Topology) -> None:
    count = 60
    topology.host.ip(*[f"link add many{number} type veth peer name peer{number}" for number in range(count)])
    for number in range(count):
        daemon.attach(interface=f"many{number}", direction="workload")
    assert len(daemon.attachments()) == count
    topology.host.ip(*[f"link del many{number}" for number in range(count)])
    wait_for(lambda: not daemon.attachments(), "all of them to go", 2.0)
    wait_for(lambda: not daemon.link_pins(), "their pins to go", 1.0)


# -- roll-back ---------------------------------------------------------------------------------------------------------


def test_a_caller_that_hangs_up_leaves_nothing_half_done(fresh: Fresh, start: Start) -> None:
    """Attach with callers that go away after ever later moments; each is rolled back or whole, and no port is lost."""
    topology = fresh.topology()
    workload = topology.add_veth()
    daemon = start(topology, config={"dns": {"port_min": 12000, "port_max": 12000}})
    daemon.detach(daemon.attach(interface=workload.host_if).id)
    before = daemon.descriptors()
    for delay_ms in range(0, 40, 2):
        _hang_up_while_attaching(daemon, workload.host_if, delay_ms / 1000)
        wait_for(
            lambda: daemon.link_pins() == [] or len(daemon.attachments()) == 1, "the attach to be whole or nothing"
        )
        for info in daemon.attachments():
            daemon.detach(info.id)
    wait_for(lambda: daemon.link_pins() == [], "the last of them to be gone")
    wait_for(lambda: daemon.descriptors() <= before + 1, "its descriptors to be closed")
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 3

    def attached() -> str | None:
        try:
            return daemon.attach(interface=workload.host_if).id
        except RefusedError as error:
            if "being attached or detached" not in str(error):
                raise
            return None  # the pins go first: the rest of the last roll-back may still be under way

    found = wait_for(attached, "the interface to be free again")
    assert found is not None
    daemon.detach(found)


def _hang_up_while_attaching(daemon: Fenced, interface: str, after_s: float) -> None:
    with grpc.insecure_channel(f"unix:{daemon.socket}") as channel:
        call = daemon_pb2_grpc.DaemonServiceStub(channel).Attach.future(
            daemon_pb2.AttachRequest(interface_name=interface), wait_for_ready=True
        )
        threading.Event().wait(after_s)
        call.cancel()


def test_a_failed_attach_leaves_no_port_pin_row_or_descriptor(fresh: Fresh, start: Start) -> None:
    topology = fresh.topology()
    workload = topology.add_veth()
    port = 12000
    daemon = start(topology, config={"dns": {"port_min": port, "port_max": port}})
    spare = topology.add_veth()
    daemon.detach(daemon.attach(interface=workload.host_if).id)
    before = daemon.descriptors()
    with topology.host.inside(), closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as taken:
        taken.bind((DNS4, port))
        said = refusal(daemon, interface=workload.host_if)
        assert f"reserve a DNS port on {DNS4}: none free in {port}-{port}" in said
        assert "widen dns.port_min..dns.port_max" in said
    assert daemon.attachments() == []
    assert daemon.link_pins() == []
    attached = daemon.attach(interface=workload.host_if)
    assert "none free" in refusal(daemon, interface=spare.host_if)
    assert topology.arrived(spare, UDP4, OUTSIDE4) == 3
    daemon.detach(attached.id)
    wait_for(lambda: daemon.descriptors() <= before, "its descriptors to be closed")


# -- where DNS listens -------------------------------------------------------------------------------------------------


def test_loopback_dns_of_an_interface_is_warned_about(fresh: Fresh, start: Start) -> None:
    topology = fresh.topology()
    workload = topology.add_veth()
    daemon = start(topology, config={"dns": {"listen_addr": "127.0.0.1"}})
    daemon.attach(interface=workload.host_if)
    assert "set dns.listen_addr to an address of this host" in daemon.wait_event("dns_on_loopback")["remedy"]


def has_dummy(topology: Topology) -> bool:
    """Tell whether this kernel can make dummy interfaces (a module of its own, which small kernels lack)."""
    done = topology.host.run("ip", "link", "add", "probe0", "type", "dummy", check=False)
    topology.host.run("ip", "link", "del", "probe0", check=False)
    return done.returncode == 0


@pytest.mark.parametrize("network", ["127.53.0.0/24", "169.254.100.0/24", "fd00:53::/64"])
def test_each_attachment_can_have_an_address_of_its_own(
    fresh: Fresh, start: Start, cgroups: Callable[[str], Cgroup], network: str
) -> None:
    topology = fresh.topology()
    fresh.names(topology, f"good.test. 300 IN A {OUTSIDE4}")
    workloads = [topology.add_veth(), topology.add_veth()]
    policy = {"default": {"mode": "allowlist", "dns": {"mode": "allowlist", "allow": ["good.test"]}}}
    daemon = start(topology, policy=policy, config={"dns": {"listen_addr": network}})
    interfaces = topology.host.interfaces()
    if not network.startswith("127.") and not has_dummy(topology):
        said = refusal(daemon, interface=workloads[0].host_if)
        assert "to dummy interface netfence0: " in said
        assert "load the kernel module `dummy`, or set dns.listen_addr" in said
        return
    on_loopback = network.startswith("127.")  # only processes of the host reach it: for cgroups, then
    groups = [cgroups(f"own-address-{number}") for number in range(2)]
    attached = [
        daemon.attach(cgroup=group) if on_loopback else daemon.attach(interface=each.host_if)
        for each, group in zip(workloads, groups, strict=True)
    ]
    assert {each.dns[1] for each in attached} == {53}
    assert len({each.dns[0] for each in attached}) == 2
    own = topology.host.interfaces() - interfaces
    assert own == (set() if on_loopback else {"netfence0"})
    for each, workload, group in zip(attached, workloads, groups, strict=True):
        place = fresh.agent(netns=topology.host, cgroup=group) if on_loopback else fresh.agent(netns=workload.netns)
        assert [str(record.rdata) for record in place.query(each.dns, "good.test").rr] == [OUTSIDE4]
    if not on_loopback:  # what a death before or behind the row leaves
        left = str(ipaddress.ip_address(attached[0].dns[0]) + 9)
        topology.host.ip(f"addr add {left}/{ipaddress.ip_address(left).max_prefixlen} dev netfence0")
        daemon.kill()
        daemon.start()
        assert f"{left}/" not in topology.host.run("ip", "addr", "show", "dev", "netfence0").stdout
        again = fresh.agent(netns=workloads[0].netns).query(attached[0].dns, "good.test")
        assert [str(record.rdata) for record in again.rr] == [OUTSIDE4]
    for each in attached:
        daemon.detach(each.id)
    assert topology.host.interfaces() == interfaces


# -- start and stop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tcx", [pytest.param(True, marks=needs_tcx), False], ids=["tcx", "clsact"])
def test_stopping_with_detach_takes_the_fences_off(
    fresh: Fresh, start: Start, cgroups: Callable[[str], Cgroup], *, tcx: bool
) -> None:
    """All kinds, and everything that was made for them."""
    topology = fresh.topology()
    plain, early, group = topology.add_veth(), topology.add_veth(), cgroups(f"detached-{tcx}")
    topology.queues(early.host_if)
    config: dict[str, Any] = {"enforcement": {"on_shutdown": "detach"}}
    if has_dummy(topology):
        config["dns"] = {"listen_addr": "169.254.100.0/24"}
    interfaces = topology.host.interfaces()
    daemon = start(topology, config=config, tcx=tcx)
    daemon.attach(interface=plain.host_if)
    daemon.attach(interface=early.host_if, hook="xdp")
    daemon.attach(cgroup=group)
    assert ("netfence0" in topology.host.interfaces()) == ("dns" in config)
    with Agent(netns=topology.host, cgroup=group) as agent:
        assert [topology.arrived(each, UDP4, OUTSIDE4) for each in (plain, early)] == [0, 0]
        with pytest.raises(PermissionError):
            agent.udp().sendto(b"x", (OUTSIDE4, 9))
        assert daemon.stop() == 0
        agent.udp().sendto(b"x", (OUTSIDE4, 9))
    assert [topology.arrived(each, UDP4, OUTSIDE4) for each in (plain, early)] == [3, 3]
    assert daemon.leftovers() == {}
    assert topology.host.interfaces() == interfaces
    assert not [*daemon.pins.iterdir()]
    with topology.host.inside(), Rtnl() as netlink:
        assert get_xdp_programs(netlink, socket.if_nametoindex(early.host_if)) == []
    daemon.start()
    assert daemon.attachments() == []


def test_systemd_waits_while_fences_are_taken_off(fresh: Fresh, start: Start, tmp_path: Path) -> None:
    topology = fresh.topology()
    workloads = [topology.add_veth() for _ in range(3)]
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        config = {"enforcement": {"on_shutdown": "detach"}}
        daemon = start(topology, config=config, env={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert manager.recv(100).splitlines()[0] == b"READY=1"
        for workload in workloads:
            daemon.attach(interface=workload.host_if)
        assert daemon.stop() == 0
        assert manager.recv(100) == b"STOPPING=1"
        assert [manager.recv(100) for _ in workloads] == [b"EXTEND_TIMEOUT_USEC=30000000"] * len(workloads)


def test_systemd_is_told(fresh: Fresh, start: Start, tmp_path: Path) -> None:
    topology = fresh.topology()
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        daemon = start(topology, env={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert manager.recv(100).splitlines()[0] == b"READY=1"
        assert daemon.stop() == 0
        assert manager.recv(100) == b"STOPPING=1"
        daemon.launch()
        assert manager.recv(100).splitlines()[0] == b"READY=1"
        assert daemon.status().attachment_count == 0  # the API is open by then


def test_an_idle_daemon_is_small(daemon: Fenced) -> None:
    assert daemon.memory_kb() <= 90 * 1024


def test_raw_senders_in_a_cgroup_are_told_at_attach(
    daemon: Fenced, topology: Topology, cgroups: Callable[[str], Cgroup]
) -> None:
    group = cgroups("raw")
    with Agent(netns=topology.host, cgroup=group) as agent:
        attached = daemon.attach(cgroup=group)
        warned = wait_for(lambda: daemon.own_events("raw_senders", attached.id), "the warning")
        assert warned[0]["pids"] == [agent.pid]
        daemon.detach(attached.id)
