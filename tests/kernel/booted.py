"""systemd itself, as the first process of its own namespaces, running packaging/netfenced.service and nothing else.

It knows no other unit, sees /proc/sys read only and /run, /var/lib and /sys/fs/bpf empty, and dies with its cgroup.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from harness import topology
from harness.cgroup import Cgroup
from harness.daemon import ALLOW_PRIVATE, PROGRAM
from harness.deadline import SLOWNESS, wait_for
from harness.spawn import spawn
from harness.topology import Topology

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "packaging" / "netfenced.service"
SYSTEMD = "/lib/systemd/systemd"
START_TIMEOUT_S = 60 * SLOWNESS
TARGETS = ("sysinit", "basic", "shutdown", "network", "multi-user")

BOOT = """
set -e
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,ro,bind /proc/sys
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf -o mode=700 bpf /sys/fs/bpf
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib
export container=other SYSTEMD_UNIT_PATH="$1" SYSTEMD_LOG_TARGET=console
exec "$0" --system --unit=multi-user.target
"""

# Where this test has things, instead of where an installation has them; all that confines stays as it is.
DROP_IN = """
[Service]
ConfigurationDirectory=
ProtectHome=tmpfs
BindReadOnlyPaths={root} {environment} {directory}
ExecStart=
ExecStart={program} start --config {config}
StandardOutput=append:{log}
StandardError=append:{log}
WatchdogSec={watchdog_s}
"""


class Booted:
    """systemd in the topology's host namespace, with the service enabled; `more`: further lines of its [Service].

    A context manager.
    """

    def __init__(
        self, place: Topology, directory: Path, policy: Mapping[str, Any], watchdog_s: float, *, more: str = ""
    ) -> None:
        self._place, self._directory, self._policy = place, directory, policy
        self._watchdog_s, self._more = watchdog_s, more
        self.log = directory / "netfenced.log"
        self._close = ExitStack()
        self._first = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            command = self._boot()
            group = Cgroup(f"systemd-{id(self):x}")
            stack.callback(group.remove)
            unshare = ["unshare", "--pid", "--fork", "--mount", "--uts", "--ipc", "--cgroup"]
            with (self._directory / "console").open("ab") as console:
                process = spawn(
                    [*unshare, *command],
                    netns=self._place.host, cgroup=group, stdout=console, stderr=console,
                )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            self._first = int(wait_for(lambda: children.read_text().split(), "systemd to be started")[0])
            self.wait_ready()
            self._close = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close.close()

    def _boot(self) -> list[str]:
        """Give what runs as the first process of new namespaces and becomes systemd."""
        return ["sh", "-c", BOOT, SYSTEMD, str(self._write_files())]

    def wait_ready(self) -> None:
        """Wait until the service is."""
        wait_for(lambda: self.shows("ActiveState") == "active", "the service to be ready", START_TIMEOUT_S)

    def _write_files(self) -> Path:
        """Write the units and the configuration; return where the units are."""
        units = self._directory / "units"
        drop_ins = units / "netfenced.service.d"
        drop_ins.mkdir(parents=True)
        for name in TARGETS:
            (units / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        (units / "multi-user.target.wants").mkdir()
        (units / UNIT.name).write_text(UNIT.read_text(encoding="utf-8"), encoding="utf-8")
        (units / "multi-user.target.wants" / UNIT.name).symlink_to(f"../{UNIT.name}")
        config, policy = self._directory / "netfence.yaml", self._directory / "policy.yaml"
        policy.write_text(yaml.safe_dump(dict(self._policy)))
        dns = {
            "listen_addr": topology.DNS4,
            "upstreams": [topology.NAMESERVER4],
            "allow_private": ALLOW_PRIVATE,
            "timeout": 0.5,
        }
        config.write_text(yaml.safe_dump({"policy_file": str(policy), "log_format": "json", "dns": dns}))
        told = DROP_IN.format(
            root=ROOT, environment=sys.prefix, directory=self._directory, program=PROGRAM, config=config, log=self.log,
            watchdog_s=self._watchdog_s,
        )  # fmt: skip
        (drop_ins / "test.conf").write_text(told + self._more)
        return units

    def run(self, *command: str, check: bool = True, timeout_s: float = 30) -> str:
        """Run a command beside systemd; return what it prints."""
        entered = ["nsenter", "--target", str(self._first), "--all", "--", *command]
        done = subprocess.run(entered, capture_output=True, text=True, check=False, timeout=timeout_s * SLOWNESS)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.said()}"
        return done.stdout

    def netfenced(self, *arguments: str) -> str:
        """Run the command line, which has to find the daemon's socket by itself."""
        return self.run(str(PROGRAM), *arguments)

    def shows(self, key: str) -> str:
        """Tell a property of the service; "" while systemd does not answer."""
        return self.run("systemctl", "show", "--value", "--property", key, UNIT.name, check=False).strip()

    def status(self) -> dict[str, str]:
        """Read /proc/<pid>/status of the daemon, with what systemd made of it."""
        lines = self.run("cat", f"/proc/{self.shows('MainPID')}/status").splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def mounts(self) -> list[list[str]]:
        """Read what the daemon sees of the file system: the fields of /proc/<pid>/mountinfo."""
        return [line.split() for line in self.run("cat", f"/proc/{self.shows('MainPID')}/mountinfo").splitlines()]

    def said(self) -> str:
        """Give what systemd and the daemon wrote."""
        files = (self._directory / "console", self.log)
        return "\n".join(file.read_text(errors="replace") for file in files if file.exists())
