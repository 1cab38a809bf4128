"""Answers with special-purpose addresses cut out: what goes with them, and what it may cost."""

from __future__ import annotations

import pytest
from dnslib import QTYPE, RR, DNSRecord
from dnslib.buffer import Buffer
from tests.unit.dns.test_answer import (
    OWNER,
    TEXT,
    build,
    least_ms,
    long_names,
    mixed,
    pointer,
    pointer_chain,
    respond,
    scanned,
    wire,
)
from tests.unit.dns.world import PUBLIC, addresses, packed, question

from netfence.dns import cut as cut_module
from netfence.dns.answer import Answer, scan
from netfence.dns.cut import Cuts, cut, cut_hints
from netfence.dns.limits import MAX_CUT_RECORDS, MAX_CUTS, MAX_RECORDS
from netfence.dns.message import relay
from netfence.dns.wire import Query, WireError, parse_query

QUERY = parse_query(question("a.org"))

SIGNED = f"""
a.org. 60 IN A 10.0.0.1
a.org. 60 IN A {PUBLIC}
a.org. 60 IN RRSIG A 13 2 300 20220919092245 20220917072245 34505 a.org. AAAA
a.org. 60 IN RRSIG TXT 13 2 300 20220919092245 20220917072245 34505 a.org. AAAA
"""


def test_cut_takes_the_signature_of_what_it_changed() -> None:
    data = bytearray(build(SIGNED))
    data[3] |= 0x20
    answer = scanned(bytes(data))
    query = parse_query(question("a.org", do=True, edns=1232))
    changed = cut(query, answer, frozenset())
    record = DNSRecord.parse(relay(query, changed, 0, 1000))
    assert addresses(record) == [PUBLIC]
    assert [rr.rdata.covered for rr in record.rr if rr.rtype == QTYPE.RRSIG] == [QTYPE.TXT]
    assert not changed.authentic
    assert changed.special == frozenset()
    same = cut(query, answer, answer.special)
    assert same.authentic
    assert same.addresses == answer.addresses


def test_cut_refuses_what_dnslib_cannot_read() -> None:
    # An MX whose name runs past its RDATA: we do not look into MX, dnslib does.
    data = build("a.org. 60 IN A 10.0.0.1\na.org. 60 IN MX 10 mx.\n", opt=False)
    broken = data.replace(b"\0\x0a\x02mx\0", b"\0\x0a\x3fmx\0")
    with pytest.raises(WireError, match="cut short"):
        cut(parse_query(question("a.org")), scanned(broken), frozenset())
    long = data.replace(b"\0\x06\0\x0a\x02mx\0", b"\0\x07\0\x0a\x02mx\0\0")
    with pytest.raises(WireError, match="wrong length for dnslib"):
        cut(parse_query(question("a.org")), scanned(long), frozenset())
    escaped = respond([wire(b"\x01\xff" + OWNER, 1, mixed(1))])
    with pytest.raises(WireError, match="UnicodeDecodeError in dnslib"):
        cut(parse_query(question("a.org")), scanned(escaped), frozenset())


def test_types_whose_names_cannot_be_moved_are_refused() -> None:
    with pytest.raises(WireError, match="cannot move"):  # 14: MINFO
        cut(QUERY, scanned(respond([wire(OWNER, 1, mixed(1)), wire(OWNER, 14, OWNER * 2)])), frozenset())


def test_other_records_keep_their_octets_and_names() -> None:
    zone = f'a.org. 60 IN A 10.0.0.1\na.org. 60 IN A {PUBLIC}\na.org. 60 IN TXT "x"\na.org. 60 IN MX 5 mx.a.org.\n'
    rest = "ns.a.org. 60 IN AAAA fd00::1\nns.a.org. 60 IN SRV 1 2 3 b.a.org.\n"
    data = build(zone, authority="org. 900 IN NS ns.a.org.\norg. 900 IN SOA m.org. r.org. 1 2 3 4 5", additional=rest)
    left = cut(QUERY, scanned(data), frozenset())
    after, before = DNSRecord.parse(left.raw), DNSRecord.parse(data)
    assert [str(rr) for rr in after.rr] == [str(rr) for rr in before.rr[1:]]
    assert [str(rr) for rr in after.auth] == [str(rr) for rr in before.auth]
    assert [str(rr) for rr in after.ar] == [str(before.ar[1])]


# --------------------------------------------------------------------------------------- bounds, and what is kept


def many(records: int) -> Answer:
    return scanned(respond([wire(OWNER, 1, mixed(n)) for n in range(records)]))


def test_an_answer_of_too_many_records_is_not_cut() -> None:
    assert len(cut(QUERY, many(MAX_CUT_RECORDS), frozenset()).addresses) == MAX_CUT_RECORDS // 2
    with pytest.raises(WireError, match="records"):
        cut(QUERY, many(MAX_CUT_RECORDS + 1), frozenset())


def exchanges(records: int, target: bytes) -> bytes:
    """Return MX records, each with its own exchange, and a private address."""
    made = [wire(OWNER, 15, b"\0\5\x05%05d" % n + target) for n in range(records - 1)]
    return respond([*made, wire(OWNER, 1, mixed(1))], 15)


def test_names_within_rdata_have_a_budget() -> None:
    # The scan does not read them; dnslib does.
    assert len(cut(QUERY, scanned(exchanges(100, OWNER), qtype="MX"), frozenset()).ttls) == 99
    with pytest.raises(WireError, match="names"):
        cut(QUERY, scanned(exchanges(100, b"\1a" * 100 + b"\0"), qtype="MX"), frozenset())
    links = b"".join(pointer(12 if n == 0 else TEXT + 2 * (n - 1)) for n in range(500))
    records = [wire(OWNER, 16, links), wire(OWNER, 15, b"\0\5" + pointer(TEXT + 998)), wire(OWNER, 1, mixed(1))]
    with pytest.raises(WireError, match="pointer"):
        cut(QUERY, scanned(respond(records, 15), qtype="MX"), frozenset())


HOSTILE = {
    "records": respond([wire(OWNER, 1, mixed(n)) for n in range(MAX_CUT_RECORDS)]),
    "all-records": respond([wire(OWNER, 1, mixed(n)) for n in range(MAX_RECORDS)]),
    "pointers": pointer_chain(MAX_CUT_RECORDS, 63),
    "short-labels": long_names(20, b"b"),
    "usual-labels": long_names(50, b"bcdefgh"),
    "labels-in-rdata": exchanges(17, b"\1a" * 100 + b"\0"),
    "names-in-rdata": exchanges(MAX_CUT_RECORDS, OWNER),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=list(HOSTILE))
def test_cutting_a_hostile_answer_never_takes_5_ms(data: bytes) -> None:
    answer = scanned(data)
    assert least_ms(lambda: cut(QUERY, answer, frozenset())) < 5


def test_what_had_to_go_and_is_left_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = scanned(build(SIGNED))
    monkeypatch.setattr(cut_module, "ADDRESS_LENGTH", {})  # a bug: addresses are overlooked
    with pytest.raises(WireError, match="left"):
        cut(QUERY, answer, frozenset())
    assert cut(QUERY, answer, answer.special).addresses == answer.addresses


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    """Return a list that grows by every answer that is really cut."""
    calls: list[Answer] = []

    def count(query: Query, answer: Answer, stay: frozenset[bytes]) -> Answer:
        calls.append(answer)
        return cut(query, answer, stay)

    monkeypatch.setattr(cut_module, "cut", count)
    return calls


def test_a_cached_answer_is_cut_once_for_what_may_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, cuts, answer = counted(monkeypatch), Cuts(), many(4)
    first = cuts.cut(QUERY, answer, frozenset())
    assert cuts.cut(QUERY, answer, frozenset()) is first
    assert len(calls) == 1
    stay = frozenset([mixed(1)])
    assert cuts.cut(QUERY, answer, stay).special == stay
    assert cuts.cut(QUERY, answer, frozenset()).special == frozenset()
    assert cuts.cut(QUERY, many(4), frozenset()) is not first  # an equal answer, but another
    assert len(calls) == 4


def test_that_an_answer_cannot_be_cut_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, cuts, answer = counted(monkeypatch), Cuts(), many(MAX_CUT_RECORDS + 1)
    for _ in range(2):
        with pytest.raises(WireError, match="records"):
            cuts.cut(QUERY, answer, frozenset())
    assert len(calls) == 1


def test_cut_answers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, cuts = counted(monkeypatch), Cuts()
    answers = [many(3) for _ in range(MAX_CUTS + 1)]
    for answer in answers:
        cuts.cut(QUERY, answer, frozenset())
    assert len(cuts._kept) == MAX_CUTS
    cuts.cut(QUERY, answers[-1], frozenset())
    assert len(calls) == MAX_CUTS + 1
    cuts.cut(QUERY, answers[0], frozenset())
    assert len(calls) == MAX_CUTS + 2
    short = many(3)._replace(life_s=0.0)
    for _ in range(2):
        cuts.cut(QUERY, short, frozenset())  # not cached, so nobody meets it again
    assert len(calls) == MAX_CUTS + 4


def hints(rr: str) -> bytes:
    buffer = Buffer()
    RR.fromZone(f"a.org. 60 IN HTTPS {rr}")[0].rdata.pack(buffer)
    return bytes(buffer.data)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"1 . ipv4hint={PUBLIC}", f"1 . ipv4hint={PUBLIC}"),
        (f"1 x.org. alpn=h2 ipv4hint=10.0.0.1,{PUBLIC} port=8443", f"1 x.org. alpn=h2 ipv4hint={PUBLIC} port=8443"),
        ("1 . alpn=h2 ipv4hint=10.0.0.1 ipv6hint=fd00::1", "1 . alpn=h2"),
        ("1 . mandatory=alpn alpn=h2 ipv4hint=10.0.0.1", "1 . mandatory=alpn alpn=h2"),
        ("1 . mandatory=ipv4hint ipv4hint=10.0.0.1", None),
        ("0 x.org.", "0 x.org."),
    ],
)
def test_hints_are_cut(before: str, after: str | None) -> None:
    gone = set(packed("10.0.0.1", "fd00::1"))
    assert cut_hints(hints(before), gone.__contains__) == (None if after is None else hints(after))


def test_svcb_records_are_cut_like_https() -> None:
    raw = hints("1 . ipv4hint=10.0.0.1").hex().upper()
    data = _svcb(raw)
    query = parse_query(question("a.org")[:-4] + b"\0\x40\0\1")
    answer = scanned_as(data, 64)
    assert answer.addresses == packed("10.0.0.1")
    assert cut(query, answer, frozenset()).addresses == ()


def _svcb(raw: str) -> bytes:
    data = build("a.org. 60 IN HTTPS 1 . ipv4hint=10.0.0.1", qtype="HTTPS")
    assert bytes.fromhex(raw) in data
    return data.replace(b"\0\x41\0\1", b"\0\x40\0\1")


def scanned_as(data: bytes, qtype: int) -> Answer:
    return scan(data, 11, "a.org", qtype, 0.0)
