"""The table of peers for notes: every pair, medians with their spread, what is behind marked and first."""

from __future__ import annotations

from tests.unit.perf.runs import result, run

from perfreport.markdown import HEAD, peers_table
from perfreport.model import Run


def rows(there: Run) -> list[list[str]]:
    """Take the table apart, without its head."""
    lines = [line for line in peers_table(there).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert cells[:2] == [[*HEAD], ["---"] * len(HEAD)]
    return cells[2:]


def test_every_pair_is_a_row_and_what_is_behind_is_marked_and_comes_first() -> None:
    path = {"none": [200.0, 220.0, 240.0], "netfence": [180.0, 200.0, 216.0], "nft-hash": [90.0, 100.0, 110.0]}
    dns = {"netfence": [40.0, 50.0, 60.0], "unbound": [100.0, 100.0, 100.0]}
    there = run(
        result("path-x", path, "packets/s", base="none", rules=10_000, cpu_pinned=1),
        result("dns-x", dns, "queries/s", base="netfence"),
        result("attach-x", {"netfence": 5}, "ms"),
    )
    assert rows(there) == [
        ["`dns-x`", "netfence", "unbound", "50 queries/s (40–60)", "100 queries/s (100–100)",
         "0.500 (0.400–0.600)", "**behind**"],
        ["`path-x` rules 10,000", "netfence", "none", "200 packets/s (180–216)", "220 packets/s (200–240)",
         "0.900 (0.900–0.909)", "cost"],
        ["`path-x` rules 10,000", "netfence", "nft-hash", "200 packets/s (180–216)", "100 packets/s (90–110)",
         "2 (1.964–2)", "ahead"],
    ]  # fmt: skip


def test_it_begins_with_what_it_comes_to_and_where_it_was_measured() -> None:
    several = {"none": 200, "netfence": 100, "nft-hash": 150, "ipset": 50, "nft-interval": 100}
    (first, *_) = peers_table(run(result("path-x", several, "pps", base="none"))).splitlines()
    assert first.startswith("Behind a peer in 1 of 3 comparisons, ahead in 1, no significant difference in 1.")
    assert "abc1234, full sizes, Some CPU, kernel 6.18.0" in first


def test_a_stroke_in_a_name_does_not_break_the_table() -> None:
    (row,) = rows(run(result("dns-x", {"net|fence": 1, "unbound": 2}, "qps")))
    assert row[1] == r"net\|fence"
