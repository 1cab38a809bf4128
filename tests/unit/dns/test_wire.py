"""Reading the wire format: equal to dnslib on valid messages, one named error on everything else."""

from __future__ import annotations

import contextlib
import struct

import pytest
from dnslib import EDNS0, DNSHeader, DNSLabel, DNSQuestion, DNSRecord
from dnslib.buffer import Buffer
from hypothesis import example, given
from hypothesis import strategies as st

from netfence.dns.limits import MAX_POINTERS, MAX_UDP_REPLY
from netfence.dns.wire import (
    BADVERS,
    FORMERR,
    NOTIMP,
    REFUSED,
    Refusal,
    WireError,
    label_text,
    parse_query,
    read_name,
    skip_name,
)

LABEL = st.binary(min_size=1, max_size=63)
NAMES = st.lists(LABEL, max_size=8).filter(lambda labels: sum(len(label) + 1 for label in labels) < 255)
HEAD = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00"


def wire_name(labels: list[bytes]) -> bytes:
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


@given(NAMES)
def test_names_read_as_they_were_written(labels: list[bytes]) -> None:
    data = b"junk" + wire_name(labels) + b"more"
    text, after = read_name(data, 4)
    assert (after, skip_name(data, 4)) == (len(data) - 4, len(data) - 4)
    assert text == label_text(labels)
    assert text == text.lower()
    # Text has as many labels as the wire, whatever octets they hold.
    assert len(text.split(".")) == max(len(labels), 1)


@given(st.lists(st.from_regex(rb"[A-Za-z0-9_-]{1,20}", fullmatch=True), min_size=1, max_size=6))
def test_plain_names_read_as_dnslib_reads_them(labels: list[bytes]) -> None:
    assert label_text(labels) == str(DNSLabel(tuple(labels))).rstrip(".").lower()


def test_octets_that_are_not_letters_are_escaped() -> None:
    assert label_text([b"a.b", b"C\\", b"\xff*"]) == "a\\046b.c\\092.\\255\\042"
    assert label_text([]) == ""


@pytest.mark.parametrize(
    "data",
    [
        b"\xc0\x00",
        b"\x01a\xc0\x00"[2:] + b"x",
        b"\xc0\x05",
        b"\x05ab",
        b"\x40a\0",
        b"\x80a\0",
        b"\x01a",
        b"\xc0",
        b"",
        wire_name([b"a" * 63] * 4),
    ],
    ids=["self", "self-2", "forward", "cut", "type-40", "type-80", "no-end", "half-pointer", "nothing", "256-octets"],
)
def test_bad_names_are_wire_errors(data: bytes) -> None:
    with pytest.raises(WireError):
        read_name(data, 0)


def test_the_longest_name_is_255_octets() -> None:
    labels = [b"a" * 63] * 3 + [b"a" * 61]
    assert len(wire_name(labels)) == 255
    assert read_name(wire_name(labels), 0)[1] == 255
    assert parse_query(HEAD + wire_name(labels) + b"\0\1\0\1").name.count("a") == 250


def test_pointers_follow_one_another_only_backwards() -> None:
    data = HEAD + b"\x01a\x00" + b"\x01b\xc0\x0c" + b"\x01c\xc0\x0f"
    assert read_name(data, 19) == ("c.b.a", 23)
    loop = HEAD + b"\x01a\xc0\x10" + b"\x01b\xc0\x0c"
    with pytest.raises(WireError, match="backwards"):
        read_name(loop, 16)
    with pytest.raises(WireError, match="backwards"):
        read_name(HEAD + b"\xc0\x0e\xc0\x0c\xc0\x0e", 16)  # the loop lies wholly before


@pytest.mark.parametrize("target", range(12))
def test_pointers_never_lead_into_the_header(target: int) -> None:
    # The reply has another id, other flags and counts: the client would read another name.
    head = b"\x01a\0\0\0\x01\0\0\0\0\0\0"
    with pytest.raises(WireError, match="header"):
        read_name(head + b"\x01b" + bytes([0xC0, target]), 12)
    assert read_name(head + b"\x01a\0\x01b\xc0\x0c", 15) == ("b.a", 19)


def test_pointers_of_one_name_are_bounded() -> None:
    # Each pointer leads to the one before it; the first to a name.
    data = (
        HEAD
        + b"\x01a\0"
        + b"".join(struct.pack("!H", 0xC000 | (12 if n == 0 else 13 + 2 * n)) for n in range(MAX_POINTERS + 1))
    )
    assert read_name(data, 13 + 2 * MAX_POINTERS) == ("a", 15 + 2 * MAX_POINTERS)
    with pytest.raises(WireError, match="too many"):
        read_name(data, 15 + 2 * MAX_POINTERS)


@given(st.binary(max_size=80), st.integers(0, 90))
@example(b"\xc0\x00", 0)
def test_reading_any_octets_ends_in_a_name_or_a_wire_error(data: bytes, offset: int) -> None:
    for read in (read_name, skip_name):
        with contextlib.suppress(WireError):
            read(data, offset)


@given(
    NAMES, st.integers(1, 40), st.sampled_from([0, 100, 512, 1232, 4096, 65535]), st.booleans(), st.integers(0, 65535)
)
def test_queries_parse_as_dnslib_builds_them(labels: list[bytes], qtype: int, size: int, do: bool, ident: int) -> None:
    record = DNSRecord(DNSHeader(id=ident, rd=1), q=DNSQuestion(DNSLabel(tuple(labels)), qtype))
    if size:
        record.add_ar(EDNS0(udp_len=size, flags="do" if do else ""))
    data = bytes(record.pack())
    query = parse_query(data)
    assert (query.id, query.qtype, query.rest) == (data[:2], qtype, data[2:])
    assert query.name == label_text(labels)
    buffer = Buffer()
    buffer.append(query.question)
    assert query.question == wire_name(labels) + qtype.to_bytes(2, "big") + b"\0\1"
    assert query.key == wire_name([label.lower() for label in labels]) + qtype.to_bytes(2, "big") + b"\0\1"
    assert (query.edns, query.do) == (bool(size), bool(size) and do)
    assert query.limit == min(max(size, 512), MAX_UDP_REPLY)


def test_the_type_s_octets_are_not_letters() -> None:
    # 65 is 'A': HTTPS and type 97 are different questions.
    assert parse_query(HEAD + b"\x01A\0\0\x41\0\1").key == b"\x01a\0\0\x41\0\1"


def opt(size: int = 1232, ttl: int = 0, owner: bytes = b"\0", options: bytes = b"") -> bytes:
    return (
        owner + b"\0\x29" + size.to_bytes(2, "big") + ttl.to_bytes(4, "big") + len(options).to_bytes(2, "big") + options
    )


QUESTION = b"\x01a\x03org\0\0\1\0\1"


def extras(count: int, *records: bytes) -> bytes:
    return HEAD[:10] + count.to_bytes(2, "big") + QUESTION + b"".join(records)


@pytest.mark.parametrize(
    ("data", "rcode"),
    [
        (HEAD[:2] + b"\x11\x00" + HEAD[4:] + QUESTION, NOTIMP),
        (HEAD[:4] + b"\0\0" + HEAD[6:] + QUESTION, FORMERR),
        (HEAD, FORMERR),
        (HEAD + QUESTION[:-1], FORMERR),
        (HEAD + b"\xc0\x0c\0\1\0\1", FORMERR),
        (HEAD + QUESTION + b"\0", FORMERR),
        (HEAD + QUESTION[:-2] + b"\0\3", REFUSED),
        (HEAD + QUESTION[:-2] + b"\0\xff", REFUSED),
        (HEAD + QUESTION[:-4] + b"\0\xff\0\1", REFUSED),
        (HEAD + QUESTION[:-4] + b"\0\xfc\0\1", REFUSED),
        (HEAD + QUESTION[:-4] + b"\0\xfb\0\1", REFUSED),
        (HEAD + QUESTION[:-4] + b"\0\0\0\1", REFUSED),
        (HEAD + QUESTION[:-4] + b"\0\x29\0\1", REFUSED),
        (extras(1), FORMERR),
        (extras(2, opt(), opt()), FORMERR),
        (extras(1, opt(owner=b"\x01a\0")), FORMERR),
        (extras(1, opt()[:-1]), FORMERR),
        (extras(1, opt()[:-2] + b"\0\5abc"), FORMERR),
        (extras(1, opt(), b"x"), FORMERR),
        (extras(5, *[opt()] * 5), FORMERR),
        (extras(1, opt(ttl=0x10000)), BADVERS),
    ],
)
def test_refusals(data: bytes, rcode: int) -> None:
    with pytest.raises(Refusal) as raised:
        parse_query(data)
    assert raised.value.rcode == rcode


@pytest.mark.parametrize("data", [b"", HEAD[:11], HEAD[:2] + b"\x81\x80" + HEAD[4:] + QUESTION])
def test_silence(data: bytes) -> None:
    with pytest.raises(WireError):
        parse_query(data)


@given(st.binary(max_size=120))
def test_any_octets_are_a_query_a_refusal_or_silence(data: bytes) -> None:
    with contextlib.suppress(Refusal, WireError):
        parse_query(data)
