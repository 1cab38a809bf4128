"""Counts of what happened since the daemon's start, for its metrics: plain numbers, incremented where it happens.

Knows nothing of Prometheus (`metrics` reads and names them) and takes no lock: everything counts on the event loop.
What the kernel counts is not here, nor what is counted per attachment.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from netfence.errors import NetfenceError

OK: Final = "ok"
_KINDS: Final[Sequence[type[NetfenceError]]] = (NetfenceError, *NetfenceError.__subclasses__())

OUTCOMES: Final = (OK, *sorted({kind.code.lower() for kind in _KINDS}))
"""Every word for how something ended."""


class Durations:
    """A histogram of seconds with fixed upper bounds; noting one costs half a microsecond."""

    __slots__ = ("_counts", "bounds", "sum_s")

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self.sum_s = 0.0

    def note(self, seconds: float) -> None:
        """Count one; what is longer than the last bound counts too."""
        self._counts[bisect_left(self.bounds, seconds)] += 1
        self.sum_s += seconds

    def cumulative(self, at_once: int = 0) -> Iterator[tuple[str, int]]:
        """Yield (upper bound, how many were no longer), the last bound is +Inf; `at_once` more took next to nothing."""
        total = at_once
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield bound, total


class Tally:
    """What the composition counts; outcomes are `OK` or the error's kind (`errors`, in lower case)."""

    def __init__(self) -> None:
        self.attaches = Counter(dict.fromkeys(OUTCOMES, 0))
        self.commands = Counter(dict.fromkeys(OUTCOMES, 0))  # of policies, whoever sent them
        self.hooks_put_back = 0
        self.switches = Durations((0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0))

    def note_commands(self, refusals: Iterable[NetfenceError | None]) -> None:
        """Count what came of commands."""
        self.commands.update(map(outcome, refusals))


def outcome(failure: BaseException | None) -> str:
    """Return the word for how something ended."""
    if failure is None:
        return OK
    return failure.code.lower() if isinstance(failure, NetfenceError) else NetfenceError.code.lower()
