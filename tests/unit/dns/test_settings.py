"""Settings: canonical upstreams, search suffixes, refusals."""

from __future__ import annotations

import socket

import pytest

from netfence.dns.settings import DnsSettings, upstream_of
from netfence.dns.wire import NXDOMAIN, REFUSED


def test_upstreams_have_one_text() -> None:
    assert DnsSettings(upstreams=("192.0.2.53", "2001:db8::53")).upstreams == ("192.0.2.53:53", "[2001:db8::53]:53")
    with pytest.raises(ValueError, match="not an upstream"):
        DnsSettings(upstreams=("dns.example.org",))


def test_addresses_to_connect_to() -> None:
    assert upstream_of("192.0.2.53:5353")[1:] == (socket.AF_INET, ("192.0.2.53", 5353))
    assert upstream_of("[2001:db8::53]:53")[1:] == (socket.AF_INET6, ("2001:db8::53", 53, 0, 0))


def test_search_suffixes_are_longest_first_and_clean() -> None:
    assert DnsSettings(search_domains=("lan", "X.Lan.", "", ".")).search_suffixes == (".x.lan", ".lan")


def test_rcodes() -> None:
    assert (DnsSettings().denial_rcode, DnsSettings(reject_rcode="nxdomain").denial_rcode) == (REFUSED, NXDOMAIN)
    with pytest.raises(ValueError, match=r"dns\.reject_rcode"):
        DnsSettings(reject_rcode="drop")
