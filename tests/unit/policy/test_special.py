"""Special-purpose space against `ipaddress` where they agree by definition, and range by range where not."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netfence.policy.special import SPECIAL4, is_special

PUBLIC4 = "93.184.215.14"
PRIVATE4 = "10.1.2.3"


def hex_of(address: str, *, invert: bool = False) -> str:
    value = int(ipaddress.IPv4Address(address)) ^ (0xFFFFFFFF if invert else 0)
    return f"{value >> 16:x}:{value & 0xFFFF:x}"


def special(text: str) -> bool:
    return is_special(ipaddress.ip_address(text).packed)


@pytest.mark.parametrize("cidr", SPECIAL4)
def test_both_ends_of_each_ipv4_range_are_special(cidr: str) -> None:
    network = ipaddress.IPv4Network(cidr)
    assert special(str(network[0]))
    assert special(str(network[-1]))


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.0.0.1", "100.64.0.1", "100.127.255.255", "127.0.0.1", "127.255.255.255", "169.254.169.254",
        "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1",
        "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::102:304", "64:ff9b:1::1", "64:ff9b:2::1", "100::1", "100:0:0:1::1", "2001:2::1", "2001:10::1",
        "2001:1ff::1", "2001:db8::1", "2001:db8:ffff:ffff::1", "3fff::1", "3fff:fff::1", "4000::1", "5f00::1",
        "fc00::1", "fd00:ec2::254", "fdff::1", "fe80::1", "febf::1", "fec0::1", "ff02::1", "::ffff:0:102:304",
    ],
)  # fmt: skip
def test_special(address: str) -> None:
    assert special(address)


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.1",
        "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0", "192.0.1.0", "192.0.3.0", "192.31.196.1",
        "192.52.193.1", "192.88.98.1", "192.88.100.1", "192.167.255.255", "192.169.0.0", "192.175.48.1",
        "198.17.255.255", "198.20.0.0", "198.51.99.255", "198.51.101.0", "203.0.112.255", "203.0.114.0",
        "223.255.255.255", "2000::1", "2001:200::1", "2001:4860:4860::8888", "2001:db7::1", "2001:db9::1",
        "2003::1", "2606:4700::1111", "2620:4f:8000::1", "3ffe::1", "3fff:1000::1",
    ],
)  # fmt: skip
def test_not_special(address: str) -> None:
    assert not special(address)


EMBEDDINGS = {
    "mapped": "::ffff:{0}",
    "nat64": "64:ff9b::{0}",
    "6to4": "2002:{0}::1",
    "teredo-client": "2001:0:5db8:d70e:0:0:{1}",
    "teredo-server": "2001:0:{0}:0:0:a247:28f1",
}


@pytest.mark.parametrize("form", EMBEDDINGS)
@pytest.mark.parametrize(("inner", "expected"), [(PUBLIC4, False), (PRIVATE4, True), ("169.254.169.254", True)])
def test_an_embedding_is_as_special_as_what_it_embeds(form: str, inner: str, expected: bool) -> None:
    assert special(EMBEDDINGS[form].format(hex_of(inner), hex_of(inner, invert=True))) is expected


@given(st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address))
def test_ipv4_agrees_with_a_scan_of_the_list(address: ipaddress.IPv4Address) -> None:
    assert is_special(address.packed) == any(address in ipaddress.IPv4Network(cidr) for cidr in SPECIAL4)


@given(
    st.one_of(
        st.integers(0, 2**128 - 1),
        st.builds(
            lambda high, low: high << 112 | low, st.sampled_from([0x2001, 0x2002, 0x64]), st.integers(0, 2**112 - 1)
        ),
    ).map(ipaddress.IPv6Address)
)
def test_whatever_the_standard_library_calls_private_is_special(address: ipaddress.IPv6Address) -> None:
    embeds = address.ipv4_mapped or address.sixtofour or address.teredo
    if not embeds and (address.is_private or address.is_multicast or address.is_reserved or address.is_link_local):
        nat64 = address in ipaddress.IPv6Network("64:ff9b::/96")
        assert is_special(address.packed) or nat64


@pytest.mark.parametrize("length", [0, 3, 5, 15, 17])
def test_other_lengths_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"not {length}"):
        is_special(bytes(length))
