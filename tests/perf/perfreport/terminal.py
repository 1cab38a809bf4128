"""The comparison with a baseline on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from perfreport.figures import figure, percent, sizes
from perfreport.gate import Change, Comparison, State

STYLES = {State.REGRESSION: "bold red", State.IMPROVEMENT: "green", State.SAME: "dim"}
UNCUT = 200
"""Columns to use where the output is no terminal: nothing is cut there."""


def show(comparison: Comparison) -> None:
    """Print every change, the worst last, where the eye is when the run ends, and the sentence that sums up."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=UNCUT)
    table = Table("state", "benchmark", "contestant", "measured", "change", "basis", "before", "after", "allowed", "p")
    for change in reversed(comparison.changes):
        table.add_row(*map(Text, _row(change)), style=STYLES.get(change.state) if change.ours else "dim")
    console.print(table)
    console.print(summary(comparison), style="bold red" if comparison.failed else "bold", markup=False)


def _row(change: Change) -> tuple[str, ...]:
    state = change.state.value if change.ours else f"{change.state.value} (not ours)"
    before, after = ("" if value is None else figure(value) for value in (change.before, change.after))
    p_value = "" if change.p_value is None else f"{change.p_value:.2g}"
    name = f"{change.result.name} {sizes(change.result.sizes)}"
    basis = "; ".join(filter(None, (change.basis, change.why)))
    return (
        state,
        name,
        change.who,
        change.measured,
        percent(change.percent),
        basis,
        before,
        after,
        change.allowed,
        p_value,
    )


def summary(comparison: Comparison) -> str:
    """Return one paragraph: what was compared with what, how, and how it ended."""
    base = comparison.base
    counts = ", ".join(f"{state.value}: {comparison.count(state)}" for state in State)
    how = (
        "Same CPU model and kernel: absolute values are compared where a benchmark has no base."
        if comparison.same_machine
        else f"Another machine (base: {base.cpu}, {base.kernel}): only ratios taken within each run are compared."
    )
    part = " Not every benchmark ran in both: only what both have is compared." if comparison.partial else ""
    return f"Against {base.commit} of {base.made} – {counts}. {how}{part}"
