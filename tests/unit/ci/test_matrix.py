"""The matrix as people meet it: exit status, terminal, HTML, README."""

from __future__ import annotations

import io
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

import matrix
import matrix_html
import matrix_readme
from matrix_counts import Cell, by_hook, by_mode_and_family, claim, skips
from matrix_results import FAILED, HOOKS, KNOWN, LOST, MODES, PASSED, SKIPPED, Result, Run

BOTH = ("ipv4", "ipv6")
WAITS = "tcx: waits for kernel 6.6"
JUNIT = '<testsuites><testcase classname="a" name="b"><properties>{}</properties>{}</testcase></testsuites>'
TCX = '<property name="hook" value="tcx"/>'


def one(outcome: str = PASSED, hook: str = "tcx", mode: str = "allowlist", reason: str = "", n: int = 0) -> Result:
    return Result(f"test_a::test_{outcome}[{hook}-{mode}-{n}]", outcome, reason, (hook,), (mode,), BOTH)


GOOD = Run("6.12", "6.12.57+deb13-amd64", PASSED, "", (one(), one(mode="audit"), one(hook="cgroup")))
OLD = Run("5.10", "5.10.0-36-amd64", PASSED, "", (one(SKIPPED, reason=WAITS), one(hook="clsact")))
BAD = Run("6.1", "6.1.0-41-amd64", FAILED, "", (one(FAILED, reason="AssertionError: <b>1 & 2</b>"), one(n=1)))
CRASHED = Run("7.3", "?", "crashed", "Oops: general protection fault")


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([], 3),
        ([GOOD, OLD], 0),
        ([GOOD, BAD], 1),
        ([GOOD, CRASHED], 3),
        ([BAD, CRASHED], 1),
        *(([GOOD, Run("7.3", outcome=lost)], 3) for lost in LOST),
        ([GOOD, Run("7.3", outcome=FAILED)], 1),
    ],
)
def test_exit_status(runs: list[Run], expected: int) -> None:
    assert matrix.status(runs) == expected


def test_cells() -> None:
    assert [str(Cell(*numbers)) for numbers in ((), (3,), (3, 1), (0, 0, 2), (3, 1, 2))] == [
        "",
        "3",
        "3 1✗",
        "2–",
        "3 1✗ 2–",
    ]
    assert [Cell(*numbers).state for numbers in ((), (3,), (3, 1), (0, 0, 2))] == ["empty", PASSED, FAILED, SKIPPED]
    assert str(by_hook(BAD)["tcx"]) == "1 1✗"
    rows = by_mode_and_family(GOOD)
    assert [(row.hook, row.family) for row in rows] == [(hook, family) for hook in ("tcx", "cgroup") for family in BOTH]
    assert dict(zip((*MODES, "-"), map(str, rows[0].cells), strict=True)) == {
        "disabled": "", "allowlist": "1", "block_all": "", "denylist": "", "audit": "1", "-": "",
    }  # fmt: skip
    assert skips([GOOD, OLD]) == {WAITS: {"5.10": 1}}


def shown(runs: list[Run], width: int = 100) -> str:
    out = io.StringIO()
    matrix.show(Console(file=out, width=width, highlight=False), runs)
    return out.getvalue()


def test_the_terminal_tells_all_in_a_hundred_columns() -> None:
    many = [one(outcome, hook, n=n) for outcome in (PASSED, FAILED, SKIPPED) for hook in HOOKS for n in range(999)]
    said = shown([GOOD, OLD, BAD, CRASHED, Run("host", "6.18.44", FAILED, "", tuple(many))])
    table = said[: said.index("skipped because")]
    assert max(map(len, table.splitlines())) <= 100
    assert "…" not in table
    assert "999 999✗" in re.sub(r"\s+", " ", table)
    for text in ("6.12.57+deb13-amd64", WAITS, "AssertionError: <b>1 & 2</b>", "Oops: general", "the kernel crashed"):
        assert text in said, text
    assert "and 4965 more on host" in said


def test_the_terminal_tells_modes_and_families() -> None:
    others = one(mode="denylist"), replace(one(FAILED, mode="audit"), families=("ipv6",))
    arp = replace(one(hook="clsact", mode="block_all"), families=("-",))
    unmoded = replace(one(SKIPPED, hook="clsact"), families=("ipv4",), modes=("-",))
    said = shown([replace(GOOD, tests=(*GOOD.tests, *others)), replace(OLD, tests=(arp, unmoded))])
    (table,) = re.findall(r"(?s)kernels × hooks × families × modes.*?(?=skipped because)", said)
    header, *rows = [re.split(r" {2,}", line.strip()) for line in table.splitlines()[1:] if re.search(r"\w| -", line)]
    assert header == ["kernel", "hook", "family", *MODES, "no mode"]
    assert rows == [
        ["6.12", "tcx", "ipv4", "1", "1", "1"],
        ["ipv6", "1", "1", "1 1✗"],
        ["cgroup", "ipv4", "1"],
        ["ipv6", "1"],
        ["5.10", "clsact", "ipv4", "1–"],
        ["-", "1"],
    ]
    (failed,) = (line for line in table.splitlines() if "1 1✗" in line)
    names = next(line for line in table.splitlines() if "block_all" in line)
    assert failed.index("1 1✗") + len("1 1✗") == names.index("audit") + len("audit")


class Page(HTMLParser):
    """Reads text, the heads of tables, and the tags that could ask a network for something."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags, self.links = "", set[str](), list[str]()
        self.heads, self.inside = list[list[str]](), ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "thead":
            self.heads.append([])
        elif tag == "th" and self.inside == "thead":
            self.heads[-1].append("")
        if tag in ("thead", "tbody"):
            self.inside = tag
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.inside == "thead" and self.heads[-1]:
            self.heads[-1][-1] += data.strip()


def test_the_page_is_whole_escaped_and_alone() -> None:
    html = matrix_html.page([GOOD, OLD, BAD, CRASHED])
    page = Page()
    page.feed(html)
    for text in ("AssertionError: <b>1 & 2</b>", WAITS, "the kernel crashed", "Oops: general", "6.12.57+deb13-amd64"):
        assert text in page.text, text
    assert not page.tags & {"b", "script", "img", "link", "iframe"}
    assert all(link.startswith("#") for link in page.links)
    assert "url(" not in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert html.count('<td class="failed">1 1✗</td>') >= 3  # the summary, and each family of the details
    summary, reasons, *details = page.heads
    assert summary == ["kernel", *HOOKS, "no hook", "outcome"]
    assert reasons == ["reason", "6.12", "5.10", "6.1", "7.3"]
    assert details == [["hook", "family", *MODES, "no mode"]] * 3  # of the crashed one nothing is known


README = f"before\n{matrix_readme.BEGIN}\nold\n{matrix_readme.END}\nafter\n"


def test_the_readmes_table() -> None:
    written = matrix_readme.with_table(README, [OLD, GOOD])
    assert written.startswith(f"before\n{matrix_readme.BEGIN}\n| hook | 5.10 | 6.12 |\n|---|---|---|\n")
    assert "\n| tcx | not in this kernel (6.6) | tested |\n| clsact | tested | not tested |\n" in written
    assert written.endswith(f"Tested kernels: 5.10.0-36-amd64, 6.12.57+deb13-amd64.\n{matrix_readme.END}\nafter\n")
    assert matrix_readme.with_table(written, [OLD, GOOD]) == written
    assert matrix_readme.with_table(written, []) == README.replace("old", "No results yet.")


def test_the_readme_is_compared_with_the_results_at_hand() -> None:
    written = matrix_readme.with_table(README, [OLD, GOOD])
    assert matrix_readme.differences(written, [GOOD]) == []
    newer = Run("5.10", "5.10.0-37-amd64", PASSED, "", OLD.tests)
    assert matrix_readme.differences(written, [newer, GOOD]) == []
    assert matrix_readme.differences(written, [Run("6.12", "", PASSED, "", GOOD.tests[2:])]) == [
        "tcx on 6.12: says tested, the results say not tested"
    ]
    assert matrix_readme.differences(written, [BAD])[0] == "tcx on 6.1: says nothing, the results say 1 of 2 fail"
    lacking = written.replace(" tested |", "", 1)
    assert matrix_readme.differences(lacking, [GOOD]) == ["tcx on 6.12: says nothing, the results say tested"]
    with pytest.raises(ValueError, match="has no <!-- hooks"):
        matrix_readme.differences("no markers", [GOOD])


def test_a_known_failure_is_not_hidden_behind_what_passes() -> None:
    known = one(SKIPPED, reason=f"{KNOWN}the kernel's fault")
    assert claim(Run("7.3", "", PASSED, "", (one(), known)), "tcx") == "tested (1 known to fail)"


def test_a_lost_machine_claims_nothing() -> None:
    assert claim(CRASHED, "tcx") == "lost: crashed"
    assert claim(Run("7.3", "", "hung", "", (one(),)), "tcx") == "lost: hung"


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, page, readme = tmp_path / "junit", tmp_path / "out" / "matrix.html", tmp_path / "README.md"
    assert matrix.main([str(results)]) == 3
    results.mkdir()
    (results / "6.12.xml").write_text(JUNIT.format(TCX, ""))
    (results / "host.xml").write_text(JUNIT.format(TCX, ""))
    readme.write_text(README)
    common = [str(results), "--html", str(page), "--readme", str(readme)]
    assert matrix.main([*common, "--check"]) == 1
    assert "tcx on 6.12: says nothing, the results say tested" in capsys.readouterr().out
    assert readme.read_text() == README
    assert matrix.main(common) == 0
    assert "| hook | 6.12 |" in readme.read_text()  # what the host runs is nobody else's kernel
    assert matrix.main([*common, "--check"]) == 0
    assert "6.12" in page.read_text()
    assert matrix.main([str(results), "--kernels", "6.12,7.3"]) == 3
    assert "7.3: the run could not be made: no results" in capsys.readouterr().out
    (results / "6.12.xml").write_text(JUNIT.format(TCX, '<failure message="AssertionError: [red] 1"/>'))
    assert matrix.main([*common, "--check"]) == 1
    assert "AssertionError: [red] 1" in capsys.readouterr().out


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Have a kernel whose tests passed."""
    made = tmp_path / "junit"
    made.mkdir()
    (made / "6.12.xml").write_text(JUNIT.format(TCX, ""))
    return made


def test_a_readme_that_agrees_hides_neither_failures_nor_losses(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README)
    written = [str(results), "--readme", str(readme)]
    assert matrix.main(written) == 0
    assert matrix.main([*written, "--check"]) == 0
    assert matrix.main([*written, "--check", "--kernels", "6.12,host"]) == 3
    (results / "host.xml").write_text(JUNIT.format(TCX, '<failure message="no"/>'))
    assert matrix.main([*written, "--check"]) == 1


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file or directory"),
        (b"no table", f"the README has no {matrix_readme.BEGIN}"),
        (b"\xff", "can't decode byte 0xff"),
    ],
    ids=["none", "no-markers", "no-text"],
)
@pytest.mark.parametrize("check", [[], ["--check"]], ids=["write", "check"])
def test_a_readme_that_is_none_is_called_wrongly(
    results: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    complaint: str,
    check: list[str],
) -> None:
    readme = tmp_path / "README.md"
    if content is not None:
        readme.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        matrix.main([str(results), "--readme", str(readme), *check])
    told = capsys.readouterr().err
    assert f"error: --readme {readme}: " in told
    assert complaint in told
    assert readme.exists() == (content is not None)


def test_what_cannot_be_written_is_infrastructure(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = f"{os.devnull}/matrix.html"
    assert matrix.main([str(results), "--html", html]) == 3
    told = capsys.readouterr()
    assert f"infrastructure: write {html}: " in told.err
    assert "6.12" in told.out
    (results / "6.12.xml").write_text(JUNIT.format(TCX, '<failure message="no"/>'))
    assert matrix.main([str(results), "--html", html]) == 1


@pytest.mark.parametrize("arguments", [[], ["--check"], ["--no-such-option"]])
def test_called_wrongly(results: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        matrix.main([str(results), *arguments] if arguments else [])
    assert "error: " in capsys.readouterr().err


def test_what_cannot_be_read_is_no_result(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "6.12.json").mkdir()
    assert matrix.main([str(results)]) == 3
    (results / "6.12.json").rmdir()
    (results / "6.12-2.xml").mkdir()
    assert matrix.main([str(results)]) == 3
    assert "6.12-2.xml is no whole JUnit file: " in capsys.readouterr().out
