"""What a ControlCommand says about itself, read from its bytes without parsing it (protobuf's wire format).

A parsed message of millions of tiny entries takes fifty times its bytes, and parsing stops the event loop; so who it is
for, and that it has not too many entries, is known before. Source: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from netfence.v1 import control_pb2

_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5
_FIXED: Final = {_I64: 8, _I32: 4}
_MAX_VARINT: Final = 10  # bytes

_FIELDS: Final = control_pb2.ControlCommand.DESCRIPTOR.fields_by_name
_ID, _VERSION, _NONCE = (_FIELDS[name].number for name in ("id", "version", "nonce"))
_ONEOF: Final = {
    field.number: field.name for field in control_pb2.ControlCommand.DESCRIPTOR.oneofs_by_name["command"].fields
}
KINDS: Final = tuple(name for name in _ONEOF.values() if name != "sync_ack")
"""What a command may be; a sync_ack is none."""

_BULKS: Final = {_FIELDS[name].number for name in ("bulk_update", "subscribed_ack")}
_BULK: Final = control_pb2.BulkUpdate.DESCRIPTOR.fields_by_name
_DNS: Final = _BULK["dns"].number

MAX_FIELDS: Final = 64
"""Fields of a ControlCommand: it has four, and more only where messages were joined."""


class Head(NamedTuple):
    """The head of a command: id, nonce and version, and the field of the oneof ("" for none that we know)."""

    id: str
    nonce: str
    version: str
    kind: str


def head_of(data: bytes) -> Head:
    """Return the head of a command; microseconds, whatever its size.

    Raises ValueError for what is no message, or has more than `MAX_FIELDS` fields.
    """
    found = {_ID: b"", _NONCE: b"", _VERSION: b""}
    kind = ""
    for count, (number, start, end) in enumerate(_fields(data, 0, len(data))):
        if count == MAX_FIELDS:
            raise ValueError(f"more than {MAX_FIELDS} fields")
        if number in found:
            found[number] = data[start:end]
        kind = _ONEOF.get(number, kind)
    return Head(found[_ID].decode(), found[_NONCE].decode(), found[_VERSION].decode(), kind)


def entries_of(data: bytes, most: int) -> int:
    """Count the fields of a command's policy, entries foremost, no further than `most` + 1; about 0.3 µs each."""
    count = 0
    for number, start, end in _fields(data, 0, len(data)):
        if number not in _BULKS:
            continue
        for inner, begin, stop in _fields(data, start, end):
            count += 1
            if count > most:
                return count
            if inner == _DNS:
                for _ in _fields(data, begin, stop):
                    count += 1
                    if count > most:
                        return count
    return count


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number, start, end of the value) of a message's fields; the number is 0 for what has no length of its own.

    Texts and messages do, and no others are asked for. Raises ValueError where there is no field.
    """
    while at < end:
        tag = data[at]
        at += 1
        if tag > 127:
            tag, at = _varint(data, at - 1, end)
        wire = tag & 7
        if wire == _LEN:
            length = data[at] if at < end else 128
            if length < 128:
                at += 1
            else:
                length, at = _varint(data, at, end)
            stop = at + length
        elif wire == _VARINT:
            _, stop = _varint(data, at, end)
        elif wire in _FIXED:
            stop = at + _FIXED[wire]
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if stop > end or tag < 8:
            raise ValueError(f"field beyond its message at byte {at}")
        yield tag >> 3 if wire == _LEN else 0, at, stop
        at = stop


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Return a varint and the place behind it."""
    value = 0
    for place in range(at, min(at + _MAX_VARINT, end)):
        value |= (data[place] & 127) << 7 * (place - at)
        if data[place] < 128:
            return value, place + 1
    raise ValueError(f"endless number at byte {at}")
