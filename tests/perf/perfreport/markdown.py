"""The comparison with peers as a Markdown table, for notes and issues; no script reads it back."""

from __future__ import annotations

from perfreport import peers
from perfreport.figures import figure, middle_half, sizes, with_unit
from perfreport.model import Run
from perfreport.peers import Match, Standing

HEAD = ("benchmark", "ours", "other", "ours measured", "other measured", "ratio", "")
MARKED = {Standing.BEHIND: "**behind**"}


def peers_table(run: Run) -> str:
    """Return all of ours against all others, where we are behind first: medians, the middle half in brackets."""
    matches = peers.matches(run)
    rows = [HEAD, ("---",) * len(HEAD), *map(_row, matches)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    where = f"Commit {run.commit}, {run.size} sizes, {run.cpu}, kernel {run.kernel}, {run.made}."
    how = "Ratio: ours divided by the other's, round by round; cost: behind one that does nothing."
    return f"{peers.summary(matches)} {where} {how}\n\n{table}\n"


def _row(match: Match) -> tuple[str, ...]:
    ours, other = (match.result.series[who] for who in (match.ours, match.other))
    told = sizes(match.result.sizes)
    return (
        f"`{match.result.name}`" + (f" {told}" if told else ""),
        match.ours,
        match.other,
        f"{with_unit(ours)} ({middle_half(ours)})",
        f"{with_unit(other)} ({middle_half(other)})",
        f"{figure(match.ratio.median)} ({middle_half(match.ratio)})",
        MARKED.get(match.standing, match.standing.value),
    )
