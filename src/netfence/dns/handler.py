"""The way of one query through an attachment's DNS server, whatever transport it came by.

Order: form (`wire`), rate, policy (`judge`, or the control plane through `proxy`), cache or upstream, then in one go
without suspension: chain, rebinding guard, lease in the kernel, reply. After every wait the policy of that moment
judges anew, so an answer that arrives after its name was denied is denied. Sockets belong to `server` and `tcp`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

import structlog

from netfence.dns import guard, message
from netfence.dns.answer import Answer
from netfence.dns.cache import CacheKey, SharedCache
from netfence.dns.cut import Cuts
from netfence.dns.gate import Gate
from netfence.dns.hot import HotReplies, HotReply
from netfence.dns.judge import Verdict, chain_denial, judge
from netfence.dns.limits import MAX_HOT_REPLY, MAX_OUTSTANDING, MAX_REJUDGE
from netfence.dns.message import EDE_FILTERED, EDE_NO_REACHABLE, EDE_OTHER, Ede
from netfence.dns.proxy import ProxyBook
from netfence.dns.ratelimit import TokenBucket
from netfence.dns.settings import DnsSettings
from netfence.dns.upstream import Resolver
from netfence.dns.wire import CD, HTTPS, REFUSED, SERVFAIL, SVCB, Query, Refusal, WireError, parse_query
from netfence.errors import NetfenceError
from netfence.log import LogLimit
from netfence.policy.search import strip

MAX_MESSAGE: Final = 65_535
_NO_CAP: Final = 0x7FFFFFFF

log = structlog.get_logger(__name__)

Send = Callable[[bytes], None]


class _Serving(NamedTuple):
    """With what an answer is served: time, age, TTL cap, end of what it stands on, EDE."""

    now: float
    age_s: int
    cap_s: int
    until: float
    ede: Ede | None


class _Asked:
    """A query on its way, and what was found out for it under the policy of `generation`."""

    __slots__ = ("generation", "query", "restarts", "send", "verdict")

    def __init__(self, query: Query, send: Send) -> None:
        self.query = query
        self.send = send
        self.generation = 0
        self.restarts = 0
        self.verdict: Verdict | None = None


class Handler:
    """Answers the queries of one attachment."""

    def __init__(
        self,
        gate: Gate,
        settings: DnsSettings,
        cache: SharedCache,
        resolver: Resolver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.gate = gate
        self.clock = clock
        self.hot = HotReplies()
        self.bucket = TokenBucket(settings.max_qps, clock()) if settings.max_qps else None
        self._settings = settings
        self._cap_s = int(settings.max_lease_s)
        self._cache = cache
        self._resolver = resolver
        self._space = guard.PrivateSpace(settings.allow_private)
        self._proxy = ProxyBook(gate, clock)
        self._waiting = 0
        self._closed = False
        self._failures = LogLimit()
        self._cuts = Cuts()

    async def close(self) -> None:
        """Leave every query that still waits unanswered, and free our share of the cache."""
        self._closed = True
        await self._proxy.close()
        self._cache.forget_owner(self)

    def ready(self, data: bytes) -> bytes | None:
        """Return the ready-made reply to a message, counted; None when it has to take the long way."""
        entry = self.hot.get(data[2:])
        if entry is None or entry.generation != self.gate.generation:
            return None
        now = self.clock()
        if (now >= entry.fresh_until and not entry.current(now)) or (self.bucket and not self.bucket.take(now)):
            return None
        self.gate.note_query(entry.allowed)
        return data[:2] + entry.body

    def take(self, data: bytes, send: Send, *, tcp: bool) -> bool:
        """Answer a message through `send`, now or later, once; False when silence is the answer. Never raises."""
        try:
            return self._take(data, send, tcp=tcp)
        except Exception as error:  # noqa: BLE001 - a bug met by one query must not stop the server of all others
            self._log("dns_query_failed", error)
            return False

    def _take(self, data: bytes, send: Send, *, tcp: bool) -> bool:
        try:
            query = parse_query(data)
        except WireError:
            return False
        except Refusal as refusal:
            send(self._refuse(data, refusal))
            return True
        if tcp:
            query.limit = MAX_MESSAGE
        if self.bucket is not None and not self.bucket.take(self.clock()):
            self.gate.note_query(False)
            send(message.reply(query, REFUSED, Ede(EDE_OTHER, "netfence: more queries than dns.max_qps")))
            return True
        self._advance(_Asked(query, send))
        return True

    def _refuse(self, data: bytes, refusal: Refusal) -> bytes:
        if refusal.query is None:
            return message.bare_reply(data, refusal.rcode)
        if refusal.rcode == REFUSED:
            self.gate.note_query(False)
        return message.reply(refusal.query, refusal.rcode)

    def _advance(self, asked: _Asked) -> None:
        """Take a query as far as it goes without waiting: to its reply, or to what `_resume` goes on from."""
        query = asked.query
        policy = self.gate.policy
        asked.generation = self.gate.generation
        verdict = asked.verdict
        if verdict is None:
            suffixes = self._settings.search_suffixes
            verdict = judge(policy, query.name, suffixes)
            if verdict is None:
                name = strip(query.name, suffixes)
                verdict = self._proxy.known(name, query.qtype)
                if verdict is None:
                    if self._may_wait(asked):
                        self._proxy.decide(name, query.qtype, partial(self._resume, asked, None))
                    return
            asked.verdict = verdict
        if verdict.denied and not verdict.audit:
            asked.send(self._deny(query, verdict.why, verdict.until))
            return
        if verdict.ips:
            now = self.clock()
            left_s = max(verdict.ttl_s - int(now - verdict.since), 0)  # a decision may hold longer than any lease
            made = message.from_addresses(query, verdict.ips, left_s, now)
            asked.send(self._finish(query, verdict._replace(guard=False), made))
            return
        upstreams = policy.dns.upstreams or self._settings.upstreams
        key = CacheKey(upstreams, query.key, query.do, bool(query.flags & CD))
        answer = self._cache.get(key, self.clock())
        if answer is not None:
            asked.send(self._finish(query, verdict, answer))
        elif self._may_wait(asked):
            self._resolver.resolve(key, query, self, partial(self._resume, asked, key))

    def _may_wait(self, asked: _Asked) -> bool:
        """Count a query that has to wait; when too many do, answer it with SERVFAIL."""
        if self._waiting >= MAX_OUTSTANDING:
            self.gate.note_query(False)
            ede = Ede(EDE_OTHER, "netfence: too many queries wait for an answer")
            asked.send(message.reply(asked.query, SERVFAIL, ede))
            return False
        self._waiting += 1
        return True

    def _resume(self, asked: _Asked, key: CacheKey | None, got: Answer | Verdict | NetfenceError) -> None:
        """Go on with what was waited for: the answer of an upstream (`key`) or a decision. Never raises."""
        self._waiting -= 1
        if self._closed:
            return  # and out of the cache: nobody would ever free what is charged to us now
        if key is not None and isinstance(got, Answer):
            self._cache.put(key, got, self)
        try:
            self._judge_again(asked, got)
        except Exception as error:  # noqa: BLE001 - as in `take`
            self._log("dns_query_failed", error)
            asked.send(message.reply(asked.query, SERVFAIL, Ede(EDE_OTHER, "netfence: internal error")))

    def _judge_again(self, asked: _Asked, got: Answer | Verdict | NetfenceError) -> None:
        query = asked.query
        if asked.generation != self.gate.generation:
            # Whatever was found out belongs to an older policy. A good answer is in the cache now.
            asked.verdict = None
            asked.restarts += 1
            if asked.restarts <= MAX_REJUDGE:
                self._advance(asked)
                return
            self.gate.note_query(False)
            asked.send(message.reply(query, SERVFAIL, Ede(EDE_OTHER, "netfence: the policy keeps changing")))
        elif isinstance(got, Verdict):
            asked.verdict = got
            self._advance(asked)
        elif asked.verdict is None:
            self.gate.note_query(False)
            ede = Ede(EDE_OTHER, "netfence: the control plane gave no decision")
            asked.send(message.reply(query, SERVFAIL, ede))
        elif isinstance(got, Answer):
            asked.send(self._finish(query, asked.verdict, got))
        else:
            self.gate.note_query(True)
            asked.send(message.reply(query, SERVFAIL, Ede(EDE_NO_REACHABLE, f"netfence: {got}")))

    def _deny(self, query: Query, why: str, until: float = math.inf) -> bytes:
        """Return the reply to a denied query, and keep it ready."""
        self.gate.note_query(False)
        reply = message.reply(query, self._settings.denial_rcode, Ede(EDE_FILTERED, f"netfence: {why}"))
        if until > self.clock():
            self.hot.store(query.rest, HotReply(reply[2:], self.gate.generation, until, allowed=False))
        return reply

    def _finish(self, query: Query, verdict: Verdict, answer: Answer) -> bytes:
        """Judge an answer, open its addresses, and only then return the reply that carries it."""
        now = self.clock()
        policy = self.gate.policy
        until = verdict.until
        ede: Ede | None = None
        stay = answer.special
        chain = answer.chain if verdict.guard and not verdict.denied else ()
        if chain and (why := chain_denial(policy, chain)) is not None:
            if not policy.audit:
                return self._deny_answer(query, why)
            verdict = verdict._replace(denied=True, why=why)
        if not message.fits(query, answer):
            return self._truncated(query)
        if verdict.guard and answer.special:
            stay, stay_until = guard.permitted(answer.special, self._space, policy, now)
            until = min(until, stay_until)
        try:
            if len(stay) < len(answer.special):
                answer, ede = self._cut(query, answer, stay)
            if not answer.end:
                answer = self._cuts.cut(query, answer, answer.special)  # OPT stood in front of others
        except WireError as error:
            self.gate.note_query(True)
            return message.reply(query, SERVFAIL, Ede(EDE_OTHER, f"netfence: the answer cannot be changed: {error}"))
        # The control plane's own addresses are trusted, but no answer may outlive its lease.
        cap_s = self._cap_s if verdict.guard or verdict.ips else _NO_CAP
        age_s = max(int(now - answer.received), 0)
        reply = message.relay(query, answer, age_s, cap_s, ede)
        if len(reply) > query.limit:
            return self._truncated(query)  # changed answers can be longer, by an EDE or in dnslib's hands
        return self._open(query, verdict, answer, reply, _Serving(now, age_s, cap_s, until, ede))

    def _truncated(self, query: Query) -> bytes:
        """Return the reply that sends the client to TCP, or SERVFAIL where TCP was not enough either."""
        # Without records there is nothing to open.
        self.gate.note_query(True)
        if query.limit < MAX_MESSAGE:
            return message.truncated(query)
        return message.reply(query, SERVFAIL, Ede(EDE_OTHER, "netfence: the answer does not fit a message"))

    def _open(self, query: Query, verdict: Verdict, answer: Answer, reply: bytes, serving: _Serving) -> bytes:
        """Open the addresses of an answer and return its reply, or SERVFAIL when the kernel refuses them."""
        ttl_s = float(max(min(answer.ttl_s, serving.cap_s) - serving.age_s, 0))
        valid_until = min(answer.received + min(answer.life_s, serving.cap_s), serving.until)
        if verdict.denied:
            self.gate.note_query(True)
            self.gate.note_audit(verdict.name, answer.addresses, verdict.why)
            return reply
        if verdict.learn and answer.addresses:
            try:
                # By the name as asked for: a later rule may deny it, and not the one without its search domain.
                self.gate.learn(query.name, answer.addresses, ttl_s)
            except NetfenceError as error:
                self.gate.note_query(True)
                return message.reply(query, SERVFAIL, Ede(EDE_OTHER, f"netfence: cannot open the addresses: {error}"))
            valid_until = min(valid_until, serving.now + self._renew_after(ttl_s))
        self.gate.note_query(True)
        if valid_until > serving.now and len(reply) <= MAX_HOT_REPLY:
            entry = HotReply(reply[2:], self.gate.generation, valid_until, allowed=True)
            entry.counting(query, answer, serving.cap_s, serving.ede, serving.now)
            self.hot.store(query.rest, entry)
        return reply

    def _renew_after(self, ttl_s: float) -> float:
        """Return the seconds after which the lease just opened has less than `min_lease` left."""
        settings = self._settings
        return max(ttl_s - settings.min_lease_s, 0.0) + max(settings.lease_grace_s, 1.0)

    def _deny_answer(self, query: Query, why: str) -> bytes:
        """Return the denial of an answer that leads to a denied name; not kept ready, the next answer may differ."""
        return self._deny(query, why, until=0.0)

    def _cut(self, query: Query, answer: Answer, stay: frozenset[bytes]) -> tuple[Answer, Ede | None]:
        """Take special addresses out of an answer; the EDE when nothing that was asked for is left."""
        left = self._cuts.cut(query, answer, stay)
        kept_records = query.qtype in (SVCB, HTTPS) and left.counts[0]
        if left.addresses or not answer.addresses or kept_records:
            return left, None
        return left, Ede(EDE_FILTERED, "netfence: special-purpose addresses removed; see dns.allow_private")

    def _log(self, event: str, error: Exception) -> None:
        """Log a failure of ours, rarely: who sends the query must not fill the log."""
        if self._failures.due(self.clock()):
            log.error(event, error=repr(error), since_start=self._failures.count)
