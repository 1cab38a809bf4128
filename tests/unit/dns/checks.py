"""Our code's understanding of broken messages against dnslib's (reading.py).

The checks raise AssertionError for a difference, and whatever our code raises beyond its own refusals; they return what
came of the message, for counting.
"""

from __future__ import annotations

import contextlib
import random
import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, TypeVar

from dnslib import CLASS, RCODE
from tests.unit.dns.mutants import ANY_NAME, DENIED, asked_in, mutated_answer, mutated_query
from tests.unit.dns.reading import MAX_TTL, OPT_TYPE, SERVICES, Told, meaning, read, records_of, text, ttl_of
from tests.unit.dns.world import Clock, FakeGate, policy

from netfence.dns.answer import Answer, scan
from netfence.dns.cache import CacheKey, SharedCache
from netfence.dns.cut import cut
from netfence.dns.exchange import matches
from netfence.dns.handler import Handler
from netfence.dns.message import relay
from netfence.dns.settings import DnsSettings
from netfence.dns.turns import Turns
from netfence.dns.wire import Query, Refusal, WireError, parse_query
from netfence.errors import UnavailableError
from netfence.policy.special import is_special

SLOW_S: Final = 0.02  # one message, least of three: four times what a hostile answer may take in test_handler.py
NO_CAP: Final = 2**31

T = TypeVar("T")


def timely(work: Callable[[], T]) -> T:
    """Return what `work` returns, or raise what it raises; AssertionError when it always takes more than `SLOW_S`."""
    begin = time.thread_time()
    try:
        return work()
    finally:
        took = time.thread_time() - begin
        if took > SLOW_S and min(took, _took(work), _took(work)) > SLOW_S:
            raise AssertionError(f"{took:.3f} s for one message")


def _took(work: Callable[[], object]) -> float:
    begin = time.thread_time()
    with contextlib.suppress(Exception):
        work()
    return time.thread_time() - begin


def check_query(data: bytes) -> str:
    """Compare our parsing of a query with dnslib's; return what became of it."""
    try:
        query = timely(lambda: parse_query(data))
    except WireError:
        return "silence"
    except Refusal as refusal:
        return f"rcode {refusal.rcode}"
    told = read(data)
    if told is None:
        return "taken, not read by dnslib"
    assert (told.header.q, told.header.get_qr(), told.header.get_opcode(), told.end) == (1, 0, 0, len(data))
    assert (query.name, query.qtype, told.qclass) == (text(told.qname), told.qtype, CLASS.IN)
    assert query.question == data[12 : 12 + len(query.question)] == asked_in(data)
    opts = [record for record in told.records if record.rtype == OPT_TYPE]
    assert (len(opts), query.do) == (int(query.edns), any(record.ttl & 0x8000 for record in opts))
    return "taken"


def check_answer(asked: bytes, data: bytes) -> str:
    """Compare what we read in an answer, relay of it and cut out of it with dnslib; return what came of it."""
    query = parse_query(asked)
    if not matches(data, query.id, query.question):
        return "no match"
    try:
        answer = timely(lambda: scan(data, len(query.question), query.name, query.qtype, 1000.0))
    except WireError:
        return "refused"
    if answer.truncated:
        assert (answer.addresses, answer.chain, answer.special, answer.life_s) == ((), (), frozenset(), 0.0)
        return "truncated"
    told = read(data)
    if told is None:
        _check_cut(query, answer, frozenset())
        return "taken, not read by dnslib"
    _agree(answer, told, len(data))
    if answer.end:
        _check_relay(query, answer, told)
    for stay in {frozenset[bytes](), answer.special} if answer.special or not answer.end else ():
        _check_cut(query, answer, stay)
    return "taken"


def _agree(answer: Answer, told: Told, length: int) -> None:
    """Check that we and dnslib read the same in a message."""
    records = records_of(told)
    assert (told.end, told.header.get_qr(), told.header.q) == (length, 1, 1)
    assert {record.rclass for record in records} <= {CLASS.IN}
    assert [ttl for _, ttl in answer.ttls] == [ttl_of(record) for record in records]
    meant = meaning(told)
    assert (answer.rcode, answer.chain, answer.addresses) == (told.rcode, meant.chain, meant.addresses)
    if answer.addresses:
        assert answer.ttl_s == meant.ttl_s
    assert answer.special == {address for record in records for address in record.addresses if is_special(address)}
    assert answer.counts == tuple(sum(record.section == section for record in records) for section in range(3))
    assert answer.life_s <= min((ttl_of(record) for record in records if record.section == 0), default=3 * 3600)


def _check_relay(query: Query, answer: Answer, told: Told) -> None:
    """Check that the client reads what we read, in its own question's answer, with TTLs capped and counted down."""
    before = records_of(told)
    fresh = relay(query, answer, 0, NO_CAP)
    assert fresh[:2] == query.id
    assert fresh[12 : 12 + len(query.question)] == query.question
    aged = relay(query, answer, 7, 50)
    for (at, ttl), record in zip(answer.ttls, before, strict=True):
        assert struct.unpack_from("!I", fresh, at) == (ttl_of(record),)
        assert struct.unpack_from("!I", aged, at) == (max(min(ttl, 50) - 7, 0),)
    if max((record.ttl for record in before), default=0) <= MAX_TTL:  # a name may be read through the octets of a TTL
        after = read(fresh)
        assert after is not None
        assert [record.said for record in records_of(after)] == [record.said for record in before]


def _check_cut(query: Query, answer: Answer, stay: frozenset[bytes]) -> None:
    """Check that a cut answer has all that it may have and nothing else; those with an rcode in OPT nobody cuts."""
    if answer.rcode > 15:
        return
    try:
        left = timely(lambda: cut(query, answer, stay))
    except WireError:
        return
    told = read(left.raw)
    assert told is not None
    _agree(left, told, len(left.raw))
    expected = [address for address in answer.addresses if address not in answer.special - stay]
    if query.qtype in SERVICES:  # a record with a mandatory hint goes whole
        assert set(left.addresses) <= set(expected)
    else:
        assert (list(left.addresses), left.chain) == (expected, answer.chain)


class _Upstream:
    """Stands for the Resolver: gives one answer, as `Resolver` would."""

    def __init__(self, data: bytes) -> None:
        self._data, self.turns = data, Turns()

    def resolve(self, _key: CacheKey, query: Query, _owner: object, done: Any) -> None:
        try:
            answer = scan(self._data, len(query.question), query.name, query.qtype, 1000.0)
        except WireError:
            done(UnavailableError("refused"))
            return
        bad = answer.truncated or answer.rcode in (RCODE.SERVFAIL, RCODE.REFUSED) or answer.rcode > 15
        done(UnavailableError("failed") if bad else answer)


class _Served(Handler):
    """A handler that hides no bug of its own."""

    def _log(self, event: str, error: Exception) -> None:
        raise AssertionError(event) from error


POLICY: Final = policy(allow=[ANY_NAME], deny=[DENIED])
_SETTINGS: Final = DnsSettings(upstreams=("192.0.2.53",))


def check_served(asked: bytes, data: bytes) -> str:
    """Serve a client of whom we ask upstream and get this; check what is opened, and that what it is told is open."""
    query = parse_query(asked)
    if not matches(data, query.id, query.question):
        return "no match"
    gate = FakeGate(POLICY)
    served = _Served(gate, _SETTINGS, SharedCache(), _Upstream(data), Clock())  # type: ignore[arg-type]
    replies: list[bytes] = []
    assert served._take(asked, replies.append, tcp=True)
    [reply] = replies
    assert reply[:2] == asked[:2]
    assert reply[12 : 12 + len(query.question)] == query.question
    opened = {address for _, addresses, _ in gate.learned for address in addresses}
    assert {name for name, _, _ in gate.learned} <= {query.name}
    told, came = read(reply), read(data)
    if told is None or came is None:
        return "not read by dnslib"
    if opened:
        assert opened <= {address for address in meaning(came).addresses if not is_special(address)}
    if max((record.ttl for record in came.records), default=0) <= NO_CAP:
        assert opened == set(meaning(told).addresses)
    return f"rcode {told.header.rcode}, {'opened' if opened else 'shut'}"


class Fuzz:
    """Rounds of one broken query and one broken answer, from a seed; an error tells seed, round and octets."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.done = 0

    def rounds(self, number: int) -> Counter[str]:
        """Do the next `number` rounds, of which each depends on seed and number alone; count what came of them."""
        outcomes: Counter[str] = Counter()
        for _ in range(number):
            rng = random.Random(f"{self.seed} {self.done}")
            broken_query, (asked, data) = mutated_query(rng), mutated_answer(rng)
            try:
                outcomes["query: " + check_query(broken_query)] += 1
                outcomes["answer: " + check_answer(asked, data)] += 1
                outcomes["served: " + check_served(asked, data)] += 1
            except BaseException as error:
                messages = f"query {broken_query.hex()}\nasked {asked.hex()}\nanswer {data.hex()}"
                error.add_note(f"NETFENCE_SEED={self.seed}, round {self.done}:\n{messages}")
                raise
            self.done += 1
        return outcomes
