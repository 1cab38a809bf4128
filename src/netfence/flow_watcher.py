"""One stream of decisions: what it wants to see, and a bounded queue between who decides and who reads.

Owns what is lost: who does not keep up, or wants more than its share, misses events, and is told how many with the next
one. Nobody ever waits for a reader.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from typing import Final

from netfence.api.views import FlowVerdict, FlowView
from netfence.errors import NetfenceError

QUEUE: Final = 1024
"""Events that wait for one reader, and that it may get in one go after a quiet second: half a megabyte."""

QUIET_S: Final = 1.0
"""How long a loss waits for an event to be told with, before it is told by itself."""

PACKETS: Final = frozenset[FlowVerdict]({"drop", "would_drop"})
"""Verdicts that packets are reported with; passed ones make no event."""


class Watcher:
    """One stream of events; iterate over it. `id` is the attachment wanted, "" for all."""

    def __init__(self, attachment_id: str, verdicts: Collection[FlowVerdict]) -> None:
        self.id = attachment_id
        self._verdicts = frozenset(verdicts)
        self._queue: deque[FlowView] = deque()
        self._news = asyncio.Event()
        self._over = False
        self._failure: NetfenceError | None = None
        self._lost = 0  # since the last event that was queued
        self._tokens, self._at = float(QUEUE), time.monotonic()
        self._put_at = self._at

    @property
    def wants_packets(self) -> bool:
        """Tell whether the kernel has to report anything for it."""
        return not self._verdicts or bool(self._verdicts & PACKETS)

    @property
    def wants_passes(self) -> bool:
        """Tell whether it is to see queries that pass."""
        return not self._verdicts or "pass" in self._verdicts

    def wants(self, attachment_id: str, verdict: FlowVerdict) -> bool:
        """Tell whether it is to get such an event."""
        return (not self.id or self.id == attachment_id) and (not self._verdicts or verdict in self._verdicts)

    def has_room(self, rate: float, now: float) -> bool:
        """Tell whether it may get an event more, and count that one; `rate` is its share, in events a second."""
        self._tokens = min(self._tokens + (now - self._at) * rate, float(QUEUE))
        self._at = now
        if self._over or self._tokens < 1.0 or len(self._queue) >= QUEUE:
            return False
        self._tokens -= 1.0
        return True

    def lose(self, count: int) -> None:
        """Note events that it does not get."""
        self._lost += count

    def put(self, view: FlowView) -> None:
        """Give it an event, with how many it lost before."""
        self._queue.append(replace(view, lost=self._lost) if self._lost else view)
        self._lost = 0
        self._put_at = self._at
        self._news.set()

    def tell_loss(self, at: float, now: float) -> None:
        """Tell of a loss that no event has come to be told with; `at` is the wall clock, `now` monotonic seconds."""
        if self._lost and not self._queue and not self._over and now - self._put_at >= QUIET_S:
            self.put(FlowView(time=at, id=self.id, kind="lost", verdict="", reason=""))
            self._put_at = now

    def end(self, failure: NetfenceError | None = None) -> None:
        """Let its iteration end behind what waits: by itself, or with an error."""
        if not self._over:
            self._over, self._failure = True, failure
            self._news.set()

    async def __aiter__(self) -> AsyncIterator[FlowView]:
        while True:
            while self._queue:
                yield self._queue.popleft()
            if self._over:
                break
            self._news.clear()
            await self._news.wait()
        if self._failure is not None:
            raise self._failure
