"""Make report.json and report.html of report.jsonl, and compare reports.

    perf_report.py check BASE --size full          can this run be compared with BASE? before half an hour of measuring
    perf_report.py write [--compare BASE]          report.jsonl to report.json and report.html
    perf_report.py compare BASE NEW [--html FILE]  two reports, nothing measured
    perf_report.py peers [REPORT]                  all of ours against all peers, as a Markdown table

Exit status: 1 if something of ours got worse than BASE, 0 if not, 2 if BASE (or another file) is not usable.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from measure import REPORT
from perfreport import gate, markdown, model, page, terminal

REGRESSION, UNUSABLE = 1, 2


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.do(arguments))
    except model.BadReportError as error:
        print(f"perf_report: {error}", file=sys.stderr)  # noqa: T201 - a command
        return UNUSABLE


def _check(arguments: argparse.Namespace) -> int:
    base = model.load(arguments.base)
    if base.size != arguments.size:
        raise model.BadReportError(f"{arguments.base} was measured with {base.size} sizes, not {arguments.size}")
    return 0


def _write(arguments: argparse.Namespace) -> int:
    run = model.read_lines(arguments.lines, arguments.selection)
    comparison = _against(arguments.compare, run)  # first: what is written may be in the base's place
    model.save(run, arguments.out.with_suffix(".json"))
    return _tell(run, comparison, arguments.out.with_suffix(".html"))


def _compare(arguments: argparse.Namespace) -> int:
    run = model.load(arguments.new)
    return _tell(run, _against(arguments.base, run), arguments.html)


def _peers(arguments: argparse.Namespace) -> int:
    print(markdown.peers_table(model.load(arguments.report)), end="")  # noqa: T201 - a command
    return 0


def _against(base: Path | None, run: model.Run) -> gate.Comparison | None:
    return gate.compare_runs(model.load(base), run) if base else None


def _tell(run: model.Run, comparison: gate.Comparison | None, html: Path | None) -> int:
    if html is not None:
        html.write_text(page.page(run, comparison), encoding="utf-8")
        print(f"wrote {html}")  # noqa: T201 - a command
    if comparison is None:
        return 0
    terminal.show(comparison)
    return REGRESSION if comparison.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    check = commands.add_parser("check", help="can a run be compared with BASE?")
    check.add_argument("base", type=Path)
    check.add_argument("--size", choices=["full", "smoke"], required=True)
    check.set_defaults(do=_check)
    write = commands.add_parser("write", help="make report.json and report.html of report.jsonl")
    write.add_argument("--lines", type=Path, default=REPORT)
    write.add_argument(
        "--out", type=Path, default=REPORT, help="where to; .json and .html are put in place of its suffix"
    )
    write.add_argument("--compare", type=Path, metavar="BASE")
    write.add_argument("--selection", nargs=argparse.REMAINDER, help="what pytest was given; stands last")
    write.set_defaults(do=_write)
    compare = commands.add_parser("compare", help="compare two reports")
    compare.add_argument("base", type=Path)
    compare.add_argument("new", type=Path)
    compare.add_argument("--html", type=Path)
    compare.set_defaults(do=_compare)
    peers = commands.add_parser("peers", help="print all of ours against all peers as a Markdown table")
    peers.add_argument("report", type=Path, nargs="?", default=REPORT.with_suffix(".json"))
    peers.set_defaults(do=_peers)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
