#!/usr/bin/env python3
"""Run the README's sessions for real, and keep the README at what they print.

    sudo .venv/bin/python ci/readme_session.py            write the sessions into README.md
    sudo .venv/bin/python ci/readme_session.py --check    exit 1 if README.md differs in more than ids and numbers

`host#` lines run in the namespace of netfenced, `vm#` lines behind the fenced veth, with a resolv.conf that names the
attachment's DNS server. What a program in the background says stands where it said it. tests/kernel/test_readme.py runs
the check.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "kernel"))

from harness import cgroup, sandbox  # noqa: E402  # found through the line above
from harness.daemon import PROGRAM, Netfenced  # noqa: E402
from harness.deadline import wait_for  # noqa: E402
from harness.netns import NetNs  # noqa: E402
from harness.services import web  # noqa: E402
from harness.spawn import spawn, stop  # noqa: E402
from harness.topology import DNS4, METADATA4, NAMESERVER4, Topology, Workload  # noqa: E402
from harness.unbound import Unbound  # noqa: E402

README = ROOT / "README.md"
EXAMPLE = "examples/controlplane/control_plane.py"
BEGIN, END = "<!-- {name}: written by ci/readme_session.py -->\n```console\n", "```\n<!-- end of {name} -->"

POLICY = """\
default: {mode: allowlist, dns: {mode: allowlist, allow: ["*.example.test"]}}
"""
POLICIES = """\
policies:
  web: {mode: allowlist, dns: {mode: allowlist, allow: ["*.example.test"]}}
  nothing: {mode: block_all}
attachments:
  - {metadata: {role: web}, policy: web}
default: nothing
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
        self._host, self._vm, self.directory = host, vm.inside, directory
        self._said = directory / "background.log"
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

    @contextmanager
    def background(self, command: str) -> Iterator[None]:
        """Run a command on the host in the background while inside; what it says is for `hear`."""
        self._show("host", f"{command} &", "")
        with self._said.open("wb") as log, self._host.inside():
            process = spawn(
                ["sh", "-c", f"cd {self.directory} && exec {command}"], env=self._env, stdout=log, stderr=log
            )
        try:
            yield
        finally:
            stop(process)

    def hear(self, line: str) -> None:
        """Wait until the command in the background has said this line, and show it."""
        wait_for(lambda: line in self._said.read_text().splitlines(), f"{line!r} in {self._said.read_text()!r}")
        self.shown += f"{line}\n"

    def _run(self, netns: NetNs, command: str) -> str:
        with netns.inside():
            done = subprocess.run(
                ["sh", "-c", command],
                cwd=self.directory,
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


@contextmanager
def stage(policy: Mapping[str, Any] | None, config: Mapping[str, Any]) -> Iterator[tuple[Shell, Netfenced, Workload]]:
    """Give a shell, a daemon and a VM behind a veth, with the internet that the sessions speak of."""
    sandbox.enter()
    with tempfile.TemporaryDirectory(prefix="netfence-readme-") as scratch, ExitStack() as stack:
        directory = Path(scratch)
        stack.callback(cgroup.remove_ours)
        topology = Topology()
        stack.callback(topology.close)
        workload = topology.add_veth("vm")
        stack.enter_context(Unbound(topology.internet, directory / "unbound", [NAMESERVER4], RECORDS))
        stack.enter_context(web(topology.internet, "203.0.113.80", 80, b"hello\n"))
        stack.enter_context(web(topology.internet, METADATA4, 80, b"cloud credentials\n"))
        daemon = Netfenced(topology.host, directory, policy=policy, config=config)
        yield Shell(topology.host, workload, directory), stack.enter_context(daemon), workload


def session() -> str:
    """Run the first session, with a policy file, and return it as a terminal shows it."""
    with stage(policy=yaml.safe_load(POLICY), config=CONFIG) as (shell, daemon, workload):
        daemon.write_policy(POLICY)
        shell.vm(f"curl -sS http://{METADATA4}/")
        shell.host("cat policy.yaml")
        shell.show("netfenced start --config netfence.yaml --policy policy.yaml &")
        shell.host(f"netfenced attach --interface {workload.host_if}")
        shell.vm("curl -sS http://www.example.test/")
        shell.vm("curl -sS http://elsewhere.test/")
        shell.vm(f"curl -sS --max-time 0.5 http://{METADATA4}/")
        shell.host("netfenced list")
        return shell.shown


def control_plane_session() -> str:
    """Run the second session, with the example control plane, and return it as a terminal shows it."""
    url = "127.0.0.1:7443"
    with stage(policy=None, config=CONFIG | {"control_plane": {"url": url}}) as (shell, daemon, workload):
        (shell.directory / "policies.yaml").write_text(POLICIES)
        (shell.directory / EXAMPLE).parent.mkdir(parents=True)
        shutil.copy(ROOT / EXAMPLE, shell.directory / EXAMPLE)
        shell.host("cat policies.yaml")
        with shell.background(f"python {EXAMPLE} policies.yaml"):
            shell.hear(f"serving at {url}")
            shell.show("netfenced start --config netfence.yaml &     # control_plane: {url: 127.0.0.1:7443}")
            wait_for(lambda: daemon.status().control_plane_state == 3, "the control plane to be connected")
            shell.host(f"netfenced attach --interface {workload.host_if} --metadata role=web")
            shell.vm("curl -sS http://www.example.test/")
            shell.host("netfenced status | grep 'control plane'")
            shell.host("sed -i 's/[*].example.test/docs.example.test/' policies.yaml")
            shell.hear("policies.yaml: 1 applied")
            shell.vm("curl -sS http://www.example.test/")
            shell.host("netfenced list")
        return shell.shown


SESSIONS: dict[str, Callable[[], str]] = {"session": session, "control-plane session": control_plane_session}


def in_readme(name: str) -> str:
    """Return a session that README.md shows."""
    return README.read_text().partition(BEGIN.format(name=name))[2].partition(END.format(name=name))[0]


def main() -> int:
    """Run as the docstring of the module says; return the exit status."""
    parser = argparse.ArgumentParser(description="Run the README's sessions.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if README.md would change")
    check = parser.parse_args().check
    cgroup.sweep()
    for name, run in SESSIONS.items():
        now = run()
        if normal(now) == normal(in_readme(name)):
            continue
        print(now)
        if check:
            print(f"README.md shows another {name}; run ci/readme_session.py", file=sys.stderr)
            return 1
        head, begin, rest = README.read_text().partition(BEGIN.format(name=name))
        if not begin:
            print(f"README.md has no place for the {name}", file=sys.stderr)
            return 1
        end = END.format(name=name)
        README.write_text(head + begin + now + end + rest.partition(end)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
