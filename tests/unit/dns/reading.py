"""A second opinion on what a DNS message says: dnslib reads it, record by record, and `meaning` follows its chain."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final, NamedTuple

from dnslib import CLASS, QTYPE, RCODE, DNSHeader, DNSQuestion
from dnslib.dns import AAAA, CNAME, HTTPS, A
from dnslib.label import DNSBuffer

CNAME_TYPE: Final = 5
OPT_TYPE: Final = 41
SERVICES: Final = (64, 65)  # SVCB, HTTPS
HINTS: Final = {4: 4, 6: 16}
MAX_TTL: Final = 2**31 - 1

Labels = tuple[bytes, ...]


class Record(NamedTuple):
    """A record as dnslib reads it. `begin` and `at` are the offsets of its owner and of its RDATA."""

    section: int
    owner: Labels
    rtype: int
    rclass: int
    ttl: int
    rdata: bytes
    target: Labels | None  # of a CNAME, SVCB or HTTPS record
    addresses: tuple[bytes, ...]
    begin: int
    at: int

    @property
    def said(self) -> tuple[object, ...]:
        """What it says, wherever it stands."""
        content = self.target if self.rtype == CNAME_TYPE else self.addresses if self.rtype in (1, 28) else None
        return self.section, self.owner, self.rtype, self.rclass, content


class Told(NamedTuple):
    """A message as dnslib reads it."""

    header: DNSHeader
    qname: Labels
    qtype: int
    qclass: int
    records: tuple[Record, ...]
    end: int

    @property
    def rcode(self) -> int:
        """The whole rcode: 4 bits of the header, 8 more of OPT."""
        more = next((record.ttl >> 24 for record in self.records if record.rtype == OPT_TYPE), 0)
        return int(self.header.rcode) | more << 4


def read(data: bytes) -> Told | None:
    """Have dnslib read a message with one question; None where it will not."""
    try:
        buffer = DNSBuffer(data)
        header = DNSHeader.parse(buffer)
        asked = DNSQuestion.parse(buffer)
        records = tuple(
            _record(buffer, section)
            for section, count in enumerate((header.a, header.auth, header.ar))
            for _ in range(count)
        )
    except Exception:  # noqa: BLE001 - its own errors, and struct, index and recursion errors
        return None
    return Told(header, _lower(asked.qname.label), asked.qtype, asked.qclass, records, buffer.offset)


def _lower(labels: Iterable[bytes]) -> Labels:
    return tuple(bytes(label).lower() for label in labels)


def _record(buffer: DNSBuffer, section: int) -> Record:
    begin = buffer.offset
    owner = _lower(buffer.decode_name().label)
    rtype, rclass, ttl, length = buffer.unpack("!HHIH")
    at = buffer.offset
    rdata = bytes(buffer.get(length))
    buffer.offset = at
    target: Labels | None = None
    addresses: tuple[bytes, ...] = ()
    if rtype == QTYPE.A:
        addresses = (bytes(A.parse(buffer, length).data),)
    elif rtype == QTYPE.AAAA:
        addresses = (bytes(AAAA.parse(buffer, length).data),)
    elif rtype == CNAME_TYPE:
        target = _lower(CNAME.parse(buffer, length).label.label)
    elif rtype in SERVICES:
        service = HTTPS.parse(buffer, length)
        target = _lower(service.target)
        for key, value in service.params:
            if size := HINTS.get(key):
                addresses += tuple(bytes(value[i : i + size]) for i in range(0, len(value), size))
    buffer.offset = at + length
    return Record(section, owner, rtype, rclass, ttl, rdata, target, tuple(map(plain, addresses)), begin, at)


def plain(address: bytes) -> bytes:
    """Return the packed address, IPv4-mapped ones in four bytes."""
    mapped = ipaddress.IPv6Address(address).ipv4_mapped if len(address) == 16 else None
    return mapped.packed if mapped else address


def text(labels: Labels) -> str:
    r"""Write a name as netfence writes it: what is not a letter, a digit, ``-`` or ``_`` as ``\DDD``."""
    return ".".join("".join(_octet(octet) for octet in label) for label in labels)


def _octet(octet: int) -> str:
    letter = chr(octet)
    return letter if letter.isascii() and (letter.isalnum() or letter in "-_") else f"\\{octet:03d}"


class Meaning(NamedTuple):
    """What of an answer belongs to its question."""

    chain: tuple[str, ...]
    addresses: tuple[bytes, ...]
    ttl_s: int


def meaning(told: Told) -> Meaning:
    """Follow the chain from the question; AssertionError where the answer makes no sense and was to be refused."""
    answers = [record for record in told.records if record.section == 0 and record.rclass == CLASS.IN]
    names, ttls = [told.qname], [MAX_TTL]
    while steps := [record for record in answers if record.rtype == CNAME_TYPE and record.owner == names[-1]]:
        target = steps[0].target
        assert target is not None
        assert {record.target for record in steps} == {target}, "two CNAMEs of one name were taken"
        assert target not in names, "a chain that loops was taken"
        names.append(target)
        ttls += [ttl_of(record) for record in steps]
    chain = [text(name) for name in names[1:]]
    addresses: dict[bytes, None] = {}
    if told.rcode == RCODE.NOERROR and told.qtype in (QTYPE.A, QTYPE.AAAA, *SERVICES):
        for record in answers:
            if record.rtype == told.qtype and record.owner in names:
                ttls.append(ttl_of(record))
                addresses |= dict.fromkeys(record.addresses)
                if record.target and text(record.target) not in chain:
                    chain.append(text(record.target))
    return Meaning(tuple(chain), tuple(addresses), min(ttls))


def ttl_of(record: Record) -> int:
    """Return the TTL that counts (RFC 2181 section 8)."""
    return record.ttl if record.ttl <= MAX_TTL else 0


def records_of(told: Told) -> list[Record]:
    """Return all records but OPT."""
    return [record for record in told.records if record.rtype != OPT_TYPE]
