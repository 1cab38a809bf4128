"""What `why` tells of a name is what a client gets; and nothing of it is learned, counted or kept."""

from __future__ import annotations

import pytest
from dnslib import DNSRecord
from tests.unit.dns.world import (
    PUBLIC,
    PUBLIC6,
    Decision,
    World,
    addresses,
    deciding,
    packed,
    policy,
    rcode,
    run,
    world,
)

from netfence.dns.explain import Looked
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import Policy

ZONE = f"""
a.org. 300 IN A {PUBLIC}
a.org. 300 IN AAAA {PUBLIC6}
www.a.org. 60 IN CNAME edge.cdn.net.
edge.cdn.net. 20 IN A {PUBLIC}
inside.a.org. 300 IN A 10.1.2.3
both.a.org. 300 IN A 10.1.2.3
both.a.org. 300 IN A {PUBLIC}
"""
NAMES = ("a.org", "www.a.org", "inside.a.org", "both.a.org", "none.a.org", "b.net", "a.org.corp.example")
POLICIES = {
    "allowlist": policy(allow=[".a.org"]),
    "nothing-allowed": policy(),
    "denylist": policy(DnsMode.DENYLIST, deny=["b.net", "a.org"]),
    "chain": policy(allow=[".a.org"], deny=["*.cdn.net"]),
    "chain-audit": policy(allow=[".a.org"], deny=["*.cdn.net"], audit=True),
    "audit": policy(audit=True),
    "block-all": policy(mode=Mode.BLOCK_ALL, allow=["*"]),
    "block-all-audit": policy(mode=Mode.BLOCK_ALL, allow=["*"], audit=True),
    "disabled": policy(DnsMode.DISABLED),
    "inside-allowed": policy(allow=[".a.org"], cidrs=["10.0.0.0/8"]),
    "inside-denied": policy(allow=[".a.org"], cidrs=["10.0.0.0/8", "!10.1.0.0/16"]),
}


async def looked(one: World, name: str) -> dict[str, Looked]:
    return {found.qtype: found for found in await one.server.trace(name)}


def counted(one: World) -> tuple[object, ...]:
    """Return what a query would change, as it is now."""
    gate = one.gate
    return list(gate.learned), dict(gate.counts), list(gate.audits), len(one.cache), one.server.counts.hits


def expected(reply: DNSRecord) -> list[bytes]:
    return sorted(packed(*addresses(reply)))


@pytest.mark.parametrize("rules", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("cached", [False, True], ids=["upstream", "cached"])
def test_it_tells_what_a_client_gets(rules: Policy, cached: bool) -> None:
    async def test() -> None:
        async with world(rules, ZONE, search_domains=("corp.example",)) as one:
            for name in NAMES:
                if cached:
                    await one.ask(name, "A")
                    await one.ask(name, "AAAA", do=True)
                seen = len(one.upstream.seen)
                state = counted(one)
                told = await looked(one, name)
                after = counted(one)
                assert state == after
                for qtype, found in told.items():
                    reply = await one.ask(name, qtype)
                    verdict = found.verdict
                    assert verdict is not None
                    denied = (verdict.denied or found.denied_by is not None) and not rules.audit
                    assert denied == (rcode(reply) == "REFUSED"), (name, qtype, found)
                    if denied:
                        continue
                    assert sorted(found.addresses) == expected(reply), (name, qtype, found)
                    assert found.rcode == rcode(reply)
                if told["A"].verdict is not None and told["A"].verdict.denied and not rules.audit:
                    assert len(one.upstream.seen) == seen  # nothing of a denied name goes upstream
                elif cached and told["A"].addresses:
                    assert told["A"].source == "cache"

    run(test())


def test_chain_ttl_and_what_is_cut_are_told() -> None:
    async def test() -> None:
        async with world(policy(allow=[".a.org"], deny=["edge.cdn.net"]), ZONE) as one:
            (a, aaaa) = (await looked(one, "www.a.org")).values()
            assert (a.chain, a.ttl_s, a.addresses, a.source) == (("edge.cdn.net",), 20, packed(PUBLIC), "upstream")
            assert a.denied_by is not None
            assert (a.denied_by[0].text, a.denied_by[1]) == ("deny edge.cdn.net", "edge.cdn.net")
            assert aaaa.addresses == ()
            both = (await looked(one, "both.a.org"))["A"]
            assert (both.addresses, both.cut) == (packed(PUBLIC), packed("10.1.2.3"))

    run(test())


def test_the_control_plane_is_not_asked_but_what_it_said_is_told() -> None:
    async def test() -> None:
        async with world(policy(DnsMode.PROXY), ZONE) as one:
            one.gate.decide = deciding(Decision(ips=packed("192.0.2.1"), ttl_s=60))
            before = await looked(one, "a.org")
            assert [found.verdict for found in before.values()] == [None, None]
            assert one.gate.asked == []
            await one.ask("a.org")
            after = await looked(one, "a.org")
            assert (after["A"].addresses, after["A"].source) == (packed("192.0.2.1"), "control plane")
            assert after["AAAA"].verdict is None
            assert one.gate.asked == [("a.org", "A")]
            assert one.upstream.seen == []

    run(test())


def test_why_there_is_no_answer_is_told() -> None:
    async def test() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as one:
            one.upstream.rcode = 2
            found = (await looked(one, "a.org"))["A"]
            assert (found.source, found.addresses) == ("", ())
            assert "rcode 2" in found.failure

    run(test())
