"""Cgroup v2 directories under one parent per test process."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from pathlib import Path

from harness import sandbox
from harness.deadline import wait_for


def root() -> Path:
    """Find where cgroup v2 is mounted: /sys/fs/cgroup on most machines, /sys/fs/cgroup/unified on some."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.split()[0] == "cgroup2":
            return Path(fields.split()[4])
    message = "cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup"
    raise FileNotFoundError(message)


class Cgroup:
    """One cgroup directory, made on construction. `remove` ends what runs in it."""

    def __init__(self, name: str) -> None:
        """Make `name` (slashes allowed) under this process's parent cgroup."""
        self.path = root() / sandbox.run_name() / name
        self.path.mkdir(parents=True)

    @property
    def procs(self) -> Path:
        """Writing a pid here moves the process into the cgroup."""
        return self.path / "cgroup.procs"

    @property
    def id(self) -> int:
        """The kernel's 64-bit id of this cgroup, which is the inode number on every kernel since 5.5."""
        return self.path.stat().st_ino

    def pids(self) -> list[int]:
        """List the processes in this very cgroup."""
        return [int(line) for line in self.procs.read_text().split()]

    def remove(self) -> None:
        """End every process in it and below, and remove the directories."""
        remove_tree(self.path)

    def __repr__(self) -> str:
        return f"Cgroup({self.path})"


def remove_tree(path: Path) -> None:
    """Remove a cgroup with all below it, ending the processes inside; another test process may be about the same."""
    with contextlib.suppress(FileNotFoundError):
        for child in [entry for entry in path.iterdir() if entry.is_dir()]:
            remove_tree(child)

    def removed() -> bool:
        try:
            for pid in (path / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            path.rmdir()
        except OSError as error:  # EBUSY until the last process is reaped
            return error.errno in {errno.ENOENT, errno.ENODEV} and not path.exists()
        return True

    wait_for(removed, f"cgroup {path} to become empty")


def sweep() -> None:
    """Remove the parent cgroups of test processes that no longer live (killed before they could clean up)."""
    for path in root().glob(f"{sandbox.PREFIX}*"):
        pid = path.name.removeprefix(sandbox.PREFIX)
        if pid.isdecimal() and not Path("/proc", pid).exists():
            remove_tree(path)


def remove_ours() -> None:
    """Remove this process's parent cgroup and all below it."""
    remove_tree(root() / sandbox.run_name())
