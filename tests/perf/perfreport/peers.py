"""Our contestants against the others of the same run: what the fence costs, and where a peer is better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from measure import Series, differs, ratio
from perfreport.model import LIMITS, Result, Run, higher_is_better, is_ours


class Standing(StrEnum):
    """How we stand against another contestant."""

    BEHIND = "behind"
    COST = "cost"  # behind one that does nothing: what the fence costs
    AHEAD = "ahead"
    SAME = "not significant"


@dataclass(frozen=True)
class Match:
    """One of ours against one of the others, round by round."""

    result: Result
    ours: str
    other: str
    ratio: Series
    standing: Standing


def matches(run: Run) -> list[Match]:
    """Return all pairs of ours and others that ran in the same rounds, where we are behind first."""
    order = list(Standing)
    return sorted((match for result in run.results for match in _of(result)), key=lambda one: order.index(one.standing))


def summary(found: Sequence[Match]) -> str:
    """Return the sentence that sums up how we stand against peers, those that do nothing left out."""
    against = [match for match in found if match.other not in LIMITS]
    counts = {standing: sum(match.standing is standing for match in against) for standing in Standing}
    return (
        f"Behind a peer in {counts[Standing.BEHIND]} of {len(against)} comparisons, "
        f"ahead in {counts[Standing.AHEAD]}, no significant difference in {counts[Standing.SAME]}."
    )


def _of(result: Result) -> Iterator[Match]:
    others = [who for who in result.series if not is_ours(who)]
    for ours in filter(is_ours, result.series):
        for other in others:
            one, two = result.series[ours], result.series[other]
            if other in LIMITS and result.base != other:
                continue  # the values are already what lies over it
            if one.unit != two.unit or len(one.values) != len(two.values) or not all(two.values):
                continue
            to_other = ratio(one, two)
            yield Match(result, ours, other, to_other, _standing(to_other, one.unit, other))


def _standing(to_other: Series, unit: str, other: str) -> Standing:
    if not differs(to_other):
        return Standing.SAME
    if (to_other.median > 1) == higher_is_better(unit):
        return Standing.AHEAD
    return Standing.COST if other in LIMITS else Standing.BEHIND
