"""The command: files that come out, what is printed, exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.unit.perf.runs import result, run

import perf_report
from perfreport.model import Run, document, load, save


def saved(path: Path, value: float, **changed: object) -> Path:
    save(run(result("attach-x", {"netfence": value}, "ms", rules=10), **changed), path)
    return path


def lines(path: Path, there: Run) -> Path:
    """Write the run as the benchmarks do."""
    where = there.model_dump(include={"size", "kernel", "cpu", "commit"})
    path.write_text("".join(json.dumps({**one, **where}) + "\n" for one in document(there)["results"]))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / "base.json", 100)


@pytest.mark.parametrize(("value", "status"), [(100, 0), (30, 0), (300, 1)])
def test_only_a_regression_fails(
    tmp_path: Path, base: Path, value: float, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert perf_report.main(["compare", str(base), str(saved(tmp_path / "new.json", value))]) == status
    word = {100: "not significant", 30: "improvement", 300: "regression"}[int(value)]
    out = capsys.readouterr().out
    assert f" {word} " in next(line for line in out.splitlines() if "attach-x" in line)
    assert f"{word}: 1" in out


def test_an_unusable_base_is_told_apart_from_a_regression(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({"schema": 99}))
    smoke = saved(tmp_path / "smoke.json", 100, size="smoke")
    for argv, why in [
        (["compare", str(tmp_path / "none.json"), str(base)], "No such file"),
        (["compare", str(bad), str(base)], "schema 99"),
        (["compare", str(base), str(bad)], "schema 99"),
        (["compare", str(smoke), str(base)], "smoke sizes"),
        (["check", str(smoke), "--size", "full"], "smoke sizes"),
        (["check", str(bad), "--size", "full"], "schema 99"),
        (["write", "--lines", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "report")], "No such file"),
    ]:
        assert perf_report.main(argv) == 2
        told = capsys.readouterr().err
        assert told.startswith("perf_report: ")
        assert why in told
    assert perf_report.main(["check", str(base), "--size", "full"]) == 0


def test_writing_makes_both_files_and_compares(tmp_path: Path, base: Path) -> None:
    slow = lines(tmp_path / "report.jsonl", run(result("attach-x", {"netfence": 300}, "ms", rules=10)))
    argv = ["write", "--lines", str(slow), "--out", str(tmp_path / "report")]
    assert perf_report.main(argv) == 0
    assert "baseline" not in (tmp_path / "report.html").read_text()
    assert perf_report.main([*argv, "--compare", str(base), "--selection", "-k", "attach", "--x"]) == 1
    assert "Against the baseline" in (tmp_path / "report.html").read_text()
    assert load(tmp_path / "report.json").selection == ["-k", "attach", "--x"]


def test_the_base_may_be_the_report_that_is_replaced(tmp_path: Path) -> None:
    base = saved(tmp_path / "report.json", 100)
    slow = lines(tmp_path / "report.jsonl", run(result("attach-x", {"netfence": 300}, "ms", rules=10)))
    argv = ["write", "--lines", str(slow), "--out", str(tmp_path / "report"), "--compare", str(base)]
    assert perf_report.main(argv) == 1
    assert load(base).results[0].series["netfence"].median == 300


def test_an_unusable_base_leaves_the_old_report_as_it_is(tmp_path: Path) -> None:
    new = lines(tmp_path / "report.jsonl", run(result("attach-x", {"netfence": 300}, "ms", rules=10)))
    old = {tmp_path / "report.json": "old figures", tmp_path / "report.html": "old page"}
    for path, text in old.items():
        path.write_text(text)
    for base in (tmp_path / "none.json", tmp_path / "report.json", saved(tmp_path / "smoke.json", 100, size="smoke")):
        argv = ["write", "--lines", str(new), "--out", str(tmp_path / "report"), "--compare", str(base)]
        assert perf_report.main(argv) == 2
        assert {path: path.read_text() for path in old} == old


def test_it_runs_as_a_program(tmp_path: Path, base: Path) -> None:
    new = saved(tmp_path / "new.json", 300)
    done = subprocess.run(
        [sys.executable, perf_report.__file__, "compare", str(base), str(new), "--html", str(tmp_path / "x.html")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "regression" in done.stdout
    assert (tmp_path / "x.html").exists()


def test_markup_in_names_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = tmp_path / "new.json"
    save(run(result("attach-[red]x", {"netfence": 1}, "ms")), new)
    assert perf_report.main(["compare", str(new), str(new)]) == 0
    assert "attach-[red]x" in capsys.readouterr().out


def test_peers_are_printed_as_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    save(run(result("dns-x", {"netfence": 50, "unbound": 100}, "queries/s")), path)
    assert perf_report.main(["peers", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Behind a peer in 1 of 1 comparisons")
    assert "| `dns-x` | netfence | unbound |" in out
    assert perf_report.main(["peers", str(tmp_path / "none.json")]) == 2
