"""What waits to be told to the control plane: state events, never dropped, and the newest heartbeat.

Owns the order and what a lost stream means for each kind; it knows no gRPC. Bounded: an attachment has at most one
`Subscribed`, one `Unsubscribed` and, without a stream, one `Result` here; with one, `room` holds up the work that makes
results while the peer does not read them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from netfence.control.port import AttachmentView, StatsView, UnsubscribeReason

MAX_RESULTS: Final = 4096
"""Results that wait for a peer to read them before its commands are left unread: twice the attachments there can be."""

MAX_RESULT_BYTES: Final = 16 << 20
"""Bytes of results that wait, for the same: a result may have a mebibyte of faults."""

MAX_LATE_ERRORS: Final = 20
"""Faults of a result that waits for another stream: there may be one for every attachment."""

UNSURE_S: Final = 60.0
"""How long after it was written an `Unsubscribed` may still be lost with its stream: unacknowledged data ends a TCP
connection within keepalive's time-out (20 s), and heartbeats see to it that there is some. Told twice does no harm."""


@dataclass(frozen=True, slots=True)
class Subscribed:
    """An attachment waits for its policy."""

    view: AttachmentView


@dataclass(frozen=True, slots=True)
class Unsubscribed:
    """An attachment is gone."""

    id: str
    reason: UnsubscribeReason
    error: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a command; `nonce` "" once its stream is lost."""

    nonce: str
    id: str
    version: str
    ok: bool
    errors: tuple[str, ...] = ()
    policy_hash: str = ""

    @property
    def size(self) -> int:
        """Return about how many bytes it takes."""
        texts = (self.nonce, self.id, self.version, *self.errors)
        return 200 + sum(len(text.encode()) + 60 for text in texts)

    def late(self) -> Result:
        """Return what is told of it on another stream than its command's: without the nonce, and not every fault."""
        more = len(self.errors) - MAX_LATE_ERRORS
        if more <= 0:
            return replace(self, nonce="")
        return replace(self, nonce="", errors=(*self.errors[:MAX_LATE_ERRORS], f"and {more} more faults"))


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The counters of all attachments."""

    stats: tuple[StatsView, ...]


Event = Subscribed | Unsubscribed | Result | Heartbeat
Key = tuple[str, str | int]  # kind, and the attachment's id or a number of ours


class Outbox:
    """The events that wait, in order. Use it on one event loop; one reader at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[Key, Event] = {}
        self._heartbeat: Heartbeat | None = None
        self._writing: Event | None = None
        self._unsure: deque[tuple[float, Unsubscribed]] = deque()
        self._open = False  # a stream stands
        self._held = False
        self._results = self._result_bytes = 0
        self._number = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._waiting) + (self._heartbeat is not None)

    def subscribed(self, view: AttachmentView) -> None:
        """Tell that an attachment waits for its policy."""
        self._put(("subscribed", view.id), Subscribed(view))

    def unsubscribed(self, attachment_id: str, reason: UnsubscribeReason, error: str) -> None:
        """Tell that an attachment is gone; nothing, if nobody has been told of it yet."""
        self._waiting.pop(("result", attachment_id), None)  # one that waits without a stream
        if self._waiting.pop(("subscribed", attachment_id), None) is None:
            self._put(("unsubscribed", attachment_id), Unsubscribed(attachment_id, reason, error))
        self._note()

    def result(self, result: Result) -> None:
        """Tell what became of a command."""
        if not self._open:
            self._waiting.pop(("result", result.id), None)
            if result.policy_hash:  # else there is no such attachment
                self._put(("result", result.id), result.late())
            return
        self._number += 1
        self._count_result(1, result.size)
        self._put(("result", self._number), result)

    def heartbeat(self, heartbeat: Heartbeat) -> None:
        """Tell the counters; an older heartbeat that waits still is replaced."""
        self._heartbeat = heartbeat
        self._note()

    def waits(self, attachment_id: str) -> bool:
        """Tell whether the `Subscribed` of this attachment has not been taken yet."""
        return ("subscribed", attachment_id) in self._waiting

    async def room(self) -> None:
        """Wait until fewer than `MAX_RESULTS` results and `MAX_RESULT_BYTES` wait."""
        await self._room.wait()

    async def take(self) -> Event:
        """Wait for the next event and take it, to be written; `written` follows, or `lost`."""
        while (key := self._first()) is None and self._heartbeat is None:
            self._news.clear()
            await self._news.wait()
        if key is not None:
            event = self._waiting.pop(key)
            if isinstance(event, Result) and isinstance(key[1], int):
                self._count_result(-1, -event.size)
        else:
            assert self._heartbeat is not None  # noqa: S101 - for mypy: the loop above
            event, self._heartbeat = self._heartbeat, None
        self._writing = event
        return event

    def _first(self) -> Key | None:
        return next((key for key in self._waiting if not (self._held and key[0] == "subscribed")), None)

    def hold(self) -> None:
        """Keep attachments that are not announced yet for the next stream: this one is about to be ended."""
        self._held = True

    def written(self) -> None:
        """Note that what was taken has been written."""
        event, self._writing = self._writing, None
        now = self._clock()
        while self._unsure and self._unsure[0][0] + UNSURE_S < now:
            self._unsure.popleft()
        if isinstance(event, Unsubscribed):
            self._unsure.append((now, event))
        self._note()

    @property
    def empty(self) -> bool:
        """Tell whether all that waited has been written."""
        return self._empty.is_set()

    async def emptied(self) -> None:
        """Wait until all that waited has been written."""
        await self._empty.wait()

    def begin(self, unacked: Iterable[AttachmentView]) -> None:
        """Note that a stream begins: attachments that nobody gave a policy yet are announced on each.

        Only those whose attach did not wait are meant: where it waited, it fails with its stream.
        """
        self._open, self._held = True, False
        for view in unacked:
            self.subscribed(view)

    def lost(self) -> None:
        """Put in order what waits for the next stream, the last one being lost.

        What may have been lost with it is told again, a `Subscribed` apart: see `begin`. Results keep their newest per
        attachment, without the nonce, which means nothing on another stream.
        """
        writing, self._writing = self._writing, None
        since = self._clock() - UNSURE_S
        unsure = [event for written, event in self._unsure if written >= since]
        self._unsure.clear()
        if isinstance(writing, Unsubscribed):
            unsure.append(writing)
        results: dict[Key, Event] = {}
        for event in (writing, *self._waiting.values()):
            if isinstance(event, Result) and event.policy_hash:
                results.pop(("result", event.id), None)
                results["result", event.id] = event.late()
        rest = {key: event for key, event in self._waiting.items() if key[0] != "result"}
        told_again: dict[Key, Event] = {("unsubscribed", event.id): event for event in unsure}
        for one in (*told_again, *rest):
            if one[0] == "unsubscribed":
                results.pop(("result", one[1]), None)
        self._waiting = {**told_again, **rest, **results}
        self._open = False
        self._results = self._result_bytes = 0
        self._room.set()
        self._note()

    def _put(self, key: Key, event: Event) -> None:
        self._waiting[key] = event
        self._note()

    def _note(self) -> None:
        """Tell those who wait whether there is anything."""
        if len(self):
            self._news.set()
        if len(self) or self._writing is not None:
            self._empty.clear()
        else:
            self._empty.set()

    def _count_result(self, more: int, size: int) -> None:
        self._results += more
        self._result_bytes += size
        if self._results < MAX_RESULTS and self._result_bytes < MAX_RESULT_BYTES:
            self._room.set()
        else:
            self._room.clear()
