"""Counts over the results: cells of the matrix, skips by reason, the cells of the README's table."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from matrix_results import ELSE, FAILED, FAMILIES, HOOKS, KNOWN, MODES, PASSED, SKIPPED, Result, Run

WAITS = re.compile(r".+: waits for kernel (\d+\.\d+)")


@dataclass(frozen=True, slots=True)
class Cell:
    """How many tests of one cell passed, failed, were skipped."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    @classmethod
    def of(cls, tests: Iterable[Result]) -> Cell:
        """Count them."""
        counted = Counter(test.outcome for test in tests)
        return cls(counted[PASSED], counted[FAILED], counted[SKIPPED])

    def __str__(self) -> str:
        """Say "12", "11 1✗", "3–" (skipped), nothing where nothing is."""
        parts = (f"{self.passed or ''}", f"{self.failed}✗" * bool(self.failed), f"{self.skipped}–" * bool(self.skipped))
        return " ".join(filter(None, parts))

    @property
    def state(self) -> str:
        """The worst that is in it: failed, passed, skipped, or "empty"."""
        if self.failed:
            return FAILED
        return PASSED if self.passed else SKIPPED if self.skipped else "empty"


def by_hook(run: Run) -> dict[str, Cell]:
    """Count a run's tests for each hook, and for none."""
    return {hook: Cell.of(test for test in run.tests if hook in test.hooks) for hook in (*HOOKS, ELSE)}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a run's details: a hook and a family, and a cell for each mode."""

    hook: str
    family: str
    cells: tuple[Cell, ...]


def by_mode_and_family(run: Run) -> list[Row]:
    """Count the tests that name a hook by mode, `MODES` and then none; a test counts in each cell that it covers."""
    rows = []
    for hook in HOOKS:
        of_hook = [test for test in run.tests if hook in test.hooks]
        for family in (*FAMILIES, ELSE):
            tests = [test for test in of_hook if family in test.families]
            if tests:
                cells = (Cell.of(test for test in tests if mode in test.modes) for mode in (*MODES, ELSE))
                rows.append(Row(hook, family, tuple(cells)))
    return rows


def skips(runs: Iterable[Run]) -> dict[str, dict[str, int]]:
    """Count the skipped tests: reason → kernel → how many."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for run in runs:
        for test in run.of(SKIPPED):
            found[test.reason][run.kernel] = found[test.reason].get(run.kernel, 0) + 1
    return dict(sorted(found.items()))


def claim(run: Run, hook: str) -> str:
    """Say in a word or two what this run shows of a hook, as the README does."""
    tests = [test for test in run.tests if hook in test.hooks]
    cell = Cell.of(tests)
    if cell.failed:
        return f"{cell.failed} of {cell.failed + cell.passed} fail"
    if run.lost:
        return "lost: " + run.outcome
    known = sum(test.reason.startswith(KNOWN) for test in tests)
    if cell.passed:
        return f"tested ({known} known to fail)" if known else "tested"
    waits = {found[1] for test in tests if (found := WAITS.fullmatch(test.reason))}
    if waits:
        return f"not in this kernel ({max(waits, key=lambda text: [int(part) for part in text.split('.')])})"
    return "not tested"


def failures_of(run: Run) -> list[Result]:
    """List a run's failed tests by name."""
    return sorted(run.of(FAILED), key=lambda test: test.name)
