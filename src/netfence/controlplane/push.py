"""One `update` on its way: who has not answered yet, and the results so far."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol

from netfence.controlplane.views import Outcome, Result, Results


class Waiting(Protocol):
    """What a push needs of an attachment."""

    def result(self, outcome: Outcome) -> Result:
        """Return a result about it."""
        ...

    def leave_push(self, push: Push) -> None:
        """Tell `push` nothing more."""
        ...


class Push:
    """Collects a result for each of `entries`; a single waiter, however many they are."""

    def __init__(self, entries: Iterable[Waiting]) -> None:
        self._results: dict[Waiting, Result | None] = dict.fromkeys(entries)
        self._open = len(self._results)
        self._done = asyncio.Event()

    def settle(self, entry: Waiting, result: Result) -> None:
        """Take a result, of which each entry gives one."""
        self._results[entry] = result
        self._open -= 1
        if not self._open:
            self._done.set()

    async def wait(self, timeout_s: float) -> Results:
        """Return the results when all are there, or when the time is over: PENDING for those who did not answer."""
        try:
            if self._open:
                async with asyncio.timeout(timeout_s):
                    await self._done.wait()
        except TimeoutError:
            pass
        finally:  # also when whoever waits is cancelled: an entry must not keep what nobody reads
            if self._open:
                for entry, result in self._results.items():
                    if result is None:
                        entry.leave_push(self)
        return Results(
            tuple(
                entry.result(Outcome.PENDING) if result is None else result for entry, result in self._results.items()
            )
        )
