"""How rounds are run and what is said of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import measure
from measure import Series, compare, differs, entries, ratio


def test_contestants_alternate_after_a_round_that_does_not_count() -> None:
    ran: list[str] = []

    def one(name: str, value: float) -> float:
        ran.append(name)
        return value

    series = compare("ns", {"a": lambda: one("a", 1.0), "b": lambda: one("b", 2.0)}, rounds=2)
    assert "".join(ran) == "ababab"
    assert series == {"a": Series("ns", [1.0, 1.0]), "b": Series("ns", [2.0, 2.0])}


def test_ratios_are_taken_round_by_round() -> None:
    """The machine is three times slower in the second round: the ratio does not change."""
    assert ratio(Series("ns", [10, 30]), Series("ns", [20, 60])).values == [0.5, 0.5]


@pytest.mark.parametrize(
    ("values", "significant"),
    [([0.8, 0.9, 0.9, 0.95], True), ([0.9, 0.99, 1.01, 1.1], False), ([1.1, 1.2, 1.3], True), ([1.0], False)],
)
def test_significant_where_the_middle_half_does_not_hold_one(values: list[float], significant: bool) -> None:
    assert differs(Series("", values)) is significant


def test_entries_relate_all_but_the_base_to_it() -> None:
    told = entries({"none": Series("ns", [2.0, 2.0]), "netfence": Series("ns", [3.0, 3.0])}, "none")
    assert "ratio" not in told["none"]
    assert told["netfence"]["ratio"] == 1.5
    assert told["netfence"]["values"] == [3.0, 3.0]
    assert "ratio" not in entries({"netfence": Series("ns", [3.0])}, None)["netfence"]


def test_a_pinned_cpu_is_told_only_where_it_is_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "REPORT", tmp_path / "report.jsonl")
    before = os.sched_getaffinity(0)
    with measure.pin() as cpu:
        assert os.sched_getaffinity(0) == {cpu}
        measure.report("attach-x", {"netfence": Series("ms", [5.0])}, cpu_pinned=cpu)
        with pytest.raises(AssertionError, match="attach-y is not pinned to CPU 4096"):
            measure.report("attach-y", {"netfence": Series("ms", [5.0])}, cpu_pinned=4096)
    assert os.sched_getaffinity(0) == before
    assert "attach-y" not in measure.REPORT.read_text()
