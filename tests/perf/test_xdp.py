"""`xdp-*`: XDP against TC and no filter, behind a veth and behind a tap, for what passes and for what is dropped.

veth: native, and generic as on a device whose driver has no XDP; UDP and TCP
tap: native and generic; frames written as QEMU does, or by writes that may wait, which go another way in the kernel
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from bench_plane import Plane
from harness import packets
from harness.deadline import wait_for
from harness.spawn import spawn, stop
from harness.topology import Topology
from harness.wire import Tag
from measure import CPU, FULL, SLOW_ROUNDS, compare, ratio, report
from netfence.dataplane.plane import Static
from netfence.dataplane.target import Direction, resolve_interface
from netfence.policy.cidr import NEVER, CidrTable, parse_cidr
from netfence.policy.modes import Mode
from netfence.policy.policy import Policy
from path_bench import BATCH, DENIED, FAR_OFF, SERVER, Blaster, nets, received
from xdp_tools import generic_only

RULES = 1_000
ROUNDS = 9 if FULL else 5
PACKETS = (100_000 if FULL else 6_400) // BATCH * BATCH
TCP_BYTES = (1_000 if FULL else 60) * 1_000_000
TCP_ROUNDS = SLOW_ROUNDS if FULL else 3
UDP_PORT, IPERF_PORT = 9, 5201
SETTLE_S = 5.0
LOST = 0.02  # native XDP of a veth takes frames from a ring of 256, and what does not fit is lost

KINDS = ["veth", "tap", "tap-waiting"] if FULL else ["veth", "tap"]
HOOKS = ["none", "tc", "xdp-native", "xdp-generic"]
TCP_HELD = ["tc", "xdp-generic"]  # native XDP costs a veth segmentation offload, and so five sixths of TCP


class Lane:
    """One contestant on a host of its own."""

    def __init__(self, directory: Path, kind: str, hook: str) -> None:
        self.topology = Topology()
        self.workload = self.topology.add_veth() if kind == "veth" else self.topology.add_tap()
        if kind == "tap-waiting":
            assert self.workload.device is not None
            self.workload.device.let_writes_wait()
        self._plane: Plane | None = None
        if hook != "none":
            self._attach(directory, hook)

    def _attach(self, directory: Path, hook: str) -> None:
        self._plane = Plane(self.topology, directory)
        plane = self._plane.plane
        with self.topology.host.inside():
            self._target = resolve_interface(self.workload.host_if)
        self._slot = plane.allocate_slot()
        static = Static(socket.inet_aton("198.51.100.254"), 11000, xdp=hook != "tc")
        with generic_only() if hook == "xdp-generic" else contextlib.nullcontext():
            mechanism = self._plane.run(plane.attach(self._slot, self._target, static, Direction.WORKLOAD, "xdp"))
        assert hook in (mechanism, "tc")
        table = CidrTable.build((parse_cidr(net), NEVER) for net in nets(RULES))
        self._plane.run(plane.apply(self._slot, Policy(mode=Mode.ALLOWLIST, cidrs=table), None))

    def judged(self) -> tuple[int, int] | None:
        """Return the packets passed and dropped; None: there is no filter."""
        if self._plane is None:
            return None
        counters = self._plane.plane.counters(self._slot)
        return counters.allowed[0], counters.blocked[0]

    def close(self) -> None:
        """Take it away with its host."""
        if self._plane is not None:
            self._plane.run(self._plane.plane.detach(self._slot, self._target, "xdp"))
            self._plane.close()
        self.topology.close()


@pytest.fixture(scope="module", params=KINDS)
def lanes(
    request: pytest.FixtureRequest, pinned_module: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Lane]]:
    """Every contestant behind one kind of device."""
    assert pinned_module == CPU
    with contextlib.ExitStack() as stack:
        made: dict[str, Lane] = {}
        for hook in HOOKS:
            made[hook] = Lane(tmp_path_factory.mktemp(hook), request.param, hook)
            stack.callback(made[hook].close)
        yield made


def _sending(lane: Lane, to: str, stack: contextlib.ExitStack) -> Callable[[], object]:
    """Return what sends PACKETS to an address."""
    workload = lane.workload
    if workload.netns is not None:
        blaster = Blaster(workload.netns, to, UDP_PORT)
        stack.callback(blaster.close)
        return lambda: blaster.send(PACKETS)
    frame = workload.bytes_of(packets.UDP4, to, Tag())

    def write() -> None:
        for _ in range(PACKETS):
            workload.sender.send(frame)

    return write


def _rate(lane: Lane, send: Callable[[], object], *, passes: bool) -> float:
    """Send, wait until that many were judged (or came out, where nobody judges), return packets/s."""
    before, arrived = lane.judged(), received(lane.topology)
    enough = PACKETS * (1 - LOST)
    start = time.perf_counter()
    send()
    after = lane.judged()
    if before is not None and after is not None:
        deadline = time.perf_counter() + SETTLE_S
        while after[not passes] - before[not passes] < enough and time.perf_counter() < deadline:
            after = lane.judged() or after
        rate = (after[not passes] - before[not passes]) / (time.perf_counter() - start)
        assert after[not passes] - before[not passes] >= enough
        assert passes or received(lane.topology) - arrived < PACKETS * LOST, "what must be dropped arrived"
        return rate
    rate = PACKETS / (time.perf_counter() - start)
    assert received(lane.topology) - arrived >= enough
    return rate


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fate", ["pass", "drop"])
def test_udp(request: pytest.FixtureRequest, lanes: dict[str, Lane], fate: str) -> None:
    kind = request.node.callspec.params["lanes"]
    with contextlib.ExitStack() as stack:
        contestants: dict[str, Callable[[], float]] = {}
        for hook, lane in lanes.items():
            for each in (SERVER, DENIED):
                with lane.topology.internet.inside():
                    sink = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                sink.bind((each, UDP_PORT))
            send = _sending(lane, SERVER if fate == "pass" else DENIED, stack)
            contestants[hook] = partial(_rate, lane, send, passes=fate == "pass")
        series = compare("packets/s", contestants, ROUNDS)
    report(f"xdp-udp-{kind}-{fate}", series, base="none", rules=RULES, packets=PACKETS, cpu_pinned=CPU)
    for hook in HOOKS[1:]:
        assert ratio(series[hook], series["none"]).median > FAR_OFF, hook


@pytest.mark.timeout(300)
@pytest.mark.parametrize("lanes", ["veth"], indirect=True)
def test_tcp(lanes: dict[str, Lane]) -> None:
    """One TCP connection, with segmentation offload where the hook leaves it on."""
    with contextlib.ExitStack() as stack:
        for lane in lanes.values():
            listen = ["iperf3", "-s", "-B", SERVER, "-p", str(IPERF_PORT)]
            server = spawn(listen, netns=lane.topology.internet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(stop, server)
        for lane in lanes.values():
            listens = partial(lane.topology.internet.run, "ss", "-Hltn")
            wait_for(lambda listens=listens: f":{IPERF_PORT}" in listens().stdout, "iperf3 to listen")  # type: ignore[misc]
        series = compare("Gbit/s", {hook: partial(_tcp_rate, lane) for hook, lane in lanes.items()}, TCP_ROUNDS)
    report("xdp-tcp-veth", series, base="none", rules=RULES, bytes=TCP_BYTES, cpu_pinned=CPU)
    for hook in TCP_HELD:
        assert ratio(series[hook], series["none"]).median > FAR_OFF, hook


def _tcp_rate(lane: Lane) -> float:
    before = lane.judged()
    done = lane.workload.inside.run("iperf3", "-c", SERVER, "-p", str(IPERF_PORT), "-n", str(TCP_BYTES), "-J")
    after = lane.judged()
    assert before is None or after is None or after[0] > before[0], "not seen by the filter"
    assert before is None or after is None or after[1] == before[1]
    return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e9
