"""Upstream texts: one canonical form, and what is refused."""

from __future__ import annotations

import pytest

from netfence.policy.upstream import canonical_upstream, parse_upstream


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("192.0.2.53", "192.0.2.53:53"),
        ("192.0.2.53:5353", "192.0.2.53:5353"),
        ("2001:DB8:0::53", "[2001:db8::53]:53"),
        ("[2001:db8::53]", "[2001:db8::53]:53"),
        ("[2001:db8::53]:5353", "[2001:db8::53]:5353"),
        ("::ffff:192.0.2.53", "192.0.2.53:53"),
        ("127.0.0.1:65535", "127.0.0.1:65535"),
    ],
)
def test_canonical(text: str, canonical: str) -> None:
    assert canonical_upstream(text) == canonical
    assert canonical_upstream(canonical) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "", "dns.example", "dns.example:53", "192.0.2", "192.0.2.53:", "192.0.2.53:0", "192.0.2.53:65536",
        "192.0.2.53:5353x", "192.0.2.53:+53", "192.0.2.53:\N{ARABIC-INDIC DIGIT FIVE}", "192.0.2.53:99999999999",
        "[192.0.2.53]:53", "[2001:db8::53", "[2001:db8::53]53", "2001:db8::53]:53", "[2001:db8::53]:", "fe80::1%eth0",
        "192.0.2.53/32", " 192.0.2.53", "0.0.0.0", "[::]:53", "224.0.0.251", "ff02::fb", "255.255.255.255", "\0",
    ],
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an upstream"):
        parse_upstream(text)
