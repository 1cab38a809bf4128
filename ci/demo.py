#!/usr/bin/env python3
"""The main job, for real, on this machine: fence a VM and see what it can still reach.

    ci/demo            (or, as root: .venv/bin/python ci/demo.py)

A network namespace plays the VM behind a veth, another plays the internet (name server, web servers, a cloud's metadata
service), a third the host with a real `netfenced` and its local policy file. Everything is asked for twice: without the
fence, where it answers, and with it. One line per step: what was expected and what was seen. Exit status 0 only if
every step went as expected. Nothing of the machine's own network is touched and nothing is left.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dnslib

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernel"))

from harness import cgroup, sandbox  # found through the line above
from harness.agent import Agent, RemoteSocket
from harness.daemon import Netfenced, host_port
from harness.services import tcp_echo, udp_echo, web
from harness.topology import METADATA4, METADATA6, NAMESERVER4, Topology, Workload
from harness.unbound import Unbound

SILENCE_S = 0.6  # without an answer for so long: dropped; everything here answers within a millisecond
ECHO_PORT = 7

SITE, SITE6 = "203.0.113.80", "2001:db8:b::80"  # www.example.test
TRACKER = "203.0.113.81"  # tracker.example.test
STRANGER, STRANGER6 = "203.0.113.82", "2001:db8:b::82"  # nobody's name
RECORDS = (
    f"www.example.test. 300 IN A {SITE}",
    f"www.example.test. 300 IN AAAA {SITE6}",
    f"tracker.example.test. 300 IN A {TRACKER}",
    f"elsewhere.test. 300 IN A {STRANGER}",
)

POLICY: dict[str, Any] = {
    "attachments": [
        {
            "match": {"metadata": {"tenant": "acme"}},
            "mode": "allowlist",
            "dns": {"mode": "allowlist", "allow": ["*.example.test"], "deny": ["tracker.example.test"]},
        }
    ],
    "default": {"mode": "block_all"},
}
BLOCK_ALL: dict[str, Any] = {"default": {"mode": "block_all"}}

ANSWERS = "answers"
NO_ANSWER = "no answer"
NOT_RESOLVED = "name refused"


@dataclass
class Vm:
    """The VM's side: tries things and says in one phrase what came of it."""

    agent: Agent
    nameserver: tuple[str, int]

    def fetch(self, name: str, qtype: str = "A") -> str:
        """Resolve a name and GET / from its address."""
        answer = self.agent.query(self.nameserver, name, qtype)
        if answer.header.rcode != dnslib.RCODE.NOERROR:
            return f"{NOT_RESOLVED}: {dnslib.RCODE[answer.header.rcode]}{_extended_error(answer)}"
        addresses = [str(record.rdata) for record in answer.rr if record.rtype == getattr(dnslib.QTYPE, qtype)]
        return self.get(addresses[0]) if addresses else f"{NOT_RESOLVED}: no address"

    def get(self, address: str) -> str:
        """GET / from an address."""
        try:
            with self.agent.connect(address, 80, SILENCE_S) as connection:
                connection.send(b"GET / HTTP/1.0\r\n\r\n")
                answer = b"".join(iter(lambda: connection.recv(timeout_s=SILENCE_S), b""))
        except TimeoutError:
            return f"{NO_ANSWER} from {address} port 80"
        status, _, body = answer.partition(b"\r\n\r\n")
        return f"{ANSWERS}: {status.split()[1].decode()} {body.decode()!r} from {address}"

    def datagram(self, address: str) -> str:
        """Send a UDP datagram and wait for its echo."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.agent.udp(family) as sock:
            sock.sendto(b"ping", (address, ECHO_PORT))
            try:
                return f"{ANSWERS}: {sock.recv(timeout_s=SILENCE_S).decode()!r} from {address}"
            except TimeoutError:
                return f"{NO_ANSWER} from {address}"

    def foreign_query(self) -> str:
        """Ask the internet's name server past ours."""
        try:
            answer = self.agent.query((NAMESERVER4, 53), "www.example.test", timeout_s=SILENCE_S)
        except TimeoutError:
            return f"{NO_ANSWER} from {NAMESERVER4} port 53"
        return f"{ANSWERS}: {answer.short()} from {NAMESERVER4}"


def _extended_error(answer: dnslib.DNSRecord) -> str:
    """Tell the Extended DNS Error (RFC 8914) of an answer."""
    options = [option for record in answer.ar if record.rtype == dnslib.QTYPE.OPT for option in record.rdata]
    return "".join(
        f", EDE {int.from_bytes(bytes(option.data[:2]))} ({bytes(option.data[2:]).decode()})"
        for option in options
        if option.code == 15
    )


@dataclass
class Report:
    """Prints steps and remembers whether all went as expected."""

    started: float = field(default_factory=time.monotonic)
    steps: int = 0
    failed: int = 0

    def step(self, what: str, expected: str, seen: str) -> None:
        """Print one step; it went well if `seen` begins with `expected`."""
        ok = seen.startswith(expected)
        self.steps += 1
        self.failed += not ok
        print(f"{'ok  ' if ok else 'FAIL'} {what:<50} expected: {expected:<13} seen: {seen}", flush=True)

    def heading(self, text: str) -> None:
        """Print what begins."""
        print(f"\n{text}", flush=True)

    def close(self) -> int:
        """Print the sum; return the exit status."""
        took_s = time.monotonic() - self.started
        result = "every step as expected" if not self.failed else f"{self.failed} NOT as expected"
        print(f"\ndemo: {self.steps} steps, {result}, {took_s:.1f} s", flush=True)
        return 1 if self.failed else 0


@contextmanager
def internet(topology: Topology, directory: Path) -> Iterator[None]:
    """Run everything that the internet offers."""
    with ExitStack() as stack:
        stack.enter_context(Unbound(topology.internet, directory, [NAMESERVER4], RECORDS))
        for address, body in (
            (SITE, "hello"), (SITE6, "hello over IPv6"), (TRACKER, "we saw you"), (STRANGER, "who are you?"),
            (STRANGER6, "who are you?"), (METADATA4, "cloud credentials"), (METADATA6, "cloud credentials"),
        ):  # fmt: skip
            stack.enter_context(web(topology.internet, address, 80, body.encode()))
        for address in (SITE, STRANGER, STRANGER6):
            stack.enter_context(udp_echo(topology.internet, address, ECHO_PORT))
        stack.enter_context(tcp_echo(topology.internet, SITE, ECHO_PORT))
        yield


Attempt = tuple[str, Callable[[Vm], str], str]

# What a VM may want to do, and what must become of it behind the fence. Without it, everything answers.
ATTEMPTS: tuple[Attempt, ...] = (
    ("allowed domain, http://www.example.test/", lambda vm: vm.fetch("www.example.test"), ANSWERS),
    ("the same over IPv6", lambda vm: vm.fetch("www.example.test", "AAAA"), ANSWERS),
    ("UDP to the allowed domain's address", lambda vm: vm.datagram(SITE), ANSWERS),
    ("denied domain, http://tracker.example.test/", lambda vm: vm.fetch("tracker.example.test"), NOT_RESOLVED),
    ("unlisted domain, http://elsewhere.test/", lambda vm: vm.fetch("elsewhere.test"), NOT_RESOLVED),
    ("the denied domain's address without its name", lambda vm: vm.get(TRACKER), NO_ANSWER),
    ("unknown IPv4 address", lambda vm: vm.get(STRANGER), NO_ANSWER),
    ("unknown IPv6 address", lambda vm: vm.get(STRANGER6), NO_ANSWER),
    ("UDP to an unknown IPv4 address", lambda vm: vm.datagram(STRANGER), NO_ANSWER),
    ("UDP to an unknown IPv6 address", lambda vm: vm.datagram(STRANGER6), NO_ANSWER),
    ("cloud metadata, http://169.254.169.254/", lambda vm: vm.get(METADATA4), NO_ANSWER),
    ("cloud metadata over IPv6, fd00:ec2::254", lambda vm: vm.get(METADATA6), NO_ANSWER),
    ("another name server than ours", lambda vm: vm.foreign_query(), NO_ANSWER),
)


def without_fence(report: Report, vm: Vm, heading: str, attempts: tuple[Attempt, ...]) -> None:
    """Show that everything answers where no filter is: what is silent later is silent because of the fence."""
    report.heading(heading)
    for what, attempt, _ in attempts:
        report.step(what, ANSWERS, attempt(vm))


def fenced(report: Report, vm: Vm, daemon: Netfenced) -> None:
    """Show what is still possible under the allowlist."""
    report.heading("fenced: mode allowlist, DNS allowlist *.example.test without tracker.example.test")
    for what, attempt, expected in ATTEMPTS:
        before = _blocked(daemon)
        seen = attempt(vm)
        if expected == NO_ANSWER and _blocked(daemon) == before:
            seen = f"{seen}, but the filter dropped nothing".replace(NO_ANSWER, "silence")
        report.step(what, expected, seen)


def block_all(report: Report, vm: Vm, daemon: Netfenced) -> None:
    """Show that block_all cuts what was allowed, running connections included."""
    report.heading("policy file changed to block_all")
    with vm.agent.connect(SITE, ECHO_PORT) as connection:
        report.step("a connection is open and in use", ANSWERS, echo(connection))
        daemon.set_policy(BLOCK_ALL)
        report.step("the same connection after the change", NO_ANSWER, echo(connection))
        report.step("allowed domain before, now", NOT_RESOLVED, vm.fetch("www.example.test"))
        report.step("its address", NO_ANSWER, vm.get(SITE))
        report.step("its address, UDP", NO_ANSWER, vm.datagram(SITE))
        report.step("its IPv6 address", NO_ANSWER, vm.get(SITE6))


def echo(connection: RemoteSocket) -> str:
    """Send over an open connection and wait for the echo."""
    connection.send(b"still there?")
    try:
        return f"{ANSWERS}: {connection.recv(timeout_s=SILENCE_S).decode()!r}"
    except TimeoutError:
        return f"{NO_ANSWER} on the open connection"


def _blocked(daemon: Netfenced) -> int:
    return int(daemon.attachments()[0].packets_blocked)


def run(report: Report, topology: Topology, workload: Workload, directory: Path) -> None:
    """Go through all steps."""
    with (
        internet(topology, directory / "unbound"),
        Agent(netns=workload.netns) as agent,
    ):
        vm = Vm(agent, (NAMESERVER4, 53))
        without_fence(report, vm, "without a fence", ATTEMPTS)
        with Netfenced(topology.host, directory / "netfenced", policy=POLICY) as daemon:
            report.heading(f"$ netfenced attach --interface {workload.host_if} --metadata tenant=acme")
            said = daemon.cli_json("attach", "--interface", workload.host_if, "--metadata", "tenant=acme")
            report.step("attach", "attached", f"attached: id {said['id']}, DNS server {said['dns_address']}")
            vm.nameserver = host_port(said["dns_address"])
            fenced(report, vm, daemon)
            block_all(report, vm, daemon)
            report.heading(f"$ netfenced detach --id {said['id']}")
            report.step("detach", "detached", daemon.cli("detach", "--id", said["id"]).stdout.strip())
            vm.nameserver = (NAMESERVER4, 53)
            stopped = tuple(attempt for attempt in ATTEMPTS if attempt[2] != ANSWERS)
            without_fence(report, vm, "detached: what the fence stopped answers again", stopped)
        # Leaving the block has checked that the daemon ended well and left no link, pin, interface or process.
        report.step("netfenced ended (SIGTERM)", "clean", "clean: no link, pin, interface or process left")


def main() -> int:
    """Build the world, go through the steps, take the world away; return the exit status."""
    report = Report()
    sandbox.enter()
    cgroup.sweep()
    try:
        with tempfile.TemporaryDirectory(prefix="netfence-demo-") as directory:
            topology = Topology()
            try:
                run(report, topology, topology.add_veth(), Path(directory))
            finally:
                topology.close()
    finally:
        cgroup.remove_ours()
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
