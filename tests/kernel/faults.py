"""What can go wrong with the machine under a daemon, made real: full or read-only disks, no descriptors, a wrong clock.

Most are context managers: a fault begins with the block and is gone after it. Mounts are this test process's own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from daemons import Fenced
from harness import sandbox, syscalls
from harness.deadline import wait_for
from harness.spawn import spawn

DISK_KIB = 2048
LOOKS = 40  # 5 ms apart

T = TypeVar("T")

# Runs the command line with a wall clock that is wrong by what the file says, in seconds.
WRONG_CLOCK = """
import sys, time
from pathlib import Path
offset, right = Path(sys.argv.pop(1)), time.time
time.time = lambda: right() + float(offset.read_text())
from netfence.cli import main
sys.argv[0] = "netfenced"
main()
"""


@contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """Mount a tmpfs of `DISK_KIB` on a directory, which is made, for a daemon's state."""
    sandbox.enter()
    directory.mkdir(mode=0o700, parents=True)
    _mount("-t", "tmpfs", "-o", f"size={DISK_KIB}k,mode=700", "state", str(directory))
    try:
        yield directory
    finally:
        syscalls.unmount(directory)


@contextmanager
def image_disk(directory: Path) -> Iterator[Path]:
    """Mount a file system that can fail, ext4 in a file, on a directory, which is made."""
    sandbox.enter()
    image = directory.with_name(f"{directory.name}.img")
    directory.mkdir(mode=0o700, parents=True)
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    _mount("-o", "loop", str(image), str(directory))
    try:
        directory.chmod(0o700)
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def mount_again(directory: Path) -> None:
    """Take a failed file system off and mount it again, as an operator does; nobody may use it."""
    subprocess.run(["umount", str(directory)], check=True)
    image = directory.with_name(f"{directory.name}.img")
    subprocess.run(["e2fsck", "-p", str(image)], check=False, capture_output=True)
    _mount("-o", "loop", str(image), str(directory))


def fail_disk(directory: Path) -> None:
    """Make ext4 read-only under its users, as it does by itself after an error of the device.

    What was written before is on the disk by then: else files younger than half a minute would be empty.
    """
    subprocess.run(["sync", "-f", str(directory)], check=True)
    _mount("-o", "remount,abort,errors=remount-ro", str(directory))


@contextmanager
def full(directory: Path) -> Iterator[None]:
    """Fill the file system that a directory is on, to the last byte."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 16, 1 << 12, 1 << 8, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Make a mount read-only."""
    _mount("-o", "remount,ro,bind", str(directory))
    try:
        yield
    finally:
        _mount("-o", "remount,rw,bind", str(directory))


@contextmanager
def no_files(pid: int) -> Iterator[None]:
    """Let a process open nothing more: its limit of open files becomes the lowest number that is free."""
    limit = _limit(pid)
    used = _settled(lambda: {int(name) for name in os.listdir(f"/proc/{pid}/fd")})  # noqa: PTH208 - descriptors, not files
    free = next(number for number in range(len(used) + 1) if number not in used)
    _set_limit(pid, str(free))
    try:
        yield
    finally:
        _set_limit(pid, limit)


def _settled(look: Callable[[], T]) -> T:
    """Look until the same has been seen for a while, and return it: what is on its way out would make room."""
    seen: list[T] = [look()]

    def the_same() -> bool:
        seen.append(look())
        return len(seen) > LOOKS and all(one == seen[-1] for one in seen[-LOOKS:])

    wait_for(the_same, "the descriptors to settle")
    return seen[-1]


def _limit(pid: int) -> str:
    told = subprocess.run(
        ["prlimit", f"--pid={pid}", "--nofile", "--noheadings", "--output=SOFT"],
        capture_output=True,
        text=True,
        check=True,
    )
    return told.stdout.strip()


def _set_limit(pid: int, soft: str) -> None:
    subprocess.run(["prlimit", f"--pid={pid}", f"--nofile={soft}:"], check=True)


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(errno.EIO, f"mount {arguments}: {done.stderr.strip()}")


class WronglyClocked(Fenced):
    """A daemon whose wall clock the test sets wrong (`offset`, in seconds)."""

    def jump(self, seconds: float) -> None:
        """Set the wall clock wrong by so much from now on."""
        file = self.directory / "offset.new"
        file.write_text(str(seconds))
        file.rename(self.directory / "offset")

    def launch(self) -> None:
        """Start the process."""
        if not (self.directory / "offset").exists():
            self.jump(0.0)
        env = {key: value for key, value in os.environ.items() if not key.startswith("NETFENCE_")} | self._env
        command = [sys.executable, "-c", WRONG_CLOCK, str(self.directory / "offset")]
        with self.log_file.open("ab") as log:
            self._process = spawn(
                [*command, "start", "--config", str(self.config_file)],
                netns=self.netns, cgroup=self._cgroup, env=env, stdout=log, stderr=log,
            )  # fmt: skip


class KernelMemory:
    """A memory cgroup to which the kernel charges the maps of a daemon that is started in it, and nothing else.

    The daemon itself is moved out: running short in it is the kernel's trouble, and no process of ours is ended for it.
    """

    def __init__(self) -> None:
        """Make it below this process's own one. Raises FileNotFoundError where there is no memory controller (v1)."""
        mounts = (line.partition(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines())
        root = next((Path(one.split()[4]) for one, _, rest in mounts if "memory" in rest.split()[-1].split(",")), None)
        if root is None:
            message = "no memory controller of cgroup v1 is mounted"
            raise FileNotFoundError(message)
        self._home = root / "cgroup.procs"
        self._group = root / f"{sandbox.run_name()}-memory"
        self._group.mkdir()

    @contextmanager
    def charged(self) -> Iterator[None]:
        """Be in it, with the processes started meanwhile."""
        (self._group / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            self._home.write_text(str(os.getpid()))

    @contextmanager
    def none_left(self, daemon: Fenced) -> Iterator[None]:
        """Let the kernel find no more memory for the daemon's maps."""
        for pid in (self._group / "cgroup.procs").read_text().split():
            self._home.write_text(pid)
        assert daemon.alive
        limit = self._group / "memory.limit_in_bytes"

        def at_its_limit() -> bool:
            used = int((self._group / "memory.usage_in_bytes").read_text())
            with contextlib.suppress(OSError):  # what can be given back is, and then it fits
                limit.write_text(str(used))
            return int(limit.read_text()) - int((self._group / "memory.usage_in_bytes").read_text()) < (1 << 16)

        wait_for(at_its_limit, "the limit to be reached")
        try:
            yield
        finally:
            limit.write_text("-1")

    def close(self) -> None:
        """Remove it; what is charged to it goes to its parent."""
        self._group.rmdir()
