#!/usr/bin/env python3
"""Run the README's session for real, and keep the README at what it prints.

    sudo .venv/bin/python ci/readme_session.py            write the session into README.md
    sudo .venv/bin/python ci/readme_session.py --check    exit 1 if README.md differs in more than ids and numbers

`host#` lines run in the namespace of netfenced, `vm#` lines behind the fenced veth, with a resolv.conf that names the
attachment's DNS server. tests/kernel/test_readme.py runs the check.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "kernel"))

from harness import cgroup, sandbox  # noqa: E402  # found through the line above
from harness.daemon import PROGRAM, Netfenced  # noqa: E402
from harness.netns import NetNs  # noqa: E402
from harness.services import web  # noqa: E402
from harness.topology import DNS4, METADATA4, NAMESERVER4, Topology, Workload  # noqa: E402
from harness.unbound import Unbound  # noqa: E402

README = ROOT / "README.md"
BEGIN, END = "<!-- session: written by ci/readme_session.py -->\n```console\n", "```\n<!-- end of session -->"

POLICY = """\
default: {mode: allowlist, dns: {mode: allowlist, allow: ["*.example.test"]}}
"""
RECORDS = ("www.example.test. 300 IN A 203.0.113.80", "elsewhere.test. 300 IN A 203.0.113.82")
# One port for one attachment: the VM's resolv.conf then needs nothing but the address.
CONFIG = {"dns": {"listen_addr": DNS4, "port_min": 53, "port_max": 53}}

# What differs between two runs that went alike: ids, ages, milliseconds, packets, and the mechanism by kernel.
VARIABLE = (
    (re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "ID"),
    (re.compile(r"after \d+ milliseconds"), "after N milliseconds"),
    (re.compile(r"\b\d+/\d+\b"), "N/N"),
    (re.compile(r"\b\d+(ms|s|m)\b"), "AGE"),
    (re.compile(r"\((tcx|clsact)\)"), "(MECHANISM)"),
    (re.compile(r"  +"), "  "),
)


def normal(session: str) -> str:
    """Replace what may differ between two runs."""
    for pattern, word in VARIABLE:
        session = pattern.sub(word, session)
    return session


class Shell:
    """Runs commands and keeps what a terminal would have shown."""

    def __init__(self, host: NetNs, vm: Workload, directory: Path) -> None:
        self._host, self._vm, self._directory = host, vm.inside, directory
        self._resolv_conf = directory / "resolv.conf"
        self._resolv_conf.write_text(f"nameserver {DNS4}\noptions attempts:1 timeout:1\n")
        self._env = {
            **os.environ,
            "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}",
            "NETFENCE_SOCKET": str(directory / "netfence.sock"),
            "LC_ALL": "C.UTF-8",
        }
        self.shown = ""

    def host(self, command: str) -> None:
        """Run a command on the host."""
        self._show("host", command, self._run(self._host, command))

    def vm(self, command: str) -> None:
        """Run a command in the VM, with the VM's own resolv.conf."""
        inside = f"mount --bind {shlex.quote(str(self._resolv_conf))} /etc/resolv.conf && exec {command}"
        self._show("vm", command, self._run(self._vm, shlex.join(["unshare", "--mount", "sh", "-c", inside])))

    def show(self, command: str) -> None:
        """Show a host command that the harness has run already."""
        self._show("host", command, "")

    def _run(self, netns: NetNs, command: str) -> str:
        with netns.inside():
            done = subprocess.run(
                ["sh", "-c", command],
                cwd=self._directory,
                env=self._env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=30,
                check=False,
            )
        return done.stdout

    def _show(self, where: str, command: str, said: str) -> None:
        lines = [line.rstrip() for line in said.splitlines()]
        self.shown += "".join(f"{line}\n" for line in [f"{where}# {command}", *lines])


def session() -> str:
    """Run the session and return it as a terminal shows it."""
    sandbox.enter()
    with tempfile.TemporaryDirectory(prefix="netfence-readme-") as scratch:
        directory = Path(scratch)
        topology = Topology()
        try:
            workload = topology.add_veth("vm")
            with (
                Unbound(topology.internet, directory / "unbound", [NAMESERVER4], RECORDS),
                web(topology.internet, "203.0.113.80", 80, b"hello\n"),
                web(topology.internet, METADATA4, 80, b"cloud credentials\n"),
                Netfenced(topology.host, directory, policy=yaml.safe_load(POLICY), config=CONFIG) as daemon,
            ):
                daemon.write_policy(POLICY)
                shell = Shell(topology.host, workload, directory)
                shell.vm(f"curl -sS http://{METADATA4}/")
                shell.host("cat policy.yaml")
                shell.show("netfenced start --config netfence.yaml --policy policy.yaml &")
                shell.host(f"netfenced attach --interface {workload.host_if}")
                shell.vm("curl -sS http://www.example.test/")
                shell.vm("curl -sS http://elsewhere.test/")
                shell.vm(f"curl -sS --max-time 0.5 http://{METADATA4}/")
                shell.host("netfenced list")
                return shell.shown
        finally:
            topology.close()
            cgroup.remove_ours()


def in_readme() -> str:
    """Return the session that README.md shows."""
    return README.read_text().partition(BEGIN)[2].partition(END)[0]


def main() -> int:
    """Run as the docstring of the module says; return the exit status."""
    parser = argparse.ArgumentParser(description="Run the README's session.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if README.md would change")
    check = parser.parse_args().check
    cgroup.sweep()
    now, shown = session(), in_readme()
    if normal(now) == normal(shown):
        return 0
    print(now)
    if check:
        print("README.md shows another session; run ci/readme_session.py", file=sys.stderr)
        return 1
    text = README.read_text()
    head, begin, rest = text.partition(BEGIN)
    if not begin:
        print("README.md has no place for the session", file=sys.stderr)
        return 1
    README.write_text(head + BEGIN + now + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
