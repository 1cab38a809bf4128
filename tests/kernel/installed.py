"""systemd in a root of its own, a copy of this machine's (overlayfs), for installing the Debian package for real.

It knows no other service; this repository is not there. Whatever dpkg, the package's scripts and the daemon write goes
to memory, and is gone with the namespaces.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from booted import ROOT, SYSTEMD, TARGETS, Booted
from harness.deadline import SLOWNESS, wait_for
from harness.topology import Topology

DPKG_S = 180
"""For one run of dpkg, which compiles Python's modules and starts the daemon, which compiles its programs."""

# $0: systemd, $1: a directory to work in, $2: where the packages are, $3: this repository, the rest: names of targets.
BOOT = """
set -e
mount -t tmpfs -o size=1g,mode=755 tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" overlay "$1/root"
cd "$1/root"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,ro,bind proc/sys
mount --rbind /dev dev
mount --rbind /sys sys
umount -R sys/fs/cgroup
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t bpf -o mode=700 bpf sys/fs/bpf
mount -t tmpfs -o mode=755 tmpfs run
mkdir -p mnt/package mnt/old
mount --bind "$2" mnt/package
mkdir -p "./$3"
mount -t tmpfs tmpfs "./$3"
mount -t tmpfs -o mode=755 tmpfs usr/lib/systemd/system
mount -t tmpfs -o mode=755 tmpfs etc/systemd/system
rm -rf usr/lib/systemd/system-generators usr/sbin/policy-rc.d var/lib/netfence etc/netfence
shift 3
for name; do printf '[Unit]\\nDefaultDependencies=no\\n' >"usr/lib/systemd/system/$name.target"; done
pivot_root . mnt/old
umount -l /mnt/old
export container=other SYSTEMD_LOG_TARGET=console
exec "$0" --system --unit=multi-user.target
"""


class Installed(Booted):
    """systemd in the topology's host namespace, and what is in `packages` under /mnt/package. A context manager."""

    def __init__(self, place: Topology, directory: Path, packages: Path) -> None:
        super().__init__(place, directory, {}, watchdog_s=0)
        self._packages = packages

    def _boot(self) -> list[str]:
        root = self._directory / "root"
        root.mkdir()
        return ["sh", "-c", BOOT, SYSTEMD, str(root), str(self._packages), str(ROOT), *TARGETS]

    def wait_ready(self) -> None:
        """Wait until systemd has come up, and nothing else with it."""

        def up() -> bool:
            return self.run("systemctl", "is-active", "multi-user.target", check=False) == "active\n"

        wait_for(up, "systemd to be up", 60 * SLOWNESS)

    def dpkg(self, action: str, what: str) -> str:
        """Run dpkg; return all that is said, by the package's scripts too."""
        options = "--force-confold --force-unsafe-io --no-triggers"
        command = ["sh", "-c", f"exec dpkg {options} {action} {what} 2>&1"]
        return self.run(*command, timeout_s=DPKG_S)

    def netfenced(self, *arguments: str) -> str:
        """Run the command line, which has to find the daemon's socket by itself."""
        return self.run("netfenced", *arguments)

    def said(self) -> str:
        """Give what systemd wrote, and the service as systemd sees it."""
        told = self.run("systemctl", "status", "--full", "netfenced.service", check=False) if self._first else ""
        return f"{super().said()}\n{told}"


def build(output: Path) -> Path:
    """Build the package; return its file."""
    command = [str(ROOT / "packaging" / "build-deb"), "--fast", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())
