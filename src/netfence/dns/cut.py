"""Answers with special-purpose addresses taken out (semantics.md 18), at a bounded cost of the event loop.

What may stay is `guard`'s to say. The records are read from the octets and written by dnslib, which compresses names
anew; only RDATA that may itself hold compressed names is parsed by it. The result is scanned like an upstream's answer,
so that there is one way to a client, and it is refused when anything that had to go is still in it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from dnslib import QTYPE, RR, DNSHeader, DNSLabel, DNSQuestion, DNSRecord
from dnslib.dns import RD as RawData  # noqa: N811 - a class; the name is also a header bit
from dnslib.dns import RDMAP
from dnslib.label import DNSBuffer

from netfence.dns.answer import ADDRESS_LENGTH, HINT_LENGTH, Answer, name_work, normal, scan, svcb_head, svcb_params
from netfence.dns.limits import MAX_CACHED_ANSWER, MAX_CUT_NAME_WORK, MAX_CUT_RECORDS, MAX_CUTS
from netfence.dns.wire import HEADER_LEN, HTTPS, OPT, RECORD, RRSIG, SVCB, Query, WireError, read_labels

_SHORTS: Final = struct.Struct("!HH")
_MANDATORY: Final = 0
# Types whose RDATA may hold compressed names (RFC 3597 section 4): all others are copied as they are.
_NAMES_WITHIN: Final = frozenset({2, 3, 4, 5, 6, 7, 8, 9, 12, 14, 15, 17, 18, 21, 24, 26, 30, 33, 35, 36})


class Cuts:
    """The cut answers that an attachment keeps, so that a cached answer is cut once and not for every query.

    What may stay is asked anew by the caller each time, so no change of policy makes an entry wrong.
    """

    def __init__(self) -> None:
        self._kept: dict[int, _Cut] = {}  # by id of the answer, which the entry holds and so keeps unique

    def cut(self, query: Query, answer: Answer, stay: frozenset[bytes]) -> Answer:
        """Return `cut(query, answer, stay)`, perhaps from before. Raises WireError."""
        kept = self._kept.get(id(answer))
        if kept is None or kept.stay != stay:
            left: Answer | str
            try:
                left = cut(query, answer, stay)
            except WireError as error:
                left = str(error)
            kept = _Cut(answer, stay, left)
            self._keep(kept)
        if isinstance(kept.left, str):
            raise WireError(kept.left)
        return kept.left

    def _keep(self, made: _Cut) -> None:
        self._kept.pop(id(made.answer), None)
        if made.answer.life_s <= 0 or len(made.answer.raw) > MAX_CACHED_ANSWER:
            return  # nobody meets it again
        if len(self._kept) >= MAX_CUTS:
            del self._kept[next(iter(self._kept))]
        self._kept[id(made.answer)] = made


class _Cut(NamedTuple):
    answer: Answer
    stay: frozenset[bytes]
    left: Answer | str  # or why it cannot be cut


def cut(query: Query, answer: Answer, stay: frozenset[bytes]) -> Answer:
    """Return the answer without its special-purpose addresses, but those in `stay`, and without AD if that changed it.

    Address records go, hints go out of SVCB and HTTPS records (a record that declares such a hint mandatory goes
    whole), and so do the signatures over what changed, and OPT in any case. Raises WireError when the message is too
    costly to change, when dnslib cannot read it, or when an address that had to go is still there.
    """
    if len(answer.ttls) > MAX_CUT_RECORDS:
        raise WireError(f"more than {MAX_CUT_RECORDS} records")
    with _dnslib():
        raw = _Cutter(answer, answer.special - stay).cut()
    if raw[HEADER_LEN : HEADER_LEN + len(query.key) - 4].lower() != query.key[:-4]:
        raise WireError("dnslib changed the question")
    left = scan(raw, len(query.question), query.name, query.qtype, answer.received)
    if not left.special <= stay:
        raise WireError("special-purpose addresses are left")
    return left


@contextmanager
def _dnslib() -> Iterator[None]:
    """Make a WireError of whatever dnslib raises: its own errors, and struct, index, value and recursion errors."""
    try:
        yield
    except WireError:
        raise
    except Exception as error:  # noqa: BLE001
        raise WireError(f"{type(error).__name__} in dnslib") from None


class _Names(DNSBuffer):
    """A buffer whose names our reader reads, within `MAX_CUT_NAME_WORK`: dnslib's follows any number of pointers."""

    offset: int

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._octets = data
        self._left = MAX_CUT_NAME_WORK

    def decode_name(self, last: int = -1) -> DNSLabel:  # noqa: ARG002 - dnslib's signature
        """Read the name at the cursor."""
        labels, self.offset, pointers = read_labels(self._octets, self.offset)
        self._left -= name_work(labels, pointers)
        if self._left < 0:
            raise WireError("too many or too long names")
        for label in labels:
            label.decode()  # UnicodeDecodeError: dnslib writes no such label
        return DNSLabel(labels)


class _Cutter:
    """The state of one `cut`."""

    def __init__(self, answer: Answer, gone: frozenset[bytes]) -> None:
        self._raw = answer.raw
        self._gone = gone
        self._buffer = _Names(answer.raw)
        self._changed: set[tuple[str, int]] = set()  # owner and type of what lost something

    def cut(self) -> bytes:
        """Return the changed message."""
        header = DNSHeader.parse(self._buffer)
        question = DNSQuestion.parse(self._buffer)
        sections = [self._section(count) for count in (header.a, header.auth, header.ar)]
        answers, authorities, extras = ([rr for rr in rrs if not self._signs(rr)] for rrs in sections)
        if self._changed:
            header.ad = 0
        return bytes(DNSRecord(header, [question], answers, auth=authorities, ar=extras).pack())

    def _section(self, count: int) -> list[RR]:
        """Return the records of the next section that stay, OPT left out."""
        return [record for _ in range(count) if (record := self._record()) is not None]

    def _record(self) -> RR | None:
        """Read the record at the cursor; None when it goes."""
        buffer = self._buffer
        owner = buffer.decode_name()
        rtype, rclass, ttl, length = RECORD.unpack_from(self._raw, buffer.offset)
        begin = buffer.offset + RECORD.size
        end = begin + length
        buffer.offset = end
        if rtype == OPT:
            return None
        rdata = self._raw[begin:end]
        if rtype in ADDRESS_LENGTH and normal(rdata) in self._gone:
            self._changed.add((str(owner).lower(), rtype))
            return None
        if rtype in (SVCB, HTTPS):
            after = cut_hints(rdata, self._gone.__contains__)
            if after != rdata:
                self._changed.add((str(owner).lower(), rtype))
            if after is None:
                return None
            rdata = after
        made = self._with_names(rtype, begin, length) if rtype in _NAMES_WITHIN else RawData(rdata)
        return RR(owner, rtype, rclass, ttl, made)

    def _with_names(self, rtype: int, begin: int, length: int) -> object:
        """Return the RDATA of a type that may hold compressed names, as dnslib writes it again."""
        kind = RDMAP.get(QTYPE.get(rtype))
        if kind is None:
            raise WireError("a record type whose names dnslib cannot move")
        self._buffer.offset = begin
        made: object = kind.parse(self._buffer, length)
        if self._buffer.offset != begin + length:
            raise WireError("RDATA of the wrong length for dnslib")
        return made

    def _signs(self, rr: RR) -> bool:
        """Tell whether a record is a signature over what changed; the covered type comes first in it (RFC 4034)."""
        if rr.rtype != RRSIG or not self._changed:
            return False
        covered = int.from_bytes(rr.rdata.data[:2], "big")
        return (str(rr.rname).lower(), covered) in self._changed


def cut_hints(rdata: bytes, is_gone: Callable[[bytes], bool]) -> bytes | None:
    """Return SVCB or HTTPS RDATA without the hints for which `is_gone`; None when the whole record has to go."""
    priority, target, offset = svcb_head(rdata)
    kept: list[tuple[int, bytes]] = []
    mandatory: set[int] = set()
    lost: set[int] = set()
    for key, value in svcb_params(rdata, offset):
        if key == _MANDATORY:
            mandatory = {value[i] << 8 | value[i + 1] for i in range(0, len(value) - 1, 2)}
        if size := HINT_LENGTH.get(key):
            addresses = [value[i : i + size] for i in range(0, len(value), size)]
            value = b"".join(address for address in addresses if not is_gone(normal(address)))  # noqa: PLW2901
            if not value:
                lost.add(key)
                continue
        kept.append((key, value))
    if lost & mandatory:
        return None
    params = b"".join(_SHORTS.pack(key, len(value)) + value for key, value in kept)
    return priority.to_bytes(2, "big") + target + params
