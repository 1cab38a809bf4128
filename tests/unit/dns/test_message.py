"""Building replies: octets against dnslib, made answers, EDE."""

from __future__ import annotations

from dnslib import DNSRecord
from tests.unit.dns.test_answer import build, scanned
from tests.unit.dns.world import PUBLIC, PUBLIC6, addresses, ede, packed, question

from netfence.dns.limits import MAX_EDE_TEXT
from netfence.dns.message import Ede, from_addresses, relay, reply, truncated, upstream_query
from netfence.dns.wire import parse_query


def test_reply_without_records_is_what_dnslib_reads() -> None:
    query = parse_query(question("A.org", "TXT", edns=4096, do=True, ident=7))
    record = DNSRecord.parse(reply(query, 5, Ede(17, "netfence: because")))
    assert (record.header.id, record.header.qr, record.header.rd, record.header.ra) == (7, 1, 1, 1)
    assert (record.header.aa, record.header.tc, record.header.rcode) == (0, 0, 5)
    assert str(record.q.qname) == "A.org."
    assert ede(record) == (17, "netfence: because")
    assert (record.ar[0].edns_len, record.ar[0].edns_do, record.ar[0].edns_ver) == (1232, 1, 0)


def test_ede_text_is_cut_between_characters() -> None:
    assert Ede(0, "ü" * 500).text == b"\xc3\xbc" * (MAX_EDE_TEXT // 2)
    assert len(Ede(0, "a" + "ü" * 500).text) == MAX_EDE_TEXT - 1


def test_truncated_has_only_the_question() -> None:
    record = DNSRecord.parse(truncated(parse_query(question("a.org"))))
    assert (record.header.tc, record.rr, str(record.q.qname)) == (1, [], "a.org.")


def test_relay_keeps_the_records_and_replaces_the_rest() -> None:
    data = build(f"a.org. 300 IN CNAME b.org.\nb.org. 60 IN A {PUBLIC}\n", authority="org. 900 IN NS ns.org.")
    query = parse_query(question("A.ORG", edns=1232, ident=99))
    record = DNSRecord.parse(relay(query, scanned(data), 7, 200))
    upstream = DNSRecord.parse(data)
    assert record.header.id == 99
    assert b"A.ORG" in str(record.q.qname).encode()
    assert [(rr.rtype, rr.rdata) for rr in record.rr] == [(rr.rtype, rr.rdata) for rr in upstream.rr]
    assert [rr.ttl for rr in record.rr] == [193, 53]
    assert [rr.ttl for rr in record.auth] == [193]
    assert len(record.ar) == 1


def test_a_ttl_never_counts_below_0() -> None:
    record = DNSRecord.parse(relay(parse_query(question("a.org")), scanned(build(f"a.org. 5 IN A {PUBLIC}")), 9, 100))
    assert record.rr[0].ttl == 0


def test_upstream_query() -> None:
    key = parse_query(question("a.org")).key
    record = DNSRecord.parse(upstream_query(key, do=True, cd=True))
    assert (record.header.rd, record.header.cd, record.header.ad) == (1, 1, 1)
    assert (record.ar[0].edns_len, record.ar[0].edns_do) == (1232, 1)
    assert DNSRecord.parse(upstream_query(key, do=False, cd=False)).header.cd == 0


def test_from_addresses_takes_the_family_of_the_question() -> None:
    given = packed(PUBLIC, PUBLIC6, "::ffff:10.0.0.1")
    answer = from_addresses(parse_query(question("a.org")), given, 30, 5.0)
    assert answer.addresses == packed(PUBLIC, "10.0.0.1")
    assert (answer.ttl_s, answer.life_s, answer.received) == (30, 30.0, 5.0)
    assert from_addresses(parse_query(question("a.org", "AAAA")), given, 30, 5.0).addresses == packed(PUBLIC6)
    assert from_addresses(parse_query(question("a.org", "MX")), given, 30, 5.0).addresses == ()


def test_made_answers_keep_names_that_dnslib_refuses() -> None:
    name = b"\x03a.b\x02\xff\x00\x03oRg\x00"
    query = parse_query(question("a.org")[:12] + name + b"\x00\x01\x00\x01")
    data = relay(query, from_addresses(query, packed(PUBLIC), 30, 0.0), 0, 100)
    assert data[12 : 12 + len(query.question)] == query.question
    plain = data[:12] + b"\x03a.b\x02xx\x03oRg\x00" + data[12 + len(name) :]
    assert addresses(DNSRecord.parse(plain)) == [PUBLIC]
