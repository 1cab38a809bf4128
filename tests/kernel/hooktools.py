"""What the hook tests share: private namespaces, a private bpffs, throw-away cgroups, tiny programs, probe packets.

Everything is a context manager that undoes itself. Namespaces are entered by the calling thread only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from harness.needs import needs
from netfence.dataplane import links, probe, rawprog
from netfence.dataplane.rawprog import ProgType

CLONE_NEWNET = 0x40000000
TCX_NEXT, TC_ACT_SHOT = -1, 2
PORT = 9
HOST_IP, WORKLOAD_IP = "10.91.0.1", "10.91.0.2"
DEADLINE_S = 5.0
needs_tcx = needs("tcx")


def take_off(pin: Path) -> None:
    """Detach a pinned link, as `bpftool link detach` does: the pin stays, and holds nothing any more."""
    link = links.obj_get(pin)
    links.link_detach(link)
    os.close(link)


SILENCE_S = 0.15  # a veth delivers in the sender's own softirq: what has not come by then does not come

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Netns:
    """A network namespace held by a descriptor alone: it goes when the descriptor and its last process go."""

    def __init__(self) -> None:
        with self._home():
            _checked(_libc.unshare(CLONE_NEWNET))
            self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            run("ip link set lo up")

    @classmethod
    @contextlib.contextmanager
    def current(cls) -> Iterator[Netns]:
        """Hold the namespace that the calling thread is in."""
        space = cls.__new__(cls)
        space.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield space
        finally:
            os.close(space.fd)

    @staticmethod
    @contextlib.contextmanager
    def _home() -> Iterator[None]:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield
        finally:
            _checked(_libc.setns(home, CLONE_NEWNET))
            os.close(home)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Be inside for a while."""
        with self._home():
            _checked(_libc.setns(self.fd, CLONE_NEWNET))
            yield


def run(command: str) -> str:
    """Run a command line without a shell; its error text goes into the exception."""
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{command}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def netns() -> Iterator[Netns]:
    space = Netns()
    try:
        yield space
    finally:
        os.close(space.fd)


@contextlib.contextmanager
def inside_netns() -> Iterator[Netns]:
    """Enter a fresh namespace for the block."""
    with netns() as space, space.entered():
        yield space


@contextlib.contextmanager
def veth_pair() -> Iterator[Netns]:
    """Enter a fresh "host" with h0 (10.91.0.1) whose peer w0 (10.91.0.2) is in a "workload", which is yielded."""
    with inside_netns(), netns() as workload:
        pid = os.getpid()
        run(f"ip link add h0 type veth peer name w0 netns /proc/{pid}/fd/{workload.fd}")
        run(f"ip addr add {HOST_IP}/24 dev h0")
        run("ip link set h0 up")
        with workload.entered():
            run(f"ip addr add {WORKLOAD_IP}/24 dev w0")
            run("ip link set w0 up")
        yield workload


@contextlib.contextmanager
def bpffs() -> Iterator[Path]:
    """Mount a bpf file system of our own."""
    with tempfile.TemporaryDirectory(prefix="netfence-test-") as directory:
        run(f"mount -t bpf bpf {directory}")
        try:
            yield Path(directory)
        finally:
            run(f"umount {directory}")


def cgroup_root() -> Path:
    return Path(next(point for kind, point in probe.mounts().values() if kind == "cgroup2"))


@contextlib.contextmanager
def cgroup(name: str = "t", parent: Path | None = None) -> Iterator[Path]:
    path = (parent or cgroup_root()) / f"netfence-test-{os.getpid()}-{name}"
    path.mkdir()
    try:
        yield path
    finally:
        remove_cgroup(path)


def remove_cgroup(path: Path) -> None:
    """Remove a cgroup once its last process has been reaped."""
    if path.exists():
        until(lambda: not (path / "cgroup.procs").read_text().strip())
        path.rmdir()


@contextlib.contextmanager
def program(code: int, prog_type: ProgType = ProgType.SCHED_CLS, expected: int = 0, name: str = "t") -> Iterator[int]:
    """Load a program that returns `code`."""
    prog_fd = rawprog.load_raw(prog_type, rawprog.returning(code), expected_attach_type=expected, name=name)
    try:
        yield prog_fd
    finally:
        os.close(prog_fd)


def open_descriptors() -> int:
    """Count this process's descriptors, to see that none leaks."""
    return len(list(Path("/proc/self/fd").iterdir()))


def until(condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.005)


class Probe:
    """UDP from the workload to the host, and back."""

    def __init__(self, workload: Netns) -> None:
        self._sockets: list[socket.socket] = []
        self.host = self._bound(HOST_IP)
        with workload.entered():
            self.workload = self._bound(WORKLOAD_IP)

    def _bound(self, address: str) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((address, PORT))
        sock.settimeout(DEADLINE_S)
        self._sockets.append(sock)
        return sock

    def to_host(self) -> bool:
        """Tell whether a packet that the workload sends arrives."""
        return self._arrives(self.workload, self.host, HOST_IP)

    def to_workload(self) -> bool:
        """Tell whether a packet that the host sends arrives."""
        return self._arrives(self.host, self.workload, WORKLOAD_IP)

    @staticmethod
    def _arrives(sender: socket.socket, receiver: socket.socket, address: str) -> bool:
        receiver.settimeout(0.0)
        with contextlib.suppress(BlockingIOError):
            while True:
                receiver.recv(64)
        token = os.urandom(8)
        with contextlib.suppress(PermissionError):
            sender.sendto(token, (address, PORT))
        receiver.settimeout(SILENCE_S)
        try:
            return receiver.recv(64) == token
        except TimeoutError:
            return False

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


@contextlib.contextmanager
def fenced_pair() -> Iterator[tuple[Probe, int]]:
    """Yield probes over a veth pair whose first packet (ARP) is behind us, and h0's index."""
    with veth_pair() as workload, contextlib.closing(Probe(workload)) as probe_:
        until(lambda: probe_.to_host() and probe_.to_workload())
        yield probe_, socket.if_nametoindex("h0")


@contextlib.contextmanager
def tun_device(name: str, mode: str) -> Iterator[None]:
    """Make a tun or tap device that lives as long as the block."""
    flags = {"tun": 0x0001, "tap": 0x0002}[mode] | 0x1000  # IFF_NO_PI
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), flags))
        yield
    finally:
        os.close(fd)


def in_cgroup(path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that entered the cgroup first."""
    enter = f"import os; open({str(path / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
    return subprocess.run([sys.executable, "-c", enter + code], capture_output=True, text=True, check=False, timeout=30)
