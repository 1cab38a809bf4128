"""What a command says about itself without being parsed: the same as the parsed one, and of garbage nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.unit.control.peer import SYNC_ACK, ControlCommand, ack, set_mode

from netfence.control.peek import MAX_FIELDS, Head, entries_of, head_of
from netfence.v1 import control_pb2

text = st.text(max_size=200)  # some with a length of two bytes
entries = st.lists(st.builds(control_pb2.CIDREntry, cidr=text), max_size=4)
names = st.lists(st.builds(control_pb2.DomainEntry, domain=text, include_subdomains=st.booleans()), max_size=4)
configs = st.none() | st.builds(
    control_pb2.DnsConfig, allow_domains=names, deny_domains=names, upstream_servers=st.lists(text, max_size=3)
)
lists = {"allow_cidrs": entries, "deny_cidrs": entries, "dns": configs, "audit": st.booleans()}
bodies = st.one_of(
    st.just({}),
    st.just({"sync_ack": control_pb2.SyncAck()}),
    st.fixed_dictionaries({"set_mode": st.builds(control_pb2.SetMode)}),
    st.fixed_dictionaries({"allow_cidr": st.builds(control_pb2.CIDREntry, cidr=text)}),
    st.fixed_dictionaries({"deny_cidr": st.builds(control_pb2.CIDREntry, cidr=text)}),
    st.fixed_dictionaries({"remove_cidr": text}),
    st.fixed_dictionaries({"bulk_update": st.builds(control_pb2.BulkUpdate, **lists)}),
    st.fixed_dictionaries({"set_dns_mode": st.builds(control_pb2.SetDnsMode)}),
    st.fixed_dictionaries({"allow_domain": st.builds(control_pb2.DomainEntry, domain=text)}),
    st.fixed_dictionaries({"deny_domain": st.builds(control_pb2.DomainEntry, domain=text)}),
    st.fixed_dictionaries({"remove_domain": text}),
    st.fixed_dictionaries({"subscribed_ack": st.builds(control_pb2.SubscribedAck, **lists)}),
)
messages = st.builds(
    lambda head, body: ControlCommand(**head, **body),
    st.fixed_dictionaries({"id": text, "nonce": text, "version": text}),
    bodies,
)
unknown = st.sampled_from([b"", b"\xf2\x01\x00", b"\x80\x7d\x05", b"\xf9\x01" + bytes(8), b"\xfd\x01" + bytes(4)])


def parsed(data: bytes) -> Head:
    """Return what the parsed message says."""
    message = ControlCommand.FromString(data)
    return Head(message.id, message.nonce, message.version, message.WhichOneof("command") or "")


def counted(message: ControlCommand) -> int:
    """Return how many fields the parsed message's policy has, a repeated one for each of its entries."""
    kind = message.WhichOneof("command")
    if kind not in {"bulk_update", "subscribed_ack"}:
        return 0
    body = getattr(message, kind)
    parts = [body, body.dns] if body.HasField("dns") else [body]
    fields = [pair for part in parts for pair in part.ListFields()]
    return sum(1 if isinstance(value, bool | int) or field.name == "dns" else len(value) for field, value in fields)


@given(st.lists(st.tuples(messages, unknown), min_size=1, max_size=3))
def test_the_head_is_the_parsed_messages_also_of_merged_ones_with_unknown_fields(
    parts: Sequence[tuple[ControlCommand, bytes]],
) -> None:
    data = b"".join(message.SerializeToString() + extra for message, extra in parts)
    assert head_of(data) == parsed(data)


@given(messages)
def test_the_entries_are_those_of_the_parsed_message(message: ControlCommand) -> None:
    assert entries_of(message.SerializeToString(), 1000) == counted(message)


@given(messages, messages)
def test_no_entry_of_merged_messages_is_overlooked(one: ControlCommand, other: ControlCommand) -> None:
    data = one.SerializeToString() + other.SerializeToString()
    assert entries_of(data, 1000) >= counted(ControlCommand.FromString(data))


@given(st.binary(max_size=60))
def test_garbage_is_a_value_error_or_nothing_worse(data: bytes) -> None:
    for peek in (head_of, lambda some: entries_of(some, 10)):
        with contextlib.suppress(ValueError):
            peek(data)


@given(messages, st.data())
def test_a_message_cut_short_within_a_field_is_a_value_error(message: ControlCommand, data: st.DataObject) -> None:
    whole = message.SerializeToString()
    assume(whole)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    try:
        expected = parsed(cut)
    except Exception:  # noqa: BLE001 - protobuf's own
        with pytest.raises(ValueError, match=r"byte|codec"):
            head_of(cut)
    else:
        assert head_of(cut) == expected


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x0b", "wire type 3"),
        (b"\x0c", "wire type 4"),
        (b"\x0e", "wire type 6"),
        (b"\x0f", "wire type 7"),
        (b"\x02\x00", "beyond its message"),
        (b"\x0a", "endless number"),
        (b"\x0a\x05abcd", "beyond its message"),
        (b"\x0a\x80", "endless number"),
        (b"\x0a" + b"\xff" * 9 + b"\x01", "beyond its message"),
        (b"\x08" + b"\xff" * 10 + b"\x01", "endless number"),
        (b"\x09" + bytes(7), "beyond its message"),
        (b"\x0d" + bytes(3), "beyond its message"),
        (b"\x0a\x02\xff\xfe", "codec can't decode"),
        (b"\x0a\x03\xed\xa0\x80", "codec can't decode"),
    ],
    ids=[
        "group", "end-of-group", "wire-6", "wire-7", "field-0", "no-length", "too-short", "endless-length",
        "huge-length", "endless-varint", "short-64", "short-32", "no-utf8", "surrogate",
    ],
)  # fmt: skip
def test_what_is_no_message_is_a_value_error_that_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        head_of(data)
    with pytest.raises(Exception):  # noqa: B017, PT011 - protobuf finds the same
        ControlCommand.FromString(data)


@pytest.mark.parametrize(
    ("message", "head"),
    [
        (set_mode("a", version="v"), Head("a", "v", "v", "set_mode")),
        (ack("b"), Head("b", "ack v1", "v1", "subscribed_ack")),
        (SYNC_ACK, Head("", "", "", "sync_ack")),
        (ControlCommand(remove_cidr=""), Head("", "", "", "remove_cidr")),
        (ControlCommand(), Head("", "", "", "")),
    ],
    ids=["set-mode", "ack", "sync-ack", "empty-text", "nothing"],
)
def test_heads(message: ControlCommand, head: Head) -> None:
    assert head_of(message.SerializeToString()) == head


@pytest.mark.parametrize("kind", ["bulk_update", "subscribed_ack"])
def test_entries_are_counted_no_further_than_one_beyond_the_bound(kind: str) -> None:
    many = [control_pb2.CIDREntry()] * 40
    names = [control_pb2.DomainEntry()] * 40
    dns = control_pb2.DnsConfig(allow_domains=names, deny_domains=names)
    message = ControlCommand(id="a")
    for field, value in {"allow_cidrs": many, "deny_cidrs": many}.items():
        getattr(getattr(message, kind), field).extend(value)
    getattr(message, kind).dns.CopyFrom(dns)
    data = message.SerializeToString()
    assert [entries_of(data, most) for most in (0, 39, 79, 80, 119, 159, 160, 1000)] == [
        1, 40, 80, 81, 120, 160, 161, 161,  # and the field `dns`
    ]  # fmt: skip


def test_in_what_comes_behind_the_bound_nothing_is_read() -> None:
    good = ControlCommand(bulk_update=control_pb2.BulkUpdate(allow_cidrs=[control_pb2.CIDREntry()] * 3))
    data = good.SerializeToString() + b"\x0f"
    assert entries_of(data, 2) == 3
    with pytest.raises(ValueError, match="wire type 7"):
        entries_of(data, 3)


def test_an_entry_beyond_its_list_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="beyond its message"):
        entries_of(b"\x3a\x02\x12\x05" + b"12345", 10)


def test_lists_elsewhere_do_not_count() -> None:
    update = control_pb2.BulkUpdate(allow_cidrs=[control_pb2.CIDREntry()] * 3).SerializeToString()
    as_set_mode = b"\x1a" + bytes([len(update)]) + update
    assert entries_of(as_set_mode, 10) == 0


@pytest.mark.parametrize("data", [b"\x08\x31", b"\x10\x00", b"\xa0\x06\x31"], ids=["id", "sync-ack", "version"])
def test_a_field_of_another_wire_type_is_an_unknown_one(data: bytes) -> None:
    assert head_of(data) == parsed(data)


def test_a_message_of_countless_fields_is_none() -> None:
    assert head_of(b"\xf2\x01\x00" * MAX_FIELDS) == Head("", "", "", "")
    with pytest.raises(ValueError, match="more than 64 fields"):
        head_of(b"\xf2\x01\x00" * (MAX_FIELDS + 1))


def test_upstreams_and_fields_that_nobody_knows_count_too() -> None:
    dns = control_pb2.DnsConfig(upstream_servers=["192.0.2.53"] * 20)
    data = ControlCommand(bulk_update=control_pb2.BulkUpdate(dns=dns)).SerializeToString()
    assert entries_of(data, 1000) == 21
    nothing = b"\xf2\x01\x00" * 40
    assert entries_of(b"\x3a" + bytes([len(nothing)]) + nothing, 1000) == 40
