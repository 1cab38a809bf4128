"""report.html: one file that needs nothing else, from report.html.j2 and report.css beside this module."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from perfreport import figures, peers, plots, terminal
from perfreport.gate import Comparison, State
from perfreport.model import Result, Run
from perfreport.tables import Behind, Table, tables

HERE = Path(__file__).parent
FAMILIES = {
    "verdict": "The program alone: ns per packet over an empty program",
    "path": "Packets through a host: the fence against no filter and other filters",
    "dns": "DNS: answers per second, and how long one takes",
    "attach": "Attaching a workload",
    "bulk": "Many rules at once",
    "match": "Matching domain names",
    "restart": "Restarting the daemon",
    "memory": "Memory",
    "xdp": "The XDP hook against TC",
    "control": "A control plane driving one daemon",
    "fleet": "A control plane driving a fleet",
}
"""Sections in their order; a family that is not here comes last, under its own name."""


@dataclass(frozen=True)
class Section:
    """A family: its tables and its plots, each with what it says in words."""

    family: str
    title: str
    tables: list[Table]
    drawings: list[tuple[str, Markup]]


def page(run: Run, comparison: Comparison | None = None) -> str:
    """Return the whole report as HTML."""
    matches = peers.matches(run)
    behind: Behind = defaultdict(list)
    for match in matches:
        if match.standing is peers.Standing.BEHIND:
            behind[id(match.result), match.ours].append(match.other)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"figure": figures.figure, "sizes": figures.sizes, "percent": figures.percent}
    environment.globals |= {"middle_half": figures.middle_half}
    template = environment.from_string((HERE / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        run=run,
        css=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        sections=_sections(run, behind),
        matches=matches,
        peers_summary=peers.summary(matches),
        Standing=peers.Standing,
        State=State,
        comparison=comparison,
        summary=terminal.summary(comparison) if comparison else "",
    )


def _sections(run: Run, behind: Behind) -> list[Section]:
    by_family: dict[str, list[Result]] = defaultdict(list)
    for result in run.results:
        by_family[result.family].append(result)
    order = [*FAMILIES, *sorted(set(by_family) - set(FAMILIES))]
    numbers = count(1)
    return [
        Section(
            family,
            FAMILIES.get(family, family),
            tables(by_family[family], behind),
            [(plot.title, Markup(plots.svg(plot, next(numbers)))) for plot in plots.plots(by_family[family])],
        )
        for family in order
        if family in by_family
    ]
