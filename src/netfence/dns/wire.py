r"""The DNS wire format that the fast paths need: names, queries, and where things stand in a message.

Owns bounds-checked reading of bytes that an attacker wrote; every function here raises `WireError` on garbage and
nothing else. It knows no policy and builds no records. Names come out as lower-case text without the final dot in
which every octet other than letters, digits, ``-`` and ``_`` is written ``\DDD``: a dot inside a label can therefore
never look like a border between labels. Source: RFC 1035 section 4, RFC 6891.
"""

from __future__ import annotations

import re
import struct
from typing import Final

from netfence.dns.limits import MAX_POINTERS, MAX_QUERY_EXTRAS, MAX_UDP_REPLY, MIN_UDP_REPLY

HEADER: Final = struct.Struct("!HHHHHH")  # id, flags, question, answer, authority and additional counts
RECORD: Final = struct.Struct("!HHIH")  # type, class, TTL, RDATA length: what follows the owner name
HEADER_LEN: Final = HEADER.size
RECORD_LEN: Final = RECORD.size
MAX_NAME_WIRE: Final = 255

QR: Final = 0x8000
AA: Final = 0x0400
TC: Final = 0x0200
RD: Final = 0x0100
RA: Final = 0x0080
AD: Final = 0x0020
CD: Final = 0x0010
DO: Final = 0x8000  # in the OPT record's flags

IN: Final = 1
A: Final = 1
CNAME: Final = 5
SOA: Final = 6
AAAA: Final = 28
OPT: Final = 41
RRSIG: Final = 46
SVCB: Final = 64
HTTPS: Final = 65

NOERROR: Final = 0
FORMERR: Final = 1
SERVFAIL: Final = 2
NXDOMAIN: Final = 3
NOTIMP: Final = 4
REFUSED: Final = 5
BADVERS: Final = 16

_PLAIN = re.compile(rb"[a-z0-9_.-]+")
_OCTETS: Final = tuple(  # the text of each octet of a label
    chr(octet) if octet < 128 and (chr(octet).isalnum() or chr(octet) in "-_") else f"\\{octet:03d}"
    for octet in range(256)
)
_HEAD2 = struct.Struct("!HH")


class WireError(ValueError):
    """The bytes are not a DNS message that we accept; the text says why and repeats none of them."""


def read_name(data: bytes, offset: int) -> tuple[str, int]:
    """Read the name at `offset`, following compression; return it as text and the offset after it.

    See `read_labels` for what is refused.
    """
    labels, after, _ = read_labels(data, offset)
    return label_text(labels), after


def read_labels(data: bytes, offset: int) -> tuple[list[bytes], int, int]:
    """Read the name at `offset`, following compression; return its labels, the offset after it, and the pointers met.

    Every pointer must lead to before the run of labels that holds it, so that a chain of pointers ends, and behind the
    header, which is ours in a reply: the client would read another name there than we. At most `MAX_POINTERS`.
    """
    labels: list[bytes] = []
    size = 1
    after = 0
    pointers = 0
    lowest = offset
    try:
        while length := data[offset]:
            if length < 64:
                end = offset + 1 + length
                labels.append(data[offset + 1 : end])
                size += length + 1
                if size > MAX_NAME_WIRE or end >= len(data):
                    raise WireError("name too long or cut short")
                offset = end
                continue
            if length < 192:
                raise WireError("unknown label type")
            after = after or offset + 2
            offset = (length & 0x3F) << 8 | data[offset + 1]
            pointers += 1
            if offset >= lowest:
                raise WireError("compression pointer does not lead backwards")
            if offset < HEADER_LEN or pointers > MAX_POINTERS:
                raise WireError("compression pointer into the header, or too many")
            lowest = offset
    except IndexError:
        raise WireError("name runs past the end") from None
    return labels, after or offset + 1, pointers


def label_text(labels: list[bytes]) -> str:
    """Return the text form of a name's labels (see the module); the root is ``""``."""
    raw = b".".join(labels).lower()
    if raw.count(b".") == len(labels) - 1 and _PLAIN.fullmatch(raw):
        return raw.decode("ascii")
    return ".".join("".join(map(_OCTETS.__getitem__, label.lower())) for label in labels)


def skip_name(data: bytes, offset: int) -> int:
    """Return the offset after the name at `offset` without following compression."""
    try:
        while length := data[offset]:
            if length >= 192:
                return offset + 2
            if length > 63:
                raise WireError("unknown label type")
            offset += length + 1
    except IndexError:
        raise WireError("name runs past the end") from None
    return offset + 1


class Query:
    """A query that passed every check of its form.

    `question` is its question as sent, `key` the same with the name in lower case; `name` is the text form.
    `rest` is the whole message but its id; `limit` is the largest UDP reply in octets.
    """

    __slots__ = ("do", "edns", "flags", "id", "key", "limit", "name", "qtype", "question", "rest")

    def __init__(self, data: bytes, name: str, end: int, qtype: int) -> None:
        self.id = data[:2]
        self.rest = data[2:]
        self.flags = data[2] << 8 | data[3]
        self.question = data[HEADER_LEN:end]
        # Only the name: 'A' in the type's octets is type 65.
        self.key = data[HEADER_LEN : end - 4].lower() + data[end - 4 : end]
        self.name = name
        self.qtype = qtype
        self.edns = False
        self.do = False
        self.limit = MIN_UDP_REPLY


class Refusal(Exception):  # noqa: N818 - it is an answer, not a failure
    """A query that is answered with an rcode alone; `query` is there where its question could be read."""

    def __init__(self, rcode: int, query: Query | None = None) -> None:
        super().__init__(rcode)
        self.rcode = rcode
        self.query = query


def parse_query(data: bytes) -> Query:
    """Parse what a client sent.

    Raises WireError where silence is the answer (too short, or a response), Refusal where an rcode is: opcodes but
    QUERY are NOTIMP; a question count but 1 or a bad form FORMERR; classes but IN, meta types (ANY, AXFR, IXFR, all of
    128 to 255, OPT, 0) REFUSED; an EDNS version but 0 BADVERS.
    """
    if len(data) < HEADER_LEN:
        raise WireError("shorter than a header")
    _, flags, questions, answers, authorities, extras = HEADER.unpack_from(data)
    if flags & QR:
        raise WireError("a response")
    if flags & 0x7800:
        raise Refusal(NOTIMP)
    if questions != 1:
        raise Refusal(FORMERR)
    try:
        name, end = _question_name(data)
        qtype, qclass = _HEAD2.unpack_from(data, end)
    except (WireError, struct.error):
        raise Refusal(FORMERR) from None
    end += 4
    query = Query(data, name, end, qtype)
    if qclass != IN or qtype in (0, OPT) or 128 <= qtype <= 255:
        raise Refusal(REFUSED, query)
    if answers or authorities or extras > MAX_QUERY_EXTRAS:
        raise Refusal(FORMERR, query)
    if not extras:
        if end != len(data):
            raise Refusal(FORMERR, query)
        return query
    _read_extras(data, end, extras, query)
    return query


def _question_name(data: bytes) -> tuple[str, int]:
    """Read the question's name, which may not be compressed; return its text and the offset after it."""
    labels: list[bytes] = []
    offset = HEADER_LEN
    try:
        while length := data[offset]:
            if length > 63:
                raise WireError("compressed question")
            end = offset + 1 + length
            labels.append(data[offset + 1 : end])
            offset = end
    except IndexError:
        raise WireError("question runs past the end") from None
    if offset - HEADER_LEN >= MAX_NAME_WIRE:
        raise WireError("name too long")
    return label_text(labels), offset + 1


def _read_extras(data: bytes, offset: int, count: int, query: Query) -> None:
    """Read a query's additional records for its OPT; raises Refusal."""
    for _ in range(count):
        try:
            after = skip_name(data, offset)
            rtype, rclass, ttl, length = RECORD.unpack_from(data, after)
        except (WireError, struct.error):
            raise Refusal(FORMERR, query) from None
        owner_is_root = after == offset + 1
        offset = after + RECORD_LEN + length
        if offset > len(data):
            raise Refusal(FORMERR, query)
        if rtype != OPT:
            continue
        if query.edns or not owner_is_root:
            raise Refusal(FORMERR, query)
        query.edns = True
        query.do = bool(ttl & DO)
        query.limit = min(max(rclass, MIN_UDP_REPLY), MAX_UDP_REPLY)
        if ttl >> 16 & 0xFF:
            raise Refusal(BADVERS, query)
    if offset != len(data):
        raise Refusal(FORMERR, query)
