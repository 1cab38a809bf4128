"""The handler without sockets: garbage and mutated queries, bounds, what waits and what is dropped."""

from __future__ import annotations

from typing import Any

import pytest
from dnslib import DNSRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.dns import test_answer
from tests.unit.dns.test_answer import OWNER, build, least_ms, mixed, respond, wire
from tests.unit.dns.world import PUBLIC, Clock, Decision, FakeGate, addresses, ede, packed, policy, question, rcode, run

from netfence.dns import cut as cut_module
from netfence.dns import handler as handler_module
from netfence.dns.answer import Answer
from netfence.dns.cache import CacheKey, SharedCache
from netfence.dns.handler import Handler
from netfence.dns.limits import MAX_CUT_RECORDS, MAX_HOT_ENTRIES, MAX_HOT_KEY, MAX_RECORDS, MAX_REJUDGE
from netfence.dns.settings import DnsSettings
from netfence.dns.turns import Turns
from netfence.dns.wire import Query
from netfence.errors import NetfenceError, UnavailableError
from netfence.policy.modes import DnsMode

ANSWER = build(f"a.org. 300 IN A {PUBLIC}")


def scanned(data: bytes) -> Answer:
    """Scan an answer that arrived when a `Clock` begins."""
    return test_answer.scanned(data)._replace(received=1000.0)


class Upstreams:
    """Stands for the Resolver: keeps the questions until the test answers them, or answers at once."""

    def __init__(self, answer: bytes | None = None) -> None:
        self.answer = answer
        self.asked: list[tuple[CacheKey, Any]] = []
        self.turns = Turns()

    def resolve(self, key: CacheKey, _query: Query, _owner: object, done: Any) -> None:
        self.asked.append((key, done))
        if self.answer is not None:
            done(scanned(self.answer))


def handler(gate: FakeGate, upstreams: Upstreams, **options: Any) -> Handler:
    chosen = DnsSettings(upstreams=("192.0.2.53",), **options)
    return Handler(gate, chosen, SharedCache(), upstreams, Clock())  # type: ignore[arg-type]


def taken(subject: Handler, data: bytes, *, tcp: bool = False) -> list[bytes]:
    replies: list[bytes] = []
    assert subject.take(data, replies.append, tcp=tcp) or not replies
    return replies


QUERIES = [
    question("a.org", edns=1232, do=True),
    question("x.b.org", "HTTPS"),
    question("a.org", "ANY"),
    question("", "NS"),
]


def well_formed(data: bytes, replies: list[bytes]) -> None:
    """Check that there is silence, or one reply with the id of the query that dnslib can read."""
    assert len(replies) <= 1
    for reply in replies:
        assert reply[:2] == data[:2]
        assert reply[2] & 0x80
        if reply[4:6] == b"\0\1" and max(data[12:]) < 128:  # dnslib takes no labels but UTF-8
            DNSRecord.parse(reply)


@settings(max_examples=400)
@given(
    st.sampled_from(QUERIES),
    st.lists(st.tuples(st.integers(0, 60), st.binary(max_size=3), st.integers(0, 4)), max_size=4),
    st.sampled_from(list(DnsMode)),
)
def test_mutated_queries_get_silence_or_a_reply_with_their_id(
    query: bytes, edits: list[tuple[int, bytes, int]], mode: DnsMode
) -> None:
    data = query
    for at, new, gone in edits:
        data = data[:at] + new + data[at + gone :]
    # Not an exception: `take` would log and hide one, so go in below it.
    gate = FakeGate(policy(mode, allow=[".a.org"], deny=["b.org"]))
    if mode is DnsMode.PROXY:
        return
    replies: list[bytes] = []
    handler(gate, Upstreams())._take(data, replies.append, tcp=False)
    well_formed(data, replies)


@settings(max_examples=400)
@given(st.binary(max_size=200))
def test_garbage_gets_silence_or_a_reply_with_its_id(data: bytes) -> None:
    replies: list[bytes] = []
    handler(FakeGate(policy(allow=[".a.org"])), Upstreams())._take(data, replies.append, tcp=False)
    well_formed(data, replies)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(12, len(ANSWER)), st.binary(max_size=3), st.integers(0, 4)), max_size=3))
def test_mutated_answers_never_open_what_is_not_linked(edits: list[tuple[int, bytes, int]]) -> None:
    data = ANSWER
    for at, new, gone in edits:
        data = data[:at] + new + data[at + gone :]
    gate = FakeGate(policy(allow=["a.org"]))
    try:
        answer: Answer = scanned(data)
    except ValueError:
        return
    subject = handler(gate, Upstreams())
    replies: list[bytes] = []
    subject._take(question("a.org", edns=1232), replies.append, tcp=False)
    subject._resolver.asked[0][1](answer)  # type: ignore[attr-defined]
    assert len(replies) == 1
    assert gate.learned in ([], [("a.org", answer.addresses, float(min(answer.ttl_s, 86400)))])
    # Opened and answered go together.
    assert (replies[0][3] & 15 == 0 and bool(answer.addresses)) >= bool(gate.learned)


def test_too_many_waiting_queries_get_servfail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler_module, "MAX_OUTSTANDING", 2)
    gate, upstreams = FakeGate(policy(allow=[".a.org"])), Upstreams()
    subject = handler(gate, upstreams)
    assert [taken(subject, question(f"n{n}.a.org")) for n in range(2)] == [[], []]
    (reply,) = taken(subject, question("n9.a.org"))
    assert rcode(DNSRecord.parse(reply)) == "SERVFAIL"
    assert len(upstreams.asked) == 2
    upstreams.asked[0][1](UnavailableError("x"))
    assert taken(subject, question("n9.a.org")) == []  # there is room again


def test_a_policy_that_keeps_changing_ends_in_servfail() -> None:
    gate, upstreams = FakeGate(policy(allow=["a.org"])), Upstreams()
    subject = handler(gate, upstreams)
    replies: list[bytes] = []
    subject.take(question("a.org"), replies.append, tcp=False)
    for n in range(MAX_REJUDGE + 1):
        assert replies == []
        gate.policy = policy(allow=["a.org"], upstreams=[f"192.0.2.{n}:53"])
        upstreams.asked[-1][1](UnavailableError("x"))
    assert rcode(DNSRecord.parse(replies[0])) == "SERVFAIL"
    assert gate.learned == []


def test_an_answer_after_close_is_dropped() -> None:
    async def go() -> None:
        gate, upstreams = FakeGate(policy(allow=["a.org"])), Upstreams()
        subject = handler(gate, upstreams)
        replies = taken(subject, question("a.org"))
        await subject.close()
        upstreams.asked[0][1](scanned(ANSWER))
        assert (replies, gate.learned) == ([], [])

    run(go())


def test_a_closed_handler_leaves_nothing_in_the_shared_cache() -> None:
    async def go() -> None:
        gate, upstreams = FakeGate(policy(allow=["a.org"])), Upstreams()
        subject = handler(gate, upstreams)
        taken(subject, question("a.org"))
        await subject.close()
        upstreams.asked[0][1](scanned(ANSWER))
        assert len(subject._cache) == 0  # nobody would free it

    run(go())


def private(records: int) -> bytes:
    """Return an answer half of whose addresses have to be cut."""
    return respond([wire(OWNER, 1, mixed(n)) for n in range(records)])


def test_an_answer_too_large_for_the_client_is_not_even_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_module, "cut", None)
    gate = FakeGate(policy(allow=["a.org"]))
    subject = handler(gate, Upstreams(private(90)))
    (reply,) = taken(subject, question("a.org", edns=1232))
    assert (DNSRecord.parse(reply).header.tc, DNSRecord.parse(reply).rr, gate.learned) == (1, [], [])


def test_a_large_answer_that_needs_cutting_is_servfail_and_one_that_does_not_passes() -> None:
    gate = FakeGate(policy(allow=["a.org"]))
    subject = handler(gate, Upstreams(private(MAX_CUT_RECORDS + 1)))
    (reply,) = taken(subject, question("a.org", edns=1232), tcp=True)
    assert (rcode(DNSRecord.parse(reply)), gate.learned) == ("SERVFAIL", [])
    gate.policy = policy(allow=["a.org"], cidrs=["10.0.0.0/8"])
    (reply,) = taken(subject, question("a.org", edns=1232), tcp=True)
    assert len(DNSRecord.parse(reply).rr) == MAX_CUT_RECORDS + 1


def test_a_cached_answer_is_cut_once_for_all_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bytes] = []
    really = cut_module.cut

    def counting(query: Query, answer: Answer, stay: frozenset[bytes]) -> Answer:
        calls.append(query.question)
        return really(query, answer, stay)

    monkeypatch.setattr(cut_module, "cut", counting)
    gate = FakeGate(policy(allow=["a.org"]))
    subject = handler(gate, Upstreams(private(40)))
    for name in ("a.org", "A.org", "a.ORG"):
        (reply,) = taken(subject, question(name, edns=1232), tcp=True)
        assert len(addresses(DNSRecord.parse(reply))) == 20
        assert str(DNSRecord.parse(reply).q.qname) == name + "."
    assert len(calls) == 1
    gate.policy = policy(allow=["a.org"], cidrs=["10.0.0.1"])  # what may stay is asked of the policy of this moment
    (reply,) = taken(subject, question("a.org", edns=1232), tcp=True)
    assert "10.0.0.1" in addresses(DNSRecord.parse(reply))
    gate.policy = policy(allow=["a.org"])
    (reply,) = taken(subject, question("a.org", edns=1232), tcp=True)
    assert "10.0.0.1" not in addresses(DNSRecord.parse(reply))


@pytest.mark.parametrize("records", [MAX_CUT_RECORDS, MAX_RECORDS])
def test_a_hostile_answer_never_takes_5_ms(records: int) -> None:
    data = private(records)

    def arrives() -> None:
        subject = handler(FakeGate(policy(allow=["a.org"])), Upstreams(data))
        assert len(taken(subject, question("a.org", edns=1232), tcp=True)) == 1

    assert least_ms(arrives) < 5


def test_a_query_of_unusual_size_gets_no_ready_reply() -> None:
    subject = handler(FakeGate(policy(allow=["b.org"])), Upstreams())
    plain = question("a.org")
    for size, ready in ((MAX_HOT_KEY, True), (MAX_HOT_KEY + 1, False)):
        padding = size + 2 - len(plain) - 11 - 4  # OPT has 11 octets, an option's head 4
        opt = b"\0\0\x29\x04\xd0\0\0\0\0" + (padding + 4).to_bytes(2, "big")
        query = plain[:11] + b"\x01" + plain[12:] + opt + b"\0\x0c" + padding.to_bytes(2, "big") + bytes(padding)
        assert len(query[2:]) == size
        assert rcode(DNSRecord.parse(taken(subject, query)[0])) == "REFUSED"
        assert (subject.ready(query) is not None) is ready


def test_a_bug_of_ours_is_silence_or_servfail_and_one_log_line(capsys: pytest.CaptureFixture[str]) -> None:
    gate, upstreams = FakeGate(policy(allow=[".a.org"])), Upstreams()
    subject = handler(gate, upstreams)
    subject._cap_s = None  # type: ignore[assignment]
    for n in range(3):
        replies: list[bytes] = []
        subject.take(question(f"n{n}.a.org"), replies.append, tcp=False)
        upstreams.asked[-1][1](scanned(ANSWER))
        assert rcode(DNSRecord.parse(replies[0])) == "SERVFAIL"
    subject._settings = None  # type: ignore[assignment]
    assert taken(subject, question("a.org")) == []
    assert capsys.readouterr().out.count("dns_query_failed") == 1


def test_ready_replies_are_bounded() -> None:
    gate, upstreams = FakeGate(policy(allow=["b.org"])), Upstreams()
    subject = handler(gate, upstreams)
    for n in range(MAX_HOT_ENTRIES + 10):
        taken(subject, question(f"n{n}.org"))
    assert len(subject.hot) == MAX_HOT_ENTRIES
    assert subject.ready(question("n0.org")) is None
    assert subject.ready(question(f"n{MAX_HOT_ENTRIES + 9}.org")) is not None


def test_a_ready_reply_is_the_reply_made_the_long_way() -> None:
    gate, upstreams = FakeGate(policy(allow=["a.org"])), Upstreams(ANSWER)
    subject = handler(gate, upstreams)
    (first,) = taken(subject, question("a.org", edns=1232, ident=1))
    second = subject.ready(question("a.org", edns=1232, ident=2))
    assert second is not None
    assert (first[:2], second[:2], first[2:]) == (b"\0\1", b"\0\2", second[2:])
    assert gate.counts[True] == 2


def test_a_large_or_truncated_reply_is_not_kept_ready() -> None:
    many = build("".join(f"a.org. 60 IN A 93.184.217.{n}\n" for n in range(60)))
    gate, upstreams = FakeGate(policy(allow=["a.org"])), Upstreams(many)
    subject = handler(gate, upstreams)
    query = question("a.org")
    (reply,) = taken(subject, query, tcp=True)
    assert len(reply) > 512
    assert subject.ready(query) is None  # the same octets over UDP must get TC
    (reply,) = taken(subject, query)
    assert DNSRecord.parse(reply).header.tc == 1
    assert subject.ready(query) is None


def test_an_answer_that_cannot_be_changed_is_servfail() -> None:
    data = build("a.org. 60 IN A 10.0.0.1\na.org. 60 IN MX 10 mx.\n").replace(b"\0\x0a\x02mx\0", b"\0\x0a\x3fmx\0")
    gate = FakeGate(policy(allow=["a.org"]))
    (reply,) = taken(handler(gate, Upstreams(data)), question("a.org", edns=1232))
    assert rcode(DNSRecord.parse(reply)) == "SERVFAIL"
    assert "cannot be changed" in (ede(DNSRecord.parse(reply)) or (0, ""))[1]
    assert gate.learned == []


def test_audit_lets_the_control_plane_s_denial_through_unopened() -> None:
    async def go() -> None:
        gate, upstreams = FakeGate(policy(DnsMode.PROXY, audit=True)), Upstreams(ANSWER)

        async def deny(_name: str, _qtype: str) -> Decision:
            return Decision(allow=False, ips=packed("10.0.0.1"))

        gate.decide = deny
        subject = handler(gate, upstreams)
        replies: list[bytes] = []
        subject.take(question("a.org", edns=1232), replies.append, tcp=False)
        while subject._proxy._tasks:
            await next(iter(subject._proxy._tasks))
        assert addresses(DNSRecord.parse(replies[0])) == [PUBLIC]
        assert (gate.learned, [name for name, _, _ in gate.audits]) == ([], ["a.org"])

    run(go())


def test_failures_of_upstreams_are_counted_as_allowed_queries() -> None:
    gate, upstreams = FakeGate(policy(allow=["a.org"])), Upstreams()
    subject = handler(gate, upstreams)
    replies: list[bytes] = []
    subject.take(question("a.org", edns=1232), replies.append, tcp=False)
    failure: NetfenceError = UnavailableError("ask upstream: 192.0.2.53: timed out")
    upstreams.asked[0][1](failure)
    assert ede(DNSRecord.parse(replies[0])) == (22, "netfence: ask upstream: 192.0.2.53: timed out")
    assert gate.counts == {True: 1, False: 0}
