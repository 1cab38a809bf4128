"""Resolving a question with the upstreams of a policy: order, failover, TCP where UDP was cut, one flight for equals.

A `_Flight` is one question in the air, whoever waits for it: callbacks drive it from upstream to upstream without a
task of its own. The sockets are `exchange`'s. What the answer means for a policy is `judge`'s to say.

Order (semantics.md 19): the upstreams as listed, the next one on a time-out, a socket error, SERVFAIL, REFUSED or an
answer that cannot be read; then again, `attempts` times in all, those that did not answer at all. TCP is used when an
upstream cut its answer, or when somebody seems to guess at the UDP socket.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final

import structlog

from netfence.dns.answer import Answer, scan
from netfence.dns.cache import CacheKey
from netfence.dns.counts import Failure, UpstreamCounts
from netfence.dns.exchange import SPOOFED, TIMED_OUT, UdpExchanger, ask_tcp
from netfence.dns.limits import MAX_FLIGHTS, MAX_FREE_FLIGHTS, RESOLVE_DEADLINE_S
from netfence.dns.message import upstream_query
from netfence.dns.settings import DnsSettings, Upstream, upstreams_of
from netfence.dns.turns import Turns
from netfence.dns.wire import REFUSED, SERVFAIL, Query, WireError
from netfence.errors import ExhaustedError, NetfenceError, UnavailableError
from netfence.log import LogLimit

TOLD_AT_ONCE: Final = 4

Done = Callable[[Answer | NetfenceError], None]

log = structlog.get_logger(__name__)


class Resolver:
    """Asks upstreams; shared by all attachments of the daemon. Bound to the event loop that first uses it."""

    def __init__(self, settings: DnsSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.turns = Turns()
        self.timeout_s = settings.timeout_s
        self.attempts = settings.attempts
        self.udp = UdpExchanger(settings.timeout_s)
        self.counts = UpstreamCounts(settings.upstreams)
        self._flights: dict[CacheKey, _Flight] = {}
        self._by_owner: dict[object, int] = {}  # flights charged to each
        self._tasks: set[asyncio.Task[None]] = set()
        self._mismatches = LogLimit()
        self.failures = LogLimit()

    def __len__(self) -> int:
        return len(self._flights)

    def resolve(self, key: CacheKey, query: Query, owner: object, done: Done) -> None:
        """Ask `key.upstreams` the question of `query`; equal questions in the air share one flight.

        `done` is called once, perhaps at once: with the answer, or with UnavailableError (no upstream answered
        usefully) or ExhaustedError (too many questions in the air). `owner` is charged for a new flight.
        """
        if (flight := self._flights.get(key)) is not None:
            flight.waiters.append(done)
            return
        try:
            flight = self._prepare(key, query, owner)
        except NetfenceError as error:
            done(error)
            return
        self._flights[key] = flight
        self._by_owner[owner] = self._by_owner.get(owner, 0) + 1
        flight.waiters.append(done)
        flight.next_try()

    def _prepare(self, key: CacheKey, query: Query, owner: object) -> _Flight:
        """Make the flight of a question; raises ExhaustedError or UnavailableError."""
        total = len(self._flights)
        if total >= MAX_FLIGHTS or (total >= MAX_FREE_FLIGHTS and owner in self._by_owner):
            self.counts.refused += 1
            raise ExhaustedError(f"ask upstream: {total} questions are waiting for answers already")
        try:
            upstreams = upstreams_of(key.upstreams)
        except ValueError as error:
            raise UnavailableError(f"ask upstream: {error}") from None
        if not upstreams:
            raise UnavailableError("ask upstream: none is configured; set dns.upstreams")
        return _Flight(self, key, query, owner, upstreams)

    def land(self, flight: _Flight) -> None:
        """Take a finished flight out of the air."""
        if self._flights.pop(flight.key, None) is None:
            return
        left = self._by_owner[flight.owner] - 1
        if left:
            self._by_owner[flight.owner] = left
        else:
            del self._by_owner[flight.owner]

    def note_mismatch(self, upstream: Upstream) -> None:
        """Log, rarely, that somebody seems to guess at our sockets."""
        if self._mismatches.due(self.clock()):
            count = self._mismatches.count
            log.warning("dns_answers_do_not_match", upstream=upstream.text, since_start=count)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run `work` as a task that we keep, end with us, and whose failure is logged."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            log.error("dns_task_failed", task=task.get_name(), error=repr(failure))

    async def close(self) -> None:
        """End every flight: who waits gets UnavailableError."""
        self.udp.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for flight in list(self._flights.values()):
            flight.fail("the daemon stops")


class _Flight:
    """One question on its way through the upstreams."""

    __slots__ = (
        "_again",
        "_current",
        "_deadline",
        "_name",
        "_next",
        "_packet",
        "_qtype",
        "_question",
        "_queue",
        "_resolver",
        "_rounds",
        "_why",
        "key",
        "owner",
        "waiters",
    )

    def __init__(
        self, resolver: Resolver, key: CacheKey, query: Query, owner: object, upstreams: tuple[Upstream, ...]
    ) -> None:
        self.key = key
        self.owner = owner
        self.waiters: list[Done] = []
        self._resolver = resolver
        self._name = query.name
        self._qtype = query.qtype
        self._question = key.question
        self._packet = upstream_query(key.question, do=key.do, cd=key.cd)
        self._queue: Sequence[Upstream] = upstreams  # of this round
        self._next = 0
        self._again: list[Upstream] = []  # did not answer in this round
        self._rounds = resolver.attempts
        self._deadline = self._resolver.clock() + RESOLVE_DEADLINE_S
        self._current = upstreams[0]
        self._why = ""

    def next_try(self) -> None:
        """Ask the next upstream, or give up."""
        while self._resolver.clock() < self._deadline:
            if self._next == len(self._queue):
                self._rounds -= 1
                if self._rounds <= 0 or not self._again:
                    break
                self._queue, self._again, self._next = self._again, [], 0
            self._current = self._queue[self._next]
            self._next += 1
            try:
                self._resolver.udp.send(self._current, self._packet, self._question, self._on_udp)
            except OSError as error:
                self._note(error.strerror or str(error), "socket")
            else:
                self._resolver.counts.note_asked(self._current)
                return
        self.fail(self._why or "no time left")

    def _note(self, why: str, failure: Failure) -> None:
        """Note why the current upstream was of no use; who did not answer at all is asked again."""
        self._why = f"{self._current.text}: {why}"
        self._resolver.counts.note_failed(self._current, failure)
        if failure in ("timeout", "socket"):
            self._again.append(self._current)

    def _on_udp(self, data: bytes | None, why: str) -> None:
        """Take the response of the current upstream, or the reason why there is none."""
        try:
            if data is not None:
                self._take(data, tcp=False)
            elif why == SPOOFED:
                self._resolver.note_mismatch(self._current)
                self._resolver.spawn(self._over_tcp(), "dns-tcp")
            else:
                self._note(why, "timeout" if why == TIMED_OUT else "socket")
                self.next_try()
        except Exception as error:  # noqa: BLE001 - logged; whoever waits is answered
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        if self._resolver.failures.due(self._resolver.clock()):
            count = self._resolver.failures.count
            log.error(
                "dns_flight_failed", upstream=self._current.text, error=repr(error), since_start=count, exc_info=error
            )
        self.fail("internal error")

    def _take(self, data: bytes, *, tcp: bool) -> None:
        """Read a response when it is the turn of who asked."""
        if not self._resolver.turns.run(self.owner, partial(self._on_response, data, tcp=tcp)):
            self._resolver.counts.refused += 1
            self.fail("too many large answers wait")

    def _on_response(self, data: bytes, *, tcp: bool) -> None:
        """Read a response. Never raises."""
        try:
            self._read(data, tcp=tcp)
        except Exception as error:  # noqa: BLE001 - the same
            self._failed(error)

    def _read(self, data: bytes, *, tcp: bool) -> None:
        try:
            answer = scan(data, len(self._question), self._name, self._qtype, self._resolver.clock())
        except WireError as error:
            self._note(f"unusable answer: {error}", "unusable")
            self.next_try()
            return
        if answer.truncated and not tcp:
            self._resolver.spawn(self._over_tcp(), "dns-tcp")
        elif answer.truncated or answer.rcode in (SERVFAIL, REFUSED) or answer.rcode > 15:
            self._note(f"answered with rcode {answer.rcode}", "rcode")
            self.next_try()
        else:
            self._end(answer)

    async def _over_tcp(self) -> None:
        """Ask the current upstream again over TCP."""
        self._resolver.counts.note_asked(self._current)
        try:
            data = await ask_tcp(self._current, self._packet, self._question, self._resolver.timeout_s)
        except OSError as error:  # a time-out is one
            why = f"over TCP: {error.strerror or str(error) or type(error).__name__}"
            self._note(why, "timeout" if isinstance(error, TimeoutError) else "socket")
            self.next_try()
        except Exception:
            self.fail("internal error")
            raise
        else:
            self._take(data, tcp=True)

    def fail(self, why: str) -> None:
        """End without an answer."""
        self._end(UnavailableError(f"ask upstream: {why}"))

    def _end(self, result: Answer | NetfenceError) -> None:
        self._resolver.land(self)
        waiters, self.waiters = self.waiters, []
        _tell(waiters, result)


def _tell(waiters: Sequence[Done], result: Answer | NetfenceError) -> None:
    """Tell a few who wait, and in the next turn of the loop the others: hundreds may have asked the same."""
    for done in waiters[:TOLD_AT_ONCE]:
        done(result)
    if len(waiters) > TOLD_AT_ONCE:
        asyncio.get_running_loop().call_soon(_tell, waiters[TOLD_AT_ONCE:], result)
