"""`path-*`: packets through veth – host – veth with a filter on the host: none, ours, nft, ipset (path_bench.py)."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from harness.deadline import wait_for
from harness.spawn import spawn, stop
from measure import CPU, FULL, SLOW_ROUNDS, compare, ratio, report
from path_bench import BATCH, DENIED, FAR_OFF, FILTERS, SERVER, Blaster, Filter, received

RULES = (10, 10_000, 100_000) if FULL else (1_000,)
TCP_RULES = (10, 100_000) if FULL else (1_000,)
ROUNDS = 9 if FULL else 5
PACKETS = (100_000 if FULL else 20_000) // BATCH * BATCH
TCP_BYTES = (2_000 if FULL else 150) * 1_000_000
TCP_ROUNDS = SLOW_ROUNDS if FULL else 3
IN_THE_AIR = 32_000_000  # sent, and not yet read when iperf3 adds up
UDP_PORT, IPERF_PORT = 9, 5201
DENIED_PACKETS = BATCH


@pytest.fixture(scope="module")
def lanes(pinned_module: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Filter]]:
    """Every contestant on its own host; what is loaded in one is not met by the packets of another."""
    with contextlib.ExitStack() as stack:
        made: dict[str, Filter] = {}
        for name, kind in FILTERS.items():
            made[name] = kind(tmp_path_factory.mktemp(name))
            stack.callback(made[name].close)
        yield made


def _check_it_filters(name: str, lane: Filter) -> None:
    """Fail where what is not in the set arrives, or the filter does not say that it dropped it."""
    blaster = Blaster(lane.workload.inside, DENIED, UDP_PORT)
    arrived, before = received(lane.topology), lane.counted()
    blaster.send(DENIED_PACKETS)
    blaster.close()
    after = lane.counted()
    if before is None or after is None:
        return
    assert received(lane.topology) == arrived, f"{name} lets pass what it must not"
    assert after.dropped - before.dropped == DENIED_PACKETS


def _load(lanes: dict[str, Filter], rules: int) -> None:
    for name, lane in lanes.items():
        lane.load(rules)
        _check_it_filters(name, lane)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rules", RULES)
def test_udp(lanes: dict[str, Filter], rules: int) -> None:
    _load(lanes, rules)
    with contextlib.ExitStack() as stack:
        contestants: dict[str, Callable[[], float]] = {}
        for name, lane in lanes.items():
            with lane.topology.internet.inside():
                sink = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sink.bind((SERVER, UDP_PORT))
            blaster = Blaster(lane.workload.inside, SERVER, UDP_PORT)
            stack.callback(blaster.close)
            contestants[name] = partial(_udp_rate, lane, blaster)
        series = compare("packets/s", contestants, ROUNDS)
    report("path-udp-veth", series, base="none", rules=rules, packets=PACKETS, cpu_pinned=CPU)
    assert ratio(series["netfence-tcx"], series["none"]).median > FAR_OFF


def _udp_rate(lane: Filter, blaster: Blaster) -> float:
    arrived, before = received(lane.topology), lane.counted()
    seconds = blaster.send(PACKETS)
    assert received(lane.topology) - arrived >= PACKETS, "lost on the way"
    after = lane.counted()
    if before is not None and after is not None:
        assert after.passed - before.passed >= PACKETS, "not seen by the filter"
    return PACKETS / seconds


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rules", TCP_RULES)
def test_tcp(lanes: dict[str, Filter], rules: int) -> None:
    """One TCP connection with segmentation offload, as containers have it: 64 KB in a packet."""
    _load(lanes, rules)
    with contextlib.ExitStack() as stack:
        for lane in lanes.values():
            listen = ["iperf3", "-s", "-B", SERVER, "-p", str(IPERF_PORT)]
            server = spawn(listen, netns=lane.topology.internet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(stop, server)
        for lane in lanes.values():
            listens = partial(lane.topology.internet.run, "ss", "-Hltn")
            wait_for(lambda listens=listens: f":{IPERF_PORT}" in listens().stdout, "iperf3 to listen")  # type: ignore[misc]
        series = compare("Gbit/s", {name: partial(_tcp_rate, lane) for name, lane in lanes.items()}, TCP_ROUNDS)
    report("path-tcp-veth", series, base="none", rules=rules, bytes=TCP_BYTES, cpu_pinned=CPU)
    assert ratio(series["netfence-tcx"], series["none"]).median > FAR_OFF


def _tcp_rate(lane: Filter) -> float:
    before = lane.counted()
    done = lane.workload.inside.run("iperf3", "-c", SERVER, "-p", str(IPERF_PORT), "-n", str(TCP_BYTES), "-J")
    after = lane.counted()
    assert before is None or after is None or after.passed > before.passed, "not seen by the filter"
    received_sum = json.loads(done.stdout)["end"]["sum_received"]
    assert received_sum["bytes"] >= TCP_BYTES - IN_THE_AIR
    return float(received_sum["bits_per_second"]) / 1e9
