"""The filters that `test_path.py` compares, each on a host of its own, and what sends through them.

    workload ── veth ── host with one filter ── veth ── internet        (harness.topology, once for each contestant)

All do the same to what enters by the workload's interface: what is in the set passes and is counted, the rest is
dropped and counted. Interval sets, ipset hash:net and our tables hold /24 networks; hash sets hold as many addresses.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench_plane import Plane
from blaster import Source
from harness.netns import NetNs
from harness.topology import INTERNET_IF, Topology
from netfence.dataplane.plane import Static
from netfence.dataplane.target import Direction, resolve_interface
from netfence.policy.cidr import NEVER, CidrTable, parse_cidr
from netfence.policy.modes import Mode
from netfence.policy.policy import Policy

SERVER, DENIED = "203.0.113.80", "203.0.113.81"
FACTOR = 0x9E3779B1
FIRST_OCTETS = range(11, 127)
BATCH = 64
PAYLOAD = bytes(22)  # a 64-byte frame
FAR_OFF = 0.5  # of no filter; the figure is 0.95: on a busy machine a smoke run only shows that nothing is badly wrong


def networks(count: int) -> Iterator[str]:
    """Give so many /24 networks, without their last octet, spread over the space; none of them is a special one."""
    number = 0
    while count:
        number += 1
        prefix = number * FACTOR & 0xFFFFFF
        if prefix >> 16 in FIRST_OCTETS:
            count -= 1
            yield f"{prefix >> 16}.{prefix >> 8 & 255}.{prefix & 255}"


def hosts(count: int) -> list[str]:
    """Return `count` addresses, with the server's."""
    return [f"{network}.1" for network in networks(count - 1)] + [SERVER]


def nets(count: int) -> list[str]:
    """Return `count` prefixes, with the server's."""
    return [f"{network}.0/24" for network in networks(count - 1)] + [f"{SERVER}/32"]


class Counted(NamedTuple):
    """What a filter counted of the workload's packets."""

    passed: int
    dropped: int


class Filter(ABC):
    """One contestant on a host of its own."""

    def __init__(self, directory: Path) -> None:
        self.topology = Topology()
        self.workload = self.topology.add_veth()
        self._directory = directory

    @abstractmethod
    def load(self, rules: int) -> None:
        """Put a set of so many elements in force."""

    @abstractmethod
    def counted(self) -> Counted | None:
        """Return the filter's own counters; None: there is no filter."""

    def close(self) -> None:
        """Take it away with its host."""
        self.topology.close()

    def _run_file(self, text: str, *argv: str) -> str:
        path = self._directory / f"{type(self).__name__}.txt"
        path.write_text(text)
        return self.topology.host.run(*argv, str(path)).stdout


class Nothing(Filter):
    """No filter: the limit."""

    def load(self, rules: int) -> None:
        """Leave the host as it is."""

    def counted(self) -> Counted | None:
        """Return nothing."""
        return None


class Fence(Filter):
    """Ours, by tcx or clsact as the kernel offers or `tcx` says."""

    tcx: bool | None = None

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._plane = Plane(self.topology, directory, tcx=self.tcx)
        plane = self._plane.plane
        with self.topology.host.inside():
            self._target = resolve_interface(self.workload.host_if)
        self._slot = plane.allocate_slot()
        static = Static(dns_address=socket.inet_aton("198.51.100.254"), dns_port=11000)
        mechanism = self._plane.run(plane.attach(self._slot, self._target, static, Direction.WORKLOAD, "path"))
        assert mechanism == ("clsact" if self.tcx is False else "tcx")

    def load(self, rules: int) -> None:
        """Replace the policy."""
        table = CidrTable.build((parse_cidr(net), NEVER) for net in nets(rules))
        assert len(table) == rules
        self._plane.run(self._plane.plane.apply(self._slot, Policy(mode=Mode.ALLOWLIST, cidrs=table), None))

    def counted(self) -> Counted:
        """Read the attachment's counters."""
        counters = self._plane.plane.counters(self._slot)
        return Counted(counters.allowed[0], counters.blocked[0])

    def close(self) -> None:
        """Detach first."""
        self._plane.run(self._plane.plane.detach(self._slot, self._target, "path"))
        self._plane.close()
        super().close()


class FenceClsact(Fence):
    """Ours as on kernels before 6.6."""

    tcx = False


class Nft(Filter):
    """An nftables set on the forward hook."""

    flags = ""

    def elements(self, rules: int) -> list[str]:
        """Return what is in the set."""
        return hosts(rules)

    def load(self, rules: int) -> None:
        """Replace the table."""
        self._run_file(
            f"""
            table inet fence {{}}
            delete table inet fence
            table inet fence {{
                set allowed {{
                    type ipv4_addr
                    {self.flags}
                    elements = {{ {", ".join(self.elements(rules))} }}
                }}
                chain forward {{
                    type filter hook forward priority 0; policy accept;
                    iifname != "{self.workload.host_if}" accept
                    ip daddr @allowed counter accept
                    counter drop
                }}
            }}
            """,
            "nft", "-f",
        )  # fmt: skip

    def counted(self) -> Counted:
        """Read the counters of the two rules."""
        listed = json.loads(self.topology.host.run("nft", "-j", "list", "chain", "inet", "fence", "forward").stdout)
        rules = [entry["rule"]["expr"] for entry in listed["nftables"] if "rule" in entry]
        counters = [part["counter"]["packets"] for rule in rules for part in rule if "counter" in part]
        return Counted(*counters)


class NftInterval(Nft):
    """… with networks in it."""

    flags = "flags interval"

    def elements(self, rules: int) -> list[str]:
        """Return networks."""
        return nets(rules)


class Ipset(Filter):
    """iptables with an ipset of addresses."""

    kind = "hash:ip"

    def elements(self, rules: int) -> list[str]:
        """Return what is in the set."""
        return hosts(rules)

    def load(self, rules: int) -> None:
        """Make the set and the two rules anew."""
        host = self.topology.host
        host.run("iptables", "-F", "FORWARD")
        host.run("ipset", "destroy")
        adds = "".join(f"add allowed {element}\n" for element in self.elements(rules))
        self._run_file(f"create allowed {self.kind} maxelem {2 * rules}\n{adds}", "ipset", "restore", "-file")
        come = ["-i", self.workload.host_if]
        host.run("iptables", "-A", "FORWARD", *come, "-m", "set", "--match-set", "allowed", "dst", "-j", "ACCEPT")
        host.run("iptables", "-A", "FORWARD", *come, "-j", "DROP")

    def counted(self) -> Counted:
        """Read the counters of the two rules."""
        listed = self.topology.host.run("iptables", "-nvxL", "FORWARD").stdout
        return Counted(*map(int, re.findall(r"^\s*(\d+)\s+\d+ (?:ACCEPT|DROP) ", listed, re.MULTILINE)))


class IpsetNet(Ipset):
    """… of networks."""

    kind = "hash:net"

    def elements(self, rules: int) -> list[str]:
        """Return networks."""
        return nets(rules)


FILTERS: dict[str, type[Filter]] = {
    "none": Nothing,
    "netfence-tcx": Fence,
    "netfence-clsact": FenceClsact,
    "nft-hash": Nft,
    "nft-interval": NftInterval,
    "ipset-ip": Ipset,
    "ipset-net": IpsetNet,
}


class Blaster:
    """Sends UDP packets as fast as one thread can (sendmmsg): system calls cost little beside the path."""

    def __init__(self, netns: NetNs, server: str, port: int) -> None:
        with netns.inside():
            self._source = Source({"to": (server, port), "packets": [PAYLOAD.hex()] * BATCH})

    def send(self, packets: int) -> float:
        """Send so many and return how long it took, in seconds: veth delivers in the sender's own time."""
        left = packets
        start = time.perf_counter()
        while left:
            sent = self._source.hand_over(max(0, BATCH - left))
            assert sent > 0, os.strerror(ctypes.get_errno())
            left -= sent
        return time.perf_counter() - start

    def close(self) -> None:
        """Close the socket."""
        self._source.close()


def received(topology: Topology) -> int:
    """Count the packets that came to the internet's end."""
    (link,) = topology.internet.ip_json("-s", "link", "show", "dev", INTERNET_IF)
    return int(link["stats64"]["rx"]["packets"])
