"""The way of one query through an attachment's DNS server, whatever transport it came by.

Order: form (`wire`), rate, policy (`judge`, or the control plane through `proxy`), cache or upstream, then in one go
without suspension: chain, rebinding guard, lease in the kernel, reply. After every wait the policy of that moment
judges anew, so an answer that arrives after its name was denied is denied. Sockets belong to `server` and `tcp`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

import structlog

from netfence.dns import guard, message
from netfence.dns.answer import Answer
from netfence.dns.cache import CacheKey, SharedCache
from netfence.dns.counts import Counts, Totals
from netfence.dns.cut import Cuts
from netfence.dns.decision import Decision, Peer, Reason, Sink, Word
from netfence.dns.explain import Tracer
from netfence.dns.gate import Gate
from netfence.dns.hot import HotReplies, HotReply
from netfence.dns.judge import Verdict, chain_denial, chain_rule, judge
from netfence.dns.limits import MAX_HOT_REPLY, MAX_OUTSTANDING, MAX_REJUDGE
from netfence.dns.message import EDE_FILTERED, EDE_NO_REACHABLE, EDE_OTHER, Ede
from netfence.dns.proxy import ProxyBook
from netfence.dns.ratelimit import TokenBucket
from netfence.dns.settings import DnsSettings
from netfence.dns.upstream import Resolver
from netfence.dns.wire import CD, HTTPS, REFUSED, SERVFAIL, SVCB, Query, Refusal, WireError, parse_query
from netfence.errors import NetfenceError
from netfence.log import LogLimit
from netfence.policy.domain import DomainRule
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

    __slots__ = ("generation", "peer", "query", "restarts", "send", "verdict")

    def __init__(self, query: Query, send: Send, peer: Peer) -> None:
        self.query = query
        self.send = send
        self.peer = peer
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
        totals: Totals | None = None,
    ) -> None:
        self.gate = gate
        self.clock = clock
        self.hot = HotReplies()
        self.counts = Counts(totals or Totals())
        self.bucket = TokenBucket(settings.max_qps, clock()) if settings.max_qps else None
        self._settings = settings
        self._cap_s = int(settings.max_lease_s)
        self._cache = cache
        self._resolver, self._turns = resolver, resolver.turns
        self._space = guard.PrivateSpace(settings.allow_private)
        self._proxy = ProxyBook(gate, clock)
        self._waiting = 0
        self._closed = False
        self._failures = LogLimit()
        self._cuts = Cuts()
        self._sink: Sink | None = None

    async def close(self) -> None:
        """Leave every query that still waits unanswered, and free our share of the cache."""
        self._closed = True
        await self._proxy.close()
        self._cache.forget_owner(self)
        self._turns.forget(self)
        self.counts.close()

    def watch(self, sink: Sink | None, *, passes: bool = True) -> None:
        """Tell `sink` of every decision from now on; None: nobody. Replies that are told of are not kept ready.

        Without `passes` those of names that pass are kept, and told of only when they are made.
        """
        self._sink = sink
        self.hot.keep(passed=sink is None or not passes, denied=sink is None)

    def tracer(self) -> Tracer:
        """Return what tells how names would be answered, without answering anybody."""
        return Tracer(self._settings, self._cache, self._resolver, self._proxy.known, self.clock)

    def ready(self, data: bytes) -> bytes | None:
        """Return the ready-made reply to a message, counted; None when it has to take the long way."""
        entry = self.hot.get(data[2:])
        if entry is None or entry.generation != self.gate.generation:
            return None
        now = self.clock()
        if (now >= entry.fresh_until and not entry.current(now)) or (self.bucket and not self.bucket.take(now)):
            return None
        self.gate.note_query(entry.allowed)
        self.counts.ready[entry.rcode] += 1
        return data[:2] + entry.body

    def take(self, data: bytes, send: Send, *, tcp: bool, peer: Peer = None) -> bool:
        """Answer a message through `send`, now or later, once; False when silence is the answer. Never raises.

        `peer` is told to who watches.
        """
        try:
            return self._take(data, send, tcp=tcp, peer=peer)
        except Exception as error:  # noqa: BLE001 - a bug met by one query must not stop the server of all others
            self._log("dns_query_failed", error)
            return False

    def _take(self, data: bytes, send: Send, *, tcp: bool, peer: Peer = None) -> bool:
        try:
            query = parse_query(data)
        except WireError:
            return False
        except Refusal as refusal:
            self.counts.note(refusal.rcode)
            send(self._refuse(data, refusal, tcp=tcp, peer=peer))
            return True
        send = self.counts.timed(send)
        if tcp:
            query.limit = MAX_MESSAGE
        asked = _Asked(query, send, peer)
        if self.bucket is not None and not self.bucket.take(self.clock()):
            self.counts.totals.over_rate += 1
            self._note(asked, False, "rate")
            send(message.reply(query, REFUSED, Ede(EDE_OTHER, "netfence: more queries than dns.max_qps")))
            return True
        self._advance(asked)
        return True

    def _refuse(self, data: bytes, refusal: Refusal, *, tcp: bool, peer: Peer) -> bytes:
        query = refusal.query
        if query is None:
            return message.bare_reply(data, refusal.rcode)
        if refusal.rcode == REFUSED:
            if tcp:
                query.limit = MAX_MESSAGE
            self._note(_Asked(query, _nobody, peer), False, "refused")
        return message.reply(query, refusal.rcode)

    def _note(
        self, asked: _Asked, allowed: bool, reason: Reason, rule: DomainRule | None = None, word: Word | None = None
    ) -> None:
        """Count a query, and tell who watches; `word` where that is not what is counted."""
        self.gate.note_query(allowed)
        if self._sink is not None:
            query = asked.query
            word = word or ("pass" if allowed else "drop")
            over_tcp = query.limit == MAX_MESSAGE
            self._sink(Decision(word, reason, query.name, query.qtype, over_tcp, asked.peer, rule))

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
            asked.send(self._deny(asked, verdict, verdict.until))
            return
        if verdict.ips:
            now = self.clock()
            left_s = max(verdict.ttl_s - int(now - verdict.since), 0)  # a decision may hold longer than any lease
            made = message.from_addresses(query, verdict.ips, left_s, now)
            asked.send(self._finish(asked, verdict._replace(guard=False), made))
            return
        upstreams = policy.dns.upstreams or self._settings.upstreams
        key = CacheKey(upstreams, query.key, query.do, bool(query.flags & CD))
        answer = self._cache.get(key, self.clock())
        if answer is not None:
            self.counts.hits += 1
            self._go_on(asked, None, answer)
            return
        self.counts.misses += 1
        if self._may_wait(asked):
            self._resolver.resolve(key, query, self, partial(self._resume, asked, key))

    def _may_wait(self, asked: _Asked) -> bool:
        """Count a query that has to wait; when too many do, answer it with SERVFAIL."""
        if self._waiting >= MAX_OUTSTANDING:
            self.counts.totals.over_waiting += 1
            self._refuse_overload(asked)
            return False
        self._waiting += 1
        return True

    def _refuse_overload(self, asked: _Asked) -> None:
        self._note(asked, False, "overload")
        ede = Ede(EDE_OTHER, "netfence: too many queries wait for an answer")
        asked.send(message.reply(asked.query, SERVFAIL, ede))

    def _resume(self, asked: _Asked, key: CacheKey | None, got: Answer | Verdict | NetfenceError) -> None:
        """Go on with what was waited for: the answer of an upstream (`key`) or a decision. Never raises."""
        self._waiting -= 1
        self._go_on(asked, key, got)

    def _go_on(self, asked: _Asked, key: CacheKey | None, got: Answer | Verdict | NetfenceError) -> None:
        """Go on when it is our turn, which is now unless our answers have cost others too much."""
        if not self._turns.run(self, partial(self._land, asked, key, got)):
            self.counts.totals.over_waiting += 1
            self._refuse_overload(asked)

    def _land(self, asked: _Asked, key: CacheKey | None, got: Answer | Verdict | NetfenceError) -> None:
        """Answer with what was found out, or ask anew. Never raises."""
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
            self._note(asked, False, "policy_changes")
            asked.send(message.reply(query, SERVFAIL, Ede(EDE_OTHER, "netfence: the policy keeps changing")))
        elif isinstance(got, Verdict):
            asked.verdict = got
            self._advance(asked)
        elif asked.verdict is None:
            self._note(asked, False, "undecided")
            ede = Ede(EDE_OTHER, "netfence: the control plane gave no decision")
            asked.send(message.reply(query, SERVFAIL, ede))
        elif isinstance(got, Answer):
            asked.send(self._finish(asked, asked.verdict, got))
        else:
            self._note(asked, True, "upstream", asked.verdict.rule)
            asked.send(message.reply(query, SERVFAIL, Ede(EDE_NO_REACHABLE, f"netfence: {got}")))

    def _deny(self, asked: _Asked, verdict: Verdict, until: float) -> bytes:
        """Return the reply to a denied query, and keep it ready until then."""
        query = asked.query
        self._note(asked, False, verdict.reason, verdict.rule)
        reply = message.reply(query, self._settings.denial_rcode, Ede(EDE_FILTERED, f"netfence: {verdict.why}"))
        if until > self.clock():
            self.hot.store(query.rest, HotReply(reply[2:], self.gate.generation, until, allowed=False))
        return reply

    def _finish(self, asked: _Asked, verdict: Verdict, answer: Answer) -> bytes:
        """Judge an answer, open its addresses, and only then return the reply that carries it."""
        query = asked.query
        now = self.clock()
        policy = self.gate.policy
        until = verdict.until
        ede: Ede | None = None
        stay = answer.special
        chain = answer.chain if verdict.guard and not verdict.denied else ()
        if chain and (why := chain_denial(policy, chain)) is not None:
            found = chain_rule(policy, chain)
            verdict = verdict._replace(denied=True, why=why, reason="chain", rule=found[0] if found else None)
            if not policy.audit:
                return self._deny(asked, verdict, until=0.0)  # not kept ready: the next answer may differ
        if not message.fits(query, answer):
            return self._truncated(asked, verdict)
        if verdict.guard and answer.special:
            stay, stay_until = guard.permitted(answer.special, self._space, policy, now)
            until = min(until, stay_until)
        try:
            if len(stay) < len(answer.special):
                answer, ede = self._cut(query, answer, stay)
            if not answer.end:
                answer = self._cuts.cut(query, answer, answer.special)  # OPT stood in front of others
        except WireError as error:
            self._note(asked, True, "upstream", verdict.rule)
            return message.reply(query, SERVFAIL, Ede(EDE_OTHER, f"netfence: the answer cannot be changed: {error}"))
        # The control plane's own addresses are trusted, but no answer may outlive its lease.
        cap_s = self._cap_s if verdict.guard or verdict.ips else _NO_CAP
        age_s = max(int(now - answer.received), 0)
        reply = message.relay(query, answer, age_s, cap_s, ede)
        if len(reply) > query.limit:
            return self._truncated(asked, verdict)  # changed answers can be longer, by an EDE or in dnslib's hands
        return self._open(asked, verdict, answer, reply, _Serving(now, age_s, cap_s, until, ede))

    def _truncated(self, asked: _Asked, verdict: Verdict) -> bytes:
        """Return the reply that sends the client to TCP, or SERVFAIL where TCP was not enough either."""
        # Without records there is nothing to open.
        query = asked.query
        if query.limit < MAX_MESSAGE:
            self._note(asked, True, verdict.reason, verdict.rule, "would_drop" if verdict.denied else None)
            return message.truncated(query)
        self._note(asked, True, "upstream", verdict.rule)
        return message.reply(query, SERVFAIL, Ede(EDE_OTHER, "netfence: the answer does not fit a message"))

    def _open(self, asked: _Asked, verdict: Verdict, answer: Answer, reply: bytes, serving: _Serving) -> bytes:
        """Open the addresses of an answer and return its reply, or SERVFAIL when the kernel refuses them."""
        query = asked.query
        ttl_s = float(max(min(answer.ttl_s, serving.cap_s) - serving.age_s, 0))
        valid_until = min(answer.received + min(answer.life_s, serving.cap_s), serving.until)
        if verdict.denied:
            self._note(asked, True, verdict.reason, verdict.rule, "would_drop")
            self.gate.note_audit(verdict.name, answer.addresses, verdict.why, answer.chain)
            return reply
        if verdict.learn and answer.addresses:
            try:
                # By the name as asked for: a later rule may deny it, and not the one without its search domain.
                self.gate.learn(query.name, answer.addresses, ttl_s)
            except NetfenceError as error:
                self._note(asked, True, "no_lease", verdict.rule, "drop")
                return message.reply(query, SERVFAIL, Ede(EDE_OTHER, f"netfence: cannot open the addresses: {error}"))
            valid_until = min(valid_until, serving.now + self._renew_after(ttl_s))
        if serving.ede is None:
            self._note(asked, True, verdict.reason, verdict.rule)
        else:  # of what was asked for nothing is left
            self._note(asked, True, "rebinding", verdict.rule, "drop")
            if self._sink is not None:
                return reply
        if valid_until > serving.now and len(reply) <= MAX_HOT_REPLY:
            entry = HotReply(reply[2:], self.gate.generation, valid_until, allowed=True)
            entry.counting(query, answer, serving.cap_s, serving.ede, serving.now)
            self.hot.store(query.rest, entry)
        return reply

    def _renew_after(self, ttl_s: float) -> float:
        """Return the seconds after which the lease just opened has less than `min_lease` left."""
        settings = self._settings
        return max(ttl_s - settings.min_lease_s, 0.0) + max(settings.lease_grace_s, 1.0)

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


def _nobody(_reply: bytes) -> None:
    """Take a reply that goes out otherwise."""
