"""A small container: runc, busybox and curl (rootfs.py), a network namespace and a cgroup that a test has made.

Owns the bundle and how it is started; what the container is asked to do goes over its input and output (shells.py).
runc is shown cgroup v2 at /sys/fs/cgroup, as on a machine of today, also where this one has it elsewhere.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Self

import rootfs
from harness import cgroup
from harness.cgroup import Cgroup
from harness.deadline import SLOWNESS
from harness.netns import NetNs
from harness.spawn import spawn, stop
from shells import LOOP, Said, Shell

START_S = 60.0 * SLOWNESS  # 0.3 s on an idle machine
ID = "container"

# In a mount namespace of its own; "$@" is runc and its arguments.
WITH_CGROUP2 = """
[ -e /sys/fs/cgroup/cgroup.controllers ] || mount -t cgroup2 none /sys/fs/cgroup || exit
exec "$@"
"""


class Container:
    """One running container, in a cgroup of its own below `parent`; a context manager."""

    def __init__(self, netns: NetNs, parent: Cgroup, directory: Path, *, nameserver: str) -> None:
        """Start it with `nameserver` in its resolv.conf and wait until it runs commands."""
        root = directory / "rootfs"
        rootfs.make(root)
        (root / "etc" / "resolv.conf").write_text(f"nameserver {nameserver}\n")
        self._configure(directory, netns, parent)
        runc = ["runc", "--root", str(directory / "state"), "run", "--bundle", str(directory), ID]
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", WITH_CGROUP2, "sh", *runc]
        with (directory / "runc.err").open("wb") as errors:
            self._process = spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        try:
            self._shell = Shell(self._process, START_S)
        except (RuntimeError, TimeoutError) as error:
            stop(self._process)
            error.add_note((directory / "runc.err").read_text())
            raise

    @staticmethod
    def _configure(directory: Path, netns: NetNs, parent: Cgroup) -> None:
        """Write config.json: what `runc spec` proposes (three capabilities, no raw sockets), in the given places."""
        subprocess.run(["runc", "spec", "--bundle", str(directory)], check=True)
        file = directory / "config.json"
        config = json.loads(file.read_text())
        config["process"] |= {"terminal": False, "args": ["/bin/sh", "-c", LOOP]}
        config["linux"]["cgroupsPath"] = f"/{parent.path.relative_to(cgroup.root())}/{ID}"
        network = {"type": "network", "path": netns.path}
        others = [each for each in config["linux"]["namespaces"] if each["type"] != "network"]
        config["linux"]["namespaces"] = [*others, network]
        file.write_text(json.dumps(config))

    def run(self, command: str) -> Said:
        """Run one command line in the container."""
        return self._shell.run(command)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # its shell ends, and with it the container, which runc then takes away
        try:
            self._process.wait(START_S)
        finally:
            stop(self._process)
