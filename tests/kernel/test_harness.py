"""The harness itself: what it sends arrives where nothing filters, it counts exactly, and it leaves nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from harness import cgroup, packets, sandbox
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.deadline import wait_for
from harness.fresh import Fresh
from harness.netns import NetNs, veth
from harness.packets import Shape
from harness.services import tcp_echo, udp_echo, web
from harness.topology import METADATA4, METADATA6, NAMESERVER4, NAMESERVER6, Topology, Workload
from harness.unbound import Unbound
from harness.wire import LostSentinelError, Meter, PacketSender, Sniffer, Tag

ANY4, ANY6 = "203.0.113.99", "2001:db8:77::1"


def anywhere(shape: Shape) -> str:
    return ANY4 if shape.family == 4 or shape is packets.MAPPED else ANY6


@pytest.fixture(scope="module")
def bridged(topology: Topology) -> Workload:
    return topology.add_bridged()


@pytest.fixture(scope="module")
def routed(topology: Topology, workload: Workload) -> dict[str, Workload]:
    return {"veth": workload, "tap": topology.add_tap(), "tun": topology.add_tun()}


@pytest.mark.parametrize("kind", ["veth", "tap", "tun"])
@pytest.mark.parametrize("shape", [packets.UDP4, packets.UDP6, packets.TCP4_SYN, packets.ICMP6], ids=str)
def test_routed_packets_arrive(topology: Topology, routed: dict[str, Workload], kind: str, shape: Shape) -> None:
    assert topology.arrived(routed[kind], shape, anywhere(shape), count=7) == 7


@pytest.mark.parametrize("shape", packets.ALL.values(), ids=str)
def test_every_shape_crosses_the_bridge(topology: Topology, bridged: Workload, shape: Shape) -> None:
    assert topology.arrived(bridged, shape, anywhere(shape)) == 3


@pytest.mark.parametrize("shape", packets.ALL.values(), ids=str)
def test_every_shape_leaves_the_host(topology: Topology, shape: Shape) -> None:
    assert topology.arrived(topology.host_workload(), shape, anywhere(shape)) == 3


def test_a_dropped_packet_is_counted_as_not_arrived(topology: Topology, workload: Workload) -> None:
    rules = "table inet cut { chain forward { type filter hook forward priority 0; meta nfproto ipv4 drop; }; }"
    topology.host.run("nft", rules)
    assert topology.arrived(workload, packets.UDP4, ANY4) == 0
    assert topology.arrived(workload, packets.UDP6, ANY6) == 3
    topology.host.run("nft", "delete table inet cut")
    assert topology.arrived(workload, packets.UDP4, ANY4) == 3


@pytest.mark.userspace
def test_a_broken_path_is_an_error_of_its_own(fresh: Fresh) -> None:
    left, right = NetNs("left"), NetNs("right")
    with closing(left), closing(right):
        veth((left, "a"), (right, "b"))
        left.ip("link set dev a up")
        right.ip("link set dev b up")
        with closing(PacketSender(left, "a")) as sender, closing(Sniffer(left, "lo")) as wrong_place:
            meter = Meter(wrong_place, sender)
            with pytest.raises(LostSentinelError, match="did not arrive on lo in left"):
                meter.transmit(sender, Tag(), [])


def test_the_vm_behind_a_tap_receives(topology: Topology, routed: dict[str, Workload]) -> None:
    device = routed["tap"].device
    assert device is not None
    tag = Tag()
    with Agent(netns=topology.internet) as agent:
        agent.udp().sendto(tag.payload, (routed["tap"].address4, 9))
    assert wait_for(lambda: tag.marks(device.receive()), "the datagram on the tap")


def test_an_agent_runs_where_it_was_put(
    topology: Topology, workload: Workload, agent: Agent, cgroups: Callable[[str], Cgroup]
) -> None:
    group = cgroups("here")
    with Agent(netns=workload.netns, cgroup=group) as other:
        assert group.pids() == [other.pid]
        here = Path("/proc", str(other.pid), "ns/net").stat()
        assert here.st_ino == os.fstat(workload.inside.fd).st_ino
        assert here.st_ino != Path("/proc/self/ns/net").stat().st_ino


@pytest.mark.parametrize(("family", "to"), [(socket.AF_INET, ANY4), (socket.AF_INET6, ANY6)], ids=["ipv4", "ipv6"])
def test_agent_datagrams_are_counted(
    topology: Topology, workload: Workload, cgroups: Callable[[str], Cgroup], family: int, to: str
) -> None:
    tag = Tag()
    with Agent(netns=workload.netns, cgroup=cgroups("sender")) as agent, agent.udp(family) as sock:
        for _ in range(5):
            sock.sendto(tag.payload, (to, 9))
        assert topology.meter().arrived(tag) == 5


def test_agent_errors_are_the_sockets_own(agent: Agent) -> None:
    with pytest.raises(ConnectionRefusedError):
        agent.connect(ANY4, 1)
    with agent.udp() as sock, pytest.raises(TimeoutError):
        sock.recv(timeout_s=0.01)


@pytest.mark.parametrize("host", ["203.0.113.80", METADATA4, METADATA6, "2001:db8:b::80"])
def test_the_internet_answers(topology: Topology, agent: Agent, host: str) -> None:
    with web(topology.internet, host, 80, b"hello") as server, agent.connect(host, 80) as connection:
        connection.send(b"GET / HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(connection.recv, b""))
        assert answer.endswith(b"\r\n\r\nhello")
        assert server.hits == 1


def test_the_internet_owns_every_address(topology: Topology, agent: Agent) -> None:
    with tcp_echo(topology.internet, "0.0.0.0", 7) as server, agent.connect("192.88.99.77", 7) as connection:
        connection.send(b"anybody there")
        assert connection.recv() == b"anybody there"
        assert server.hits == 1
    with udp_echo(topology.internet, METADATA4, 7), agent.udp() as sock:
        sock.sendto(b"secrets?", (METADATA4, 7))
        assert sock.recv() == b"secrets?"


@pytest.mark.parametrize("server", [NAMESERVER4, NAMESERVER6])
@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
def test_unbound_answers_and_tells_what_it_was_asked(agent: Agent, names: Unbound, server: str, *, tcp: bool) -> None:
    names.replace(["alias.test. 60 IN CNAME www.test.", "www.test. 300 IN A 203.0.113.80"])
    before = names.asked("alias.test")
    answer = agent.query((server, 53), "alias.test", tcp=tcp)
    assert [str(record.rdata) for record in answer.rr] == ["www.test.", "203.0.113.80"]
    assert names.asked("alias.test") == before + 1
    assert names.asked("www.test") == 0
    assert agent.query((server, 53), "nowhere.test", tcp=tcp).header.rcode == 3


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """Give a harness process that has made one of everything and waits."""
    program = """
import sys, tempfile
from pathlib import Path
from harness import sandbox
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.topology import Topology
sandbox.enter()
topology = Topology()
workload = topology.add_veth()
agent = Agent(netns=workload.netns, cgroup=Cgroup("victim"))
with sandbox.bpffs(Path(tempfile.mkdtemp())) as mounted:
    print(agent.pid, mounted, flush=True)
    sys.stdin.read()
"""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        yield process
        process.kill()


@pytest.mark.userspace
def test_a_killed_run_leaves_nothing_but_a_cgroup_and_the_next_one_sweeps_it(child: subprocess.Popen[bytes]) -> None:
    assert child.stdout is not None
    pid, mounted = child.stdout.readline().decode().split()
    parent = cgroup.root() / f"{sandbox.PREFIX}{child.pid}"
    assert (parent / "victim").exists()
    assert mounted not in Path("/proc/self/mountinfo").read_text()
    child.kill()
    child.wait()
    wait_for(lambda: not Path("/proc", pid).exists() or _is_zombie(pid), "the agent to die with its parent")
    cgroup.sweep()
    assert not parent.exists()
    Path(mounted).rmdir()


def _is_zombie(pid: str) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_two_test_processes_may_sweep_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one of them removed under the other's hands is removed."""
    left = cgroup.root() / f"{sandbox.PREFIX}999999999"
    for directory in (left, left / "daemon", left / "daemon" / "inner"):
        directory.mkdir()
    iterdir = Path.iterdir

    def overtaken(path: Path) -> Iterator[Path]:
        entries = list(iterdir(path))
        if path == left:
            monkeypatch.undo()
            cgroup.sweep()  # the other one
        return iter(entries)

    monkeypatch.setattr(Path, "iterdir", overtaken)
    cgroup.sweep()
    assert not left.exists()
