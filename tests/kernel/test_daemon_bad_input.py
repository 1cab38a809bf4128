"""Bad input to a real daemon and its command line: a clear error, the right exit status, everything else untouched."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from daemons import Fenced, Start
from harness.agent import Agent
from harness.cgroup import root as cgroup_root
from harness.daemon import PROGRAM
from harness.fresh import Fresh
from harness.packets import UDP4
from harness.topology import DNS4, Topology, Workload
from xdp_tools import foreign_xdp

pytestmark = pytest.mark.userspace

OUTSIDE4 = "203.0.113.99"


@pytest.fixture(scope="module")
def daemon(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fenced]:
    """Give a daemon that lives as long as the test module."""
    with Fenced(topology, tmp_path_factory.mktemp("netfenced")) as running:
        yield running


@pytest.fixture
def bench(fresh: Fresh, start: Start) -> Fenced:
    """Give a running daemon that the test may break."""
    return start(fresh.topology())


def refused(daemon: Fenced, *arguments: str, status: int = 1) -> str:
    """Run a command that must fail with this status, one line on stderr, and nothing changed; return the line."""
    before = (daemon.attachments(), daemon.link_pins(), daemon.descriptors())
    done = daemon.cli(*arguments, check=False)
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("netfenced: ")
    assert (daemon.attachments(), daemon.link_pins()) == before[:2]
    return line.removeprefix("netfenced: ")


def refuses_to_start(daemon: Fenced, **changes: Any) -> str:
    """Stop the daemon, change its configuration, and return why it does not start then."""
    daemon.stop()
    daemon.write_config(changes)
    daemon.launch()
    said = daemon.ended_saying()
    assert said.startswith("netfenced: ")
    assert not daemon.socket.exists()
    return said.removeprefix("netfenced: ")


# -- attach and detach -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["-i", "nowhere0"], 1, "'nowhere0': no such interface in this network namespace; see `ip link`"),
        (["-i", "vet0"], 1, "'vet0': no such interface in this network namespace; did you mean 'veth0'?"),
        (["-g", "/sys/fs/cgroup/nowhere"], 1, "attach to cgroup '/sys/fs/cgroup/nowhere': no such directory"),
        (["-g", "/tmp"], 1, "attach to cgroup '/tmp': not a cgroup"),
        (["-g", str(cgroup_root())], 1, "the root cgroup holds the whole host"),
        (["-i", "lo"], 1, "attach to interface 'lo': nothing leaves the host by the loopback"),
        (["-i", "a b"], 1, "not an interface name"),
        ([], 2, "--interface"),
        (["-i", "veth0", "-g", "/sys/fs/cgroup/x"], 2, "--cgroup"),
        (["-i", "veth0", "--metadata", "novalue"], 2, "not of the form key=value"),
        (["-i", "veth0", "--metadata", "k=1,k=2"], 2, "'k' is given twice"),
        (["-i", "veth0", "--metadata", f"k={'x' * 5000}"], 2, "bytes"),
        (["-i", "veth0", "--hook", "xdp", "--direction", "host"], 1, "XDP sees only what comes in"),
        (["-i", "lo", "--hook", "xdp"], 1, "attach to interface 'lo': nothing leaves the host by the loopback"),
        (["-i", "up0", "--hook", "xdp"], 1, "carries the default route"),
        (["-g", "/sys/fs/cgroup/x", "--hook", "xdp"], 2, "--hook and --direction are for interfaces"),
        (["-i", "up0", "--direction", "sideways"], 2, "sideways"),
    ],
    ids=[
        "interface", "interface-mistyped", "cgroup", "no-cgroup", "root-cgroup", "loopback", "name", "neither", "both",
        "metadata", "metadata-twice", "metadata-long", "xdp-host", "xdp-loopback", "xdp-default-route", "xdp-cgroup",
        "direction",
    ],
)  # fmt: skip
def test_attach(daemon: Fenced, workload: Workload, arguments: list[str], status: int, says: str) -> None:
    assert workload.host_if == "veth0"
    assert says in refused(daemon, "attach", *arguments, status=status)


def test_a_cgroup_with_the_daemon_in_it(daemon: Fenced) -> None:
    assert daemon._cgroup is not None
    said = refused(daemon, "attach", "-g", str(daemon._cgroup.path))
    assert "netfenced itself runs inside it" in said


def test_a_bridge_does_not_tell_its_direction(daemon: Fenced, topology: Topology) -> None:
    topology.host.ip("link add plain0 type bridge")
    assert "--direction workload" in refused(daemon, "attach", "-i", "plain0")
    topology.host.ip("link del plain0")


def test_the_default_route_gives_the_workloads_own_end_away(fresh: Fresh, start: Start) -> None:
    topology = fresh.topology()
    daemon = start(topology)
    assert "carries the default route" in refused(daemon, "attach", "-i", "up0")
    daemon.detach(daemon.attach(interface="up0", direction="host").id)


def test_direction_host_wants_a_cgroup_of_the_daemons_own(fresh: Fresh, start: Start) -> None:
    topology = fresh.topology()
    daemon = start(topology)
    with Agent(netns=topology.host, cgroup=daemon._cgroup):
        said = refused(daemon, "attach", "-i", "up0", "--direction", "host")
    assert "1 other processes share that" in said
    assert "start netfenced in a cgroup of its own" in said


def test_an_interface_that_has_an_xdp_program(daemon: Fenced, topology: Topology) -> None:
    workload = topology.add_veth()
    with foreign_xdp(topology.host, workload.host_if) as theirs:
        said = refused(daemon, "attach", "-i", workload.host_if, "--hook", "xdp")
        assert f"attach xdp on {workload.host_if}: it has XDP program {theirs} (somebody), and takes only one" in said
        daemon.detach(daemon.attach(interface=workload.host_if).id)  # as the message says
    daemon.detach(daemon.attach(interface=workload.host_if, hook="xdp").id)


def test_detach_of_nothing(daemon: Fenced) -> None:
    assert refused(daemon, "detach", "--id", "nobody") == "detach: no attachment nobody; see `netfenced list`"


def test_nobody_to_ask(tmp_path: Path, topology: Topology) -> None:
    for arguments in (["list"], ["status"], ["attach", "-i", "veth0"], ["detach", "--id", "x"]):
        done = topology.host.run(str(PROGRAM), "--socket", str(tmp_path / "none.sock"), *arguments, check=False)
        assert done.returncode == 3
        assert done.stderr.startswith(f"netfenced: connect to the daemon on {tmp_path}/none.sock: ")


def test_no_policy_source(fresh: Fresh, start: Start) -> None:
    topology = fresh.topology()
    workload = topology.add_veth()
    daemon = start(topology, policy=None)
    assert daemon.wait_event("no_policy_source")["level"] == "warning"
    said = refused(daemon, "attach", "-i", workload.host_if)
    assert "neither control_plane.url nor policy_file is set" in said
    assert daemon.cli_json("status")["attachment_count"] == 0


def test_garbage_on_the_dns_port(daemon: Fenced, workload: Workload, agent: Agent) -> None:
    attached = daemon.attach(interface=workload.host_if)
    with agent.udp() as sock:
        for garbage in (b"", b"\0", os.urandom(12), b"\xff" * 512, os.urandom(1400)):
            sock.sendto(garbage, attached.dns)
    with agent.connect(*attached.dns) as connection:
        connection.send(b"\xff\xffGET / HTTP/1.1\r\n\r\n")
    assert agent.query(attached.dns, "any.test").header.rcode == 5
    assert not [entry for entry in daemon.events() if entry["level"] == "error"]
    daemon.detach(attached.id)


# -- start -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dns": {"listen_adr": "127.0.0.1"}}, "dns.listen_adr"),
        ({"dns": {"listen_addr": "0.0.0.0"}}, "dns.listen_addr"),
        ({"log_level": "loud"}, "log_level"),
        ({"policy_file": "/nowhere/policy.yaml"}, "/nowhere/policy.yaml: read policy file: No such file or directory"),
        ({"control_plane": {"url": "192.0.2.1:1"}}, "plaintext to another host is not allowed"),
        (
            {"control_plane": {"url": "192.0.2.1:1", "tls": {"ca": "/nowhere/ca.pem"}}},
            "control_plane.tls.ca: /nowhere/ca.pem: no such file or directory; create it",
        ),
        ({"socket": "/nowhere/netfence.sock"}, "create the directory /nowhere"),
        ({"data_dir": "/proc/nowhere"}, "open data_dir /proc/nowhere"),
    ],
    ids=["key", "wildcard", "level", "policy-file", "plaintext", "ca", "socket", "data-dir"],
)
def test_configuration(bench: Fenced, changes: dict[str, Any], says: str) -> None:
    assert says in refuses_to_start(bench, **changes)


def test_a_bad_policy_file(bench: Fenced) -> None:
    bench.stop()
    bench.write_policy("default: {mode: open}\nattachments: [{mode: block_all}]\n")
    bench.launch()
    bench.ended_saying()
    lines = bench.log_file.read_text().splitlines()[-2:]
    assert [line.removeprefix(f"netfenced: {bench.policy_file}:").split(":")[:2] for line in lines] == [
        ["1", " default.mode"],
        ["2", " attachments[0].match"],
    ]


def test_no_bpffs(bench: Fenced, tmp_path: Path) -> None:
    said = refuses_to_start(bench, bpffs_dir=str(tmp_path / "plain"))
    assert f"use {tmp_path}/plain for pins: it is not on a bpf file system; `mount -t bpf bpf /sys/fs/bpf`" in said
    assert not (tmp_path / "plain").exists()


def test_a_socket_in_use(bench: Fenced) -> None:
    bench.stop()
    with closing(socket.socket(socket.AF_UNIX)) as other:
        other.bind(str(bench.socket))
        other.listen()
        bench.launch()
        assert f"listen on socket {bench.socket}: another process is listening on it" in bench.ended_saying()
        assert bench.socket.exists()
    bench.socket.unlink()


@pytest.mark.parametrize("shared", ["data_dir", "bpffs_dir"])
def test_a_second_daemon(fresh: Fresh, start: Start, tmp_path: Path, shared: str) -> None:
    """It is refused by what both would write, and the first one does not feel it: then, nor when it starts again."""
    topology = fresh.topology()
    workload = topology.add_veth()
    bench = start(topology)
    attached = bench.attach(interface=workload.host_if)
    pins = set(bench.pins.rglob("*"))
    own = {"data_dir": str(tmp_path / "data2"), "bpffs_dir": str(bench.bpffs / "second")}
    own[shared] = str(bench.directory / "data") if shared == "data_dir" else str(bench.pins)
    environment = {f"NETFENCE_{key.upper()}": value for key, value in own.items()}
    environment["NETFENCE_SOCKET"] = str(tmp_path / "second.sock")
    with bench.netns.inside():
        done = subprocess.run(
            [str(PROGRAM), "start", "--config", str(bench.config_file)],
            env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert "another netfenced uses" in done.stderr.splitlines()[-1]
    for again in (False, True):
        if again:
            bench.restart()
        assert [info.id for info in bench.attachments()] == [attached.id]
        assert pins <= set(bench.pins.rglob("*"))  # more may come behind the attach
        assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
    assert not bench.events("recovered")  # its state was whole
    bench.detach(attached.id)
    assert topology.arrived(workload, UDP4, OUTSIDE4) == 3


def test_missing_capabilities_are_named(bench: Fenced) -> None:
    if shutil.which("setpriv") is None:
        pytest.fail("setpriv is missing: apt install util-linux")
    bench.stop()
    drop = "-bpf,-net_admin,-sys_admin,-perfmon"
    with bench.netns.inside():
        done = subprocess.run(
            ["setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}", "--", str(PROGRAM), "start", "--config",
             str(bench.config_file)],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert "start netfenced: operation not permitted; needs CAP_BPF and CAP_NET_ADMIN" in done.stderr.splitlines()[-1]


def test_a_listen_address_that_is_not_ours(fresh: Fresh, start: Start) -> None:
    topology = fresh.topology()
    workload = topology.add_veth()
    daemon = start(topology, config={"dns": {"listen_addr": "192.0.2.99"}})
    said = refused(daemon, "attach", "-i", workload.host_if)
    assert "bind DNS server to 192.0.2.99 port 11000: " in said
    assert "set dns.listen_addr to an address of this host" in said


def test_no_free_port(fresh: Fresh, start: Start) -> None:
    topology = fresh.topology()
    workload = topology.add_veth()
    daemon = start(topology, config={"dns": {"port_min": 12345, "port_max": 12346}})
    with ExitStack() as stack, topology.host.inside():
        for port in (12345, 12346):
            sock = stack.enter_context(closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
            sock.bind((DNS4, port))
        said = refused(daemon, "attach", "-i", workload.host_if)
    assert said.startswith(f"reserve a DNS port on {DNS4}: none free in 12345-12346")
    daemon.detach(daemon.attach(interface=workload.host_if).id)
