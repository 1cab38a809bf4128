"""DNS messages gone wrong, drawn from a `random.Random` or, as numbers, by hypothesis.

`CORPUS` holds what dnslib builds, of all kinds; `mutated` breaks a message by a list of edits; `composed` makes answers
of records that are well formed each by itself.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from dnslib import EDNS0, RCODE, RR, DNSRecord, EDNSOption
from tests.unit.dns.reading import CNAME_TYPE, HINTS, OPT_TYPE, SERVICES, read
from tests.unit.dns.world import PUBLIC, PUBLIC6, packed, question

NAME: Final = "w000000.example.test"
ANY_NAME: Final = "*.example.test"
DENIED: Final = "denied.test"
EXTREMES: Final = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

Edit = tuple[int, int, int]
"""What, where and with which value, each 0 to 65,535 and taken modulo what there is."""

_NS = "ns.example.test."
_SOA = f"example.test. 900 IN SOA {_NS} root.example.test. 1 3600 600 86400 60"
_ZONES: Final[dict[str, Sequence[str]]] = {
    "A": [f"{NAME}. 300 IN A {PUBLIC}"],
    "A many": [f"{NAME}. {60 + n} IN A 93.184.{n}.7" for n in range(30)],
    "A private": [f"{NAME}. 300 IN A {address}" for address in (PUBLIC, "10.0.0.1", "127.0.0.1", "169.254.169.254")],
    "A chain": [
        f"{NAME}. 300 IN CNAME a.b.test.",
        "a.b.test. 30 IN CNAME C.d.test.",
        f"c.d.test. 60 IN A {PUBLIC}",
        "stray.test. 60 IN A 93.184.216.66",
    ],
    "A denied": [f"{NAME}. 300 IN CNAME {DENIED}.", f"{DENIED}. 60 IN A {PUBLIC}"],
    "A loop": [f"{NAME}. 300 IN CNAME a.b.test.", f"a.b.test. 30 IN CNAME {NAME}."],
    "AAAA": [f"{NAME}. 300 IN AAAA {PUBLIC6}", f"{NAME}. 300 IN AAAA fd00::1", f"{NAME}. 300 IN AAAA ::ffff:a00:1"],
    "HTTPS": [
        f"{NAME}. 300 IN HTTPS 1 . alpn=h2,h3 ipv4hint={PUBLIC},10.0.0.2 ipv6hint={PUBLIC6},fd00::2 port=8443",
        f"{NAME}. 60 IN HTTPS 2 svc.example.test. mandatory=ipv4hint ipv4hint=10.0.0.3",
    ],
    "CNAME": [f"{NAME}. 300 IN CNAME a.b.test."],
    "TXT": [f'{NAME}. 300 IN TXT "{"netfence " * 20}" "second"'],
    "MX": [f"{NAME}. 300 IN MX 10 mx.example.test."],
    "SRV": [f"{NAME}. 300 IN SRV 1 2 443 srv.example.test."],
    "NS": [f"{NAME}. 300 IN NS {_NS}"],
    "PTR": [f"{NAME}. 300 IN PTR ptr.example.test."],
    "SOA": [_SOA.replace("example.test.", f"{NAME}.", 1)],
    "CAA": [f'{NAME}. 300 IN CAA 0 issue "ca.test"'],
    "NAPTR": [f'{NAME}. 300 IN NAPTR 1 2 "u" "E2U+sip" "!^.*$!sip:a@b!" .'],
    "DS": [f"{NAME}. 300 IN DS 1 8 2 {'ab' * 32}"],
    "TLSA": [f"{NAME}. 300 IN TLSA 3 1 1 {'cd' * 32}"],
    "NXDOMAIN": [],
    "SERVFAIL": [],
}


class Sample(NamedTuple):
    """A query, its honest answer, and where a lie in it hurts: counts, owners, types, TTLs, lengths, RDATA."""

    kind: str
    query: bytes
    answer: bytes
    marks: tuple[int, ...]


def _sample(kind: str, zone: Sequence[str], *, do: bool = False) -> Sample:
    qtype = kind.partition(" ")[0]
    rcode = qtype if qtype in ("NXDOMAIN", "SERVFAIL") else "NOERROR"
    asked = DNSRecord.parse(question(NAME, qtype if rcode == "NOERROR" else "A", edns=1232, do=do))
    reply = asked.reply(aa=0, ra=1)
    reply.header.rcode = getattr(RCODE, rcode)
    for line in zone:
        reply.add_answer(*RR.fromZone(line))
    if rcode == "NXDOMAIN" or do:
        reply.add_auth(*RR.fromZone(_SOA))
    if do:
        reply.add_ar(*RR.fromZone(f"{_NS} 60 IN A 10.1.1.1"))
    options = [EDNSOption(10, bytes(16)), EDNSOption(3, b"ns1")] if do else []
    reply.add_ar(EDNS0(udp_len=4096, flags="do" if do else "", opts=options))
    answer = bytes(reply.pack())
    return Sample(kind, bytes(asked.pack()), answer, (*range(2, 12), *_marks(answer)))


def _marks(data: bytes) -> Iterable[int]:
    told = read(data)
    assert told is not None
    for record in told.records:
        yield from range(record.at - 10, record.at)  # type, class, TTL, length
        yield from (
            record.begin,
            record.begin,
            record.begin + 1,
            record.at,
            record.at + 1,
            record.at + len(record.rdata),
        )


CORPUS: Final = [
    *(_sample(kind, zone) for kind, zone in _ZONES.items()),
    *(
        _sample(kind, _ZONES[kind], do=True)
        for kind in ("A", "A chain", "A private", "AAAA", "HTTPS", "MX", "NXDOMAIN")
    ),
]


def mutated(data: bytes, marks: Sequence[int], edits: Iterable[Edit], others: Sequence[bytes]) -> bytes:
    """Return the message with these edits made, one after another; `others` are what may be spliced in."""
    out = bytearray(data)
    for what, where, value in edits:
        if not out:
            break
        at = marks[(where >> 2) % len(marks)] if where & 3 and marks else where >> 2
        _EDITS[what % len(_EDITS)](out, at % len(out), value, others)
    return bytes(out[:65_535])


def _flip(out: bytearray, at: int, value: int, _others: Sequence[bytes]) -> None:
    out[at] ^= 1 << value % 8


def _octet_set(out: bytearray, at: int, value: int, _others: Sequence[bytes]) -> None:
    out[at] = value & 255


def _number(out: bytearray, at: int, value: int, _others: Sequence[bytes]) -> None:
    out[at : at + 2] = value.to_bytes(2, "big")


def _near(out: bytearray, at: int, value: int, _others: Sequence[bytes]) -> None:
    out[at] = (out[at] + (-2, -1, 1, 2)[value % 4]) & 255


def _extreme(out: bytearray, at: int, value: int, _others: Sequence[bytes]) -> None:
    out[at : at + 4] = EXTREMES[value % len(EXTREMES)].to_bytes(4, "big")


def _pointer(out: bytearray, at: int, value: int, _others: Sequence[bytes]) -> None:
    out[at : at + 2] = (0xC000 | value % (len(out) + 4)).to_bytes(2, "big")


def _truncate(out: bytearray, at: int, _value: int, _others: Sequence[bytes]) -> None:
    del out[at:]


def _delete(out: bytearray, at: int, value: int, _others: Sequence[bytes]) -> None:
    del out[at : at + 1 + value % 12]


def _insert(out: bytearray, at: int, value: int, _others: Sequence[bytes]) -> None:
    out[at:at] = value.to_bytes(2, "big") * (1 + value % 5)


def _copy(out: bytearray, at: int, value: int, _others: Sequence[bytes]) -> None:
    begin = value % len(out)
    out[at:at] = out[begin : begin + 40]


def _splice(out: bytearray, at: int, value: int, others: Sequence[bytes]) -> None:
    other = others[value % len(others)]
    out[at:] = other[value // len(others) % len(other) :]


_EDITS: Final = (
    _flip, _octet_set, _number, _near, _extreme, _pointer, _truncate, _delete, _insert, _copy, _splice, _near, _flip
)  # fmt: skip


def drawn(rng: random.Random) -> list[Edit]:
    """Draw some edits, mostly few."""
    many = rng.choice((1, 1, 1, 2, 2, 3, 4, 8))
    return [(rng.randrange(65_536), rng.randrange(65_536), rng.randrange(65_536)) for _ in range(many)]


def mutated_query(rng: random.Random) -> bytes:
    """Draw a broken query."""
    one = rng.choice(CORPUS)
    return mutated(one.query, range(len(one.query)), drawn(rng), _QUERIES)


def mutated_answer(rng: random.Random) -> tuple[bytes, bytes]:
    """Draw a query and a broken or strange answer to it."""
    one = rng.choice(CORPUS)
    return one.query, strange(rng, one)


def strange(rng: random.Random, one: Sample) -> bytes:
    """Draw a broken or strange answer to a sample's query; mostly it still has its id and question."""
    edits = drawn(rng)
    if rng.random() < 0.5:
        one = one._replace(answer=composed(rng, one.query), marks=())
        edits = edits[: rng.choice((0, 0, 1))]
    return broken(one, edits, keep=rng.random() < 0.9)


def composed(rng: random.Random, query: bytes) -> bytes:
    """Compose an answer of records that are well formed by themselves, by whatever names, types, classes and TTLs."""
    asked = asked_in(query)
    out = bytearray(12) + asked
    owners = [b"\xc0\x0c"] * 4
    counts = [rng.choice((0, 1, 1, 2, 3, 6)), rng.choice((0, 0, 1, 2)), rng.choice((0, 0, 1, 1, 2))]
    qtype = int.from_bytes(asked[-4:-2], "big")
    for _ in range(sum(counts)):
        owners += [_pointer_to(len(out)), rng.choice(_WIRE_NAMES)]
        rtype = rng.choice(
            (qtype, qtype, 1, 1, 28, CNAME_TYPE, CNAME_TYPE, 6, 15, 16, 46, 64, 65, 65280, rng.choice((2, 41)))
        )
        rclass = 1 if rng.random() < 0.98 else rng.choice((0, 3, 255))
        ttl = rng.choice((300, 300, 60, 7, *EXTREMES, rng.getrandbits(32)))
        rdata = _rdata(rng, rtype, owners)
        if rtype == OPT_TYPE:
            out += b"\0" + struct.pack("!HHIH", rtype, 4096, ttl & 0xFFFF, len(rdata)) + rdata
        else:
            out += rng.choice(owners) + struct.pack("!HHIH", rtype, rclass, ttl, len(rdata)) + rdata
    flags = 0x8180 | rng.choice((0, 0, 0, 0, 0x20, 0x200, 1, 2, 3, 5, 15))
    return query[:2] + struct.pack("!HHHHH", flags, 1, *counts) + bytes(out[12:])


def _pointer_to(offset: int) -> bytes:
    return struct.pack("!H", 0xC000 | offset)


def _rdata(rng: random.Random, rtype: int, names: Sequence[bytes]) -> bytes:
    name = rng.choice(names)
    if rtype in (1, 28):
        return _address(rng, 4 if rtype == 1 else 16)
    if rtype in (2, CNAME_TYPE):
        return name
    if rtype == 6:
        return name + rng.choice(names) + rng.randbytes(16) + struct.pack("!I", rng.choice((60, *EXTREMES)))
    if rtype == 15:
        return b"\0\x0a" + name
    if rtype in SERVICES:
        target = rng.choice((b"\0", b"\0", *_WIRE_NAMES))
        hints = [
            (key, b"".join(_address(rng, size) for _ in range(rng.choice((1, 1, 2))))) for key, size in HINTS.items()
        ]
        params = [(0, b"\0\4")] * (rng.random() < 0.2) + [(1, b"\2h2")] + rng.sample(hints, rng.choice((0, 1, 2)))
        return (
            rng.randbytes(2) + target + b"".join(struct.pack("!HH", key, len(value)) + value for key, value in params)
        )
    return rng.randbytes(rng.choice((0, 1, 18, 40)))


def _address(rng: random.Random, size: int) -> bytes:
    known = [address for address in _ADDRESSES if len(address) == size]
    return rng.choice(known) if rng.random() < 0.8 else rng.randbytes(size)


_ADDRESSES: Final = packed(
    PUBLIC, "93.184.216.35", "10.0.0.1", "127.0.0.1", "0.0.0.0", "255.255.255.255",
    PUBLIC6, "2606:2800::1", "::1", "fd00::1", "::ffff:10.0.0.1", f"::ffff:{PUBLIC}", "64:ff9b::10.0.0.1",
    "2002:a00:1::",
)  # fmt: skip
_WIRE_NAMES: Final = (
    b"\1a\1b\4test\0", b"\1A\1B\4TEST\0", b"\1c\1b\4test\0", b"\6denied\4test\0", b"\6Denied\4tesT\0",
    b"\7w000000\7example\4test\0", b"\7W000000\xc0\x14", b"\1x\xc0\x14", b"\0",
    b"\3a.b\4test\0", b"\1*\4test\0", b"\2\0x\4test\0", b"\2\xc3\xa4\4test\0",
)  # fmt: skip


def answering(query: bytes) -> list[Sample]:
    """Return samples that answer a query for a name as long as `NAME`, of the same type where there are any."""
    asked = asked_in(query)
    fitting = [one for one in CORPUS if asked_in(one.query)[-4:] == asked[-4:]]
    return [
        one._replace(query=query, answer=query[:2] + one.answer[2:12] + asked + one.answer[12 + len(asked) :])
        for one in fitting or CORPUS
    ]


def broken(one: Sample, edits: Iterable[Edit], *, keep: bool = True) -> bytes:
    """Return a sample's answer after the edits; `keep` puts back id and question, without which nobody reads on."""
    data = mutated(one.answer, one.marks, edits, _ANSWERS)
    asked = asked_in(one.query)
    end = 12 + len(asked)
    if keep and len(data) >= end:
        data = one.query[:2] + bytes([data[2] | 0x80]) + data[3:4] + b"\0\1" + data[6:12] + asked + data[end:]
    return data


def asked_in(query: bytes) -> bytes:
    """Return the question of a well-formed query."""
    end = 12
    while query[end]:
        end += query[end] + 1
    return query[12 : end + 5]


_ANSWERS: Final = [one.answer for one in CORPUS]
_QUERIES: Final = [*(one.query for one in CORPUS), *_ANSWERS[:3]]
