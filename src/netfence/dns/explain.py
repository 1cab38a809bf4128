"""What a name would be answered with now, and why: the way of `handler`, walked without being a client.

Looks into the shared cache and, where that has nothing, asks the upstreams; but keeps nothing, opens nothing, counts
nothing, and neither uses up the workload's rate nor its share of questions in the air. A denied name is not looked up,
as for the workload. In DNS mode `proxy` a decision that still holds is told; the control plane is not asked, because it
could not tell that question from a workload's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, NamedTuple

from dnslib import QTYPE, RCODE

from netfence.dns import guard
from netfence.dns.answer import Answer
from netfence.dns.cache import CacheKey, SharedCache
from netfence.dns.judge import Verdict, chain_rule, judge
from netfence.dns.message import upstream_query
from netfence.dns.settings import DnsSettings
from netfence.dns.upstream import Resolver
from netfence.dns.wire import AAAA, IN, A, parse_query
from netfence.errors import NetfenceError
from netfence.policy.domain import DomainRule
from netfence.policy.policy import Policy
from netfence.policy.search import strip

TYPES: Final = (A, AAAA)
_VARIANTS: Final = ((False, False), (True, False), (False, True), (True, True))  # DO and CD, as clients ask
_SIZES: Final = {A: 4, AAAA: 16}

Clock = Callable[[], float]

Known = Callable[[str, int], Verdict | None]
"""Return the control plane's decision about a name and type that still holds, if there is one."""


class Looked(NamedTuple):
    """What one question about the name would get.

    `verdict` None: the control plane decides, and nothing it said holds. `source` tells where the answer comes from:
    "cache", "upstream", "control plane", or "" for none, then `failure` may say why. `chain` are the names that it
    leads to, `addresses` what the client would see, `cut` what the rebinding guard takes out, all packed; `ttl_s` is
    what is left of the TTL. `denied_by` is the rule that denies a name of the chain, and that name.
    """

    qtype: str
    verdict: Verdict | None
    source: str = ""
    rcode: str = ""
    chain: tuple[str, ...] = ()
    addresses: tuple[bytes, ...] = ()
    cut: tuple[bytes, ...] = ()
    ttl_s: int = 0
    denied_by: tuple[DomainRule, str] | None = None
    failure: str = ""


class Tracer:
    """Looks names up for one attachment."""

    def __init__(
        self, settings: DnsSettings, cache: SharedCache, resolver: Resolver, known: Known, clock: Clock
    ) -> None:
        self._settings, self._cache, self._resolver, self._known = settings, cache, resolver, known
        self._clock = clock
        self._space = guard.PrivateSpace(settings.allow_private)

    async def trace(self, policy: Policy, name: str) -> list[Looked]:
        """Return what questions for IPv4 and IPv6 addresses of a name (lower case, no final dot) would get."""
        return list(await asyncio.gather(*(self._look(policy, name, qtype) for qtype in TYPES)))

    async def _look(self, policy: Policy, name: str, qtype: int) -> Looked:
        suffixes = self._settings.search_suffixes
        verdict = judge(policy, name, suffixes) or self._known(strip(name, suffixes), qtype)
        kind = str(QTYPE.get(qtype))
        if verdict is None or (verdict.denied and not verdict.audit):
            return Looked(kind, verdict)
        if verdict.ips:
            ips = tuple(ip for ip in verdict.ips if len(ip) == _SIZES[qtype])
            return Looked(kind, verdict, "control plane", "NOERROR", addresses=ips, ttl_s=verdict.ttl_s)
        answer, source = await self._answer(policy, name, qtype)
        if isinstance(answer, NetfenceError):
            return Looked(kind, verdict, failure=str(answer))
        return self._judged(policy, Looked(kind, verdict, source, str(RCODE.get(answer.rcode))), verdict, answer)

    def _judged(self, policy: Policy, looked: Looked, verdict: Verdict, answer: Answer) -> Looked:
        """Judge an answer as `Handler._finish` does."""
        now = self._clock()
        stay = answer.special
        if verdict.guard and answer.special:
            stay, _ = guard.permitted(answer.special, self._space, policy, now)
        gone = answer.special - stay
        cap_s = int(self._settings.max_lease_s) if verdict.guard else answer.ttl_s
        return looked._replace(
            chain=answer.chain,
            addresses=tuple(address for address in answer.addresses if address not in gone),
            cut=tuple(address for address in answer.addresses if address in gone),
            ttl_s=max(min(answer.ttl_s, cap_s) - int(now - answer.received), 0),
            denied_by=chain_rule(policy, answer.chain) if verdict.guard and not verdict.denied else None,
        )

    async def _answer(self, policy: Policy, name: str, qtype: int) -> tuple[Answer | NetfenceError, str]:
        """Return the cached answer, else the upstreams' (or why there is none), and where it comes from."""
        upstreams = policy.dns.upstreams or self._settings.upstreams
        question = _question(name, qtype)
        for do, cd in _VARIANTS:
            found = self._cache.peek(CacheKey(upstreams, question, do, cd), self._clock())
            if found is not None:
                return found, "cache"
        landed: asyncio.Future[Answer | NetfenceError] = asyncio.get_running_loop().create_future()

        def done(got: Answer | NetfenceError) -> None:
            if not landed.done():  # nobody waits any more: the caller went away
                landed.set_result(got)

        query = parse_query(upstream_query(question, do=False, cd=False))
        self._resolver.resolve(CacheKey(upstreams, question, False, False), query, self, done)
        return await landed, "upstream"


def _question(name: str, qtype: int) -> bytes:
    """Return the question in wire form (RFC 1035 section 4.1.2)."""
    labels = [label.encode("ascii") for label in name.split(".")] if name else []
    wire = b"".join(bytes([len(label)]) + label for label in labels)
    return wire + b"\0" + qtype.to_bytes(2, "big") + IN.to_bytes(2, "big")
