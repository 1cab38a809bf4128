"""The text of a DNS upstream: `host[:port]` with an IP literal as host, one canonical form.

Used by policies, the policy file and the configuration, so that a server is the same text (and cache) everywhere.
"""

from __future__ import annotations

from typing import Final

from netfence.policy.prefix import address_text, parse_address, shown

DNS_PORT: Final = 53
_MAX_PORT: Final = 65_535


def parse_upstream(text: str) -> tuple[str, int]:
    """Return (address, port) of an upstream; the address canonical and without brackets, the port 53 if not given.

    `192.0.2.53`, `192.0.2.53:5353`, `2001:db8::53`, `[2001:db8::53]`, `[2001:db8::53]:5353`. A name server given by
    name would need a name server to find, so names are refused. Raises ValueError with the reason.
    """
    host, port_text = _split(text)
    try:
        address = parse_address(host)
    except ValueError:
        raise ValueError(
            f"{shown(text)} is not an upstream: expected an IP address with an optional port, such as 192.0.2.53, "
            "192.0.2.53:5353 or [2001:db8::53]:5353"
        ) from None
    if not any(address) or address == b"\xff" * len(address) or address[0] in _MULTICAST[len(address)]:
        raise ValueError(f"{shown(text)} is not an upstream: not the address of one host")
    if port_text is None:
        return address_text(address), DNS_PORT
    # str.isdigit alone takes digits of other scripts.
    if not (port_text.isascii() and port_text.isdigit() and len(port_text) <= 5 and 1 <= int(port_text) <= _MAX_PORT):
        raise ValueError(f"{shown(text)} is not an upstream: the port must be a number from 1 to {_MAX_PORT}")
    return address_text(address), int(port_text)


_MULTICAST: Final = {4: range(224, 240), 16: range(255, 256)}


def _split(text: str) -> tuple[str, str | None]:
    """Cut host from port; an IPv6 literal without brackets has no port."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if bracket and ":" in host and (not rest or rest.startswith(":")):
            return host, rest[1:] if rest else None
        return text, None  # no address reads like this: refused by the caller
    if text.count(":") == 1:
        host, _, port = text.partition(":")
        return host, port
    return text, None


def upstream_text(address: str, port: int) -> str:
    """Return the canonical text of an upstream: always with its port, IPv6 in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def canonical_upstream(text: str) -> str:
    """Return the canonical text of an upstream as written. Raises ValueError as `parse_upstream` does."""
    return upstream_text(*parse_upstream(text))
