"""The server over real sockets: what clients see of semantics.md 10, 12 and 14 to 21."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
from dnslib import QTYPE, RR, DNSRecord
from tests.unit.dns.world import (
    PUBLIC,
    PUBLIC6,
    Decision,
    FakeUpstream,
    addresses,
    deciding,
    ede,
    packed,
    policy,
    question,
    rcode,
    run,
    start,
    tcp_exchange,
    udp_exchange,
    until,
    world,
)

from netfence.dns import server as server_module
from netfence.dns.server import DnsServer, DnsSettings, Resolver, SharedCache
from netfence.errors import ExhaustedError, UnavailableError
from netfence.policy.cidr import CidrTable, parse_cidr
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import DnsPolicy, Policy

ZONE = f"""
a.org. 300 IN A {PUBLIC}
a.org. 300 IN AAAA {PUBLIC6}
sub.a.org. 300 IN A {PUBLIC}
b.org. 300 IN A 93.184.216.35
"""


# ------------------------------------------------------------------------------------------------ 12, 14, 15: names


@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
def test_allowlist_answers_and_opens_only_allowed_names(tcp: bool) -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            reply = await w.ask("a.org", tcp=tcp)
            assert (rcode(reply), addresses(reply)) == ("NOERROR", [PUBLIC])
            assert w.gate.learned == [("a.org", packed(PUBLIC), 300.0)]
            denied = await w.ask("b.org", tcp=tcp)
            assert (rcode(denied), addresses(denied)) == ("REFUSED", [])
            assert len(w.upstream.seen) == 1  # nothing of the denied one went upstream
            assert len(w.gate.learned) == 1
            assert w.gate.counts == {True: 1, False: 1}

    run(go())


def test_denylist_answers_all_but_denied_names() -> None:
    async def go() -> None:
        async with world(policy(DnsMode.DENYLIST, deny=[".a.org"]), ZONE) as w:
            assert rcode(await w.ask("sub.a.org")) == "REFUSED"
            assert addresses(await w.ask("b.org")) == ["93.184.216.35"]
            assert [name for name, _, _ in w.gate.learned] == ["b.org"]

    run(go())


def test_dns_mode_disabled_forwards_everything_and_learns_nothing() -> None:
    async def go() -> None:
        zone = ZONE + "private.org. 200000 IN A 10.0.0.1\n"
        async with world(policy(DnsMode.DISABLED, deny=["a.org"]), zone) as w:
            assert addresses(await w.ask("a.org")) == [PUBLIC]
            reply = await w.ask("private.org")
            assert addresses(reply) == ["10.0.0.1"]  # no rebinding guard
            assert reply.rr[0].ttl == 200000  # and no cap
            assert w.gate.learned == []

    run(go())


@pytest.mark.parametrize("dns", list(DnsMode))
def test_block_all_denies_every_query_whatever_the_dns_mode(dns: DnsMode) -> None:
    async def go() -> None:
        async with world(policy(dns, mode=Mode.BLOCK_ALL, allow=["a.org"]), ZONE) as w:
            w.gate.decide = deciding(Decision())
            assert rcode(await w.ask("a.org")) == "REFUSED"
            assert (w.upstream.seen, w.gate.asked, w.gate.learned) == ([], [], [])

    run(go())


def test_names_compare_without_case_and_the_question_is_echoed_octet_by_octet() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            query = question("A.oRg", edns=1232)
            assert b"\x01A\x03oRg" in query
            for _ in range(2):  # from upstream, then ready-made
                reply = await w.raw(query)
                assert reply[12:23] == query[12:23]
                assert addresses(DNSRecord.parse(reply)) == [PUBLIC]
            lower = await w.raw(question("a.org", edns=1232))
            assert lower[12:23] == b"\x01a\x03org\0\0\x01\0\x01"
            assert len(w.upstream.seen) == 1  # the spelling is not part of the cache's key
            assert b"\x01a\x03org" in w.upstream.seen[0]  # and does not go upstream
            assert rcode(DNSRecord.parse(await w.raw(question("B.Org")))) == "REFUSED"

    run(go())


def test_a_dot_inside_a_label_does_not_make_a_name_allowed() -> None:
    async def go() -> None:
        async with world(policy(allow=[".a.org"]), ZONE) as w:
            head = question("x")[:12]
            for name in (b"\x07x.a.org\x00", b"\x05a.org\x00", b"\x01x\x05a.org\x00"):
                assert rcode(DNSRecord.parse(await w.raw(head + name + b"\x00\x01\x00\x01"))) == "REFUSED"
            assert w.upstream.seen == []

    run(go())


@pytest.mark.parametrize(("setting", "expected"), [("refused", "REFUSED"), ("nxdomain", "NXDOMAIN")])
def test_denied_query_gets_the_configured_rcode_and_ede_17_naming_the_rule(setting: str, expected: str) -> None:
    async def go() -> None:
        async with world(policy(allow=[".a.org"], deny=["sub.a.org"]), ZONE, reject_rcode=setting) as w:
            for _ in range(2):  # made, then ready-made
                reply = await w.ask("sub.a.org")
                assert rcode(reply) == expected
                code, text = ede(reply) or (None, "")
                assert code == 17
                assert "netfence" in text
                assert "deny sub.a.org" in text
            plain = await w.ask("sub.a.org", edns=0)
            assert (rcode(plain), plain.ar) == (expected, [])  # no EDNS, no EDE
            assert w.gate.counts[False] == 3

    run(go())


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("a.org.corp.example", True), ("a.org", True), ("b.org.corp.example", False), ("corp.example", False)],
)
def test_search_domains_are_stripped_before_matching(name: str, allowed: bool) -> None:
    async def go() -> None:
        zone = ZONE + f"a.org.corp.example. 60 IN A {PUBLIC}\n"
        async with world(policy(allow=["a.org"]), zone, search_domains=("corp.example",)) as w:
            assert (rcode(await w.ask(name)) == "NOERROR") is allowed
            # The lease is held by the name as asked for: a later rule may deny that one and not the stripped one.
            assert [learned for learned, _, _ in w.gate.learned] == ([name] if allowed else [])

    run(go())


# ------------------------------------------------------------------------------------------------ 10: audit


def test_audit_answers_denied_names_and_reports_them_without_opening() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"], audit=True), ZONE) as w:
            assert addresses(await w.ask("b.org")) == ["93.184.216.35"]
            assert w.gate.learned == []
            assert len(w.gate.audits) == 1
            name, opened, why = w.gate.audits[0]
            assert (name, opened) == ("b.org", packed("93.184.216.35"))
            assert "no rule" in why
            assert addresses(await w.ask("a.org")) == [PUBLIC]
            assert (len(w.gate.audits), len(w.gate.learned)) == (1, 1)

    run(go())


def test_audit_of_block_all_and_of_a_denied_chain() -> None:
    async def go() -> None:
        zone = ZONE + "c.org. 60 IN CNAME b.org.\n"
        async with world(policy(mode=Mode.BLOCK_ALL, allow=["a.org"], audit=True), zone) as w:
            assert addresses(await w.ask("a.org")) == [PUBLIC]
            assert (w.gate.learned, [name for name, _, _ in w.gate.audits]) == ([], ["a.org"])
            w.gate.policy = policy(allow=["c.org"], deny=["b.org"], audit=True)
            assert addresses(await w.ask("c.org")) == ["93.184.216.35"]
            assert w.gate.learned == []
            assert "deny b.org" in w.gate.audits[-1][2]
            assert w.gate.chains[-1] == ("b.org",)

    run(go())


# ------------------------------------------------------------------------------------------------ 5: leases first


def test_lease_is_open_before_the_answer_is_sent_and_refused_means_servfail() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            w.gate.refuse = ExhaustedError("lease table full")
            reply = await w.ask("a.org")
            assert (rcode(reply), addresses(reply)) == ("SERVFAIL", [])
            assert "lease table full" in (ede(reply) or (0, ""))[1]
            w.gate.refuse = None
            assert addresses(await w.ask("a.org")) == [PUBLIC]  # the refusal was not kept ready

    run(go())


def test_a_lease_is_renewed_from_the_cache_but_not_by_every_hit() -> None:
    async def go() -> None:
        zone = f"a.org. 3600 IN A {PUBLIC}\n"
        async with world(policy(allow=["a.org"]), zone, min_lease_s=300.0, lease_grace_s=60.0) as w:
            for _ in range(3):
                await w.ask("a.org")
            assert [ttl for _, _, ttl in w.gate.learned] == [3600.0]
            w.clock.now += 3359  # 301 s of lease left
            await w.ask("a.org")
            assert len(w.gate.learned) == 1
            w.clock.now += 2  # less than min_lease
            await w.ask("a.org")
            assert w.gate.learned[1:] == [("a.org", packed(PUBLIC), 239.0)]
            assert len(w.upstream.seen) == 1

    run(go())


def test_an_answer_that_arrives_after_its_name_was_denied_is_denied() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            w.upstream.hold = asyncio.Event()
            waiting = asyncio.ensure_future(w.ask("a.org"))
            await until(lambda: bool(w.upstream.seen))
            w.gate.policy = policy(allow=["b.org"])
            w.upstream.hold.set()
            assert rcode(await waiting) == "REFUSED"
            assert w.gate.learned == []

    run(go())


def test_an_answer_of_an_upstream_that_the_policy_no_longer_names_is_not_used() -> None:
    async def go() -> None:
        async with (
            FakeUpstream("a.org. 60 IN A 93.184.216.99").serving() as other,
            world(policy(allow=["a.org"]), ZONE) as w,
        ):
            w.upstream.hold = asyncio.Event()
            waiting = asyncio.ensure_future(w.ask("a.org"))
            await until(lambda: bool(w.upstream.seen))
            w.gate.policy = policy(allow=["a.org"], upstreams=[other.text])
            w.upstream.hold.set()
            assert addresses(await waiting) == ["93.184.216.99"]

    run(go())


def test_ready_made_replies_die_with_the_policy() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            await w.ask("a.org")
            await w.ask("a.org")
            w.gate.policy = policy(deny=["a.org"])
            assert rcode(await w.ask("a.org")) == "REFUSED"
            w.gate.policy = policy(allow=["a.org"])
            assert addresses(await w.ask("a.org")) == [PUBLIC]

    run(go())


# ------------------------------------------------------------------------------------------------ 16, 17: learning


def test_chain_is_followed_and_the_least_ttl_on_it_counts() -> None:
    async def go() -> None:
        zone = f"a.org. 300 IN CNAME b.net.\nb.net. 20 IN CNAME c.net.\nc.net. 100 IN A {PUBLIC}\n"
        async with world(policy(allow=["a.org"]), zone) as w:
            assert addresses(await w.ask("a.org")) == [PUBLIC]
            assert w.gate.learned == [("a.org", packed(PUBLIC), 20.0)]
            assert rcode(await w.ask("b.net")) == "REFUSED"  # the question decides

    run(go())


@pytest.mark.parametrize("section", ["answer", "authority", "additional"])
def test_stray_records_are_not_learned(section: str) -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            stray = RR.fromZone("evil.net. 300 IN A 93.184.216.66")
            if section == "answer":
                honest = w.upstream.answer

                def lie(query: bytes) -> list[bytes]:
                    record = DNSRecord.parse(honest(query))
                    record.rr = [*stray, *record.rr]
                    record.header.a = len(record.rr)
                    return [bytes(record.pack())]

                w.upstream.udp = lie
            elif section == "authority":
                w.upstream.authority = stray
            else:
                w.upstream.additional = stray
            await w.ask("a.org")
            assert w.gate.learned == [("a.org", packed(PUBLIC), 300.0)]

    run(go())


def test_a_records_in_the_answer_to_another_type_are_not_learned() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE + 'a.org. 300 IN TXT "hello"\n') as w:
            honest = w.upstream.answer

            def lie(query: bytes) -> list[bytes]:
                record = DNSRecord.parse(honest(query))
                record.add_answer(*RR.fromZone(f"a.org. 300 IN A {PUBLIC}"))
                return [bytes(record.pack())]

            w.upstream.udp = lie
            reply = await w.ask("a.org", "TXT")
            assert [str(rr.rdata) for rr in reply.rr if rr.rtype == QTYPE.TXT] == ['"hello"']
            assert w.gate.learned == []

    run(go())


def test_an_explicit_deny_rule_on_a_name_in_the_chain_denies_the_answer() -> None:
    async def go() -> None:
        zone = f"a.org. 300 IN CNAME b.net.\nb.net. 20 IN CNAME c.net.\nc.net. 100 IN A {PUBLIC}\n"
        async with world(policy(allow=["a.org"], deny=["b.net"]), zone) as w:
            for _ in range(2):
                reply = await w.ask("a.org")
                assert (rcode(reply), addresses(reply)) == ("REFUSED", [])
                code, text = ede(reply) or (None, "")
                assert (code, "deny b.net" in text) == (17, True)
            assert w.gate.learned == []
            w.gate.policy = policy(allow=["a.org"], deny=["d.net"])
            assert addresses(await w.ask("a.org")) == [PUBLIC]

    run(go())


def test_hints_of_https_records_are_learned_like_addresses() -> None:
    async def go() -> None:
        zone = f"a.org. 90 IN HTTPS 1 . alpn=h2 ipv4hint={PUBLIC},93.184.216.35 ipv6hint={PUBLIC6}\n"
        async with world(policy(allow=["a.org"]), zone) as w:
            reply = await w.ask("a.org", "HTTPS")
            assert PUBLIC in str(reply.rr[0].rdata)
            assert w.gate.learned == [("a.org", packed(PUBLIC, "93.184.216.35", PUBLIC6), 90.0)]

    run(go())


def test_a_deny_rule_on_the_target_of_an_https_record_denies_the_answer() -> None:
    async def go() -> None:
        zone = f"a.org. 90 IN HTTPS 1 svc.evil.net. ipv4hint={PUBLIC}\n"
        async with world(policy(allow=["a.org"], deny=[".evil.net"]), zone) as w:
            assert rcode(await w.ask("a.org", "HTTPS")) == "REFUSED"
            assert w.gate.learned == []

    run(go())


# ------------------------------------------------------------------------------------------------ 18: rebinding

SPECIAL = ["10.1.2.3", "127.0.0.1", "169.254.169.254", "100.64.0.1", "192.168.1.1", "0.0.0.0", "224.0.0.1", "240.0.0.1"]
SPECIAL6 = ["::1", "fe80::1", "fd00:ec2::254", "::ffff:a00:1", "64:ff9b::a00:1", "2002:a00:1::1", "ff02::1", "::"]


@pytest.mark.parametrize("address", SPECIAL + SPECIAL6)
def test_special_addresses_are_removed_and_never_learned(address: str) -> None:
    async def go() -> None:
        qtype = "AAAA" if ":" in address else "A"
        public = PUBLIC6 if ":" in address else PUBLIC
        zone = f"a.org. 60 IN {qtype} {address}\nb.org. 60 IN {qtype} {public}\nb.org. 60 IN {qtype} {address}\n"
        async with world(policy(allow=["a.org", "b.org"]), zone) as w:
            nothing = await w.ask("a.org", qtype)
            assert (rcode(nothing), nothing.rr) == ("NOERROR", [])  # NODATA
            assert (ede(nothing) or (0, ""))[0] == 17
            assert w.gate.learned == []
            part = await w.ask("b.org", qtype)
            assert packed(*addresses(part)) == packed(public)
            assert w.gate.learned == [("b.org", packed(public), 60.0)]

    run(go())


@pytest.mark.parametrize(
    ("allow_private", "cidrs", "stays"),
    [
        (["10.0.0.0/8"], [], True),
        ([], ["10.1.0.0/16"], True),
        ([], ["10.1.0.0/16", "!10.1.2.0/24"], False),
        ([], ["!10.0.0.0/8"], False),
        (["192.168.0.0/16"], ["10.2.0.0/16"], False),
    ],
    ids=["allow-private", "allow-cidr", "deny-inside-allow", "deny-cidr", "elsewhere"],
)
def test_special_addresses_stay_inside_allow_private_and_allow_cidrs(
    allow_private: list[str], cidrs: list[str], stays: bool
) -> None:
    async def go() -> None:
        keys = tuple(parse_cidr(text) for text in allow_private)
        async with world(policy(allow=["a.org"], cidrs=cidrs), "a.org. 60 IN A 10.1.2.3\n", allow_private=keys) as w:
            for _ in range(2):
                assert addresses(await w.ask("a.org")) == (["10.1.2.3"] if stays else [])
            assert (w.gate.learned != []) is stays

    run(go())


def test_an_allow_cidr_with_a_ttl_stops_counting_for_ready_made_replies_too() -> None:
    async def go() -> None:
        base = policy(allow=["a.org"])
        table = CidrTable().allow(parse_cidr("10.0.0.0/8"), 1030.0)
        rules = Policy(mode=base.mode, cidrs=table, dns=base.dns)
        async with world(rules, "a.org. 600 IN A 10.1.2.3\n") as w:
            assert addresses(await w.ask("a.org")) == ["10.1.2.3"]
            w.clock.now = 1031.0
            assert addresses(await w.ask("a.org")) == []

    run(go())


def test_private_hints_are_cut_from_https_records() -> None:
    async def go() -> None:
        zone = f"a.org. 90 IN HTTPS 1 . alpn=h2 ipv4hint={PUBLIC},10.0.0.1 ipv6hint=fd00::1\n"
        async with world(policy(allow=["a.org"]), zone) as w:
            reply = await w.ask("a.org", "HTTPS")
            assert str(reply.rr[0].rdata) == f"1 . alpn=h2 ipv4hint={PUBLIC}"
            assert w.gate.learned == [("a.org", packed(PUBLIC), 90.0)]

    run(go())


def test_special_addresses_go_from_the_additional_section_too() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), "a.org. 60 IN MX 10 mx.a.org.\n") as w:
            w.upstream.additional = RR.fromZone(f"mx.a.org. 60 IN A 10.0.0.1\nmx.a.org. 60 IN A {PUBLIC}")
            reply = await w.ask("a.org", "MX")
            assert len(reply.rr) == 1
            assert [str(rr.rdata) for rr in reply.ar if rr.rtype == QTYPE.A] == [PUBLIC]
            assert w.gate.learned == []

    run(go())


@pytest.mark.parametrize(("address", "authentic"), [(PUBLIC, 1), ("10.0.0.1", 0)])
def test_ad_is_relayed_and_cleared_where_the_answer_was_changed(address: str, authentic: int) -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), f"a.org. 60 IN A {address}\na.org. 60 IN A 93.184.216.35\n") as w:
            honest = w.upstream.answer

            def signed(query: bytes) -> list[bytes]:
                data = bytearray(honest(query))
                data[3] |= 0x20
                return [bytes(data)]

            w.upstream.udp = signed
            assert (await w.ask("a.org", do=True)).header.ad == authentic
            assert (await w.ask("a.org")).header.ad == 0  # did not ask for it

    run(go())


def test_answer_ttls_are_capped_at_max_lease() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), f"a.org. 200000 IN A {PUBLIC}\n", max_lease_s=3600.0) as w:
            assert (await w.ask("a.org")).rr[0].ttl == 3600
            assert w.gate.learned == [("a.org", packed(PUBLIC), 3600.0)]
            w.clock.now += 3500
            assert (await w.ask("a.org")).rr[0].ttl == 100
            w.clock.now += 100
            await w.ask("a.org")
            assert len(w.upstream.seen) == 2

    run(go())


# ------------------------------------------------------------------------------------------------ 14: proxy


def test_proxy_asks_the_control_plane_and_resolves_upstream() -> None:
    async def go() -> None:
        async with world(policy(DnsMode.PROXY, deny=["b.org"]), ZONE) as w:
            w.gate.decide = deciding(Decision())
            assert addresses(await w.ask("b.org", "A")) == ["93.184.216.35"]  # its word, not the rules'
            assert w.gate.asked == [("b.org", "A")]
            assert w.gate.learned == [("b.org", packed("93.184.216.35"), 300.0)]
            w.gate.decide = deciding(Decision(add_to_filter=False))
            assert addresses(await w.ask("a.org")) == [PUBLIC]
            assert len(w.gate.learned) == 1

    run(go())


def test_proxy_denial_and_failure() -> None:
    async def go() -> None:
        async with world(policy(DnsMode.PROXY), ZONE) as w:
            w.gate.decide = deciding(Decision(allow=False, ips=packed(PUBLIC)))
            reply = await w.ask("a.org")
            assert (rcode(reply), (ede(reply) or (0, ""))[0]) == ("REFUSED", 17)
            w.gate.decide = None
            assert rcode(await w.ask("a.org")) == "SERVFAIL"

            async def broken(_name: str, _qtype: str) -> Decision:
                raise RuntimeError("a bug")

            w.gate.decide = broken
            assert rcode(await w.ask("a.org")) == "SERVFAIL"
            assert (w.upstream.seen, w.gate.learned) == ([], [])

    run(go())


@pytest.mark.parametrize(
    ("qtype", "expected"), [("A", [PUBLIC, "10.0.0.1"]), ("AAAA", [PUBLIC6]), ("TXT", [])], ids=["a", "aaaa", "txt"]
)
def test_proxy_answers_with_the_given_addresses_of_the_query_s_family(qtype: str, expected: list[str]) -> None:
    async def go() -> None:
        async with world(policy(DnsMode.PROXY), ZONE) as w:
            # A private one among them: addresses of the control plane itself are trusted.
            w.gate.decide = deciding(Decision(ips=packed(PUBLIC, PUBLIC6, "10.0.0.1")))
            query = question("X.a.org", qtype, edns=1232)
            reply = await w.raw(query)
            assert reply[12 : 12 + 13] == query[12 : 12 + 13]
            record = DNSRecord.parse(reply)
            assert packed(*addresses(record)) == packed(*expected)
            assert all(rr.ttl == 300 for rr in record.rr)
            assert w.upstream.seen == []
            assert w.gate.learned == ([("x.a.org", packed(*expected), 300.0)] if expected else [])

    run(go())


@pytest.mark.parametrize("ttl_s", [0.0, 600.0], ids=["no-ttl", "ttl"])
def test_proxy_answers_never_outlive_their_lease(ttl_s: float) -> None:
    async def go() -> None:
        async with world(policy(DnsMode.PROXY), max_lease_s=60.0, min_lease_s=10.0) as w:
            w.gate.decide = deciding(Decision(ips=packed(PUBLIC), ttl_s=ttl_s))
            assert (await w.ask("a.org")).rr[0].ttl == 60
            w.clock.now += 50
            if ttl_s:  # else it was not remembered
                assert (await w.ask("a.org")).rr[0].ttl == 10
            w.clock.now += 520
            assert (await w.ask("a.org")).rr[0].ttl == (30 if ttl_s else 60)
            assert len(w.gate.asked) == (1 if ttl_s else 2)
            assert max(lease for _, _, lease in w.gate.learned) == 60.0

    run(go())


def test_proxy_decisions_are_cached_for_their_ttl_and_emptied_by_any_command() -> None:
    async def go() -> None:
        async with world(policy(DnsMode.PROXY), ZONE) as w:
            w.gate.decide = deciding(Decision(ips=packed(PUBLIC), ttl_s=60.0))
            assert (await w.ask("a.org")).rr[0].ttl == 60
            w.clock.now += 20
            assert (await w.ask("a.org")).rr[0].ttl == 40
            assert (await w.ask("a.org", edns=0)).rr[0].ttl == 40  # not the ready-made reply
            assert len(w.gate.asked) == 1
            w.clock.now += 41
            await w.ask("a.org")
            assert len(w.gate.asked) == 2
            w.gate.policy = policy(DnsMode.PROXY, cidrs=["10.0.0.0/8"])
            await w.ask("a.org")
            assert len(w.gate.asked) == 3
            w.gate.decide = deciding(Decision(ips=packed(PUBLIC)))
            for _ in range(2):
                await w.ask("b.org")  # no ttl: asked every time
            assert len(w.gate.asked) == 5

    run(go())


def test_proxy_merges_concurrent_equal_questions() -> None:
    async def go() -> None:
        async with world(policy(DnsMode.PROXY), ZONE) as w:
            gate = asyncio.Event()

            async def slow(_name: str, _qtype: str) -> Decision:
                await gate.wait()
                return Decision(ips=packed(PUBLIC))

            w.gate.decide = slow
            waiting = [asyncio.ensure_future(w.ask("a.org")) for _ in range(5)]
            await until(lambda: w.server._handler._waiting == 5)
            gate.set()
            assert all(addresses(reply) == [PUBLIC] for reply in await asyncio.gather(*waiting))
            assert len(w.gate.asked) == 1

    run(go())


def test_a_decision_that_arrives_after_a_policy_change_is_not_used() -> None:
    async def go() -> None:
        async with world(policy(DnsMode.PROXY), ZONE) as w:
            gate = asyncio.Event()

            async def slow(_name: str, _qtype: str) -> Decision:
                await gate.wait()
                return Decision(ips=packed(PUBLIC), ttl_s=600.0)

            w.gate.decide = slow
            waiting = asyncio.ensure_future(w.ask("a.org"))
            await until(lambda: bool(w.gate.asked))
            w.gate.policy = policy(allow=["b.org"])
            gate.set()
            assert rcode(await waiting) == "REFUSED"
            assert w.gate.learned == []

    run(go())


# ------------------------------------------------------------------------------------------------ 19: transport


def test_answers_that_do_not_fit_send_the_client_to_tcp_and_open_nothing() -> None:
    async def go() -> None:
        many = [f"93.184.217.{n}" for n in range(60)]
        zone = "".join(f"a.org. 60 IN A {address}\n" for address in many)
        async with world(policy(allow=["a.org"]), zone) as w:
            for edns, fits in ((0, False), (512, False), (1100, True), (4096, True)):
                raw = await w.raw(question("a.org", edns=edns))
                reply = DNSRecord.parse(raw)
                assert (reply.header.tc, len(reply.rr)) == ((0, 60) if fits else (1, 0))
                assert len(raw) <= max(edns, 512)
                assert bool(w.gate.learned) is fits
            assert addresses(await w.ask("a.org", edns=0, tcp=True)) == many

    run(go())


def test_a_client_s_large_edns_size_does_not_make_us_fragment() -> None:
    async def go() -> None:
        zone = "".join(f"a.org. 60 IN A 93.184.217.{n}\n" for n in range(100))
        async with world(policy(allow=["a.org"]), zone) as w:
            assert (await w.ask("a.org", edns=65535)).header.tc == 1

    run(go())


def test_pipelined_tcp_queries_are_all_answered() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            queries = [question("a.org" if n % 2 else "b.org", edns=1232, ident=n) for n in range(100)]
            replies = await tcp_exchange(w.server.port, *queries)
            assert {reply[:2] for reply in replies} == {query[:2] for query in queries}

    run(go())


@pytest.mark.parametrize("qtype", ["ANY", "AXFR", "IXFR", "TKEY"])
def test_meta_types_are_refused(qtype: str) -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            assert rcode(await w.ask("a.org", qtype)) == "REFUSED"
            assert w.upstream.seen == []

    run(go())


def _with_word(query: bytes, at: int, word: int) -> bytes:
    return query[:at] + word.to_bytes(2, "big") + query[at + 2 :]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (_with_word(question("a.org"), 2, 0x2100), "NOTIMP"),
        (_with_word(question("a.org"), 2, 0x2900), "NOTIMP"),
        (_with_word(question("a.org"), 4, 0), "FORMERR"),
        (_with_word(question("a.org"), 4, 2), "FORMERR"),
        (_with_word(question("a.org"), 6, 1), "FORMERR"),
        (_with_word(question("a.org"), 21, 3), "REFUSED"),
        (question("a.org")[:-3], "FORMERR"),
        (question("a.org") + b"x", "FORMERR"),
        (question("a.org")[:12] + b"\xc0\x0c\0\1\0\1", "FORMERR"),
    ],
    ids=["status", "update", "no-question", "two-questions", "with-answer", "class-chaos", "short", "long", "pointer"],
)
def test_what_is_not_a_plain_query_gets_an_rcode(query: bytes, expected: str) -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            raw = await w.raw(query)
            assert (raw[:2], rcode(DNSRecord.parse(raw))) == (query[:2], expected)
            assert w.upstream.seen == []

    run(go())


def test_edns_version_1_gets_badvers() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            query = question("a.org", edns=1232)
            reply = DNSRecord.parse(await w.raw(query[:-5] + b"\x01" + query[-4:]))
            assert (reply.header.rcode, reply.ar[0].edns_rcode) == (0, 1)

    run(go())


def test_responses_and_stumps_are_met_with_silence() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            response = _with_word(question("a.org", ident=1), 2, 0x8180)
            loop = asyncio.get_running_loop()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.connect(("127.0.0.1", w.server.port))
                for datagram in (response, b"", b"\0", question("a.org")[:11]):
                    sock.send(datagram)
                sock.send(question("a.org", ident=2))
                # The order of one socket is kept: what comes first is the answer to the last.
                reply = await asyncio.wait_for(loop.sock_recv(sock, 4096), 5)
            assert reply[:2] == b"\0\2"

    run(go())


def test_upstream_servfail_is_servfail() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            w.upstream.rcode = 2
            reply = await w.ask("a.org")
            assert (rcode(reply), (ede(reply) or (0, ""))[0]) == ("SERVFAIL", 22)

    run(go())


def test_the_policy_s_upstreams_win_over_the_daemon_s() -> None:
    async def go() -> None:
        async with FakeUpstream("a.org. 60 IN A 93.184.216.99").serving() as other, world(policy(), ZONE) as w:
            w.gate.policy = policy(allow=["a.org"], upstreams=[other.text])
            assert addresses(await w.ask("a.org")) == ["93.184.216.99"]
            assert w.upstream.seen == []

    run(go())


def test_max_qps_refuses_what_is_over_it_and_counts() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE, max_qps=3) as w:
            codes = [rcode(await w.ask("a.org")) for _ in range(5)]
            assert codes == ["NOERROR"] * 3 + ["REFUSED"] * 2
            assert w.gate.counts == {True: 3, False: 2}
            w.clock.now += 1
            assert rcode(await w.ask("a.org")) == "NOERROR"

    run(go())


# ------------------------------------------------------------------------------------------------ 21: cache


def test_ttls_count_down_and_an_answer_ends_with_its_ttl() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), f"a.org. 30 IN A {PUBLIC}\n") as w:
            for age, ttl in ((0, 30), (0.9, 30), (1.0, 29), (12.5, 18), (29.9, 1)):
                w.clock.now = 1000.0 + age
                assert (await w.ask("a.org")).rr[0].ttl == ttl  # ready-made
                assert (await w.ask("a.org", edns=900 + int(age))).rr[0].ttl == ttl  # from the shared cache
            assert len(w.upstream.seen) == 1
            w.clock.now = 1030.0
            assert (await w.ask("a.org")).rr[0].ttl == 30
            assert len(w.upstream.seen) == 2

    run(go())


def test_ttl_0_is_not_cached() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), f"a.org. 0 IN A {PUBLIC}\n") as w:
            for _ in range(3):
                assert addresses(await w.ask("a.org")) == [PUBLIC]
            assert (len(w.upstream.seen), len(w.gate.learned)) == (3, 3)

    run(go())


def test_negative_answers_are_cached_by_their_soa() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org", "b.org"])) as w:
            w.upstream.rcode = 3
            assert rcode(await w.ask("a.org")) == "NXDOMAIN"
            await w.ask("a.org")
            assert len(w.upstream.seen) == 2  # without an SOA: not
            w.upstream.authority = RR.fromZone("org. 900 IN SOA ns.org. root.org. ( 1 2 3 4 50 )")
            for _ in range(3):
                assert rcode(await w.ask("b.org")) == "NXDOMAIN"
            assert len(w.upstream.seen) == 3
            w.clock.now += 50
            await w.ask("b.org")
            assert len(w.upstream.seen) == 4

    run(go())


def test_attachments_with_the_same_upstreams_share_answers_but_not_policies_or_leases() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w, world(policy(allow=["a.org"]), ZONE) as unused:
            other = unused.gate
            server = DnsServer(other, w.settings, w.cache, w.resolver, w.clock)
            await start(server)
            try:
                await w.ask("a.org")
                query = question("a.org", edns=1232)
                assert addresses(DNSRecord.parse((await udp_exchange(server.port, query))[0])) == [PUBLIC]
                assert len(w.upstream.seen) == 1
                assert other.learned == w.gate.learned  # each opened its own lease
                other.policy = policy(allow=["b.org"])
                assert rcode(DNSRecord.parse((await udp_exchange(server.port, query))[0])) == "REFUSED"  # policy first
                other.policy = policy(allow=["a.org"], upstreams=[unused.upstream.text])
                await udp_exchange(server.port, query)
                assert len(unused.upstream.seen) == 1  # other upstreams, other cache
            finally:
                await server.close()

    run(go())


def test_concurrent_equal_questions_go_upstream_once() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            w.upstream.hold = asyncio.Event()
            waiting = [asyncio.ensure_future(w.ask("a.org", edns=600 + n)) for n in range(10)]
            await until(lambda: w.server._handler._waiting == 10)
            w.upstream.hold.set()
            assert all(addresses(reply) == [PUBLIC] for reply in await asyncio.gather(*waiting))
            assert len(w.upstream.seen) == 1
            assert len(w.gate.learned) == 10

    run(go())


def test_nothing_of_the_client_s_message_but_the_question_goes_upstream() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            query = question("a.org", edns=1232)
            secret = query[:-2] + b"\x00\x0a\xfd\xe9\x00\x06SECRET"
            assert rcode(DNSRecord.parse(await w.raw(secret))) == "NOERROR"
            assert b"SECRET" not in w.upstream.seen[0]

    run(go())


# ------------------------------------------------------------------------------------------------ sockets


def test_udp_and_tcp_are_bound_on_exactly_one_address_and_port() -> None:
    async def go() -> None:
        async with world(policy(), ZONE) as w:
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                with socket.socket(socket.AF_INET, kind) as same, pytest.raises(OSError, match="in use"):
                    same.bind(("127.0.0.1", w.server.port))
                with socket.socket(socket.AF_INET, kind) as other:
                    other.bind(("127.0.0.2", w.server.port))

    run(go())


@pytest.mark.parametrize("taken", [socket.SOCK_DGRAM, socket.SOCK_STREAM], ids=["udp", "tcp"])
def test_a_taken_port_is_an_os_error_and_leaves_nothing_bound(taken: int) -> None:
    async def go() -> None:
        settings = DnsSettings()
        with socket.socket(socket.AF_INET, taken) as holder:
            holder.bind(("127.0.0.1", 0))
            if taken == socket.SOCK_STREAM:
                holder.listen()
            port = holder.getsockname()[1]
            async with world(policy()) as w:
                server = DnsServer(w.gate, settings, SharedCache(), Resolver(settings))
                with pytest.raises(OSError, match="in use"):
                    await server.start("127.0.0.1", port)
                await server.close()
            other = socket.SOCK_STREAM if taken == socket.SOCK_DGRAM else socket.SOCK_DGRAM
            with socket.socket(socket.AF_INET, other) as free:
                free.bind(("127.0.0.1", port))

    run(go())


def test_a_start_that_failed_can_be_tried_again() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            server = DnsServer(w.gate, w.settings, w.cache, w.resolver, w.clock)
            with pytest.raises(OSError, match="in use"):
                await server.start("127.0.0.1", w.server.port)
            await start(server)
            raw = (await udp_exchange(server.port, question("a.org", edns=1232)))[0]
            assert addresses(DNSRecord.parse(raw)) == [PUBLIC]
            await server.close()

    run(go())


class FullSocket:
    """A socket with some datagrams to read, which takes none while it is full."""

    def __init__(self, *datagrams: bytes) -> None:
        self.waiting = list(datagrams)
        self.sent: list[bytes] = []
        self.full = False

    def recvfrom(self, _size: int) -> tuple[bytes, tuple[str, int]]:
        if not self.waiting:
            raise BlockingIOError
        return self.waiting.pop(0), ("127.0.0.1", 1)

    def sendto(self, data: bytes, _address: object) -> None:
        if self.full:
            raise BlockingIOError
        self.sent.append(data)


def test_answers_are_dropped_not_kept_for_a_workload_that_does_not_take_them() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            await w.ask("a.org")
            sock = FullSocket()
            udp = server_module._Udp(sock, w.server._handler)  # type: ignore[arg-type]
            for full, sent in ((False, 1), (True, 1), (False, 2)):
                sock.full = full
                sock.waiting = [question("a.org", edns=1232)]
                assert not udp.take(time.monotonic() + 1)
                assert len(sock.sent) == sent

    run(go())


def test_a_slice_that_is_over_keeps_what_it_has_read_for_the_next() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            await w.ask("a.org")
            sock = FullSocket(*[question("a.org", edns=1232, ident=ident) for ident in range(5)])
            udp = server_module._Udp(sock, w.server._handler)  # type: ignore[arg-type]
            answered = []
            while udp.take(until=0.0):
                answered.append(len(sock.sent))
            assert answered == [0, 1, 2, 3, 4]
            assert [reply[:2] for reply in sock.sent] == [bytes((0, ident)) for ident in range(5)]

    run(go())


def test_serves_on_ipv6() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            server = DnsServer(w.gate, w.settings, w.cache, w.resolver, w.clock)
            await start(server, "::1")
            try:
                raw = (await udp_exchange(server.port, question("a.org", edns=1232), address="::1"))[0]
                assert addresses(DNSRecord.parse(raw)) == [PUBLIC]
            finally:
                await server.close()

    run(go())


def test_close_leaves_waiting_queries_unanswered_and_frees_the_port() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            w.upstream.hold = asyncio.Event()
            waiting = asyncio.ensure_future(w.ask("a.org"))
            await until(lambda: bool(w.upstream.seen))
            await w.server.close()
            w.upstream.hold.set()
            done, _ = await asyncio.wait({waiting}, timeout=0.2)
            assert not done
            waiting.cancel()
            assert w.gate.learned == []
            again = DnsServer(w.gate, w.settings, w.cache, w.resolver, w.clock)
            await again.start("127.0.0.1", w.server.port)
            assert again.port == w.server.port
            await again.close()

    run(go())


def test_dns_policy_without_upstreams_and_no_default_is_servfail_that_says_so() -> None:
    async def go() -> None:
        rules = Policy(mode=Mode.ALLOWLIST, dns=DnsPolicy(DnsMode.DISABLED))
        async with world(rules, upstreams=()) as w:
            reply = await w.ask("a.org")
            assert rcode(reply) == "SERVFAIL"
            assert "dns.upstreams" in (ede(reply) or (0, ""))[1]

    run(go())


def test_errors_of_the_gate_s_own_making_do_not_stop_the_server() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:

            def broken(_name: str, _addresses: object, _ttl_s: float) -> None:
                raise RuntimeError("a bug")

            learn = w.gate.learn
            w.gate.learn = broken  # type: ignore[method-assign,assignment]
            assert rcode(await w.ask("a.org")) == "SERVFAIL"
            w.gate.learn = learn  # type: ignore[method-assign]
            w.gate.refuse = UnavailableError("gone")
            assert rcode(await w.ask("a.org")) == "SERVFAIL"

    run(go())
