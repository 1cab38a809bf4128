"""Anonymous network namespaces: they have no name on the machine and die with the last process that holds them.

Look inside from outside with `nsenter --net=/proc/<pid>/fd/<fd>`; `repr()` tells both numbers.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import syscalls
from harness.deadline import SLOWNESS

THREAD_NS = Path("/proc/thread-self/ns/net")

# No duplicate-address detection (addresses work at once) and no solicitation of routers (counters stay exact); the
# second report of joined multicast groups comes after 10 ms, not within a second, in the middle of a test.
QUIET = {
    "net/ipv6/conf/all/disable_ipv6": "0",
    "net/ipv6/conf/default/disable_ipv6": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/router_solicitations": "0",
    "net/ipv6/conf/default/accept_ra": "0",
    "net/ipv6/conf/default/mldv1_unsolicited_report_interval": "10",
    "net/ipv6/conf/default/mldv2_unsolicited_report_interval": "10",
    "net/ipv4/conf/default/igmpv2_unsolicited_report_interval": "10",
    "net/ipv4/conf/default/igmpv3_unsolicited_report_interval": "10",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
}


class NetNs:
    """One network namespace, made on construction, with lo up. Close it, or let the process end."""

    def __init__(self, name: str) -> None:
        self.name = name  # for humans: it is bound nowhere
        before = os.open(THREAD_NS, os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscalls.unshare(syscalls.CLONE_NEWNET)
            try:
                self.fd = os.open(THREAD_NS, os.O_RDONLY | os.O_CLOEXEC)
            finally:
                syscalls.setns(before, syscalls.CLONE_NEWNET)
        finally:
            os.close(before)
        for key, value in QUIET.items():
            self.sysctl(key, value)
        self.ip("link set lo up")

    @property
    def path(self) -> str:
        """A path that `ip link set … netns` and nsenter understand, as long as this process lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Put the calling thread into the namespace: sockets and processes made here belong to it for good."""
        before = os.open(THREAD_NS, os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscalls.setns(self.fd, syscalls.CLONE_NEWNET)
            try:
                yield
            finally:
                syscalls.setns(before, syscalls.CLONE_NEWNET)
        finally:
            os.close(before)

    def ip(self, *commands: str) -> None:
        """Run `ip` commands (without the word ip; `-6` first for IPv6) in order; the first that fails raises."""
        for six, batch in itertools.groupby(commands, lambda command: command.startswith("-6 ")):
            lines = "\n".join(command.removeprefix("-6 ") for command in batch)
            argv = ["ip", *(["-6"] if six else []), "-batch", "-"]
            with self.inside():
                done = subprocess.run(argv, input=lines, text=True, capture_output=True, check=False)
            if done.returncode != 0:
                message = f"ip in {self.name}: {done.stderr.strip()} in:\n{lines}"
                raise RuntimeError(message)

    def ip_json(self, *arguments: str) -> list[dict[str, Any]]:
        """Run one reading `ip` command and return what it says (iproute2 says {} for what a filter left out)."""
        return [found for found in json.loads(self.run("ip", "-j", "-d", *arguments).stdout or "[]") if found]

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program inside to its end, at most 30 s (emulated 300)."""
        with self.inside():
            return subprocess.run(argv, text=True, capture_output=True, check=check, timeout=30 * SLOWNESS)

    def sysctl(self, key: str, value: str) -> None:
        """Set /proc/sys/<key>, which for net/ is the one of the namespace of the thread that writes."""
        with self.inside():
            Path("/proc/sys", key).write_text(value)

    def mac(self, ifname: str) -> str:
        """Tell an interface's Ethernet address."""
        return str(self.ip_json("link", "show", ifname)[0]["address"])

    def ifindex(self, ifname: str) -> int:
        """Tell an interface's index in this namespace."""
        return int(self.ip_json("link", "show", ifname)[0]["ifindex"])

    def interfaces(self) -> set[str]:
        """Name all interfaces."""
        return {str(link["ifname"]) for link in self.ip_json("link")}

    def close(self) -> None:
        """Let go. The kernel ends the namespace, and its interfaces, when nobody is inside any more."""
        os.close(self.fd)

    def __repr__(self) -> str:
        return f"NetNs({self.name}, {self.path})"


def veth(left: tuple[NetNs, str], right: tuple[NetNs, str]) -> None:
    """Make a veth pair whose ends are born in their namespaces under their final names."""
    (ns, name), (peer_ns, peer_name) = left, right
    ns.ip(f"link add name {name} type veth peer name {peer_name} netns {peer_ns.path}")
