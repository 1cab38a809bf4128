"""How results are laid out: contestants side by side, or sizes where there is one contestant."""

from __future__ import annotations

from tests.unit.perf.runs import result, run

from perfreport.tables import Table, tables


def laid_out(*results: dict[str, object]) -> list[Table]:
    return tables(run(*results).results, {})


def medians(table: Table) -> list[tuple[str, str, list[str | None]]]:
    return [(row.name, row.sizes, [cell.median if cell else None for cell in row.cells]) for row in table.rows]


def test_contestants_stand_side_by_side_with_their_ratio_to_the_base() -> None:
    values = {"none": [100.0, 110.0, 120.0], "netfence": [90.0, 100.0, 110.0], "ipset": [99.0, 111.0, 121.0]}
    (table,) = laid_out(result("path-x", values, "pps", base="none", rules=1000, cpu_pinned=1))
    assert table.columns == ("none", "netfence", "ipset")
    assert medians(table) == [("path-x", "rules 1,000", ["110 pps", "100 pps", "111 pps"])]
    told = [(cell.note, cell.significant) for cell in table.rows[0].cells if cell]
    assert told == [("", True), ("0.909 of none", True), ("1.008 of none", False)]


def test_sizes_of_one_contestant_stand_side_by_side() -> None:
    (table,) = laid_out(
        *(result("verdict-hit", {"netfence": 50 + place}, rules=10**place, how="hot") for place in (1, 3)),
        *(result("verdict-miss", {"netfence": 60 + place}, rules=10**place) for place in (1, 3)),
    )
    assert table.columns == ("rules 10", "rules 1,000")
    assert medians(table) == [
        ("verdict-hit", "how hot", ["51 ns", "53 ns"]),
        ("verdict-miss", "", ["61 ns", "63 ns"]),
    ]


def test_a_size_that_was_not_measured_is_an_empty_cell() -> None:
    (table,) = laid_out(
        result("bulk-x", {"netfence": 1}, "ms", rules=10, how="once"),
        result("bulk-x", {"netfence": 2}, "ms", rules=20, how="once"),
        result("bulk-x", {"netfence": 3}, "ms", rules=20, how="twice"),
    )
    assert medians(table) == [("bulk-x", "how once", ["1 ms", "2 ms"]), ("bulk-x", "how twice", [None, "3 ms"])]


def test_different_contestants_make_different_tables() -> None:
    several = laid_out(result("path-x", {"netfence": 1, "none": 1}), result("path-y", {"netfence": 1}))
    assert [table.columns for table in several] == [("netfence", "none"), ("netfence",)]
