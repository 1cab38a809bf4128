"""The daemon does all its work with what packaging/netfenced.service leaves it, and with less it says what it lacks."""

from __future__ import annotations

import grp
import json
import os
import select
import signal
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from confined import Confined, capabilities
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.deadline import SLOWNESS, wait_for
from harness.fresh import Fresh
from harness.packets import UDP4, UDP6
from harness.topology import Topology, Workload
from netfence.dataplane import probe
from netfence.store import DATABASE

pytestmark = pytest.mark.userspace  # tried on 5.10, 6.1 and 7.3: the same; a minute in an emulated guest

OUTSIDE4, OTHER4, OUTSIDE6, LEARNED4 = "203.0.113.99", "203.0.113.98", "2001:db8:77::1", "203.0.113.80"
DNS: dict[str, Any] = {"mode": "allowlist", "allow": ["good.test"]}
POLICY: dict[str, Any] = {"default": {"mode": "allowlist", "allow_cidrs": [OUTSIDE4], "dns": DNS}}
WIDER: dict[str, Any] = {"default": {"mode": "allowlist", "allow_cidrs": [OUTSIDE4, OTHER4], "dns": DNS}}
NOTHING: dict[str, Any] = {"default": {"mode": "block_all"}}


@pytest.fixture
def topology(fresh: Fresh) -> Topology:
    """Give namespaces of the test's own, with a name server."""
    topology = fresh.topology()
    fresh.names(topology, f"good.test. 300 IN A {LEARNED4}")
    return topology


def facts(pid: int) -> dict[str, str]:
    """Read /proc/<pid>/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def query(workload: Workload, server: tuple[str, int]) -> list[str]:
    with Agent(netns=workload.netns) as agent:
        return [str(record.rdata) for record in agent.query(server, "good.test").rr]


def test_the_confinement_is_the_units(topology: Topology, tmp_path: Path) -> None:
    """What the other tests try is what the kernel holds the daemon to: compiling the programs included."""
    with Confined(topology, tmp_path / "netfenced", cold=True) as daemon:
        told = facts(daemon.pid)
        wanted = sum(1 << probe.CAPABILITIES[name] for name in capabilities())
        for kind in ("CapBnd", "CapPrm", "CapEff"):
            assert int(told[kind], 16) == wanted, kind
        assert (told["NoNewPrivs"], told["Seccomp"]) == ("1", "2")
        assert daemon.events("capability_missing") == []


@pytest.mark.parametrize("hook", ["tc", "clsact", "xdp"])
def test_an_interface(topology: Topology, tmp_path: Path, hook: str) -> None:
    """Attach, resolve, take over after kill -9, change one rule of the policy and then all of it, detach."""
    workload = topology.add_veth()

    def passed() -> list[int]:
        sent = [(UDP4, OUTSIDE4), (UDP4, LEARNED4), (UDP4, OTHER4), (UDP6, OUTSIDE6)]
        return [topology.arrived(workload, packet, where) for packet, where in sent]

    with Confined(topology, tmp_path / "netfenced", policy=POLICY, tcx=hook != "clsact") as daemon:
        attached = daemon.attach(interface=workload.host_if, hook="xdp" if hook == "xdp" else "tc")
        topology.queues(workload.host_if)
        assert query(workload, attached.dns) == [LEARNED4]
        assert passed() == [3, 3, 0, 0]
        daemon.kill()
        assert passed() == [3, 3, 0, 0]
        daemon.start()
        assert passed() == [3, 3, 0, 0]
        daemon.set_policy(WIDER)
        assert passed() == [3, 3, 3, 0]
        daemon.set_policy(POLICY)
        assert passed() == [3, 3, 0, 0]
        daemon.set_policy(NOTHING)
        assert passed() == [0, 0, 0, 0]
        daemon.detach(attached.id)
        topology.queues(workload.host_if)
        assert passed() == [3, 3, 3, 3]


def test_a_cgroup(topology: Topology, tmp_path: Path, cgroups: Callable[[str], Cgroup]) -> None:
    """The same, with an address of 127/8 and port 53 for its DNS server."""
    group = cgroups("box")
    config = {"dns": {"listen_addr": "127.53.0.0/24"}}
    with Confined(topology, tmp_path / "netfenced", policy=POLICY, config=config) as daemon:
        attached = daemon.attach(cgroup=group)
        assert attached.dns == ("127.53.0.1", 53)
        with Agent(netns=topology.host, cgroup=group) as agent:

            def passes(address: str) -> bool:
                try:
                    agent.udp(socket.AF_INET).sendto(b"x", (address, 9))
                except PermissionError:
                    return False
                return True

            assert [passes(address) for address in (OUTSIDE4, OTHER4, LEARNED4)] == [True, False, False]
            assert [str(record.rdata) for record in agent.query(attached.dns, "good.test").rr] == [LEARNED4]
            daemon.kill()
            assert [passes(address) for address in (OUTSIDE4, OTHER4, LEARNED4)] == [True, False, True]
            daemon.start()
            daemon.set_policy(WIDER)
            assert [passes(address) for address in (OUTSIDE4, OTHER4, LEARNED4)] == [True, True, True]
            daemon.detach(attached.id)


def test_a_group_for_the_socket(topology: Topology, tmp_path: Path) -> None:
    """The unit gives no CAP_CHOWN: a file may be given to one's own groups without."""
    group = grp.getgrgid(1)
    with Confined(
        topology, tmp_path / "netfenced", groups=[group.gr_gid], config={"socket_group": group.gr_name}
    ) as daemon:
        assert daemon.socket.stat().st_gid == group.gr_gid


# -- what is missing ---------------------------------------------------------------------------------------------------


def refusal(topology: Topology, directory: Path, **arguments: Any) -> tuple[dict[str, dict[str, str]], str]:
    """Start a daemon that must not come up; return what it says of each missing capability, and its last line."""
    with pytest.raises(RuntimeError) as raised, Confined(topology, directory, **arguments):
        pytest.fail("it came up")
    lines = str(raised.value).splitlines()
    told = [json.loads(line) for line in lines if line.startswith("{")]
    assert all(entry["level"] == "error" for entry in told if entry["event"] == "capability_missing")
    return {entry["capability"]: entry for entry in told if entry["event"] == "capability_missing"}, lines[-1]


@pytest.mark.parametrize(
    ("name", "purpose"),
    [
        ("CAP_BPF", "load BPF programs and make their maps"),
        ("CAP_PERFMON", "load BPF programs that calculate with packet pointers"),
        ("CAP_NET_ADMIN", "attach to interfaces and cgroups"),
    ],
)
def test_a_missing_capability_is_named_with_what_needs_it(
    topology: Topology, tmp_path: Path, name: str, purpose: str
) -> None:
    told, last = refusal(topology, tmp_path / "netfenced", without=[name])
    assert list(told) == [name]
    assert told[name]["needed_for"] == purpose
    assert told[name]["remedy"] == f"add {name} to CapabilityBoundingSet= of the service, or start as root"
    assert last == f"netfenced: start netfenced: operation not permitted; needs {name}"


def test_port_53_needs_a_capability(topology: Topology, tmp_path: Path) -> None:
    config = {"dns": {"listen_addr": "127.53.0.0/24"}}
    told, last = refusal(topology, tmp_path / "netfenced", without=["CAP_NET_BIND_SERVICE"], config=config)
    assert last == "netfenced: start netfenced: operation not permitted; needs CAP_NET_BIND_SERVICE"
    assert (
        told["CAP_NET_BIND_SERVICE"]["needed_for"] == "bind DNS servers to port 53 (dns.listen_addr is 127.53.0.0/24)"
    )
    with Confined(topology, tmp_path / "other", without=["CAP_NET_BIND_SERVICE"]):
        pass  # other ports do not


def test_a_group_that_is_not_ours_needs_a_capability(topology: Topology, tmp_path: Path) -> None:
    name = grp.getgrgid(1).gr_name
    told, last = refusal(topology, tmp_path / "netfenced", config={"socket_group": name})
    assert last == "netfenced: start netfenced: operation not permitted; needs CAP_CHOWN"
    assert told["CAP_CHOWN"]["remedy"].endswith(f"; or SupplementaryGroups={name} in the service")


def test_a_system_call_that_is_not_allowed_ends_it(topology: Topology, tmp_path: Path) -> None:
    """The filter of these tests holds: without bpf(2) nothing works."""
    with (
        pytest.raises(RuntimeError, match=f"netfenced ended with -{signal.SIGSYS.value} instead of serving"),
        Confined(topology, tmp_path / "netfenced", without=["bpf"]),
    ):
        pytest.fail("it came up")


# -- the watchdog ------------------------------------------------------------------------------------------------------


@contextmanager
def manager(directory: Path) -> Iterator[socket.socket]:
    """Listen where a service manager would."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as listening:
        listening.bind(str(directory / "notify"))
        listening.settimeout(10 * SLOWNESS)
        yield listening


def waiting(listening: socket.socket) -> list[bytes]:
    """Take what has come."""
    found = []
    while select.select([listening], [], [], 0)[0]:
        found.append(listening.recv(200))
    return found


def test_the_watchdog_is_fed_while_the_daemon_works(topology: Topology, tmp_path: Path) -> None:
    """Not while the process is stopped, nor while the store does not answer; and what it then gets opens nothing."""
    workload = topology.add_veth()
    limit_s = 0.4  # the store answers, with an error, after 5 s
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": str(int(limit_s * 1e6))}
    with manager(tmp_path) as heard, Confined(topology, tmp_path / "netfenced", env=environment) as daemon:
        daemon.attach(interface=workload.host_if)
        assert heard.recv(200) == b"READY=1\nSTATUS=0 attachments"
        wait_for(lambda: b"WATCHDOG=1\nSTATUS=1 attachments" in waiting(heard), "a ping that tells of the attachment")

        with closing(sqlite3.connect(daemon.directory / "data" / DATABASE, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert daemon.wait_event("watchdog_not_fed")["silent"] == ["store"]
            other.execute("ROLLBACK")
            waiting(heard)
        assert heard.recv(200).startswith(b"WATCHDOG=1")

        os.kill(daemon.pid, signal.SIGSTOP)
        wait_for(lambda: facts(daemon.pid)["State"].startswith("T"), "the process to be stopped")
        waiting(heard)
        threading.Event().wait(limit_s)
        assert waiting(heard) == []
        os.kill(daemon.pid, signal.SIGABRT)  # as WatchdogSignal= of the unit says
        os.kill(daemon.pid, signal.SIGCONT)
        assert daemon.wait() == -signal.SIGABRT
        assert "Fatal Python error: Aborted" in daemon.log_file.read_text()
        assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
        daemon.start()
        assert topology.arrived(workload, UDP4, OUTSIDE4) == 0
        assert len(daemon.attachments()) == 1
