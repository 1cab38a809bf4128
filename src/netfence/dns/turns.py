"""The event loop shared among the DNS servers, so that nobody's greed keeps the others waiting (semantics.md 26).

A `Reader` answers what comes at once, as long as a slice lasts. Who has more waiting than that queues up in `Turns`,
which gives one slice to one of them in each turn of the loop, in order: however many workloads ask more than we can
answer, what comes for all others meanwhile is met between two slices. And while others ask too, those in the queue get
no more than a share of the loop's time, whatever their queries cost later on: of what comes at any moment, more finds
the loop idle than not.

What has to be done for a query later (`Turns.run`) may take long by itself: an answer with hundreds of addresses takes
milliseconds. Whose work did that while others ask does its next work in the lane, one piece at a time, when its share
of the loop has paid for the last one. Knows nothing of what is read or done.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import structlog

from netfence.log import LogLimit

SLICE_S: Final = 0.00002
"""How long one socket is read before others have their turn: some ready-made replies, or the begin of one long way. An
answer from the cache takes the client as long, wake-ups included."""

LONG_SLICE_S: Final = 0.0005
"""The same while nobody else asks: several long ways, so that a turn of the loop costs little beside them. Who begins
to ask meanwhile waits as long, once, for the begin of its answer."""

LONG_EVERY_S: Final = 0.005
"""Between two long slices outside the queue: a workload with many connections that become readable at once would have
one after the other, all of them in one turn of the loop."""

SHARE: Final = 0.3
"""Of the loop's time, beyond which nothing of the queue is taken while others ask: two of three find the loop idle."""

BURST_S: Final = 0.0005
"""Time of the loop that may be saved up: what a rest brings."""

DEBT_S: Final = 0.005
"""Time of the loop that is not made up for: it was spent on what nobody in the queue can help."""

REST_S: Final = 0.001
"""How long the queue rests when its share is used up; the loop's timers are no finer."""

STARVED_S: Final = 0.005
"""How long the queue rests at most, however busy the loop is with others."""

ASKING_S: Final = 0.25
"""How long who has asked counts as asking: beyond it the queue may have all of the loop."""

NORM_S: Final = 0.0003
"""Time of the loop's thread that one piece of work may take and cost nothing: twice that of a usual answer, on the
machine where `PACE_S` was measured; elsewhere as much longer as `pace` says."""

PACE_S: Final = 0.00006
"""What the loop of `pace` takes there."""

LANE_SHARE: Final = 0.2
"""Of the loop's time, what all those together have in the lane whose pieces take longer than `NORM_S`."""

MOST_DEBT_S: Final = 1.0
"""How long anybody waits for its next piece of work, whatever the last one took."""

MAX_IN_LANE: Final = 64
"""Pieces of work of one owner that wait in the lane, with up to 64 kB each."""

PAUSE_S: Final = 0.1
"""How long a socket for which the kernel has nothing but errors (no descriptor left) is left alone."""

log = structlog.get_logger(__name__)

Work = Callable[[], bool]
"""One slice of what waits; tells whether there is more."""


@functools.cache
def pace() -> float:
    """Return how many times as long Python takes on this machine as where `PACE_S` was measured, 1 at least."""
    octets, taken = bytes(512), []
    for _ in range(10):
        began = time.thread_time()
        for at in range(300):
            int.from_bytes(octets[at : at + 2])
        taken.append(time.thread_time() - began)
    return max(min(taken) / PACE_S, 1.0)


class Turns:
    """Who waits for a slice. One for all servers of an event loop; use it only there.

    `clock` and `busy` are the time and the time that the loop's thread has worked, in seconds.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, busy: Callable[[], float] = time.thread_time
    ) -> None:
        self.clock = clock
        self._busy_clock = busy
        self._norm_s = NORM_S * pace()
        self._waiting: deque[tuple[object, Work]] = deque()
        self._last: object = None  # who asked last without having to wait, and when
        self._last_at = self._other_at = float("-inf")  # and when somebody else did
        self._credit = self._at = self._busy = self._served = 0.0
        self._worked_at = float("-inf")
        self._long_from = float("-inf")  # when the next slice may be a long one
        self._debts: dict[object, float] = {}  # until when whose work has to go by the lane
        self._within = 0.0  # time of pieces of work that were done within the one under way
        self._lane: dict[object, deque[Callable[[], None]]] = {}  # who is first had its last turn longest ago
        self._lane_timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def until(self, owner: object, now: float) -> float:
        """Return the end of a slice for `owner` that begins now, and note it where it is a long one."""
        if now < self._long_from or self._others_ask(owner, now):
            return now + SLICE_S
        self._long_from = now + LONG_EVERY_S
        return now + LONG_SLICE_S

    def note(self, owner: object, began: float) -> None:
        """Note that `owner` asked something without having to wait, and was served since `began`."""
        if owner is not self._last:
            self._last, self._other_at = owner, self._last_at
        self._last_at = self.clock()
        self._served += self._last_at - began

    def run(self, owner: object, work: Callable[[], None]) -> bool:
        """Do a piece of work for an owner, now or in its turn in the lane; False if too much of its waits there.

        `work` must not raise. It may do pieces of work of others within it, which are theirs.
        """
        now = self.clock()
        if self._in_debt(owner, now) or owner in self._lane:
            waiting = self._lane.setdefault(owner, deque())
            if len(waiting) >= MAX_IN_LANE:
                return False
            waiting.append(work)
            if len(waiting) == 1:
                self._await_lane(now)
            return True
        self._do(owner, work, now)
        return True

    def forget(self, owner: object) -> None:
        """Forget what an owner owes; what it has in the lane is done all the same."""
        self._debts.pop(owner, None)

    def _do(self, owner: object, work: Callable[[], None], began: float) -> None:
        if not self._others_ask(owner, began):  # the thread's clock is a system call
            work()
            return
        outer, self._within = self._within, 0.0
        busy = self._busy_clock()
        try:
            work()
        finally:
            took = self._busy_clock() - busy
            over = took - self._within - self._norm_s
            self._within = outer + took
            if over > 0:
                now = self.clock()
                self._debts = {one: until for one, until in self._debts.items() if until > now}
                until = max(self._debts.get(owner, now), now) + over * (len(self._debts) + 1) / LANE_SHARE
                self._debts[owner] = min(until, now + MOST_DEBT_S)

    def _in_debt(self, owner: object, now: float) -> bool:
        until = self._debts.get(owner)
        return until is not None and until > now and self._others_ask(owner, now)

    def _await_lane(self, now: float) -> None:
        """Have the lane go on when the first of those who wait in it may."""
        if self._lane_timer is not None:
            self._lane_timer.cancel()
            self._lane_timer = None
        if self._lane:
            until = min(self._debts.get(owner, now) for owner in self._lane)
            # The loop's timers are no finer; and between two pieces of work it is everybody else's turn.
            self._lane_timer = asyncio.get_running_loop().call_later(max(until - now, REST_S), self._lane_turn)

    def _lane_turn(self) -> None:
        now = self.clock()
        for owner, waiting in self._lane.items():
            if not self._in_debt(owner, now):
                del self._lane[owner]
                work = waiting.popleft()
                if waiting:
                    self._lane[owner] = waiting
                try:
                    self._do(owner, work, now)
                finally:
                    later = self.clock()
                    self._served += later - now  # no part of what the queue owes
                    self._await_lane(later)
                return
        self._await_lane(now)

    def join(self, owner: object, work: Work) -> None:
        """Give `work` its slices, from the next turn of the loop on, until it says that nothing is left."""
        self._waiting.append((owner, work))
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        loop = asyncio.get_running_loop()
        owner, work = self._waiting[0]
        if self._has_to_rest(owner):
            loop.call_later(REST_S, self._turn)
            return
        more = False
        self._long_from = float("-inf")  # the queue has one in a turn
        try:
            more = work()
        finally:
            if more:
                self._waiting.rotate(-1)
            else:
                self._waiting.popleft()
            if self._waiting:
                loop.call_soon(self._turn)

    def _others_ask(self, owner: object, now: float) -> bool:
        """Tell whether anybody else asks, other than from the queue."""
        return now - (self._other_at if owner is self._last else self._last_at) < ASKING_S

    def _has_to_rest(self, owner: object) -> bool:
        now = self.clock()
        if not self._others_ask(owner, now):  # the thread's clock is a system call, and nobody's share is at stake
            self._worked_at = now
            return False
        busy = self._busy_clock()
        earned = SHARE * (now - self._at) - (busy - self._busy) + self._served
        self._credit = max(min(self._credit + earned, BURST_S), -DEBT_S)
        self._at, self._busy, self._served = now, busy, 0.0
        if self._credit <= 0 and now - self._worked_at < STARVED_S:
            return True
        self._worked_at = now
        return False


class Reader:
    """Reads a socket by `take`: it works until the time given (`Turns.clock`) and tells whether more is waiting.

    Where `take` raises OSError, the socket is left alone for `PAUSE_S`.
    """

    def __init__(self, owner: object, sock: socket.socket, take: Callable[[float], bool], turns: Turns) -> None:
        self._owner, self._sock, self._take, self._turns = owner, sock, take, turns
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._failures = LogLimit()
        self._closed = False
        self._watch()

    def close(self) -> None:
        """Read no more, and close the socket. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock)
        if self._timer is not None:
            self._timer.cancel()
        self._sock.close()

    def _watch(self) -> None:
        self._timer = None
        self._loop.add_reader(self._sock, self._readable)

    def _readable(self) -> None:
        began = self._turns.clock()
        more = self._slice(began)
        self._turns.note(self._owner, began)
        if more and not self._closed:
            self._loop.remove_reader(self._sock)
            self._turns.join(self._owner, self._go_on)

    def _go_on(self) -> bool:
        """Have one slice of the backlog."""
        if self._closed:
            return False
        more = self._slice(self._turns.clock())
        if not more and self._timer is None and not self._closed:
            self._watch()
        return more

    def _slice(self, now: float) -> bool:
        try:
            return self._take(self._turns.until(self._owner, now))
        except OSError:
            self._loop.remove_reader(self._sock)
            self._timer = self._loop.call_later(PAUSE_S, self._watch)
        except Exception as error:
            if self._failures.due(now):
                log.exception("dns_socket_failed", error=repr(error), since_start=self._failures.count)
        return False
