"""Reading and writing: what the benchmarks append, what is kept, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.perf.runs import result, run

import measure
from measure import Series
from perfreport.model import SCHEMA, BadReportError, document, higher_is_better, load, read_lines, save


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `measure.report` appends."""
    path = tmp_path / "report.jsonl"
    monkeypatch.setattr(measure, "REPORT", path)
    return path


def test_what_is_reported_is_read_back(lines: Path) -> None:
    series = {"none": Series("pps", [1.0, 2.0, 3.0]), "netfence": Series("pps", [2.0, 3.0, 4.0])}
    with measure.pin() as cpu:
        measure.report("path-udp", series, base="none", rules=1000, cpu_pinned=cpu)
    measure.report("attach-x", {"netfence": Series("ms", [5.0])})
    read = read_lines(lines, ["-k", "path"])
    assert [one.name for one in read.results] == ["path-udp", "attach-x"]
    first = read.results[0]
    assert (first.series, first.base, first.sizes) == (series, "none", {"rules": 1000, "cpu_pinned": cpu})
    assert (read.size, read.selection) == ("smoke", ["-k", "path"])
    assert read.cpu
    assert read.commit != "?"


def test_a_report_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    before = run(result("path-udp", {"none": 1, "netfence": 2}, "pps", base="none", rules=10), selection=["-k", "path"])
    save(before, tmp_path / "report.json")
    assert load(tmp_path / "report.json") == before


def test_a_report_tells_medians_and_ratios_to_those_who_read_no_rounds() -> None:
    (told,) = document(run(result("path-udp", {"none": [2, 4, 6], "netfence": [1, 2, 3]}, base="none")))["results"]
    assert told["series"]["none"]["median"] == 4
    assert told["series"]["netfence"]["ratio"] == 0.5
    assert told["series"]["netfence"]["significant"] is True


def test_of_a_benchmark_that_ran_twice_the_later_counts(lines: Path) -> None:
    for value in (1.0, 2.0):
        measure.report("attach-x", {"netfence": Series("ms", [value])}, rules=10)
    measure.report("attach-x", {"netfence": Series("ms", [3.0])}, rules=20)
    assert [one.series["netfence"].values for one in read_lines(lines).results] == [[2.0], [3.0]]


def test_lines_of_two_runs_are_refused(lines: Path) -> None:
    measure.report("attach-x", {"netfence": Series("ms", [1.0])})
    other = json.loads(lines.read_text()) | {"size": "full"}
    lines.write_text(lines.read_text() + json.dumps(other) + "\n")
    with pytest.raises(BadReportError, match="more than one run"):
        read_lines(lines)


def test_a_line_that_is_none_is_named(lines: Path) -> None:
    measure.report("attach-x", {"netfence": Series("ms", [1.0])})
    lines.write_text(lines.read_text() + '{"name": "dns"}\n')
    with pytest.raises(BadReportError, match="line 2"):
        read_lines(lines)


def test_no_lines_are_no_report(lines: Path) -> None:
    lines.touch()
    with pytest.raises(BadReportError, match="nothing was measured"):
        read_lines(lines)


def _good() -> dict[str, Any]:
    return document(run(result("path-udp", {"none": 1, "netfence": 2}, base="none")))


def _without(name: str) -> str:
    return json.dumps({key: value for key, value in _good().items() if key != name})


def _with_values(values: list[Any]) -> str:
    good = _good()
    good["results"][0]["series"]["none"]["values"] = values
    return json.dumps(good)


BAD: dict[str, tuple[Callable[[], str], str]] = {
    "empty": (lambda: "", "not JSON"),
    "text": (lambda: "hello", "not JSON"),
    "lines": (lambda: "{}\n{}", "not JSON"),
    "list": (lambda: "[]", "no schema version"),
    "no schema": (lambda: _without("schema"), "no schema version"),
    "later schema": (lambda: json.dumps(_good() | {"schema": SCHEMA + 1}), f"schema {SCHEMA + 1}"),
    "no size": (lambda: _without("size"), "size"),
    "unknown size": (lambda: json.dumps(_good() | {"size": "huge"}), "size"),
    "no results": (lambda: _without("results"), "results"),
    "no values": (lambda: _with_values([]), "no values"),
    "words": (lambda: _with_values(["fast"]), "values"),
    "not a number": (lambda: _with_values([float("nan")]), "no numbers"),
    "unknown base": (lambda: json.dumps(_good()).replace('"base": "none"', '"base": "other"'), "not among"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_report_is_refused_with_its_name_and_why(tmp_path: Path, kind: str) -> None:
    text, why = BAD[kind]
    path = tmp_path / "base.json"
    path.write_text(text())
    with pytest.raises(BadReportError, match=why) as raised:
        load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("kind", ["missing", "directory", "not text"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "base.json"
    if kind == "directory":
        path.mkdir()
    if kind == "not text":
        path.write_bytes(b"\xff")
    with pytest.raises(BadReportError, match="cannot read"):
        load(path)


@pytest.mark.parametrize("unit", ["packets/s", "pps", "Gbit/s", "queries/s", "qps"])
def test_rates_are_better_high(unit: str) -> None:
    assert higher_is_better(unit)


@pytest.mark.parametrize("unit", ["ns", "µs", "ms", "s", "MB", "KB", "files", ""])
def test_everything_else_is_better_low(unit: str) -> None:
    assert not higher_is_better(unit)
