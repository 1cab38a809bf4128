"""`control-*`: a control plane in another process, from a command's bytes on the stream to what the kernel does."""

from __future__ import annotations

import bisect
import contextlib
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

import control_commands as commands
from harness.controlplane import ControlPlaneProcess
from harness.daemon import Netfenced
from harness.deadline import wait_for
from harness.spawn import spawn, stop
from harness.topology import Topology, Workload
from measure import FULL, Series, report

SERVER, PORT = "203.0.113.80", 7
TIMES = 100 if FULL else 25
SINGLES = 1000
RULES = 100_000
QUIET_S = 0.02  # nothing for so long: the command is in force

# Sends its clock, in nanoseconds, five times a millisecond; on end of input writes every time it has sent.
PUMP = """
import os, socket, struct, sys, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
target = (sys.argv[1], int(sys.argv[2]))
os.set_blocking(0, False)
sent = []
while True:
    now = time.monotonic_ns()
    sock.sendto(struct.pack("!Q", now), target)
    sent.append(now)
    if len(sent) % 64 == 0:
        try:
            if os.read(0, 1) == b"":
                break
        except BlockingIOError:
            pass
    time.sleep(0.0001)
sys.stdout.buffer.write(struct.pack(f"!{len(sent)}Q", *sent))
"""


@pytest.fixture(scope="module")
def workload(topology: Topology) -> Workload:
    return topology.add_veth()


@pytest.fixture(scope="module")
def plane(topology: Topology) -> Iterator[ControlPlaneProcess]:
    with ControlPlaneProcess(topology.host) as running:
        running.on_subscribed(commands.ack(mode="denylist"))
        yield running


@pytest.fixture(scope="module")
def daemon(
    topology: Topology, workload: Workload, plane: ControlPlaneProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Netfenced]:
    config = {"log_level": "warning", **plane.config()}
    with Netfenced(topology.host, tmp_path_factory.mktemp("netfenced"), policy=None, config=config) as running:
        yield running


@pytest.fixture
def attachment(workload: Workload, daemon: Netfenced) -> Iterator[str]:
    attached = daemon.attach(interface=workload.host_if)
    yield attached.id
    daemon.detach(attached.id)


class Ear:
    """Hears what the pump sends, and when it was sent."""

    def __init__(self, topology: Topology) -> None:
        with topology.internet.inside():
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((SERVER, PORT))
        self.last = 0

    def hear(self, quiet_s: float) -> bool:
        """Take what comes until nothing has for so long; False if nothing came at all."""
        heard = False
        self._socket.settimeout(quiet_s)
        with contextlib.suppress(TimeoutError):
            while True:
                (self.last,) = struct.unpack("!Q", self._socket.recv(8))
                heard = True
        return heard

    def first(self) -> None:
        """Wait for one."""
        self._socket.settimeout(5)
        (self.last,) = struct.unpack("!Q", self._socket.recv(8))

    def close(self) -> None:
        self._socket.close()


def test_command_to_first_dropped_packet(
    topology: Topology, workload: Workload, plane: ControlPlaneProcess, attachment: str
) -> None:
    """From the moment the control plane's process writes `deny_cidr` to the first packet that does not arrive."""
    ear = Ear(topology)
    argv = [sys.executable, "-I", "-S", "-c", PUMP, SERVER, str(PORT)]
    pump = spawn(argv, netns=workload.netns, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    rng = random.Random(11)
    rounds: list[tuple[float, int]] = []
    try:
        for _ in range(TIMES):
            ear.first()
            time.sleep(rng.uniform(0, 0.005))  # not in step with the daemon's own clock ticks
            written = plane.send(commands.deny_cidr(attachment, f"{SERVER}/32"))
            ear.hear(QUIET_S)
            rounds.append((written, ear.last))
            plane.send(commands.remove_cidr(attachment, f"{SERVER}/32"))
        assert pump.stdin is not None
        assert pump.stdout is not None
        pump.stdin.close()
        data = pump.stdout.read()
    finally:
        stop(pump)
        ear.close()
    sent = struct.unpack(f"!{len(data) // 8}Q", data)
    series = Series("ms")
    for written, last in rounds:
        dropped = sent[bisect.bisect_right(sent, last)]
        series.values.append(max(dropped / 1e6 - written * 1e3, 0.0))
    report("control-command-to-first-drop", {"netfence": series})
    assert series.median < 2 * 10


def _seconds_until_results(plane: ControlPlaneProcess, written: float, nonces: list[str]) -> float:
    last = plane.wait_seen("command_result", nonce=nonces[-1], timeout_s=30)
    results = {seen.body.nonce: seen for seen in plane.events("command_result")}
    assert all(results[nonce].body.ok for nonce in nonces)
    return last.at - written


@pytest.mark.parametrize("how", ["at-once", "one-by-one"])
def test_a_thousand_single_rule_commands(plane: ControlPlaneProcess, attachment: str, how: str) -> None:
    """From the first command written to the last result, each with its own; sent at once, or each after the last."""
    nonces = [f"{attachment}-{how}-{number}" for number in range(SINGLES)]
    batch = [
        commands.allow_cidr(attachment, f"10.{number >> 8}.{number & 255}.0/24", nonce=nonce)
        for number, nonce in enumerate(nonces)
    ]
    if how == "at-once":
        written = plane.send(*batch)
    else:
        written = plane.send(batch[0])
        for nonce, command in zip(nonces, batch[1:], strict=False):
            plane.wait_event("command_result", nonce=nonce, since=max(len(plane.seen) - 8, 0))
            plane.send(command)
    seconds = _seconds_until_results(plane, written, nonces)
    report("control-single-rule-commands", {"netfence": Series("s", [seconds, seconds])}, commands=SINGLES, how=how)
    assert seconds < 2 * (2 if how == "at-once" else 5)


def test_bulk_update_of_100k_cidrs(plane: ControlPlaneProcess, attachment: str) -> None:
    """From the command's bytes written to its result: parsed, checked, in the kernel, hashed and stored."""
    rng = random.Random(5)
    series = Series("s")
    for number in range(3):
        allow = [
            f"{rng.randrange(1, 224)}.{rng.randrange(256)}.{rng.randrange(256)}.0/24" for _ in range(RULES * 6 // 10)
        ]
        allow += [f"2001:db8:{rng.randrange(65536):x}:{rng.randrange(65536):x}::/64" for _ in range(RULES - len(allow))]
        nonce = f"{attachment}-bulk-{number}"
        written = plane.send(commands.bulk(attachment, "allowlist", allow=allow, nonce=nonce))
        series.values.append(_seconds_until_results(plane, written, [nonce]))
    report("control-bulk-update-100k", {"netfence": series}, rules=RULES)
    assert series.median < 2 * 1


def test_reconnect(plane: ControlPlaneProcess, attachment: str, daemon: Netfenced) -> None:
    """From the end of the control plane's process to the daemon's next SyncRequest, its start included."""
    streams = len(plane.streams)
    began = time.monotonic()
    plane.restart()
    opened = plane.wait_streams(streams + 1, 30)
    wait_for(lambda: daemon.status().control_plane_state == 3, "the daemon to be connected")
    seconds = opened.at - began
    report("control-reconnect", {"netfence": Series("s", [seconds, seconds])})
    assert [one.id for one in plane.wait_event("sync", stream=opened.stream).attachments] == [attachment]
