"""Streams at full rate, who sends them, and an account of every packet: sent, lost on the way, judged, arrived.

Two kinds of streams, whose packets are made before the first is sent:

- sockets: small UDP datagrams of both families, as pktgen sends them, through the sender's own IP stack;
- scapy: every shape of SHAPES in every size of SIZES, replayed as whole frames.

What has come through is thrown away at the internet's door by a route, so that neither answers nor sockets cost time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from flood import Sender, Source
from harness import packets
from harness.cgroup import Cgroup
from harness.deadline import wait_for
from harness.netns import NetNs
from harness.packets import Shape
from harness.topology import INTERNET_IF, UP_IF, Topology, Workload
from harness.wire import Tag

ALLOWED = {4: "203.0.113.80", 6: "2001:db8:b::80"}
DENIED = {4: "203.0.113.81", 6: "2001:db8:b::81"}
DISCARD = 9
DATAGRAM = bytes(22)  # a 64-byte frame
BATCH = 32  # datagrams in one system call
SHAPES = (
    packets.UDP4, packets.UDP6, packets.TCP4_SYN, packets.TCP6_ACK, packets.ICMP4, packets.ICMP6, packets.PROTOCOL_253,
    packets.UDP4_OPTIONS, packets.UDP6_DESTINATION_OPTIONS, packets.UDP4_FIRST_FRAGMENT, packets.UDP4_LATER_FRAGMENT,
    packets.UDP6_LATER_FRAGMENT,
)  # fmt: skip
SIZES = (0, 400, 1300)  # bytes of payload behind the tag

Addresses = dict[int, str]  # by family


def sockets(*to: Addresses) -> list[Source]:
    """Describe a stream of datagrams, from a socket per address."""
    hexadecimal = [DATAGRAM.hex()] * BATCH
    return [{"to": [host, DISCARD], "packets": hexadecimal} for each in to for host in each.values()]


def scapy(workload: Workload, *to: Addresses) -> list[Source]:
    """Describe a stream of mixed frames; packets to the different places follow one another."""
    tag = Tag()
    frames = [
        workload.bytes_of(_padded(shape, size), each[shape.family], tag)
        for shape in SHAPES
        for size in SIZES
        for each in to
    ]
    return [{"device": "eth0", "packets": [frame.hex() for frame in frames]}]


def _padded(shape: Shape, octets: int) -> Shape:
    def build(source: str, destination: str, payload: bytes) -> Any:
        return shape.build(source, destination, payload + bytes(octets))

    return replace(shape, build=build)


@dataclass(frozen=True, slots=True)
class Link:
    """What an interface received, sent, and could not send, in packets."""

    received: int
    sent: int
    lost: int


class LinkCounters:
    """An interface's counters, read in microseconds."""

    def __init__(self, netns: NetNs, ifname: str) -> None:
        self._name = ifname
        with netns.inside():
            self._fd = os.open("/proc/thread-self/net/dev", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> Link:
        """Read them."""
        for line in os.pread(self._fd, 1 << 16, 0).decode().splitlines():
            name, _, numbers = line.partition(":")
            if name.strip() == self._name:
                columns = [int(each) for each in numbers.split()]
                return Link(columns[1], columns[9], columns[11])
        raise KeyError(self._name)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class Way:
    """The way from a workload to the internet's door: what got lost on it for want of room, and what arrived."""

    def __init__(self, topology: Topology, workload: Workload) -> None:
        self._out = LinkCounters(workload.inside, "eth0")
        self._up = LinkCounters(topology.host, UP_IF)
        self._door = LinkCounters(topology.internet, INTERNET_IF)

    def lost(self) -> tuple[int, int]:
        """Count packets that the workload's interface had no room for, and the host's on their way out."""
        return self._out.read().lost, self._up.read().lost

    def arrived(self) -> int:
        """Count what came to the internet's interface, from whomever."""
        return self._door.read().received

    def close(self) -> None:
        """Close the files."""
        for each in (self._out, self._up, self._door):
            each.close()


class Blaster(Sender):
    """A sender in a workload, and the way that its packets take."""

    def __init__(
        self, topology: Topology, workload: Workload, stream: list[Source], cgroup: Cgroup | None = None
    ) -> None:
        super().__init__(workload.netns, stream, cgroup)
        self.way = Way(topology, workload)

    def flow(self, count: int) -> tuple[int, float]:
        """Send at least so many packets; return how many arrived, and how many did a second, until the last one had.

        Packets that found no room in a queue are waited for no more than those that arrived are counted twice: what a
        path loses it does not carry.
        """
        lost, arrived = sum(self.way.lost()), self.way.arrived()
        sent = self.send(count)
        through = ended = 0.0

        def all_through() -> bool:
            nonlocal through, ended
            through, ended = self.way.arrived() - arrived, time.monotonic()
            return through + sum(self.way.lost()) - lost >= sent.packets

        at_once = all_through()  # as a rule: a veth delivers in the sender's own time
        if not at_once:
            wait_for(all_through, "the last packet")
        return int(through), through / ((sent.ended if at_once else ended) - sent.began)

    def close(self) -> None:
        """End the process and close the counters."""
        super().close()
        self.way.close()


@contextmanager
def blackholes(topology: Topology) -> Iterator[None]:
    """Throw away in the internet what comes for ALLOWED and DENIED; it has been counted before."""
    places = [(*place, "-6 " if place[0] == 6 else "") for to in (ALLOWED, DENIED) for place in to.items()]
    topology.internet.ip(*[f"{six}route add blackhole {to} table 100" for _, to, six in places])
    try:
        yield
    finally:
        topology.internet.ip(*[f"{six}route del blackhole {to} table 100" for _, to, six in places])
