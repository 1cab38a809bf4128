"""`dns-*`: queries/s and latency of our DNS against dnsmasq --nftset and unbound, all on one CPU (dns_bench.py)."""

from __future__ import annotations

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench_daemon import leases
from dns_bench import KINDS, NAMES, Asker, Fenced, Server, asked_upstream, load, nft_elements, peers, write_names
from harness.topology import Topology
from measure import CPU, FULL, SLOW_ROUNDS, Series, compare, ratio, report

SECONDS = 0.5 if FULL else 0.1
QUERIES = {"udp": 4_000, "tcp": 1_000} if FULL else {"udp": 500, "tcp": 100}
MANY = 100 if FULL else 10
STATES = {"cached": "warm", "uncached": "cold", "refused": "denied"}
JOINED = 0.01  # queries for a name that is in the air already may wait for its answer
FAR_OFF = 0.15  # of unbound; the figures are 0.6 to 3


class Contestants:
    """Every server, and for ours what was asked of them."""

    def __init__(
        self, topology: Topology, one: Fenced, many: Fenced, others: dict[str, Server], directory: Path
    ) -> None:
        self.host = topology.host
        self._directory = directory
        self.ours = {1: one, MANY: many}
        self._others = others
        self.names = write_names(directory)
        self.asker = Asker(topology.host)

    def each(self, run: Callable[[str, Server], float], *without: str) -> dict[str, Callable[[], float]]:
        """Name the contestants, each with its run; of many attachments every round asks another one."""
        turns = {f"netfence-{count}": itertools.cycle(fenced.servers.values()) for count, fenced in self.ours.items()}
        turns |= {name: itertools.cycle([server]) for name, server in self._others.items() if name not in without}
        return {name: functools.partial(lambda name, turn: run(name, next(turn)), name, turns[name]) for name in turns}

    def check_who_answered(self, state: str, run: Callable[[], int]) -> None:
        """Run something that returns how many queries were answered; fail where the state is another than is told."""
        before = asked_upstream(self.host, self._directory)
        answered = run()
        upstream = asked_upstream(self.host, self._directory) - before
        if state == "uncached":
            assert upstream >= answered * (1 - JOINED), (
                f"{answered} answers, and upstream was asked {upstream} times only"
            )
        else:  # before a cache is full, each name is asked for once
            most = 0 if state == "refused" else NAMES
            assert upstream <= most, f"upstream was asked {upstream} times for what is {state}"

    def tell(self, title: str, series: dict[str, Series], **sizes: object) -> None:
        """Report our daemon with one attachment, and with many, against the same rounds of the others."""
        for attachments in self.ours:
            told = {"netfence": series[f"netfence-{attachments}"]}
            told |= {name: series[name] for name in self._others if name in series}
            report(title, told, base="netfence", attachments=attachments, cpu_pinned=CPU, names=NAMES, **sizes)


@pytest.fixture(scope="module")
def contestants(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contestants]:
    directory = tmp_path_factory.mktemp("dns")
    with (
        peers(topology.host, directory) as others,
        Fenced(topology.host, tmp_path_factory.mktemp("one"), 1, 11000) as one,
        Fenced(topology.host, tmp_path_factory.mktemp("many"), MANY, 12000) as many,
    ):
        all_of_them = Contestants(topology, one, many, others, directory)
        yield all_of_them


@pytest.fixture(scope="module", autouse=True)
def _pinned_before_anything_starts(pinned_module: int) -> None:
    """Servers, daemons and clients inherit the CPU."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("transport", ["udp", "tcp"])
@pytest.mark.parametrize("state", STATES)
def test_rate(contestants: Contestants, state: str, transport: str) -> None:
    """Twenty queries in the air, by TCP on one connection; dnsmasq ends one after 100 queries and is left out there."""
    kind, tcp = STATES[state], transport == "tcp"
    before = {attachments: fenced.counted() for attachments, fenced in contestants.ours.items()}
    answered: Counter[str] = Counter()

    def run(name: str, server: Server) -> float:
        rates: list[float] = []

        def once() -> int:
            rate, completed = load(contestants.host, server, contestants.names[kind], KINDS[kind], SECONDS, tcp=tcp)
            rates.append(rate)
            answered[name] += completed
            return completed

        contestants.check_who_answered(state, once)
        return rates[0]

    series = compare("queries/s", contestants.each(run, *(["dnsmasq-nftset"] if tcp else [])), SLOW_ROUNDS)
    for attachments, fenced in contestants.ours.items():
        moved = [after - was for was, after in zip(before[attachments], fenced.counted(), strict=True)]
        assert moved[kind == "denied"] >= answered[f"netfence-{attachments}"]
    if kind != "denied":
        assert all(leases(fenced.daemon) >= NAMES for fenced in contestants.ours.values()), "ours opened no leases"
        assert tcp or nft_elements(contestants.host) == NAMES, "dnsmasq filled no set"
    contestants.tell(f"dns-{transport}-{state}-rate", series, seconds=SECONDS)
    assert ratio(series["netfence-1"], series["unbound"]).median > FAR_OFF


@pytest.mark.timeout(300)
@pytest.mark.parametrize("transport", ["udp", "tcp"])
@pytest.mark.parametrize("state", STATES)
def test_latency(contestants: Contestants, state: str, transport: str) -> None:
    """One query in the air, by TCP with a connection each; the client's own part, in Python, is in every figure."""
    p99s: defaultdict[str, list[float]] = defaultdict(list)
    ask = contestants.asker.tcp_us if transport == "tcp" else contestants.asker.udp_us

    def run(name: str, server: Server) -> float:
        times: list[float] = []

        def once() -> int:
            times.extend(ask(server, STATES[state], QUERIES[transport]))
            return len(times)

        contestants.check_who_answered(state, once)
        p99s[name].append(times[len(times) * 99 // 100])
        return times[len(times) // 2]

    series = compare("µs", contestants.each(run), SLOW_ROUNDS)
    contestants.tell(f"dns-{transport}-{state}-p50", series, queries=QUERIES[transport])
    tails = {name: Series("µs", values[-SLOW_ROUNDS:]) for name, values in p99s.items()}
    contestants.tell(f"dns-{transport}-{state}-p99", tails, queries=QUERIES[transport])
    assert ratio(series["netfence-1"], series["unbound"]).median < 1 / FAR_OFF
