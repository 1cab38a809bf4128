"""Where ours stands against the others of the same run."""

from __future__ import annotations

import pytest
from tests.unit.perf.runs import result, run

from perfreport.model import is_ours
from perfreport.peers import Standing, matches


@pytest.mark.parametrize(
    ("unit", "ours", "standing"),
    [
        ("queries/s", 50, Standing.BEHIND),
        ("queries/s", 200, Standing.AHEAD),
        ("queries/s", 100, Standing.SAME),
        ("ms", 50, Standing.AHEAD),
        ("ms", 200, Standing.BEHIND),
    ],
)
def test_standing_against_a_peer(unit: str, ours: float, standing: Standing) -> None:
    (match,) = matches(run(result("dns-x", {"netfence": ours, "unbound": 100}, unit)))
    assert (match.ours, match.other, match.standing) == ("netfence", "unbound", standing)


def test_who_is_the_base_does_not_matter() -> None:
    for base in ("netfence", "unbound", None):
        (match,) = matches(run(result("dns-x", {"netfence": 50, "unbound": 100}, "queries/s", base=base)))
        assert match.standing is Standing.BEHIND
        assert match.ratio.median == pytest.approx(0.5)


def test_the_distance_to_no_filter_is_a_cost() -> None:
    (match,) = matches(run(result("path-x", {"none": 100, "netfence": 90}, "pps", base="none")))
    assert match.standing is Standing.COST


def test_what_lies_over_an_empty_program_is_not_divided_by_it() -> None:
    assert matches(run(result("verdict-x", {"empty": 30, "netfence": 60}))) == []


def test_rounds_that_do_not_pair_and_other_units_are_left_out() -> None:
    assert matches(run(result("bulk-x", {"netfence": [1, 2, 3], "nft-hash": [1, 2]}))) == []
    mixed = result("bulk-x", {"netfence": 1, "nft-hash": 2})
    mixed["series"]["nft-hash"]["unit"] = "ms"
    assert matches(run(mixed)) == []


def test_where_we_are_behind_comes_first() -> None:
    found = matches(run(result("dns-x", {"netfence": 100, "dnsmasq": 50, "unbound": 200}, "queries/s")))
    assert [(match.other, match.standing) for match in found] == [
        ("unbound", Standing.BEHIND),
        ("dnsmasq", Standing.AHEAD),
    ]


@pytest.mark.parametrize("who", ["netfence", "allow-hit", "xdp-native", "tc"])
def test_ours(who: str) -> None:
    assert is_ours(who)


@pytest.mark.parametrize(
    "who", ["none", "empty", "nft-hash", "nftables interval", "ipset", "dnsmasq-nftset", "unbound"]
)
def test_not_ours(who: str) -> None:
    assert not is_ours(who)
