"""Fenced programs that connect and serve, for the tests about connections: no test, no fixture."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from harness.agent import Agent, RemoteSocket
from harness.cgroup import Cgroup
from harness.fence import Attachment, Fence
from harness.needs import is_before
from harness.netns import NetNs
from harness.packets import Shape
from harness.topology import Topology, Workload
from harness.wire import Tag
from netfence.policy.modes import Reason

FAMILIES = ["ipv4", "ipv6"]
KINDS = ["interface", "cgroup"]
WEB = {"ipv4": "203.0.113.80", "ipv6": "2001:db8:b::80"}
EVERYTHING = ["0.0.0.0/0", "::/0"]
ANY = {"ipv4": "0.0.0.0", "ipv6": "::"}
ECHO = 7
REFUSED_S = 0.25  # a SYN is sent again after a second; what an unloaded veth has not brought by then does not come


@dataclass
class Place:
    """A workload's program, and the fence around it: its interface, or its cgroup."""

    attachment: Attachment
    agent: Agent
    workload: Workload
    kind: str = "interface"


@dataclass
class PlaceMaker:
    """Makes fenced programs; they live as long as the stack."""

    fence: Fence
    cgroups: Callable[[str], Cgroup]
    stack: ExitStack
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __call__(self, kind: str, workload: Workload, **static: Any) -> Place:
        """Start a program in the workload and fence its interface or its cgroup; keywords as for `Static`."""
        group = self.cgroups(f"place{next(self._numbers)}")
        agent = self.stack.enter_context(Agent(netns=workload.netns, cgroup=group))
        if kind == "interface":
            attachment = self.fence.interface(workload.host_if, **static)
        else:
            attachment = self.fence.cgroup(group, **static)
        return Place(self.stack.enter_context(attachment), agent, workload, kind)


@dataclass
class Site:
    """Workloads that are neighbours: two routed by the host, two on one bridge."""

    topology: Topology
    fence: Fence
    routed: tuple[Workload, Workload]
    bridged: tuple[Workload, Workload]

    @classmethod
    def build(cls, topology: Topology, fence: Fence) -> Site:
        """Make the workloads; those on the bridge know each other's hardware address.

        For an advertisement to a neighbour's global address is none that always passes (semantics.md 6).
        """
        ports = topology.add_bridged(), topology.add_bridged()
        for here, there in (ports, ports[::-1]):
            assert here.netns is not None
            assert there.netns is not None
            mac = there.netns.mac("eth0")
            for to in (there.address4, there.address6):
                here.netns.ip(f"neigh replace {to} lladdr {mac} dev eth0 nud permanent")
        return cls(topology, fence, (topology.add_veth(), topology.add_veth()), ports)


def address(workload: Workload, family: str) -> str:
    return workload.address4 if family == "ipv4" else workload.address6


@dataclass
class Server:
    """A server inside a workload."""

    place: Place
    family: str

    def __post_init__(self) -> None:
        agent = self.place.agent
        self.listening = agent.tcp(socket.AF_INET if self.family == "ipv4" else socket.AF_INET6)
        self.listening.bind((ANY[self.family], 0))
        self.listening.listen()
        self.host, self.port = address(self.place.workload, self.family), self.listening.name()[1]

    def reached_from(self, client: Agent) -> bool:
        """Tell whether a client gets a whole conversation."""
        try:
            connection = client.connect(self.host, self.port, timeout_s=REFUSED_S)
        except (TimeoutError, PermissionError):
            return False
        with connection, self.listening.accept() as accepted:
            connection.send(b"hello")
            assert accepted.recv() == b"hello"
            accepted.send(b"welcome")
            unasked = self.family == "ipv6" and self.place.kind == "cgroup"
            if unasked and is_before("IPv6 SYN-ACKs of cgroups"):
                # A cgroup's fence lets such a handshake through there, and nothing after it.
                with contextlib.suppress(TimeoutError):
                    return connection.recv(timeout_s=REFUSED_S) == b"welcome"
                return False
            assert connection.recv() == b"welcome"
        return True

    @property
    def noted(self) -> int:
        """How many connections begun from outside the kernel holds for it."""
        return self.place.attachment.fence.plane._inbound.shares.of(self.place.attachment.slot)


def assert_talks(connection: RemoteSocket) -> None:
    tag = Tag()
    connection.send(tag.payload)
    assert connection.recv() == tag.payload


def is_refused(agent: Agent, host: str, port: int) -> bool:
    """Tell whether a TCP connection is not made: refused at once by a cgroup, never answered through an interface."""
    try:
        agent.connect(host, port, timeout_s=REFUSED_S).close()
    except (PermissionError, TimeoutError):
        return True
    return False


def assert_passes(
    topology: Topology, workload: Workload, fenced: Attachment, shape: Shape, to: str, why: Reason
) -> None:
    with fenced.counts(why, 2):
        assert topology.arrived(workload, shape, to, 2) == 2


def assert_drops(
    topology: Topology, workload: Workload, fenced: Attachment, shape: Shape, to: str, why: Reason
) -> None:
    with fenced.counts(why, 2):
        assert topology.arrived(workload, shape, to, 2) == 0


@contextmanager
def silent(*namespaces: NetNs | None) -> Iterator[None]:
    """Keep kernels from resetting connections that they do not know."""
    chain = "chain output { type filter hook output priority 0; tcp flags rst drop; }"
    with ExitStack() as stack:
        for each in namespaces:
            assert each is not None
            each.run("nft", f"table inet silence {{ {chain}; }}")
            stack.callback(each.run, "nft", "delete table inet silence")
        yield
