"""Prefix keys: what texts are read, what is refused and why, and the arithmetic against `ipaddress`."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netfence.policy.limits import MAX_ERROR_TEXT
from netfence.policy.prefix import address_text, cidr_text, key_of, last_key, normal, parse_address, parse_cidr

NETWORK4 = bytes((192, 0, 2, 0)) + b"\x18"
HOST4 = bytes((192, 0, 2, 7)) + b"\x20"
HOST6 = ipaddress.ip_address("2001:db8::7").packed + b"\x80"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        pytest.param("192.0.2.0/24", NETWORK4, id="ipv4-network"),
        pytest.param("192.0.2.7/24", NETWORK4, id="ipv4-host-bits-masked"),
        pytest.param("192.0.2.7", HOST4, id="ipv4-bare"),
        pytest.param("192.0.2.7/32", HOST4, id="ipv4-host"),
        pytest.param("0.0.0.0/0", bytes(5), id="ipv4-all"),
        pytest.param("255.255.255.255/0", bytes(5), id="ipv4-all-masked"),
        pytest.param("2001:db8::7", HOST6, id="ipv6-bare"),
        pytest.param("2001:DB8:0:0::7/128", HOST6, id="ipv6-long-form"),
        pytest.param("::/0", bytes(17), id="ipv6-all"),
        pytest.param("::ffff:192.0.2.0/120", NETWORK4, id="mapped-network"),
        pytest.param("::ffff:192.0.2.7", HOST4, id="mapped-bare"),
        pytest.param("::ffff:c000:207/128", HOST4, id="mapped-hex"),
        pytest.param("::ffff:0:0/96", bytes(5), id="mapped-all"),
        pytest.param(
            "::ffff:0:0/95", bytes(10) + b"\xff\xfe" + bytes(4) + b"\x5f", id="shorter-than-mapped-stays-ipv6"
        ),
    ],
)
def test_parse_cidr(text: str, key: bytes) -> None:
    assert parse_cidr(text) == key


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("", "expected e.g.", id="empty"),
        pytest.param("example.com", "expected e.g.", id="name"),
        pytest.param("10/8", "short forms", id="short"),
        pytest.param("10.1/16", "short forms", id="short-two"),
        pytest.param("1.2.3", "short forms", id="short-three"),
        pytest.param("167772161", "short forms", id="one-number"),
        pytest.param("010.0.0.1", "expected e.g.", id="leading-zero"),
        pytest.param("0x7f.0.0.1", "expected e.g.", id="hex"),
        pytest.param("256.0.0.1", "expected e.g.", id="octet-too-big"),
        pytest.param("1.2.3.4.5", "expected e.g.", id="five-octets"),
        pytest.param(" 192.0.2.7", "spaces", id="space-before"),
        pytest.param("192.0.2.7 ", "spaces", id="space-after"),
        pytest.param("192.0.2.7\n", "spaces", id="newline"),
        pytest.param("192.0.2.7\0", "expected e.g.", id="nul"),
        pytest.param("\ud800", "expected e.g.", id="surrogate"),
        pytest.param("192.0.2.\N{ARABIC-INDIC DIGIT SEVEN}", "expected e.g.", id="other-digits"),
        pytest.param("192.0.2.0/33", "0 to 32", id="ipv4-length"),
        pytest.param("192.0.2.0/-1", "0 to 32", id="negative-length"),
        pytest.param("192.0.2.0/", "0 to 32", id="no-length"),
        pytest.param("192.0.2.0/08", "0 to 32", id="length-leading-zero"),
        pytest.param("192.0.2.0/ 8", "0 to 32", id="length-space"),
        pytest.param("192.0.2.0/+8", "0 to 32", id="length-sign"),
        pytest.param("192.0.2.0/\N{ARABIC-INDIC DIGIT EIGHT}", "0 to 32", id="length-other-digits"),
        pytest.param("192.0.2.0/255.255.255.0", "0 to 32", id="netmask"),
        pytest.param("192.0.2.0/24/24", "0 to 32", id="two-lengths"),
        pytest.param("2001:db8::/129", "0 to 128", id="ipv6-length"),
        pytest.param("2001:db8::/x", "0 to 128", id="ipv6-length-text"),
        pytest.param("fe80::1%eth0", "zone ids", id="zone"),
        pytest.param("fe80::1%eth0/64", "zone ids", id="zone-length"),
        pytest.param("[2001:db8::1]", "expected e.g.", id="brackets"),
        pytest.param("2001:db8::1::", "expected e.g.", id="two-gaps"),
        pytest.param(":", "expected e.g.", id="colon"),
    ],
)
def test_parse_cidr_refuses(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_cidr(text)


def test_an_error_repeats_only_a_bounded_part_of_the_value() -> None:
    with pytest.raises(ValueError, match=r"\(1000000 characters\)") as caught:
        parse_cidr("9" * 1_000_000)
    assert len(str(caught.value)) < MAX_ERROR_TEXT + 200


NETWORKS = st.one_of(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)).map(
        lambda pair: ipaddress.IPv4Network(pair, strict=False)
    ),
    st.tuples(st.integers(0, 2**128 - 1), st.integers(0, 128)).map(
        lambda pair: ipaddress.IPv6Network(pair, strict=False)
    ),
)


@given(NETWORKS)
def test_keys_agree_with_ipaddress(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> None:
    mapped = network.version == 6 and network.subnet_of(ipaddress.IPv6Network("::ffff:0:0/96"))
    key = parse_cidr(str(network))
    if not mapped:
        assert key == network.network_address.packed + bytes((network.prefixlen,))
        assert cidr_text(key) == str(network)
        assert last_key(key)[:-1] == network.broadcast_address.packed
    assert parse_cidr(cidr_text(key)) == key


@given(NETWORKS, NETWORKS)
def test_a_key_is_inside_a_prefix_exactly_between_its_key_and_its_last_key(
    outer: ipaddress.IPv4Network, inner: ipaddress.IPv4Network
) -> None:
    if outer.version != inner.version:
        return
    outer_key = outer.network_address.packed + bytes((outer.prefixlen,))
    inner_key = inner.network_address.packed + bytes((inner.prefixlen,))
    assert (outer_key <= inner_key <= last_key(outer_key)) == inner.subnet_of(outer)


def test_keys_sort_by_address_then_length() -> None:
    ordered = ["0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/16", "10.0.0.0/32", "10.0.0.1/32", "10.1.0.0/16", "11.0.0.0/8"]
    assert [cidr_text(key) for key in sorted(map(parse_cidr, reversed(ordered)))] == ordered


@pytest.mark.parametrize(
    ("packed", "text"),
    [
        pytest.param(bytes(12) + bytes((1, 2, 3, 4)), "::102:304", id="ipv4-compatible-in-hex"),
        pytest.param(bytes(10) + b"\xff\xff" + bytes((1, 2, 3, 4)), "::ffff:102:304", id="mapped-in-hex"),
        pytest.param(bytes(15) + b"\x01", "::1", id="loopback"),
        pytest.param(bytes(16), "::", id="unspecified"),
    ],
)
def test_address_text_is_one_form_on_every_libc(packed: bytes, text: str) -> None:
    assert address_text(packed) == text


def test_normal_is_ipv4_for_mapped_addresses() -> None:
    assert normal(bytes(10) + b"\xff\xff" + bytes((1, 2, 3, 4))) == bytes((1, 2, 3, 4))
    assert normal(HOST6[:-1]) == HOST6[:-1]
    with pytest.raises(ValueError, match="not 5"):
        normal(bytes(5))


def test_parse_address() -> None:
    assert parse_address("::ffff:192.0.2.7") == HOST4[:-1]
    assert parse_address("2001:db8::7") == HOST6[:-1]
    for text in ("192.0.2.7/32", "", "fe80::1%lo", "192.0.2"):
        with pytest.raises(ValueError, match="is not an IPv4 or IPv6 address"):
            parse_address(text)


def test_key_of_masks() -> None:
    assert key_of(HOST4[:-1], 24) == NETWORK4
    assert key_of(HOST6[:-1], 0) == bytes(17)
