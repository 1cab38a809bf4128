"""`path-*`: packets through veth – host – veth with the fence on the host, against no filter."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from bench_plane import Plane
from harness.netns import NetNs
from harness.spawn import spawn, stop
from harness.topology import INTERNET_IF, Topology, Workload
from measure import CPU, FULL, compare, ratio, report
from netfence.dataplane.plane import Static
from netfence.dataplane.target import Direction, InterfaceTarget, resolve_interface
from netfence.policy.commands import BulkUpdate, CidrSpec, apply
from netfence.policy.modes import Mode
from netfence.policy.policy import EMPTY

SERVER = "203.0.113.80"
RULES = 1_000
BATCH = 64
PACKETS = 400_000 if FULL else 100_000
PAYLOAD = bytes(22)  # a 64-byte frame
TCP_SECONDS = 3 if FULL else 1
IPERF_PORT = 5201
FAR_OFF = 0.7  # the figure is 0.95; on a busy machine a smoke run only shows that nothing is badly wrong


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_char_p), ("length", ctypes.c_size_t)]


class _Message(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iov_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("sent", ctypes.c_uint32),
    ]


class Blaster:
    """Sends UDP packets as fast as one thread can (sendmmsg): system calls cost little beside the path."""

    def __init__(self, netns: NetNs, server: str, port: int) -> None:
        with netns.inside():
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.connect((server, port))
        self._iovec = _Iovec(PAYLOAD, len(PAYLOAD))
        self._messages = (_Message * BATCH)()
        for message in self._messages:
            message.iov, message.iov_count = ctypes.pointer(self._iovec), 1
        self._libc = ctypes.CDLL(None, use_errno=True)

    def send(self, packets: int) -> None:
        left = packets
        while left:
            sent = self._libc.sendmmsg(self._socket.fileno(), self._messages, min(BATCH, left), 0)
            assert sent > 0, os.strerror(ctypes.get_errno())
            left -= sent

    def close(self) -> None:
        self._socket.close()


class Fence:
    """The fence on a workload's interface, put on and taken off between rounds."""

    def __init__(self, topology: Topology, plane: Plane, workload: Workload) -> None:
        self._plane = plane
        with topology.host.inside():
            self._target: InterfaceTarget = resolve_interface(workload.host_if)
        cidrs = [CidrSpec(f"10.{n >> 8}.{n & 255}.0/24", 0) for n in range(RULES - 1)] + [CidrSpec(f"{SERVER}/32", 0)]
        bulk = BulkUpdate(mode=int(Mode.ALLOWLIST), allow_cidrs=cidrs, deny_cidrs=[], dns=None, audit=False)
        self._policy = apply(EMPTY, bulk, time.monotonic())
        self._slot: int | None = None

    def on(self) -> None:
        if self._slot is None:
            plane = self._plane.plane
            self._slot = plane.allocate_slot()
            static = Static(dns_address=socket.inet_aton("198.51.100.254"), dns_port=11000)
            self._plane.run(plane.attach(self._slot, self._target, static, Direction.WORKLOAD, "path"))
            self._plane.run(plane.apply(self._slot, self._policy, None))

    def off(self) -> None:
        if self._slot is not None:
            self._plane.run(self._plane.plane.detach(self._slot, self._target, "path"))
            self._plane.plane.free_slot(self._slot)
            self._slot = None

    def allowed(self) -> int:
        assert self._slot is not None
        return self._plane.plane.counters(self._slot).allowed[0]


@pytest.fixture(scope="module")
def workload(topology: Topology) -> Workload:
    return topology.add_veth()


@pytest.fixture(scope="module")
def fence(topology: Topology, plane: Plane, workload: Workload) -> Iterator[Fence]:
    one = Fence(topology, plane, workload)
    yield one
    one.off()


def received(netns: NetNs, ifname: str) -> int:
    (link,) = netns.ip_json("-s", "link", "show", "dev", ifname)
    return int(link["stats64"]["rx"]["packets"])


@pytest.mark.usefixtures("pinned")
def test_udp(topology: Topology, workload: Workload, fence: Fence) -> None:
    assert workload.netns is not None
    with topology.internet.inside():
        sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sink.bind((SERVER, 9))
    blaster = Blaster(workload.netns, SERVER, 9)
    packets = PACKETS // BATCH * BATCH

    def run() -> float:
        before = received(topology.internet, INTERNET_IF)
        start = time.perf_counter()
        blaster.send(packets)
        elapsed = time.perf_counter() - start
        assert received(topology.internet, INTERNET_IF) - before >= packets, "lost on the way"
        return packets / elapsed

    def fenced() -> float:
        fence.on()
        before = fence.allowed()
        rate = run()
        assert fence.allowed() - before >= packets
        return rate

    def bare() -> float:
        fence.off()
        return run()

    series = compare("packets/s", {"none": bare, "netfence": fenced})
    blaster.close()
    sink.close()
    report("path-udp-veth", series, base="none", rules=RULES, packets=packets, cpu_pinned=CPU)
    assert ratio(series["netfence"], series["none"]).median > FAR_OFF


@pytest.mark.usefixtures("pinned")
def test_tcp(topology: Topology, workload: Workload, fence: Fence) -> None:
    assert workload.netns is not None
    listen = ["iperf3", "-s", "-B", SERVER, "-p", str(IPERF_PORT)]
    server = spawn(listen, netns=topology.internet, stdout=subprocess.DEVNULL)
    try:
        _wait_listening(topology.internet)

        def run() -> float:
            argv = ["iperf3", "-c", SERVER, "-p", str(IPERF_PORT), "-t", str(TCP_SECONDS), "-J"]
            client = spawn(argv, netns=workload.netns, stdout=subprocess.PIPE)
            out, _ = client.communicate(timeout=30)
            return float(json.loads(out)["end"]["sum_received"]["bits_per_second"]) / 1e9

        def fenced() -> float:
            fence.on()
            return run()

        def bare() -> float:
            fence.off()
            return run()

        series = compare("Gbit/s", {"none": bare, "netfence": fenced})
    finally:
        with contextlib.suppress(Exception):
            stop(server)
    report("path-tcp-veth", series, base="none", rules=RULES, seconds=TCP_SECONDS, cpu_pinned=CPU)
    assert ratio(series["netfence"], series["none"]).median > FAR_OFF


def _wait_listening(netns: NetNs) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if f":{IPERF_PORT}" in netns.run("ss", "-Hltn").stdout:
            return
    message = "iperf3 does not listen"
    raise TimeoutError(message)
