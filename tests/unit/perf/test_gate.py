"""Every outcome of the comparison of two runs, at the edges of what is allowed."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.unit.perf.runs import ROUNDS, result, rounds, run

from perfreport import gate
from perfreport.gate import LEAST_ROUNDS, OTHERWISE, Allowed, Change, State, allowed_for, compare_runs
from perfreport.model import BadReportError, Run

README = Path(__file__).resolve().parents[3] / "tests/perf/README.md"


def only(before: dict[str, object], after: dict[str, object]) -> Change:
    """Return the change of `netfence` between two runs of one result."""
    found = [change for change in compare_runs(run(before), run(after)).changes if change.who == "netfence"]
    assert len(found) == 1
    return found[0]


def attach(value: float | Sequence[float], unit: str = "ms", name: str = "attach-x") -> dict[str, object]:
    return result(name, {"netfence": value}, unit)


@pytest.mark.parametrize(
    ("unit", "after", "state"),
    [
        ("ms", 200, State.REGRESSION),
        ("ms", 30, State.IMPROVEMENT),
        ("ms", 100, State.SAME),
        ("packets/s", 200, State.IMPROVEMENT),
        ("packets/s", 30, State.REGRESSION),
        ("Gbit/s", 30, State.REGRESSION),
        ("qps", 200, State.IMPROVEMENT),
        ("MB", 200, State.REGRESSION),
    ],
)
def test_times_are_better_low_and_rates_high(unit: str, after: float, state: State) -> None:
    assert only(attach(100, unit), attach(after, unit)).state is state


@pytest.mark.parametrize(("off", "state"), [(-0.04, State.SAME), (0.04, State.REGRESSION)])
def test_no_change_within_what_is_allowed_counts_however_clear_it_is(off: float, state: State) -> None:
    """The values of both runs lie all apart: only the size of the change decides."""
    assert only(attach(100), attach(100 * (1 + OTHERWISE.share + off))).state is state


@pytest.mark.parametrize(("off", "state"), [(-2, State.SAME), (2, State.REGRESSION)])
def test_verdicts_may_differ_by_what_the_clock_adds_too(off: float, state: State) -> None:
    allowed = allowed_for("verdict-x-hot")
    assert (allowed.unit, allowed.floor > 0) == ("ns", True)
    after = 50 * (1 + allowed.share) + allowed.floor + off
    assert only(attach(50, "ns", "verdict-x-hot"), attach(after, "ns", "verdict-x-hot")).state is state


def test_two_hundred_nanoseconds_more_in_a_verdict_are_a_regression() -> None:
    """The slowest hot verdict that was measured, and a random one of few rules."""
    for name, before in (("verdict-xdp-ipv6-lease-hit-hot", 160), ("verdict-tc-ipv4-allow-hit-random", 80)):
        assert only(attach(before, "ns", name), attach(before + 200, "ns", name)).fails


def test_what_depends_on_the_neighbours_cache_may_differ_more() -> None:
    assert allowed_for("verdict-tc-ipv4-miss-random").share > allowed_for("verdict-tc-ipv4-miss-hot").share
    assert allowed_for("something-else") == OTHERWISE


def table_of_allowed_changes() -> dict[str, Allowed]:
    """Return what the README allows, by pattern; "all others" are `*`."""
    rows = re.findall(
        r"^\| (?:`([^`]+)`|all others) \| (\d+) %(?: \+ (\d+) (\w+))? \|",
        README.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    return {
        pattern or "*": Allowed(int(percent) / 100, float(floor or 0), unit) for pattern, percent, floor, unit in rows
    }


def test_what_is_allowed_is_what_the_readme_says() -> None:
    told = table_of_allowed_changes()
    assert told == {**gate.ALLOWED, "*": OTHERWISE}
    assert {pattern: allowed_for(pattern.replace("*", "x")) for pattern in told} == told


def test_a_large_change_is_not_significant_where_the_rounds_differ_as_much() -> None:
    wild = [50, 400, 60, 380, 70, 390, 55, 410, 100]
    assert only(attach(100), attach(wild)).state is State.SAME


def test_few_rounds_are_not_tested() -> None:
    before, after = ([value] * (LEAST_ROUNDS - 1) for value in (100.0, 900.0))
    change = only(attach(before), attach(after))
    assert change.state is State.UNTESTED
    assert "rounds" in change.why
    assert not change.fails


def test_where_a_base_ran_beside_ours_the_ratio_counts_and_not_a_slower_machine() -> None:
    def path(none: float, ours: float) -> dict[str, object]:
        return result("path-x", {"none": none, "netfence": ours}, "packets/s", base="none")

    change = only(path(200_000, 190_000), path(100_000, 95_000))
    assert (change.state, change.basis) == (State.SAME, "ratio to none")
    assert change.before == pytest.approx(0.95)
    assert only(path(200_000, 190_000), path(200_000, 160_000)).state is State.REGRESSION


def test_ours_as_the_base_is_related_to_the_peer() -> None:
    def dns(ours: float, peer: float) -> dict[str, object]:
        return result("dns-x", {"netfence": ours, "dnsmasq": peer}, "queries/s", base="netfence")

    change = only(dns(70_000, 60_000), dns(35_000, 30_000))
    assert (change.state, change.basis) == (State.SAME, "ratio to dnsmasq")
    assert only(dns(70_000, 60_000), dns(35_000, 60_000)).state is State.REGRESSION


def test_of_several_peers_the_base_is_related_to() -> None:
    series = {"unbound": 100.0, "dnsmasq": 60.0, "netfence": 70.0}
    change = only(result("dns-x", series, "qps", base="dnsmasq"), result("dns-x", series, "qps", base="dnsmasq"))
    assert change.basis == "ratio to dnsmasq"


def test_p_is_exact_for_few_rounds() -> None:
    """Nine values that lie all above nine others: one order of the many."""
    assert only(attach(100), attach(300)).p_value == pytest.approx(1 / math.comb(2 * ROUNDS, ROUNDS))


def test_what_lies_over_an_empty_program_is_compared_in_its_nanoseconds() -> None:
    def verdict(empty: float, ours: float) -> dict[str, object]:
        return result("verdict-x", {"empty": empty, "netfence": ours})

    floor = allowed_for("verdict-x").floor
    assert only(verdict(20, 10), verdict(20, 10 + floor)).state is State.SAME  # twice as much, and within the floor
    assert only(verdict(20, 10), verdict(20, 14 + floor)).state is State.REGRESSION


@pytest.mark.parametrize("changed", [{"cpu": "Another CPU"}, {"kernel": "7.3.0"}])
def test_on_another_machine_only_ratios_are_compared(changed: dict[str, str]) -> None:
    path = {"none": 200.0, "netfence": 190.0}
    before = run(attach(100), result("path-x", path, "pps", base="none"))
    after = run(attach(300), result("path-x", path | {"netfence": 100.0}, "pps", base="none"), **changed)
    comparison = compare_runs(before, after)
    states = {change.result.name: change.state for change in comparison.changes if change.who == "netfence"}
    assert states == {"attach-x": State.UNTESTED, "path-x": State.REGRESSION}
    assert not comparison.same_machine


def test_another_unit_is_not_tested() -> None:
    assert only(attach(100, "ms"), attach(100_000, "µs")).state is State.UNTESTED


def test_what_only_one_run_has_is_new_or_gone_and_does_not_fail() -> None:
    comparison = compare_runs(
        run(attach(1), attach(2, name="attach-old")), run(attach(1), attach(2, name="attach-new"))
    )
    states = {change.result.name: change.state for change in comparison.changes}
    assert states == {"attach-x": State.SAME, "attach-old": State.GONE, "attach-new": State.NEW}
    assert not comparison.failed


def test_a_contestant_or_a_size_that_only_one_run_has_is_new_or_gone() -> None:
    before = run(result("path-x", {"netfence": 1, "ipset": 2}, rules=10))
    after = run(result("path-x", {"netfence": 1, "nft-hash": 2}, rules=10), result("path-x", {"netfence": 1}, rules=20))
    states = {
        (change.who, change.result.sizes["rules"]): change.state for change in compare_runs(before, after).changes
    }
    assert states == {
        ("netfence", 10): State.SAME,
        ("netfence", 20): State.NEW,
        ("nft-hash", 10): State.NEW,
        ("ipset", 10): State.GONE,
    }


def test_of_partial_runs_only_what_both_have_is_compared() -> None:
    before, after = run(attach(1), attach(2, name="bulk-y")), run(attach(1), selection=["-k", "attach"])
    comparison = compare_runs(before, after)
    assert [change.result.name for change in comparison.changes] == ["attach-x"]
    assert comparison.partial


def test_a_peer_that_gets_worse_does_not_fail() -> None:
    before, after = (run(result("path-x", {"nft-hash": 100, "netfence": 100}, "pps")) for _ in range(2))
    slow = run(result("path-x", {"nft-hash": 10, "netfence": 10}, "pps"))
    assert not compare_runs(before, after).failed
    states = {change.who: (change.state, change.fails) for change in compare_runs(before, slow).changes}
    assert states["nft-hash"] == (State.REGRESSION, False)
    assert states["netfence"] == (State.SAME, False)


def test_the_cpu_pinned_is_no_size_and_the_order_of_sizes_does_not_matter() -> None:
    before = run(result("bulk-x", {"netfence": 1}, rules=10, how="at-once", cpu_pinned=1))
    after = run(result("bulk-x", {"netfence": 1}, cpu_pinned=7, how="at-once", rules=10))
    assert [change.state for change in compare_runs(before, after).changes] == [State.SAME]


def test_full_and_smoke_sizes_are_not_comparable() -> None:
    with pytest.raises(BadReportError, match="full"):
        compare_runs(run(attach(1), size="smoke"), run(attach(1)))


def test_worst_comes_first() -> None:
    before = run(*(attach(100, name=f"attach-{name}") for name in ("same", "worse", "better")))
    after = run(attach(100, name="attach-same"), attach(300, name="attach-worse"), attach(30, name="attach-better"))
    order = [change.state for change in compare_runs(before, after).changes]
    assert order == [State.REGRESSION, State.IMPROVEMENT, State.SAME]


def test_one_regression_among_a_hundred_and_fifty_is_seen() -> None:
    """Corrected for their number, nine rounds that lie all apart are still enough."""
    names = [f"attach-{number}" for number in range(150)]
    comparison = compare_runs(
        run(*(attach(100, name=name) for name in names)),
        run(*(attach(160 if name == "attach-77" else 100, name=name) for name in names)),
    )
    assert [change.result.name for change in comparison.changes if change.fails] == ["attach-77"]


@pytest.mark.parametrize(("fewer", "seen"), [(0, True), (1, False)])
def test_the_rounds_of_slow_benchmarks_are_the_fewest_with_which_one_alone_is_seen(fewer: int, seen: bool) -> None:
    """Among 350: what is said beside SLOW_ROUNDS in measure.py, whose value here is that of full sizes."""
    count = 8 - fewer
    names = [f"dns-{number}" for number in range(350)]

    def with_one(value: float) -> Run:
        return run(*(attach(rounds(value if name == "dns-77" else 100)[:count], name=name) for name in names))

    assert compare_runs(with_one(100), with_one(160)).failed is seen


def test_noise_alone_gives_no_alarm_though_many_are_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runs are drawn alike and nothing is allowed: it is the correction for the number of tests that counts."""
    monkeypatch.setattr(gate, "ALLOWED", {"attach-*": Allowed(0.0)})
    rng = random.Random(4)

    def noisy() -> Run:
        return run(*(attach([rng.gauss(100, 30) for _ in range(ROUNDS)], name=f"attach-{n}") for n in range(150)))

    pairs = [(noisy(), noisy()) for _ in range(10)]
    assert sum(compare_runs(*pair).count(State.REGRESSION) for pair in pairs) == 0
    monkeypatch.setattr(gate, "false_discovery_control", lambda values: values)
    assert sum(compare_runs(*pair).count(State.REGRESSION) for pair in pairs) > 10 * 150 * 0.03


def test_values_of_zero_are_compared_without_a_ratio() -> None:
    change = only(attach([0.0] * ROUNDS), attach(rounds(5)))
    assert (change.state, change.percent) == (State.REGRESSION, None)
