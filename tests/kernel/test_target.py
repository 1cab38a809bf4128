"""target and cgroups against real interfaces, routes, addresses and cgroups."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import needs
from hooktools import Netns, cgroup, cgroup_root, in_cgroup, inside_netns, open_descriptors, run, tun_device, until
from netfence.dataplane import cgroups, probe, rtnl
from netfence.dataplane.target import (
    ARPHRD_ETHER,
    ARPHRD_NONE,
    PHYSICAL,
    Direction,
    LinkLayer,
    choose_direction,
    host_addresses,
    own_addresses,
    resolve_interface,
)
from netfence.errors import InvalidError, NotFoundError, PreconditionError


@pytest.fixture(autouse=True)
def machine() -> Iterator[Netns]:
    """Be in a fresh namespace; the machine's own is yielded."""
    with Netns.current() as outside, inside_netns():
        yield outside


def packed(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def add_link(kind: str, arguments: str = "") -> None:
    """Add x0 of a kind; skip when this kernel was built without it, fail when it has it (distribution kernels do)."""
    try:
        run(f"ip link add x0 type {kind} {arguments}")
    except AssertionError as error:
        if "Unknown device type" not in str(error) and "not supported" not in str(error):
            raise
        needs.without_link_kind(kind)


def test_veth() -> None:
    add_link("veth", "peer name y0")
    target = resolve_interface("x0")
    assert (target.name, target.ifindex, target.kind) == ("x0", socket.if_nametoindex("x0"), "veth")
    assert (target.layer, target.master, target.bridge) == (LinkLayer.L2, 0, 0)
    assert not target.is_bond_member
    assert not target.has_default_route
    assert choose_direction(target, None) is Direction.WORKLOAD


@pytest.mark.parametrize("mode", ["tun", "tap"])
def test_tun_and_tap_are_told_apart(mode: str) -> None:
    with tun_device("t0", mode):
        target = resolve_interface("t0")
        assert target.kind == mode
        assert target.layer is (LinkLayer.L3 if mode == "tun" else LinkLayer.L2)
        assert (target.arphrd == ARPHRD_NONE) == (mode == "tun")
        assert choose_direction(target, None) is Direction.WORKLOAD


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("dummy", ""), ("bond", ""), ("wireguard", ""), ("vlan", "link y0 id 5"), ("macvtap", "link y0")],
)
def test_ways_out(kind: str, arguments: str) -> None:
    run("ip link add y0 type veth peer name y1")
    add_link_with(kind, arguments)
    target = resolve_interface("x0")
    assert target.kind == kind
    assert choose_direction(target, None) is Direction.HOST


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("bridge", ""), ("ifb", ""), ("vrf", "table 9"), ("macvlan", "link y0"), ("ipvlan", "link y0")],
)
def test_kinds_that_cannot_tell(kind: str, arguments: str) -> None:
    run("ip link add y0 type veth peer name y1")
    add_link_with(kind, arguments)
    with pytest.raises(PreconditionError, match=f"a {kind} interface .*--direction"):
        choose_direction(resolve_interface("x0"), None)


def add_link_with(kind: str, arguments: str) -> None:
    """Add x0, on top of y0 where the kind stands on another interface."""
    if arguments.startswith("link"):
        _, lower, *rest = arguments.split()
        try:
            run(f"ip link add link {lower} name x0 type {kind} {' '.join(rest)}")
        except AssertionError as error:
            if "Unknown device type" not in str(error):
                raise
            needs.without_link_kind(kind)
    else:
        add_link(kind, arguments)


def test_bridge_port_and_own_addresses() -> None:
    """A bridge port answers for its own IPv6 addresses and for its bridge's, not for other interfaces'."""
    add_link("veth", "peer name y0")
    run("ip link add br0 type bridge")
    run("ip link set x0 master br0")
    for device, address in (("x0", "fd00:1::1"), ("br0", "fd00:2::1"), ("y0", "fd00:3::1")):
        run(f"ip addr add {address}/64 dev {device} nodad")
    run("ip addr add 10.0.0.1/8 dev x0")
    target = resolve_interface("x0")
    assert target.bridge == target.master == socket.if_nametoindex("br0")
    assert choose_direction(target, None) is Direction.WORKLOAD
    assert set(target.own_addresses) == {packed("fd00:1::1"), packed("fd00:2::1")}
    run("ip addr del fd00:2::1/64 dev br0")
    assert own_addresses(target.ifindex) == (packed("fd00:1::1"),)
    run("ip link del x0")
    assert own_addresses(target.ifindex) == ()


def test_bond_member_is_refused() -> None:
    add_link("bond")
    run("ip link add m0 type veth peer name y0")
    run("ip link set m0 master x0")
    target = resolve_interface("m0")
    assert target.is_bond_member
    assert target.bridge == 0
    with pytest.raises(PreconditionError, match="member of a bond"):
        choose_direction(target, None)


@pytest.mark.parametrize(
    "route",
    [
        "ip route add default via 10.0.0.2",
        "ip route add default via 10.0.0.2 table 77",
        "ip route add default nexthop via 10.1.0.2 nexthop via 10.0.0.2",
        "ip -6 route add default via fd00:1::2",
    ],
    ids=["main", "other-table", "multipath", "ipv6"],
)
def test_veth_with_the_default_route_is_refused(route: str) -> None:
    add_link("veth", "peer name y0")
    run("ip link add z0 type veth peer name z1")
    for device in ("x0", "y0", "z0", "z1"):
        run(f"ip link set {device} up")
    run("ip addr add 10.0.0.1/24 dev x0")
    run("ip addr add fd00:1::1/64 dev x0 nodad")
    run("ip addr add 10.1.0.1/24 dev z0")
    assert choose_direction(resolve_interface("x0"), None) is Direction.WORKLOAD
    run(route)
    assert resolve_interface("x0").has_default_route
    assert not resolve_interface("y0").has_default_route
    with pytest.raises(PreconditionError, match="carries the default route"):
        choose_direction(resolve_interface("x0"), None)


def test_a_default_that_leads_nowhere_is_no_way_out() -> None:
    add_link("veth", "peer name y0")
    run("ip link set x0 up")
    run("ip route add unreachable default")
    run("ip route add local default dev x0 table 100")  # what a transparent proxy does: every address is this host
    assert not resolve_interface("x0").has_default_route


def test_alternative_name_resolves_to_the_real_one() -> None:
    add_link("veth", "peer name y0")
    run("ip link property add dev x0 altname the-uplink-of-the-tenant")
    assert resolve_interface("the-uplink-of-the-tenant").name == "x0"


@pytest.mark.parametrize("name", ["", "a b", "a/b", "x" * 200, " x0", "x\0"])
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidError, match="not an interface name"):
        resolve_interface(name)


def test_missing_interface_and_loopback() -> None:
    with pytest.raises(NotFoundError, match="no such interface in this network namespace"):
        resolve_interface("nothere0")
    with pytest.raises(NotFoundError, match="no such interface"):
        resolve_interface("a-name-that-is-longer-than-fifteen")
    with pytest.raises(InvalidError, match="loopback"):
        resolve_interface("lo")


def test_a_link_type_that_carries_neither_is_refused() -> None:
    add_link("gre", "local 10.0.0.1 remote 10.0.0.2")
    with pytest.raises(InvalidError, match="link type 778"):
        resolve_interface("x0")


def test_physical_is_what_has_no_kind(machine: Netns) -> None:
    """Only a real NIC has none; the machine's own is looked at, not touched."""
    with machine.entered():
        with rtnl.Rtnl() as netlink:
            nics = [link.name for link in rtnl.get_links(netlink) if not link.kind and link.arphrd == ARPHRD_ETHER]
        if not nics:
            needs.without_nic()
        target = resolve_interface(nics[0])
    assert target.kind == PHYSICAL
    assert choose_direction(target, None) is Direction.HOST


def test_host_addresses_are_all_of_them() -> None:
    add_link("veth", "peer name y0")
    run("ip addr add 10.0.0.1/8 dev x0")
    run("ip addr add 10.9.9.9 peer 10.9.9.1 dev y0")
    run("ip addr add fd00::1/64 dev y0 nodad")
    found = host_addresses()
    assert {packed(each) for each in ("127.0.0.1", "::1", "10.0.0.1", "10.9.9.9", "fd00::1")} <= found
    assert packed("10.9.9.1") not in found


class TestCgroup:
    def test_path_id_and_descriptor(self, tmp_path: Path) -> None:
        with cgroup() as path:
            link = tmp_path / "link"
            link.symlink_to(path)
            for given in (str(path), f"{path}/", f"{path.parent}/./{path.name}", str(link)):
                target = cgroups.resolve_cgroup(given)
                assert (target.path, target.cgroup_id) == (str(path), path.stat().st_ino)
                assert os.fstat(target.fd).st_ino == target.cgroup_id
                assert not os.get_inheritable(target.fd)
                target.close()

    def test_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match="no such directory"):
            cgroups.resolve_cgroup(str(cgroup_root() / "no-such"))
        with pytest.raises(InvalidError, match="not an absolute path"):
            cgroups.resolve_cgroup("relative/path")
        with pytest.raises(InvalidError, match="not a cgroup"):
            cgroups.resolve_cgroup(str(tmp_path))
        with pytest.raises(InvalidError, match="not a directory"):
            cgroups.resolve_cgroup(str(cgroup_root() / "cgroup.procs"))
        with pytest.raises(InvalidError, match="root cgroup"):
            cgroups.resolve_cgroup(str(cgroup_root()))

    def test_refusals_leak_no_descriptor(self, tmp_path: Path) -> None:
        before = open_descriptors()
        for _ in range(5):
            with pytest.raises(InvalidError):
                cgroups.resolve_cgroup(str(tmp_path))
        assert open_descriptors() == before

    def test_version_one_is_refused(self, tmp_path: Path) -> None:
        run(f"mount -t cgroup -o none,name=nf-test-{os.getpid()} cgroup {tmp_path}")  # a hierarchy without controllers
        try:
            with pytest.raises(InvalidError, match="version 1"):
                cgroups.resolve_cgroup(str(tmp_path))
        finally:
            run(f"umount {tmp_path}")

    def test_a_cgroup_with_the_daemon_in_it_is_refused(self) -> None:
        code = """
import sys
from netfence.dataplane.cgroups import resolve_cgroup
from netfence.errors import InvalidError
try: resolve_cgroup(sys.argv[1] if len(sys.argv) > 1 else PATH); print("taken")
except InvalidError as error: print(error)
"""
        with cgroup() as path, cgroup("in", path) as child, cgroup("beside", path) as beside:
            for given, refused in ((path, True), (child, True), (beside, False)):
                said = in_cgroup(child, code.replace("PATH", repr(str(given)))).stdout
                assert ("netfenced itself runs inside it" in said) == refused, said
                assert (said == "taken\n") == (not refused)

    def test_own_cgroup_and_who_shares_it(self) -> None:
        code = "from netfence.dataplane.cgroups import daemon_cgroup; print(daemon_cgroup())"
        with cgroup() as path:
            identity = path.stat().st_ino
            assert in_cgroup(path, code).stdout == f"({identity}, ())\n"
            other = subprocess.Popen(["sleep", "60"])
            try:
                (path / "cgroup.procs").write_text(str(other.pid))
                assert in_cgroup(path, code).stdout == f"({identity}, ({other.pid},))\n"
                said = in_cgroup(
                    path,
                    "from netfence.dataplane.cgroups import require_own_cgroup as r\n"
                    "from netfence.errors import PreconditionError\n"
                    "try: r('eth0')\nexcept PreconditionError as e: print(e)",
                ).stdout
                assert f"1 other processes share that (pid {other.pid} is one)" in said
            finally:
                other.kill()
                other.wait()

    def test_own_children_are_ours(self) -> None:
        code = """
import subprocess
from netfence.dataplane.cgroups import daemon_cgroup
child = subprocess.Popen(["sleep", "60"])
print(daemon_cgroup()[1])
child.kill(); child.wait()
"""
        with cgroup() as path:
            assert in_cgroup(path, code).stdout == "()\n"

    def test_raw_senders_below_too(self) -> None:
        with cgroup() as path, cgroup("in", path) as child:
            sleeper = subprocess.Popen(["sleep", "60"])
            plain = subprocess.Popen(["setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw", "sleep", "60"])
            try:
                for process in (sleeper, plain):
                    (child / "cgroup.procs").write_text(str(process.pid))
                until(lambda: not probe.effective_capabilities(plain.pid) >> 13 & 1)
                assert cgroups.raw_senders(str(path)) == (sleeper.pid,)
            finally:
                for process in (sleeper, plain):
                    process.kill()
                    process.wait()
            assert cgroups.raw_senders(str(path)) == ()
