"""The matrix of results, kernel × hook × mode × family: what passed, failed or was skipped and why, on every kernel.

    python ci/matrix.py build/junit [--html build/matrix.html] [--kernels 5.10,6.1] [--readme README.md [--check]]

Reads what the nox sessions `kernel` and `vm(...)` leave in build/junit. Exit status: 0 all passed, 1 tests failed (or,
with --check, the README says something else), 2 called wrongly (a README without the table's place is that too),
3 infrastructure: a machine was lost, there are no results, or a file cannot be written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import matrix_html
import matrix_readme
from infrastructure import EXIT_STATUS, InfrastructureError
from matrix_counts import Cell, by_hook, by_mode_and_family, failures_of, skips
from matrix_results import ELSE, FAILED, HOOKS, LOST, MODES, PASSED, Run, read_runs

OK, TESTS_FAILED, INFRASTRUCTURE = 0, 1, EXIT_STATUS
HOST = "host"
WIDTH = 100  # columns, where there is no terminal to ask
STYLES = {"passed": "green", "failed": "bold red", "skipped": "dim", "empty": "dim"}
MAX_FAILURES_SHOWN = 30  # per kernel, on the terminal; the HTML has all


def status(runs: Sequence[Run]) -> int:
    """Tell the exit status: failed tests are certain, whatever else was lost; no result is not a pass."""
    if any(run.of(FAILED) or run.outcome == FAILED for run in runs):
        return TESTS_FAILED
    if not runs or any(run.lost for run in runs):
        return INFRASTRUCTURE
    return OK


def summary(runs: Sequence[Run]) -> Table:
    """Make the table kernel × hook."""
    table = Table(title="kernels × hooks: tests passed, failed ✗, skipped –", title_justify="left")
    table.add_column("kernel", no_wrap=True)
    for hook in HOOKS:
        table.add_column(hook.replace(" ", "\n"), justify="right")
    table.add_column("no hook", justify="right")
    table.add_column("outcome")
    for run in runs:
        cells = by_hook(run)
        outcome = f"[{STYLES[PASSED if run.outcome == PASSED else FAILED]}]{LOST.get(run.outcome, run.outcome)}[/]"
        name = run.kernel if run.release == "?" else f"{run.kernel}\n[dim]{escape(run.release)}[/]"
        table.add_row(name, *(_cell(cells[hook]) for hook in (*HOOKS, ELSE)), outcome)
    return table


def details(runs: Sequence[Run]) -> Table:
    """Make the table kernel × hook × family, a column for each mode."""
    # Without lines between the columns it has room in WIDTH.
    table = Table(title="kernels × hooks × families × modes", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("kernel", "hook", "family"):
        table.add_column(name, no_wrap=True)
    for mode in MODES:
        table.add_column(mode, justify="right")
    table.add_column("no mode", justify="right")
    for run in runs:
        kernel, above = run.kernel, ""
        for row in by_mode_and_family(run):
            hook = "" if row.hook == above else row.hook
            table.add_row(kernel, hook, row.family, *map(_cell, row.cells))
            kernel, above = "", row.hook
        table.add_section()
    return table


def _cell(cell: Cell) -> str:
    return f"[{STYLES[cell.state]}]{cell}[/]" if str(cell) else ""


def show(console: Console, runs: Sequence[Run]) -> None:
    """Print the summary and the details, then why tests were skipped, what failed, and what was lost."""
    console.print(summary(runs))
    console.print(details(runs))
    if skipped := skips(runs):
        table = Table(title="skipped because", title_justify="left")
        table.add_column("reason")
        table.add_column("tests")
        for reason, counts in skipped.items():
            table.add_row(escape(reason), ", ".join(f"{kernel}: {count}" for kernel, count in counts.items()))
        console.print(table)
    for run in runs:
        failed = failures_of(run)
        for test in failed[:MAX_FAILURES_SHOWN]:
            console.print(f"[bold red]✗[/] {run.kernel} {escape(test.name)}\n    {escape(test.reason)}", soft_wrap=True)
        if len(failed) > MAX_FAILURES_SHOWN:
            console.print(f"  … and {len(failed) - MAX_FAILURES_SHOWN} more on {run.kernel}")
        if run.lost:
            console.print(f"[bold red]![/] {run.kernel}: {LOST[run.outcome]}: {escape(run.detail or 'no detail')}")


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="directory of JUnit files and outcomes")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the whole matrix, with the details, there")
    parser.add_argument("--kernels", default="", metavar="A,B", help="kernels that must be among the results")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write the table hooks × kernels into it")
    parser.add_argument("--check", action="store_true", help="write nothing into it: compare")
    options = parser.parse_args(arguments)
    if options.check and not options.readme:
        parser.error("--check compares a README: give --readme")
    readme = _readme(parser, options.readme) if options.readme else ""
    runs = read_runs(options.results, filter(None, options.kernels.split(",")))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    if not runs:
        console.print(f"no results in {options.results}: run `nox -s kernel` or `nox -s vm` first")
        return INFRASTRUCTURE
    show(console, runs)
    result = status(runs)
    guests = [run for run in runs if run.kernel != HOST]
    try:
        if options.html:
            _write(options.html, matrix_html.page(runs))
            console.print(f"details: {options.html}")
        if options.readme and not options.check:
            _write(options.readme, matrix_readme.with_table(readme, guests))
    except InfrastructureError as error:
        print(error, file=sys.stderr)
        result = result or INFRASTRUCTURE
    if options.check:
        differences = matrix_readme.differences(readme, guests)
        console.print(*(f"{options.readme}: {each}" for each in differences), sep="\n", markup=False, soft_wrap=True)
        result = result or (TESTS_FAILED if differences else OK)
    return result


def _readme(parser: argparse.ArgumentParser, path: Path) -> str:
    """Read the README; what is none ends the program."""
    try:
        text = path.read_text(encoding="utf-8")
        matrix_readme.with_table(text, ())
    except (OSError, ValueError) as error:
        parser.error(f"--readme {path}: {error}")
    return text


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InfrastructureError(f"write {path}: {error}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
