"""Prefixes as packed keys: text to key, key to text, masks and containment.

Owns the only place where the text of a CIDR is read. `socket.inet_pton` and `inet_ntop` are used as pure functions (no
socket is made): they are ten times faster than `ipaddress`, and as strict.
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Final, TypeAlias

from netfence.policy.limits import MAX_ERROR_TEXT

Key: TypeAlias = bytes
"""Packed masked address (4 or 16 bytes, network order) and one byte prefix length. Keys of one family sort by address,
then by length; IPv4-mapped IPv6 is always in its IPv4 form."""

MAPPED: Final = bytes(10) + b"\xff\xff"
"""The first 12 bytes of an IPv4-mapped IPv6 address (RFC 4291 section 2.5.5.2)."""

_BITS: Final = {4: 32, 16: 128}
_LENGTH_BYTE: Final = tuple(bytes((length,)) for length in range(129))
_LENGTHS4: Final = {str(length): length for length in range(33)}
_LENGTHS6: Final = {str(length): length for length in range(129)}
_HOST_BITS4: Final = tuple((1 << (32 - length)) - 1 for length in range(33))
_HOST_BITS6: Final = tuple((1 << (128 - length)) - 1 for length in range(129))
_HOST_BITS: Final = {4: _HOST_BITS4, 16: _HOST_BITS6}


def shown(text: str) -> str:
    """Quote a bad value for an error message, cut to a bounded length."""
    return repr(text) if len(text) <= MAX_ERROR_TEXT else f"{text[:MAX_ERROR_TEXT]!r}… ({len(text)} characters)"


def parse_cidr(text: str) -> Key:
    """Return the key of a CIDR or bare address; host bits are masked, IPv4-mapped IPv6 of /96 and longer becomes IPv4.

    Raises ValueError with the reason: anything but a full dotted quad or IPv6 literal without zone, then at most
    ``/`` and a plain decimal length.
    """
    address, slash, length_text = text.partition("/")
    if ":" in address:
        return _parse_cidr6(text, address, slash, length_text)
    try:
        packed = inet_pton(AF_INET, address)
    except (OSError, ValueError):
        raise ValueError(_why_not_an_address(text, address)) from None
    if not slash:
        return packed + b"\x20"
    length = _LENGTHS4.get(length_text)
    if length is None:
        raise ValueError(_why_not_a_length(text, 32))
    value = int.from_bytes(packed, "big")
    host_bits = value & _HOST_BITS4[length]
    if host_bits:
        packed = (value ^ host_bits).to_bytes(4, "big")
    return packed + _LENGTH_BYTE[length]


def _parse_cidr6(text: str, address: str, slash: str, length_text: str) -> Key:
    try:
        packed = inet_pton(AF_INET6, address)
    except (OSError, ValueError):
        raise ValueError(_why_not_an_address(text, address)) from None
    length = _LENGTHS6.get(length_text) if slash else 128
    if length is None:
        raise ValueError(_why_not_a_length(text, 128))
    if length >= 96 and packed.startswith(MAPPED):
        return key_of(packed[12:], length - 96)
    return key_of(packed, length)


def _why_not_an_address(text: str, address: str) -> str:
    what = f"{shown(text)} is not a CIDR or address"
    if "%" in address:
        return f"{what}: zone ids are not supported, write the address alone"
    if address != address.strip():
        return f"{what}: it has spaces around it"
    if address.replace(".", "").isdigit() and address.count(".") < 3:
        return f"{what}: short forms are not supported, write all four numbers"
    return f"{what}; expected e.g. 192.0.2.0/24, 192.0.2.7 or 2001:db8::/32"


def _why_not_a_length(text: str, bits: int) -> str:
    return f"{shown(text)} is not a CIDR: the prefix length must be a decimal number from 0 to {bits}"


def parse_address(text: str) -> bytes:
    """Return a packed address (4 or 16 bytes; IPv4-mapped as IPv4). Raises ValueError with the reason."""
    try:
        packed = inet_pton(AF_INET6 if ":" in text else AF_INET, text)
    except (OSError, ValueError):
        raise ValueError(f"{shown(text)} is not an IPv4 or IPv6 address") from None
    return normal(packed)


def normal(address: bytes) -> bytes:
    """Return the packed address with an IPv4-mapped IPv6 one in its 4-byte form; ValueError if not 4 or 16 bytes."""
    if len(address) == 4:
        return address
    if len(address) != 16:
        raise ValueError(f"a packed address has 4 or 16 bytes, not {len(address)}")
    return address[12:] if address.startswith(MAPPED) else address


def address_text(address: bytes) -> str:
    """Return the packed address as text, canonical (RFC 5952)."""
    if len(address) == 4:
        return inet_ntop(AF_INET, address)
    text = inet_ntop(AF_INET6, address)
    # glibc writes IPv4-compatible addresses (::a.b.c.d) with dots; one canonical form on every libc: hexadecimal.
    return _hex_tail(address) if "." in text else text


def _hex_tail(address: bytes) -> str:
    high, low = int.from_bytes(address[12:14], "big"), int.from_bytes(address[14:], "big")
    prefix = "::ffff" if address.startswith(MAPPED) else ":"
    return f"{prefix}:{high:x}:{low:x}"


def cidr_text(key: Key) -> str:
    """Return the canonical text of a key, always with its prefix length."""
    return f"{address_text(key[:-1])}/{key[-1]}"


def key_of(address: bytes, length: int) -> Key:
    """Return the key of the prefix of that length (0 to 32 or 128) around a packed address."""
    size = len(address)
    value = int.from_bytes(address, "big")
    return (value & ~_HOST_BITS[size][length]).to_bytes(size, "big") + _LENGTH_BYTE[length]


def last_key(key: Key) -> Key:
    """Return the greatest key that lies inside this prefix: a key k of the family is inside if key <= k <= last_key."""
    size = len(key) - 1
    value = int.from_bytes(key[:-1], "big") | _HOST_BITS[size][key[-1]]
    return value.to_bytes(size, "big") + b"\xff"


def bits_of(size: int) -> int:
    """Return the address bits of a family by its address size in bytes: 4 → 32, 16 → 128."""
    return _BITS[size]
