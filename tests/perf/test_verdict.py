"""`verdict-*`: nanoseconds per packet of the program alone, over an empty program (verdict_bench.py tells how)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from bench_plane import Plane
from harness.topology import Topology
from measure import CPU, FULL, ROUNDS, compare, report
from netfence.dataplane.compile import PROGRAMS
from netfence.policy.modes import FIRST_DROP, Reason
from verdict_bench import HOOKS, HOT_RUNS, NOT_JUDGING, ROW, STATES, Bench, frame, over, policy

RULES = (10, 100, 1_000, 10_000, 100_000, 1_000_000) if FULL else (10, 100_000)
ATTACHMENTS = (1, 10, 100, 1_000) if FULL else (1, 100)
RULES_EACH = 100
SPREAD_RULES = 100_000  # a table that no near cache holds: random was six times hot there
RUNS = ROUNDS if FULL else 3
FAR_OFF_NS = 2_000  # a hot verdict is 50 to 200 ns


@pytest.fixture(scope="module")
def bench(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    plane = Plane(topology, tmp_path_factory.mktemp("plane"))
    one = Bench(topology, plane, tmp_path_factory.mktemp("bench"))
    yield one
    one.close()
    plane.close()


def test_every_hook_is_measured() -> None:
    """A program that is neither measured nor known to judge nothing is one that somebody forgot here."""
    measured = {hook.program for hook in HOOKS.values()}
    assert measured | NOT_JUDGING == set(PROGRAMS)


def counts(hook: str, reason: Reason) -> bool:
    """Tell whether a hook counts: what XDP lets pass, the TC program behind it does."""
    return hook != "xdp" or reason >= FIRST_DROP


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("pinned")
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])
def test_rules(bench: Bench, family: int, rules: int) -> None:
    bench.load(policy(rules, family))
    bench.open_leases(family)
    for name, hook in HOOKS.items():
        contestants: dict[str, Callable[[], float]] = {}
        before = {reason: bench.counted(reason) for reason, _ in STATES.values()}
        for state, (reason, first) in STATES.items():
            number = first or rules // 2
            packet = frame(number, family)
            assert bench.verdict(name, packet) == (hook.passes if reason < FIRST_DROP else hook.drops)
            contestants[f"{state}-hot"] = bench.hot(name, packet)
            contestants[f"{state}-random"] = bench.random(name, packet, first, ROW if first else rules)
        other = frame(0, family)
        contestants["hot"], contestants["random"] = bench.hot_empty(name, other), bench.random_empty(name, other)
        series = compare("ns", contestants, RUNS)
        for state, (reason, _) in STATES.items():
            # The round that is not measured counts too, and the one packet before it.
            judged = (RUNS + 1) * (HOT_RUNS + ROW) + 1
            assert bench.counted(reason) - before[reason] == (judged if counts(name, reason) else 0)
            for where in ("hot", "random"):
                told = over(series[f"{state}-{where}"], series[where])
                title = f"verdict-{name}-ipv{family}-{state}-{where}"
                report(title, {"netfence": told}, rules=rules, cpu_pinned=CPU)
                assert where == "random" or told.median < FAR_OFF_NS
        if rules >= SPREAD_RULES:
            hot, random = (over(series[f"allow-hit-{where}"], series[where]).median for where in ("hot", "random"))
            assert random > 1.5 * hot, "the destinations are not spread"


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("pinned")
@pytest.mark.parametrize("attachments", ATTACHMENTS)
def test_attachments(bench: Bench, attachments: int) -> None:
    """Each attachment has a policy of its own; random: a packet of each in turn, to ever other destinations."""
    bench.add_attachments(attachments)
    bench.load(policy(RULES_EACH, 4), attachments)
    reason, _ = STATES["allow-hit"]
    packet = frame(0, 4)
    for name in HOOKS:
        before = bench.counted(reason, attachments)
        contestants = {
            "hot": bench.hot(name, packet),
            "random": bench.random(name, packet, 0, RULES_EACH, attachments),
            "empty hot": bench.hot_empty(name, packet),
            "empty random": bench.random_empty(name, packet),
        }
        series = compare("ns", contestants, RUNS)
        judged = (RUNS + 1) * (HOT_RUNS + ROW)
        assert bench.counted(reason, attachments) - before == (judged if counts(name, reason) else 0)
        for where in ("hot", "random"):
            told = over(series[where], series[f"empty {where}"])
            title = f"verdict-{name}-ipv4-allow-hit-attachments-{where}"
            report(title, {"netfence": told}, attachments=attachments, rules=RULES_EACH, cpu_pinned=CPU)
            assert where == "random" or told.median < FAR_OFF_NS


@pytest.mark.usefixtures("pinned")
def test_watched_drops(bench: Bench) -> None:
    """A drop that nobody is told of, and one of a flood that somebody watches: beyond the limit it is only counted."""
    bench.load(policy(RULES_EACH, 4))
    reason, first = STATES["miss"]
    packet = frame(first, 4)
    for name in HOOKS:
        before = bench.counted(reason)
        unwatched = bench.hot(name, packet)

        def watched(measure: Callable[[], float] = unwatched) -> float:
            with bench.watching():
                return measure()

        contestants = {"unwatched": unwatched, "watched": watched, "empty": bench.hot_empty(name, packet)}
        series = compare("ns", contestants, RUNS)
        assert bench.counted(reason) - before == 2 * (RUNS + 1) * HOT_RUNS
        told = {what: over(series[what], series["empty"]) for what in ("watched", "unwatched")}
        report(f"verdict-{name}-ipv4-miss-watched-hot", {"netfence": told["watched"]}, rules=RULES_EACH, cpu_pinned=CPU)
        assert told["watched"].median < told["unwatched"].median + FAR_OFF_NS
    assert bench.reported


WATCHED_NS = 10  # best rounds differ by 2; a reservation in the ring, tried in vain, is some 20
TRIES = 3  # others may be busy in rounds of one kind alone; a cost is there in all


@pytest.mark.usefixtures("pinned")
@pytest.mark.parametrize("state", ["allow-hit", "miss"])
def test_watching_costs_nothing_measurable(bench: Bench, state: str) -> None:
    """Packets that pass, and a flood's beyond what is told of it. The best rounds: what else runs only adds."""
    bench.load(policy(RULES_EACH, 4))
    reason, first = STATES[state]
    packet = frame(first or RULES_EACH // 2, 4)
    told = bench.reported
    for name in HOOKS:
        unwatched = bench.hot(name, packet)

        def watched(measure: Callable[[], float] = unwatched) -> float:
            with bench.watching():
                return measure()

        before = bench.counted(reason)
        more: list[float] = []
        while not more or (more[-1] >= WATCHED_NS and len(more) < TRIES):
            series = compare("ns", {"unwatched": unwatched, "watched": watched}, RUNS)
            more.append(min(series["watched"].values) - min(series["unwatched"].values))
        judged = 2 * len(more) * (RUNS + 1) * HOT_RUNS
        assert bench.counted(reason) - before == (judged if counts(name, reason) else 0)
        assert more[-1] < WATCHED_NS, (name, more)
    assert (bench.reported > told) == (reason >= FIRST_DROP)
