"""A throw-away machine for one page of documentation: a root shell with its own network, files and processes.

What a page writes goes to a temporary directory (the working directory, in which the repository's own files are seen as
in a clone) or to layers over /etc, /run and /var/lib that nobody else sees. `/sys/fs/cgroup` is a cgroup of the test's,
`/sys/fs/bpf` a bpffs of its own. The internet is `harness.topology`'s, with public addresses for the names that pages
speak of, reached by the host's default route. Processes have a PID namespace of their own: all end with the shell, and
`pkill netfenced` finds no one else's.
"""

from __future__ import annotations

import os
import selectors
import shlex
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from harness import warm
from harness.cgroup import Cgroup
from harness.daemon import PROGRAM
from harness.services import web
from harness.spawn import spawn, stop
from harness.topology import METADATA4, NAMESERVER4, Topology
from harness.unbound import Unbound
from netfence.config import Dns
from recipes import can_have_addresses

ROOT = Path(__file__).resolve().parents[2]
COMMAND_TIMEOUT_S = 20.0
DONE = "docs-shell-done"

# Names of the pages: public addresses, which the rebinding guard lets pass; nothing leaves the namespace.
SITES = {
    "example.com": "93.184.215.14",
    "www.example.com": "93.184.215.14",
    "example.org": "93.184.215.15",
    "deb.debian.org": "151.101.2.132",
    "pypi.org": "151.101.0.223",
    "files.pythonhosted.org": "151.101.0.224",
    "github.com": "140.82.121.3",
    "api.anthropic.com": "160.79.104.10",
    "registry.npmjs.org": "104.16.1.34",
    "registry-1.docker.io": "44.208.254.194",
    "one.one.one.one": "1.1.1.1",
}

SETUP = """
set -e
mount --make-rprivate /
layer() {
  mkdir -p "$WORK/layers$1/upper" "$WORK/layers$1/work"
  mount -t overlay overlay -o "lowerdir=$1,upperdir=$WORK/layers$1/upper,workdir=$WORK/layers$1/work" "$1"
}
mount -t tmpfs none "$WORK"
layer /etc
layer /var/lib
mount -t tmpfs none /run
mkdir /run/netns /run/lock
echo "nameserver $NAMESERVER" >/etc/resolv.conf
mkdir -m 0700 -p /var/lib/netfence /etc/netfence
mount --bind "$DATA" /var/lib/netfence
mount --bind "$BPFFS" /sys/fs/bpf
mount --bind "$CGROUP" /sys/fs/cgroup
unset WORK NAMESERVER DATA BPFFS CGROUP
exec bash --noprofile --norc
"""


class DocsShell:
    """The machine and its shell. A context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._close = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            topology = Topology()
            stack.callback(topology.close)
            can_have_addresses(topology)
            for address in sorted(set(SITES.values())):
                topology.internet.ip(f"addr add {address}/32 dev lo")
            names = [f"{name}. 300 IN A {address}" for name, address in SITES.items()]
            stack.enter_context(Unbound(topology.internet, self._directory / "unbound", [NAMESERVER4], names))
            for name, address in {address: name for name, address in SITES.items()}.items():
                stack.enter_context(web(topology.internet, name, 80, f"hello from {address}\n".encode()))
            stack.enter_context(web(topology.internet, METADATA4, 80, b"cloud credentials\n"))
            data, bpffs = self._directory / "data", self._directory / "bpffs"
            stack.enter_context(warm.bpffs(bpffs, data, Dns().max_leases_total))
            page = Cgroup(f"docs-{id(self):x}")
            stack.callback(page.remove)
            shell, seen = (Cgroup(f"{page.path.name}/{name}") for name in ("shell", "seen"))
            for name in ("work", "clone"):
                (self._directory / name).mkdir()
            for entry in ROOT.iterdir():
                if entry.name not in (".git", "build"):
                    (self._directory / "clone" / entry.name).symlink_to(entry)
            env = {
                name: value for name, value in os.environ.items() if not name.startswith(("NETFENCE_", "PYTEST"))
            } | {
                "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}",
                "LC_ALL": "C.UTF-8",
                "WORK": str(self._directory / "work"),
                "NAMESERVER": NAMESERVER4,
                "DATA": str(data),
                "BPFFS": str(bpffs),
                "CGROUP": str(seen.path),
            }
            unshare = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c"]
            enter = f"cd {shlex.quote(str(self._directory / 'clone'))}{SETUP}"
            self._process = spawn(
                [*unshare, enter], netns=topology.host, cgroup=shell, env=env,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            stack.callback(self._end)
            status, said = self.run("trap 'failed=$?' ERR")
            assert status == 0, f"no shell: {said}"
            self._close = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            stop(self._process)

    def run(self, command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> tuple[int, str]:
        """Run commands in the shell; return the exit status of the last that failed, and what was printed."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        # In the shell itself, not below it, so that `cd`, variables and jobs stay; it must not read what comes next.
        process.stdin.write(f"failed=0\n{{ {command}\n}} </dev/null\nprintf '\\n{DONE} %d\\n' $failed\n".encode())
        process.stdin.flush()
        said = self._until_done(timeout_s, command)
        body, _, status = said.rpartition(f"\n{DONE} ")
        return int(status), body

    def _until_done(self, timeout_s: float, command: str) -> str:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        until, said = time.monotonic() + timeout_s, b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while f"\n{DONE} ".encode() not in said or not said.endswith(b"\n"):
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise TimeoutError(
                        f"{command!r} has not ended after {timeout_s:g} s: {said.decode(errors='replace')}"
                    )
                more = os.read(process.stdout.fileno(), 65_536)
                if not more:
                    raise RuntimeError(f"the shell ended in {command!r}: {said.decode(errors='replace')}")
                said += more
        return said.decode(errors="replace").rstrip("\n")
