"""Special-purpose addresses: what a DNS answer from outside must not open (semantics.md 18, rebinding).

Source: the IANA IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890, as of 2025) and the IPv6 address space
registry. Ranges that the registries call globally reachable (AS112, AMT) are not special. An address that embeds an
IPv4 address is as special as that one, for a translator or tunnel on the way would go there.
"""

from __future__ import annotations

from typing import Final

from netfence.policy.prefix import MAPPED, parse_cidr

SPECIAL4: Final = (
    "0.0.0.0/8",  # this network, unspecified (RFC 791)
    "10.0.0.0/8",  # private (RFC 1918)
    "100.64.0.0/10",  # shared address space of carrier NAT (RFC 6598)
    "127.0.0.0/8",  # loopback (RFC 1122)
    "169.254.0.0/16",  # link-local (RFC 3927); cloud metadata
    "172.16.0.0/12",  # private (RFC 1918)
    "192.0.0.0/24",  # IETF protocol assignments (RFC 6890); DS-Lite
    "192.0.2.0/24",  # documentation (RFC 5737)
    "192.88.99.0/24",  # 6to4 relay anycast, deprecated (RFC 7526)
    "192.168.0.0/16",  # private (RFC 1918)
    "198.18.0.0/15",  # benchmarking (RFC 2544)
    "198.51.100.0/24",  # documentation (RFC 5737)
    "203.0.113.0/24",  # documentation (RFC 5737)
    "224.0.0.0/4",  # multicast (RFC 5771)
    "240.0.0.0/4",  # reserved (RFC 1112), limited broadcast
)

# IPv6: everything outside 2000::/3 is special (loopback, fc00::/7, fe80::/10, ff00::/8, 100::/64, 5f00::/16,
# 64:ff9b:1::/48, what IETF reserves); of 2000::/3 these are, and 64:ff9b::/96, 2002::/16 and 2001::/32 embed IPv4.
SPECIAL6: Final = (
    "2001::/23",  # IETF protocol assignments (RFC 2928): benchmarking, ORCHID …; Teredo in it is told by its parts
    "2001:db8::/32",  # documentation (RFC 3849)
    "3fff::/20",  # documentation (RFC 9637)
)

_NAT64: Final = bytes.fromhex("0064ff9b") + bytes(8)  # 64:ff9b::/96, RFC 6052
_TEREDO: Final = bytes.fromhex("20010000")  # 2001::/32, RFC 4380: bytes 4-7 the server, 12-15 the client inverted
_SIX_TO_FOUR: Final = bytes.fromhex("2002")  # 2002::/16, RFC 3056: bytes 2-5


def _by_first_byte(cidrs: tuple[str, ...]) -> tuple[bool | tuple[tuple[int, int], ...], ...]:
    """Tabulate by an address's first byte: wholly special, not at all (an empty tuple), or (mask, network) pairs."""
    table: list[bool | tuple[tuple[int, int], ...]] = [()] * 256
    for cidr in cidrs:
        key = parse_cidr(cidr)
        first, length, bits = key[0], key[-1], 8 * (len(key) - 1)
        if length <= 8:
            table[first : first + (1 << (8 - length))] = [True] * (1 << (8 - length))
            continue
        pairs = table[first]
        if not isinstance(pairs, bool):
            mask = ((1 << length) - 1) << (bits - length)
            table[first] = (*pairs, (mask, int.from_bytes(key[:-1], "big")))
    return tuple(table)


_TABLE4: Final = _by_first_byte(SPECIAL4)
_TABLE6: Final = _by_first_byte(SPECIAL6)


def _listed(table: tuple[bool | tuple[tuple[int, int], ...], ...], address: bytes) -> bool:
    entry = table[address[0]]
    if isinstance(entry, bool):
        return entry
    if not entry:
        return False
    value = int.from_bytes(address, "big")
    return any(value & mask == network for mask, network in entry)


def is_special(address: bytes) -> bool:
    """Tell whether a packed address (4 or 16 bytes, IPv4-mapped allowed) is of special-purpose space.

    Takes under a microsecond. ValueError for any other length.
    """
    if len(address) == 4:
        return _listed(_TABLE4, address)
    if len(address) != 16:
        raise ValueError(f"a packed address has 4 or 16 bytes, not {len(address)}")
    if address[0] >> 5 != 1:  # outside 2000::/3
        if address.startswith((MAPPED, _NAT64)):
            return _listed(_TABLE4, address[12:])
        return True
    if address.startswith(_SIX_TO_FOUR):
        return _listed(_TABLE4, address[2:6])
    if address.startswith(_TEREDO):
        client = bytes(byte ^ 0xFF for byte in address[12:])
        return _listed(_TABLE4, address[4:8]) or _listed(_TABLE4, client)
    return _listed(_TABLE6, address)
