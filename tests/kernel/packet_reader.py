"""Bytes read into the description that the oracle judges: a second parser, of the RFCs and semantics.md 7, plainly.

`read` gives a `Frame`, or None for what nobody may guess at and the fence must drop. It shares nothing with bpf/parse.h
but its bounds.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass, replace

from frames import ETHERTYPES, EXTENSIONS, FLAGS, PROTOCOLS, TAG_TYPES, UPPER_NEEDED, Fragment, Frame
from oracle import MAX_EXTENSIONS

MAX_TAGS = 2
MAX_IPV4_OPTIONS = 12
LAST_EXTENSION_END = 2027  # bytes from the frame's start: no header begins so late that TCP's would end beyond 2047
SOURCE_ROUTES = (131, 137)
ROUTING, FRAGMENT, AH = 43, 44, 51
_NAMES = {number: name for name, number in PROTOCOLS.items()}
_KINDS = {number: name for name, number in EXTENSIONS.items()}


@dataclass(frozen=True)
class Reading:
    """What was read. `doubtful`: the last IPv4 option runs past its header; dropping that is right too."""

    frame: Frame
    doubtful: bool = False


def read(raw: bytes) -> Reading | None:
    """Read a frame from its Ethernet header on."""
    if len(raw) < 14:
        return None
    (ethertype,) = struct.unpack_from("!H", raw, 12)
    at, tags = 14, 0
    while ethertype in TAG_TYPES.values():
        if tags == MAX_TAGS or at + 4 > len(raw):
            return None
        (ethertype,) = struct.unpack_from("!H", raw, at + 2)
        at, tags = at + 4, tags + 1
    read_ip = {0x0800: _ipv4, 0x86DD: _ipv6}.get(ethertype)
    if read_ip is not None:
        reading = read_ip(raw[at:], at)
    elif ethertype == ETHERTYPES["arp"]:
        reading = Reading(Frame(ethertype="arp"))
    else:
        reading = None
    return None if reading is None else replace(reading, frame=replace(reading.frame, tags=("802.1Q",) * tags))


def _ipv4(packet: bytes, _at: int) -> Reading | None:
    if len(packet) < 20 or packet[0] >> 4 != 4:
        return None
    size = (packet[0] & 15) * 4
    total, _, fragment_word, hop_limit, number, _ = struct.unpack_from("!HHHBBH", packet, 2)
    if not 20 <= size <= min(len(packet), total):
        return None
    ends = _ipv4_options_end(packet, size)
    if ends is None:
        return None
    frame = Frame(
        source=ipaddress.IPv4Address(packet[12:16]),
        destination=ipaddress.IPv4Address(packet[16:20]),
        hop_limit=hop_limit,
        fragment="later" if fragment_word & 0x1FFF else "first" if fragment_word & 0x2000 else "",
    )
    upper = _upper(frame, number, packet[size:])
    return None if upper is None else Reading(upper, doubtful=ends > size)


def _ipv4_options_end(packet: bytes, size: int) -> int | None:
    """Return where the last option ends; None for a source route, an option without a length, or too many."""
    at = 20
    for _ in range(MAX_IPV4_OPTIONS):
        if at >= size:
            return at
        if packet[at] == 0:
            return size
        if packet[at] in SOURCE_ROUTES:
            return None
        if packet[at] == 1:
            at += 1
            continue
        if at + 1 >= len(packet) or packet[at + 1] < 2:
            return None
        at += packet[at + 1]
    return at if at >= size else None


def _ipv6(packet: bytes, before: int) -> Reading | None:
    if len(packet) < 40 or packet[0] >> 4 != 6:
        return None
    number, at = packet[6], 40
    kinds: list[tuple[str, bool]] = []
    fragment: Fragment = ""
    while number in _KINDS and fragment != "later":
        if len(kinds) == MAX_EXTENSIONS or at + 8 > len(packet):
            return None
        following, length, _, segments_left = packet[at : at + 4]
        size = 8 * (length + 1)
        if number == FRAGMENT:
            size = 8
            fragment = "later" if struct.unpack_from("!H", packet, at + 2)[0] >> 3 else "first"
        elif number == AH:
            size = 4 * (length + 2)
        elif number == ROUTING and segments_left:
            return None
        kinds.append((_KINDS[number], False))
        number = following
        if fragment == "later":
            break
        at += size
        if at > len(packet) or before + at > LAST_EXTENSION_END:
            return None
    frame = Frame(
        source=ipaddress.IPv6Address(packet[8:24]),
        destination=ipaddress.IPv6Address(packet[24:40]),
        hop_limit=packet[7],
        extensions=tuple(kinds),
        fragment=fragment,
    )
    upper = _upper(frame, number, packet[at:])
    return None if upper is None else Reading(upper)


def _upper(frame: Frame, number: int, data: bytes) -> Frame | None:
    """Add what the upper layer says; of a first fragment TCP's ports are enough."""
    frame = replace(frame, protocol=_NAMES.get(number, str(number)), flags="", source_port=0, destination_port=0)
    if frame.fragment == "later":
        return frame
    needed = UPPER_NEEDED.get(frame.protocol, 0)
    if len(data) < needed and not (frame.fragment and frame.protocol == "tcp" and len(data) >= 4):
        return None
    if frame.protocol in ("tcp", "udp"):
        frame.source_port, frame.destination_port = struct.unpack_from("!HH", data)
    if frame.protocol == "tcp" and len(data) >= needed:
        frame.flags = "".join(name for name, bit in FLAGS.items() if data[13] & bit)
    if frame.protocol in ("icmp", "icmpv6"):
        frame.icmp_type, frame.icmp_code = data[:2]
    return frame
