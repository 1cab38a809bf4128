"""Plain numbers: histograms that are cumulative as Prometheus wants them, and words for outcomes."""

from __future__ import annotations

from netfence.errors import ExhaustedError, NetfenceError
from netfence.tally import OK, OUTCOMES, Durations, Tally, outcome


def test_a_duration_counts_in_every_bucket_that_holds_it() -> None:
    durations = Durations((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 7.0):
        durations.note(seconds)
    assert list(durations.cumulative()) == [("0.1", 2), ("1.0", 3), ("+Inf", 4)]
    assert durations.sum_s == 7.65
    assert list(durations.cumulative(at_once=10)) == [("0.1", 12), ("1.0", 13), ("+Inf", 14)]


def test_every_outcome_is_there_from_the_start() -> None:
    tally = Tally()
    assert tuple(tally.attaches) == tuple(tally.commands) == OUTCOMES
    assert set(tally.commands.values()) == {0}
    tally.note_commands([None, ExhaustedError("full"), None])
    assert (tally.commands[OK], tally.commands["resource_exhausted"]) == (2, 1)
    assert sum(tally.commands.values()) == 3


def test_a_defect_is_an_internal_error() -> None:
    assert outcome(KeyError("a defect")) == outcome(NetfenceError("ours")) == "internal"
    assert {outcome(kind("x")) for kind in NetfenceError.__subclasses__()} < set(OUTCOMES)
