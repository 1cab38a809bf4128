"""What an upstream's answer says, independent of any policy: scanned once, shared by every attachment that asks.

`scan` reads a whole upstream message, bounds-checked, and notes what the policy and the relay need: the names that the
chain passes through, the addresses linked to the question, which addresses are special, where the TTLs stand, how
long it may be cached. It judges nothing. Sources: RFC 1035, RFC 2181 section 8 (TTLs), RFC 2308 (negative answers),
RFC 9460 (SVCB and HTTPS).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from netfence.dns.limits import (
    MAX_ADDRESSES,
    MAX_CHAIN,
    MAX_NAME_WORK,
    MAX_NEGATIVE_S,
    MAX_RECORDS,
    MAX_SVCB_OCTETS,
    MAX_TARGETS,
)
from netfence.dns.wire import (
    AAAA,
    AD,
    CNAME,
    HEADER,
    HEADER_LEN,
    HTTPS,
    IN,
    NOERROR,
    NXDOMAIN,
    OPT,
    QR,
    RECORD,
    RECORD_LEN,
    SOA,
    SVCB,
    TC,
    A,
    WireError,
    label_text,
    read_labels,
    read_name,
)
from netfence.policy.special import is_special

LEARNED: Final = frozenset({A, AAAA, SVCB, HTTPS})  # question types whose answers carry addresses to learn
IPV4HINT: Final = 4
IPV6HINT: Final = 6
ADDRESS_LENGTH: Final = {A: 4, AAAA: 16}
HINT_LENGTH: Final = {IPV4HINT: 4, IPV6HINT: 16}
MAX_TTL: Final = 0x7FFFFFFF  # a greater TTL counts as 0 (RFC 2181 section 8)
MAPPED: Final = b"\0" * 10 + b"\xff\xff"
_SHORTS = struct.Struct("!HH")
_SHORT = struct.Struct("!H")
_LONG = struct.Struct("!I")
_NONE: Final = MAX_TTL + 1  # greater than any TTL: there was none
_NOTHING: Final[frozenset[bytes]] = frozenset()


class Answer(NamedTuple):
    """An upstream's answer to one question.

    `raw` is the message, with every TTL above `MAX_TTL` written as 0; its records without OPT are ``raw[start:end]``
    with `counts` in the three sections (`end` is 0 when an OPT record stands in front of others and the message cannot
    be relayed as it is). `ttls` holds the offset in `raw` and the value of every TTL in that stretch. `chain` holds the
    names that the question leads to (CNAME targets, SVCB target names), without its own. `addresses` are the packed
    addresses of the question's type (or hints) at a linked name, none where the rcode is an error, `ttl_s` the least
    TTL on the way to them. `special` are all special-purpose addresses anywhere in the message. `life_s` is how long it
    may be cached, 0 for not at all. `received` is the monotonic time of arrival.
    """

    raw: bytes
    rcode: int
    authentic: bool
    truncated: bool
    start: int
    end: int
    counts: tuple[int, int, int]
    ttls: tuple[tuple[int, int], ...]
    chain: tuple[str, ...]
    addresses: tuple[bytes, ...]
    special: frozenset[bytes]
    ttl_s: int
    life_s: float
    received: float


def scan(data: bytes, question_len: int, name: str, qtype: int, received: float) -> Answer:
    """Scan the response `data` to the question (`name`, `qtype`) whose wire form takes `question_len` octets.

    The caller has compared id and question. Raises WireError for anything that is not a whole, consistent message.
    """
    if len(data) < HEADER_LEN + question_len:
        raise WireError("shorter than its question")
    _, flags, questions, answers, authorities, extras = HEADER.unpack_from(data)
    if not flags & QR or flags & 0x7800 or questions != 1:
        raise WireError("not a response to one question")
    scanner = _Scanner(data, HEADER_LEN + question_len, name, qtype)
    if flags & TC:
        # Cut somewhere: nothing in it is used, it only says "ask over TCP".
        return scanner.finish(flags, (0, 0, 0), received)
    if answers + authorities + extras > MAX_RECORDS:
        raise WireError("too many records")
    scanner.read(answers, authorities, extras)
    return scanner.finish(flags, (answers, authorities, extras), received)


class _Found(NamedTuple):
    """A record of the question's type in the answer section."""

    owner: str
    ttl: int
    addresses: tuple[bytes, ...]
    target: str  # of an SVCB or HTTPS record, "" for none


class _Scanner:
    """The state of one `scan`."""

    __slots__ = (
        "_answer_ttl",
        "_cnames",
        "_data",
        "_found",
        "_name",
        "_names",
        "_offset",
        "_opt_at",
        "_opt_rcode",
        "_qtype",
        "_soa_s",
        "_special",
        "_start",
        "_svcb_left",
        "_ttls",
        "_void",
        "_work_left",
    )

    def __init__(self, data: bytes, offset: int, name: str, qtype: int) -> None:
        self._data = data
        self._start = self._offset = offset
        self._name = name
        self._qtype = qtype
        self._names: dict[int, str] = {HEADER_LEN: name}  # text of names by offset: owners are mostly the same pointer
        self._cnames: dict[str, tuple[str, int]] = {}  # owner: target, TTL
        self._found: list[_Found] = []
        self._ttls: list[tuple[int, int]] = []
        self._void: list[int] = []  # offsets of TTLs greater than `MAX_TTL`
        self._special: set[bytes] = set()
        self._soa_s = _NONE
        self._answer_ttl = _NONE
        self._opt_at = 0
        self._opt_rcode = 0
        self._work_left = MAX_NAME_WORK
        self._svcb_left = MAX_SVCB_OCTETS

    def read(self, answers: int, authorities: int, extras: int) -> None:
        """Read all sections; what is left over after them is garbage."""
        for _ in range(answers):
            self._record(answer=True)
        for _ in range(authorities):
            self._record(answer=False)
        if self._opt_at:
            raise WireError("OPT in the wrong section")
        for _ in range(extras):
            self._record(answer=False)
        if self._offset != len(self._data):
            raise WireError("octets after the last record")

    def _owner(self) -> tuple[str, int]:
        """Read the owner name at the cursor; return it and the offset after it."""
        data, offset = self._data, self._offset
        if not data[offset]:
            return "", offset + 1  # OPT's, in almost every answer
        if data[offset] < 192:
            return self._read_name(offset)
        target = (data[offset] & 0x3F) << 8 | data[offset + 1]
        name = self._names.get(target)
        if name is None:
            name = self._names[target] = self._read_name(offset)[0]
        return name, offset + 2

    def _read_name(self, offset: int) -> tuple[str, int]:
        """Read a name as `read_name` does, and pay for it."""
        labels, after, pointers = read_labels(self._data, offset)
        self._work_left -= name_work(labels, pointers)
        if self._work_left < 0:
            raise WireError("too many or too long names")
        return label_text(labels), after

    def _record(self, *, answer: bool) -> None:
        data, begin = self._data, self._offset
        try:
            owner, offset = self._owner()
            rtype, rclass, ttl, length = RECORD.unpack_from(data, offset)
        except (IndexError, struct.error):
            raise WireError("record cut short") from None
        rdata = offset + RECORD_LEN
        self._offset = end = rdata + length
        if end > len(data):
            raise WireError("RDATA runs past the end")
        if rtype == OPT:
            if self._opt_at or offset != begin + 1:
                raise WireError("two OPT records, or one that is not at the root")
            self._opt_at = begin
            self._opt_rcode = ttl >> 24
            return
        if rclass != IN:
            raise WireError("record of another class")  # some stub resolvers look at the type alone
        if ttl > MAX_TTL:
            ttl = 0
            self._void.append(offset + 4)
        self._ttls.append((offset + 4, ttl))
        if answer and ttl < self._answer_ttl:
            self._answer_ttl = ttl
        if (size := ADDRESS_LENGTH.get(rtype)) is not None:
            if length != size:
                raise WireError("address of the wrong length")
            address = normal(data[rdata:end])
            if is_special(address):
                self._special.add(address)
            if answer and rtype == self._qtype:
                self._found.append(_Found(owner, ttl, (address,), ""))
        else:
            self._rarer(owner, rtype, ttl, (rdata, end), answer=answer)

    def _rarer(self, owner: str, rtype: int, ttl: int, span: tuple[int, int], *, answer: bool) -> None:
        """Note what the RDATA of a record other than A and AAAA means for us; it takes the octets of `span`."""
        data = self._data
        rdata, end = span
        if rtype == CNAME:
            target, after = self._read_name(rdata)
            if after != end:
                raise WireError("CNAME of the wrong length")
            if answer:
                known, least = self._cnames.get(owner, (target, ttl))
                if known != target:
                    raise WireError("two CNAMEs for one name")
                self._cnames[owner] = (target, min(least, ttl))
        elif rtype in (SVCB, HTTPS):
            self._svcb_left -= end - rdata
            if self._svcb_left < 0:
                raise WireError("too many or too long service records")
            target, hints = read_svcb(data[rdata:end])
            self._special.update(filter(is_special, hints))
            if answer and rtype == self._qtype:
                self._found.append(_Found(owner, ttl, hints, target))
        elif rtype == SOA and not answer:
            if end - rdata < 22:
                raise WireError("SOA too short")
            (minimum,) = _LONG.unpack_from(data, end - 4)
            self._soa_s = min(ttl, minimum if minimum <= MAX_TTL else 0)

    def finish(self, flags: int, counts: tuple[int, int, int], received: float) -> Answer:
        """Follow the chain and make the value."""
        rcode = flags & 15 | self._opt_rcode << 4
        chain, linked, least = self._follow() if self._cnames else ((), (self._name,), MAX_TTL)
        addresses: dict[bytes, None] = {}  # in order, each once
        matched = False
        for owner, ttl, found, target in self._found if rcode == NOERROR else ():
            if owner in linked:
                matched = True
                least = min(least, ttl)
                addresses.update(dict.fromkeys(found))
                if target and target not in chain:
                    chain += (target,)
        if max(len(addresses), len(self._special)) > MAX_ADDRESSES or len(chain) > MAX_CHAIN + MAX_TARGETS:
            raise WireError("too many addresses, or names that they stand on")
        end = self._offset
        if self._opt_at:
            # A record of another kind behind OPT: it cannot be cut off.
            end = self._opt_at if self._opt_at + 1 + RECORD_LEN + self._opt_length() == end else 0
            counts = (counts[0], counts[1], counts[2] - 1)
        truncated = bool(flags & TC)
        return Answer(
            self._octets(),
            rcode,
            bool(flags & AD),
            truncated,
            self._start,
            end,
            counts,
            tuple(self._ttls),
            chain,
            tuple(addresses),
            frozenset(self._special) if self._special else _NOTHING,
            least,
            0.0 if truncated else self._life(rcode, positive=matched or self._unread(counts)),
            received,
        )

    def _octets(self) -> bytes:
        """Return the message with the TTLs that count as 0 written as 0: who reads them as they came would wait."""
        if not self._void:
            return self._data
        octets = bytearray(self._data)
        for offset in self._void:
            _LONG.pack_into(octets, offset, 0)
        return bytes(octets)

    def _opt_length(self) -> int:
        length: int = _SHORT.unpack_from(self._data, self._opt_at + 9)[0]
        return length

    def _unread(self, counts: tuple[int, int, int]) -> bool:
        """Tell whether the answer holds records of a type that was asked for and that we do not look into."""
        if self._qtype in LEARNED:
            return False
        return counts[0] > len(self._cnames) or (self._qtype == CNAME and bool(self._cnames))

    def _follow(self) -> tuple[tuple[str, ...], tuple[str, ...], int]:
        """Return the chain's names after the question's, all its names, and the least TTL on it."""
        linked = [self._name]
        least = MAX_TTL
        while (step := self._cnames.get(linked[-1])) is not None:
            name, ttl = step
            if name in linked or len(linked) > MAX_CHAIN:
                raise WireError("CNAME chain loops or is too long")
            linked.append(name)
            least = min(least, ttl)
        return tuple(linked[1:]), tuple(linked), least

    def _life(self, rcode: int, *, positive: bool) -> float:
        """Return how many seconds the answer may be cached."""
        if rcode == NOERROR and positive:
            return float(self._answer_ttl)
        if rcode not in (NOERROR, NXDOMAIN) or self._soa_s == _NONE:
            return 0.0
        return float(min(self._soa_s, self._answer_ttl, MAX_NEGATIVE_S))


def name_work(labels: Sequence[bytes], pointers: int) -> int:
    """Return what reading a name costs, in the unit of `MAX_NAME_WORK`."""
    return sum(map(len, labels)) + 8 * (len(labels) + pointers)


def normal(address: bytes) -> bytes:
    """Return the packed address with IPv4-mapped IPv6 in its 4-byte form."""
    return address[12:] if len(address) == 16 and address.startswith(MAPPED) else address


def read_svcb(rdata: bytes) -> tuple[str, tuple[bytes, ...]]:
    """Return the target name (``""`` for the owner itself) and the address hints of an SVCB or HTTPS record's RDATA.

    Raises WireError when it is malformed (a compressed target or a hint of the wrong length included).
    """
    _, _, after = svcb_head(rdata)
    target, end = read_name(rdata, 2)
    if end != after:
        raise WireError("compressed SVCB target")
    hints: list[bytes] = []
    for key, value in svcb_params(rdata, after):
        if size := HINT_LENGTH.get(key):
            hints += [normal(value[i : i + size]) for i in range(0, len(value), size)]
    return target, tuple(hints)


def svcb_head(rdata: bytes) -> tuple[int, bytes, int]:
    """Return priority, target name in wire form and the offset of the parameters."""
    offset = 2
    try:
        while length := rdata[offset]:
            if length > 63:
                raise WireError("compressed SVCB target")
            offset += length + 1
    except IndexError:
        raise WireError("SVCB record cut short") from None
    offset += 1
    return rdata[0] << 8 | rdata[1], rdata[2:offset], offset


def svcb_params(rdata: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    """Yield key and value of the service parameters from `offset` on; hints are whole addresses."""
    while offset < len(rdata):
        if offset + 4 > len(rdata):
            raise WireError("service parameter cut short")
        key, length = _SHORTS.unpack_from(rdata, offset)
        value = rdata[offset + 4 : offset + 4 + length]
        if len(value) != length or (key in HINT_LENGTH and (not value or length % HINT_LENGTH[key])):
            raise WireError("service parameter of the wrong length")
        yield key, value
        offset += 4 + length
