"""Ready-made replies: how long a body and an entry are good."""

from __future__ import annotations

import math

from dnslib import DNSRecord
from tests.unit.dns.test_answer import build, scanned
from tests.unit.dns.world import PUBLIC, question

from netfence.dns.hot import HotReplies, HotReply
from netfence.dns.limits import MAX_HOT_ANSWER, MAX_HOT_ENTRIES, MAX_HOT_KEY
from netfence.dns.message import relay
from netfence.dns.wire import parse_query


def entry(valid_until: float, now: float = 5.0, ttl_s: int = 60) -> HotReply:
    query, answer = parse_query(question("a.org", edns=1232)), scanned(build(f"a.org. {ttl_s} IN A {PUBLIC}"))
    age_s = int(now - answer.received)
    made = HotReply(relay(query, answer, age_s, 1000)[2:], 1, valid_until, allowed=True)
    made.counting(query, answer, 1000, None, now)
    return made


def ttl(made: HotReply) -> int:
    return int(DNSRecord.parse(b"\0\0" + made.body).rr[0].ttl)


def test_a_body_is_good_for_the_second_of_its_age() -> None:
    made = entry(65.0, now=7.5)
    assert (ttl(made), made.fresh_until) == (58, 8.0)
    assert made.current(7.9)
    assert ttl(made) == 58
    assert made.current(8.0)
    assert (ttl(made), made.fresh_until) == (57, 9.0)
    assert made.current(64.9)
    assert (ttl(made), made.fresh_until) == (1, 65.0)
    assert not made.current(65.0)


def test_an_entry_never_outlives_what_it_stands_on() -> None:
    made = entry(5.4)
    assert made.fresh_until == 5.4
    assert not made.current(5.4)


def test_a_reply_without_records_stays_as_it_is() -> None:
    made = HotReply(b"body", 1, math.inf, allowed=False)
    assert made.fresh_until == math.inf
    assert made.current(1e9)
    assert made.body == b"body"


def test_the_oldest_goes_first_and_a_new_one_is_young() -> None:
    hot = HotReplies()
    for n in range(MAX_HOT_ENTRIES):
        hot.store(b"%d" % n, entry(65.0))
    hot.store(b"0", entry(65.0))
    hot.store(b"new", entry(65.0))
    assert len(hot) == MAX_HOT_ENTRIES
    assert b"0" in hot
    assert b"1" not in hot


def test_large_keys_and_answers_are_not_kept() -> None:
    hot = HotReplies()
    hot.store(b"k" * MAX_HOT_KEY, entry(65.0))
    hot.store(b"k" * (MAX_HOT_KEY + 1), entry(65.0))
    assert list(map(len, hot)) == [MAX_HOT_KEY]
    query, answer = parse_query(question("a.org")), scanned(build(f"a.org. 60 IN A {PUBLIC}"))
    for size, kept in ((MAX_HOT_ANSWER, True), (MAX_HOT_ANSWER + 1, False)):
        made = HotReply(b"body", 1, 65.0, allowed=True)
        made.counting(query, answer._replace(raw=bytes(size)), 1000, None, 5.0)
        hot.store(b"key", made)  # in the place of the one before, which is over
        assert (b"key" in hot) is kept
