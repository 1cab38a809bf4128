"""A program in a cgroup, and how to fence it: for the tests about cgroups. No test, no fixture."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from harness.agent import Agent, RemoteSocket, family_of
from harness.cgroup import Cgroup
from harness.fence import Attachment, Fence
from harness.services import tcp_echo
from harness.topology import Topology
from harness.wire import Tag

FAMILIES = ["ipv4", "ipv6"]
WEB = {"ipv4": "203.0.113.80", "ipv6": "2001:db8:b::80"}
OTHER = {"ipv4": "203.0.113.81", "ipv6": "2001:db8:b::81"}
EVERYTHING = ["0.0.0.0/0", "::/0"]
ECHO, DISCARD = 7, 9


@dataclass
class Inside:
    """A process in a cgroup, and how to fence that."""

    topology: Topology
    fence: Fence
    group: Cgroup
    agent: Agent
    stack: ExitStack

    def fenced(self, **static: Any) -> Attachment:
        return self.stack.enter_context(self.fence.cgroup(self.group, **static))

    def connected(self, host: str, port: int = DISCARD, kind: int = socket.SOCK_DGRAM) -> RemoteSocket:
        """Connect; before the attach, so that `connect` has no say."""
        sock = self.agent.open(family_of(host), kind)
        sock.connect((host, port))
        return sock

    def sends(self, sock: RemoteSocket, count: int = 3) -> int:
        """Send datagrams on a connected socket and count those that reach the internet."""
        tag = Tag()
        for _ in range(count):
            with suppress(PermissionError):
                sock.send(tag.payload)
        return self.topology.meter().arrived(tag)


@contextmanager
def services(topology: Topology) -> Iterator[None]:
    """Echo TCP everywhere in the internet, and swallow datagrams, so that no error comes back for them."""
    with topology.internet.inside():
        sink = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with sink, tcp_echo(topology.internet, "::", ECHO):
        sink.bind(("::", DISCARD))
        yield


def assert_talks(connection: RemoteSocket) -> None:
    tag = Tag()
    connection.send(tag.payload)
    assert connection.recv() == tag.payload
