"""What the runs of tests/kernel left behind: JUnit files and an outcome for each kernel, read into values.

`build/junit/6.1.xml`, `6.1-2.xml` … are what pytest wrote, one file per pytest; `6.1.json` is what the session says of
the run as a whole. A run that has lost its machine is told apart from one with failed tests: nothing can be said about
tests that were never reported.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

HOOKS = (
    "tcx",
    "clsact",
    "xdp native",
    "xdp generic",
    "cgroup",
)  # this and what follows: as tests/kernel/harness/covers.py
MODES = ("disabled", "allowlist", "block_all", "denylist", "audit")
FAMILIES = ("ipv4", "ipv6")
ELSE = "-"  # what no hook, mode or family is told of

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
KNOWN = "known to fail: "  # how the reason of a test begins that is expected to fail; else it counts as skipped
LOST = {
    "crashed": "the kernel crashed",
    "hung": "the machine hung",
    "noboot": "the kernel did not boot",
    "infrastructure": "the run could not be made",
}
"""Outcomes of a run that are no verdict on the tests, in words."""


@dataclass(frozen=True, slots=True)
class Result:
    """One test on one kernel. `reason`: why it failed or was skipped, in one line."""

    name: str
    outcome: str
    reason: str = ""
    hooks: tuple[str, ...] = (ELSE,)
    modes: tuple[str, ...] = (ELSE,)
    families: tuple[str, ...] = (ELSE,)


@dataclass(frozen=True, slots=True)
class Run:
    """All that was run on one kernel. `outcome`: passed, failed, or one of `LOST`."""

    kernel: str
    release: str = "?"
    outcome: str = PASSED
    detail: str = ""
    tests: tuple[Result, ...] = field(default=(), repr=False)

    @property
    def lost(self) -> bool:
        """Tell whether the machine, not a test, is what failed."""
        return self.outcome in LOST

    def of(self, outcome: str) -> list[Result]:
        """List the tests with that outcome."""
        return [test for test in self.tests if test.outcome == outcome]


def read_runs(directory: Path, expected: Iterable[str] = ()) -> list[Run]:
    """Read every kernel's results, and miss those that are expected; in order of version, what has none first."""
    found = {re.sub(r"-\d+$", "", path.stem) for path in directory.glob("*.xml")}
    found |= {path.stem for path in directory.glob("*.json")}
    return [_read_run(directory, kernel) for kernel in sorted(found | set(expected), key=by_version)]


def by_version(kernel: str) -> tuple[list[int], str]:
    """Sort "host" first, then "5.10" before "6.1"."""
    return [int(part) for part in re.findall(r"\d+", kernel)], kernel


def _read_run(directory: Path, kernel: str) -> Run:
    files = sorted(
        path for path in directory.glob(f"{kernel}*.xml") if re.fullmatch(r"(-\d+)?", path.stem[len(kernel) :])
    )
    tests: dict[str, Result] = {}
    broken = []
    for path in files:
        try:
            for test in _read_junit(path):
                worst = max(tests.get(test.name, test), test, key=lambda each: _SEVERITY[each.outcome])
                tests[test.name] = worst
        except (ET.ParseError, OSError) as error:
            broken.append(f"{path.name} is no whole JUnit file: {error}")
    run = _told(directory / f"{kernel}.json", kernel)
    run = replace(run, tests=tuple(tests.values()))
    if run.lost:
        return run
    if broken or not tests:
        return replace(run, outcome="infrastructure", detail="; ".join(broken) or run.detail or "no results")
    if run.of(FAILED):
        return replace(run, outcome=FAILED)
    return run


_SEVERITY = {SKIPPED: 0, PASSED: 1, FAILED: 2}


def _told(path: Path, kernel: str) -> Run:
    """Read what the session said of the run; it need not have said anything."""
    if not path.exists():
        return Run(kernel)
    try:
        told = json.loads(path.read_text())
        outcome = told["outcome"]
        if outcome not in (PASSED, FAILED, *LOST):
            return Run(kernel, outcome="infrastructure", detail=f"{path.name} tells an outcome unknown here: {outcome}")
        return Run(kernel, str(told.get("release") or "?"), outcome, str(told.get("detail") or ""))
    except (ValueError, KeyError, TypeError, OSError) as error:
        return Run(kernel, outcome="infrastructure", detail=f"{path.name} cannot be read: {error!r}")


def _read_junit(path: Path) -> Iterator[Result]:
    for case in ET.parse(path).iter("testcase"):  # noqa: S314  # our own pytest's
        outcome, reason = PASSED, ""
        for child in case:
            if child.tag in ("failure", "error"):
                outcome, reason = FAILED, _first_line(child)
            elif child.tag == "skipped" and outcome != FAILED:
                known = KNOWN if child.get("type") == "pytest.xfail" else ""
                outcome, reason = SKIPPED, known + _first_line(child)
        told = {each.get("name"): each.get("value", "") for each in case.iter("property")}
        hooks, modes, families = (
            tuple(filter(None, told.get(name, "").split(", "))) or (ELSE,) for name in ("hook", "mode", "family")
        )
        where = (case.get("classname", "").removeprefix("tests.kernel."), case.get("name", ""))
        yield Result("::".join(filter(None, where)), outcome, reason, hooks, modes, families)


def _first_line(element: ET.Element) -> str:
    text = (element.get("message") or element.text or "").strip() or "no message"
    return text.splitlines()[0]
