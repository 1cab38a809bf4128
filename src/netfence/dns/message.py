"""Building messages: replies to clients, queries to upstreams, answers that we make.

Pure. A reply without records and an unchanged answer are put together from octets (`reply`, `relay`: the fast paths);
whatever has its records changed (`cut`) or made (`from_addresses`) comes out as an `Answer` again, so that there is one
way to a client. Sources: RFC 1035, RFC 6891 (EDNS), RFC 8914 (EDE).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from netfence.dns.answer import ADDRESS_LENGTH, Answer, normal, scan
from netfence.dns.limits import MAX_EDE_TEXT, MAX_UDP_REPLY
from netfence.dns.wire import (
    AD,
    CD,
    DO,
    HEADER,
    IN,
    OPT,
    QR,
    RA,
    RD,
    RECORD,
    TC,
    Query,
)

EDE_OTHER = 0
EDE_FILTERED = 17
EDE_NO_REACHABLE = 22
EDE_NETWORK = 23

_OPT_HEAD = struct.Struct("!BHHIH")
_OPTION = struct.Struct("!HHH")
_LONG = struct.Struct("!I")
_EDE_OPTION = 15
_OWNER_IS_QUESTION = b"\xc0\x0c"


class Ede:
    """An Extended DNS Error: its code and a text, cut to `MAX_EDE_TEXT` octets."""

    __slots__ = ("code", "text")

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        # Cut between characters, never inside one.
        self.text = text.encode("utf-8", "replace")[:MAX_EDE_TEXT].decode("utf-8", "ignore").encode()


def opt(query: Query, rcode: int = 0, ede: Ede | None = None) -> bytes:
    """Return the OPT record of a reply, empty for a client without EDNS."""
    if not query.edns:
        return b""
    options = b"" if ede is None else _OPTION.pack(_EDE_OPTION, 2 + len(ede.text), ede.code) + ede.text
    ttl = rcode >> 4 << 24 | (DO if query.do else 0)
    return _OPT_HEAD.pack(0, OPT, MAX_UDP_REPLY, ttl, len(options)) + options


def reply(query: Query, rcode: int, ede: Ede | None = None, flags: int = 0) -> bytes:
    """Return a reply without records; `flags` are added to the header (TC)."""
    end = opt(query, rcode, ede)
    word = QR | RA | query.flags & (RD | CD) | flags | rcode & 15
    return query.id + _counts(word, 0, 0, 1 if end else 0) + query.question + end


def truncated(query: Query) -> bytes:
    """Return the reply that sends a client to TCP."""
    return reply(query, 0, flags=TC)


def bare_reply(data: bytes, rcode: int) -> bytes:
    """Return the header-only reply to a query whose question could not be read; `data` holds at least a header."""
    word = QR | (data[2] << 8 | data[3]) & 0x7800 | rcode
    return data[:2] + struct.pack("!HHHHH", word, 0, 0, 0, 0)


def _counts(word: int, answers: int, authorities: int, extras: int) -> bytes:
    return struct.pack("!HHHHH", word, 1, answers, authorities, extras)


def relay(query: Query, answer: Answer, age_s: int, cap_s: int, ede: Ede | None = None) -> bytes:
    """Return the reply that carries an upstream's answer as it came: our id, flags and OPT, the client's own question.

    TTLs are capped at `cap_s` and counted down by `age_s` (whole seconds). The question has the length it had towards
    the upstream, so compression pointers stay right. `answer.end` must not be 0.
    """
    records: bytes | bytearray = answer.raw[answer.start : answer.end]
    if age_s or any(ttl > cap_s for _, ttl in answer.ttls):
        records = bytearray(records)
        for offset, ttl in answer.ttls:
            _LONG.pack_into(records, offset - answer.start, max(min(ttl, cap_s) - age_s, 0))
    end = opt(query, answer.rcode, ede)
    authentic = AD if answer.authentic and (query.do or query.flags & AD) else 0
    word = QR | RA | query.flags & (RD | CD) | authentic | answer.rcode & 15
    answers, authorities, extras = answer.counts
    head = _counts(word, answers, authorities, extras + 1 if end else extras)
    return b"".join((query.id, head, query.question, records, end))


def upstream_query(key: bytes, *, do: bool, cd: bool) -> bytes:
    """Return the query we send upstream, with id 0: the question in lower case, RD and AD set, our own OPT.

    Nothing else of the client's message goes out: its EDNS options, its spelling and its padding stay here.
    """
    word = RD | AD | (CD if cd else 0)
    return HEADER.pack(0, word, 1, 0, 0, 1) + key + _OPT_HEAD.pack(0, OPT, MAX_UDP_REPLY, DO if do else 0, 0)


def fits(query: Query, answer: Answer) -> bool:
    """Tell whether an upstream's answer, unchanged, fits what the client takes; known before any work is done on it."""
    octets = answer.end - answer.start if answer.end else len(answer.raw) - answer.start
    return HEADER.size + len(query.question) + octets + len(opt(query)) <= query.limit


def from_addresses(query: Query, addresses: Iterable[bytes], ttl_s: int, now: float) -> Answer:
    """Make the answer to `query` of the packed addresses of its family (semantics.md 14: a control plane's `ips`)."""
    size = ADDRESS_LENGTH.get(query.qtype)
    records = [
        _OWNER_IS_QUESTION + RECORD.pack(query.qtype, IN, ttl_s, size) + address
        for address in map(normal, addresses)
        if len(address) == size
    ]
    raw = HEADER.pack(0, QR, 1, len(records), 0, 0) + query.question + b"".join(records)
    return scan(raw, len(query.question), query.name, query.qtype, now)
