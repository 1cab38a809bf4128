"""The regression gate: two runs, and for each benchmark and contestant what became of it.

README.md tells the rule for readers; the numbers of the rule are here. Nothing here knows how a report looks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase

from scipy.stats import false_discovery_control, mannwhitneyu

from measure import Series, ratio
from perfreport.figures import figure, with_unit
from perfreport.model import BadReportError, Result, Run, higher_is_better, is_ours

ALPHA = 0.05
"""The chance of any false alarm when nothing changed: Benjamini–Hochberg holds it over all tests together."""
LEAST_ROUNDS = 5
"""With fewer, not even values that lie all apart are significant beside a hundred others: 4 against 4 is 1 in 70."""


@dataclass(frozen=True)
class Allowed:
    """A change that is none: a share of the base, and what the clock and the machine's jitter add."""

    share: float
    floor: float = 0.0
    unit: str = ""


ALLOWED = {
    # What misses the near caches depends on who else uses the far one: the same code was seen at 133 and at 247 ns.
    "verdict-*-random": Allowed(1.0, 20, "ns"),
    "verdict-*": Allowed(0.20, 10, "ns"),
    "path-*": Allowed(0.05),
    "dns-*-p99": Allowed(1.0),
    "dns-*": Allowed(0.15),
    "memory-*": Allowed(0.10),
}
"""By the benchmark's name, the first that fits, from runs of unchanged code against itself (README.md)."""
OTHERWISE = Allowed(0.50)


def allowed_for(name: str) -> Allowed:
    """Return how much a benchmark may differ between two runs of the same code."""
    return next((allowed for pattern, allowed in ALLOWED.items() if fnmatchcase(name, pattern)), OTHERWISE)


class State(StrEnum):
    """What became of a benchmark's contestant, in the order in which a reader wants to know."""

    REGRESSION = "regression"
    IMPROVEMENT = "improvement"
    NEW = "new"
    GONE = "gone"
    UNTESTED = "not tested"
    SAME = "not significant"


@dataclass(frozen=True)
class Change:
    """One contestant of one benchmark in both runs.

    `before` and `after` are medians on the basis told; `measured` are those with a unit, for readers.
    """

    result: Result
    who: str
    state: State
    basis: str = ""
    before: float | None = None
    after: float | None = None
    p_value: float | None = None
    allowed: str = ""
    measured: str = ""
    why: str = ""

    @property
    def ours(self) -> bool:
        """Whether this is ours: what a peer or a limit does never fails the gate."""
        return is_ours(self.who)

    @property
    def percent(self) -> float | None:
        """How much `after` is above `before`."""
        if self.before is None or self.after is None or not self.before:
            return None
        return (self.after / self.before - 1) * 100

    @property
    def fails(self) -> bool:
        """Whether this alone makes the gate say no."""
        return self.ours and self.state is State.REGRESSION


@dataclass(frozen=True)
class Comparison:
    """All changes, worst first."""

    base: Run
    changes: list[Change]
    same_machine: bool
    partial: bool

    @property
    def failed(self) -> bool:
        """Whether anything of ours got worse."""
        return any(change.fails for change in self.changes)

    def count(self, state: State) -> int:
        """Count our contestants of a state."""
        return sum(change.state is state and change.ours for change in self.changes)


@dataclass(frozen=True)
class _Test:
    """A change still without a state, with the p-values of both directions."""

    change: Change
    worse: float
    better: float


def compare_runs(base: Run, new: Run) -> Comparison:
    """Compare `new` with `base`, an older run. Raises BadReportError where that means nothing."""
    if base.size != new.size:
        raise BadReportError(f"the base was measured with {base.size} sizes, this run with {new.size}: run both alike")
    before = {one.key: one for one in base.results}
    after = {one.key: one for one in new.results}
    partial = bool(base.selection or new.selection)
    same_machine = base.machine() == new.machine()
    untold: list[Change] = []
    tests: list[_Test] = []
    for key, result in after.items():
        old = before.get(key)
        for who in result.series:
            if old is None or who not in old.series:
                untold.append(Change(result, who, State.NEW))
                continue
            outcome = _test(old, result, who, same_machine)
            if isinstance(outcome, _Test):
                tests.append(outcome)
            else:
                untold.append(outcome)
    untold += [
        Change(result, who, State.GONE)
        for key, result in before.items()
        for who in result.series
        if key not in after or who not in after[key].series
    ]
    if partial:  # what was not asked for is neither new nor gone
        untold = [change for change in untold if change.state is State.UNTESTED]
    changes = [*untold, *_decide(tests)]
    order = list(State)
    changes.sort(key=lambda change: (not change.ours, order.index(change.state)))
    return Comparison(base, changes, same_machine, partial)


def _test(old: Result, new: Result, who: str, same_machine: bool) -> _Test | Change:
    unit = new.series[who].unit
    measured = f"{figure(old.series[who].median)} → {with_unit(new.series[who])}"
    none = Change(new, who, State.UNTESTED, measured=measured)
    if old.series[who].unit != unit:
        return replace(none, why=f"the unit was {old.series[who].unit}")
    control = new.control(who)
    allowed = allowed_for(new.name)
    floor = allowed.floor if allowed.unit == unit else 0.0
    if control is not None and control == old.control(who):
        one, two = (_ratio(result, who, control) for result in (old, new))
        basis = f"ratio to {control}"
        floor /= old.series[control].median
    elif same_machine:
        one, two, basis = old.series[who], new.series[who], unit
    else:
        return replace(none, why="absolute values of different machines")
    known = replace(none, basis=basis, before=one.median, after=two.median, allowed=_words(allowed, unit))
    if min(len(one.values), len(two.values)) < LEAST_ROUNDS:
        return replace(known, why=f"fewer than {LEAST_ROUNDS} rounds")
    up, down = _beyond(one, two, allowed.share, floor), _beyond(two, one, allowed.share, floor)
    return _Test(known, *((down, up) if higher_is_better(unit) else (up, down)))


def _ratio(result: Result, who: str, control: str) -> Series:
    """Divide round by round, or by the control's median where the rounds do not pair."""
    one, other = result.series[who], result.series[control]
    if len(one.values) != len(other.values):
        other = Series(other.unit, [other.median] * len(one.values))
    return ratio(one, other)


def _beyond(low: Series, high: Series, share: float, floor: float) -> float:
    """Return p of `high` being no more than the allowed change above `low`.

    A test against the allowed change, not against none: whatever is significant is also large. Ties make the exact
    distribution too wide, which errs on the side of "not significant".
    """
    limit = [value + abs(value) * share + floor for value in low.values]
    return float(mannwhitneyu(high.values, limit, alternative="greater", method="exact").pvalue)


def _decide(tests: list[_Test]) -> Iterator[Change]:
    """Correct for the number of tests, each direction by itself, ours and others' by themselves."""
    for group in ([one for one in tests if one.change.ours], [one for one in tests if not one.change.ours]):
        if not group:
            continue
        worse = false_discovery_control([one.worse for one in group])
        better = false_discovery_control([one.better for one in group])
        for one, p_worse, p_better in zip(group, worse, better, strict=True):
            state = State.SAME
            if min(p_worse, p_better) <= ALPHA:
                state = State.REGRESSION if p_worse < p_better else State.IMPROVEMENT
            yield replace(one.change, state=state, p_value=float(min(p_worse, p_better)))


def _words(allowed: Allowed, unit: str) -> str:
    floor = f" + {allowed.floor:g} {allowed.unit}" if allowed.unit == unit and allowed.floor else ""
    return f"{allowed.share:.0%}{floor}"
