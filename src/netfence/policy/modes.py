"""Modes, verdict reasons and their numbers: one numbering for C (bpf/reasons.h), Python and the API.

A test compares this file with bpf/reasons.h and with the proto enums.
"""

from __future__ import annotations

import enum


class Mode(enum.IntEnum):
    """Packet mode of a policy (semantics.md 2); numbers are those of proto PolicyMode."""

    DISABLED = 1
    ALLOWLIST = 2
    BLOCK_ALL = 3
    DENYLIST = 4


class DnsMode(enum.IntEnum):
    """DNS mode of a policy (semantics.md 14); numbers are those of proto DnsMode."""

    DISABLED = 1
    ALLOWLIST = 2
    DENYLIST = 3
    PROXY = 4


class Reason(enum.IntEnum):
    """Why a packet passed or was dropped; the number is the index into the kernel's counters.

    Reasons below `FIRST_DROP` pass, the others drop.
    """

    # pass
    DISABLED = 0  # mode disabled
    ALLOW_RULE = 1  # longest matching live rule allows
    LEASE = 2  # live lease of an allowed name
    ESTABLISHED = 3  # TCP without SYN to an address whose lease ran out (semantics.md 5)
    DEFAULT_PASS = 4  # denylist, nothing matched
    REPLY = 5  # TCP connection begun from outside (semantics.md 6)
    ARP = 6
    NEIGHBOUR = 7  # ICMPv6 neighbour discovery and multicast listener reports
    DNS = 8  # to the attachment's own DNS server
    DHCP = 9
    LOOPBACK = 10  # cgroups only
    DAEMON = 11  # host direction: the daemon's own traffic
    LINK_LOCAL = 12  # enforcement.allow_link_local
    # drop
    DENY_RULE = 16  # longest matching live rule denies
    DEFAULT_DROP = 17  # allowlist, nothing matched
    BLOCK_ALL = 18  # mode block_all
    START = 19  # start_mode: no policy applied yet
    METADATA = 20  # cloud metadata address without a rule of its own
    FOREIGN_DNS = 21  # DNS port of another attachment
    CONNECT = 22  # a refused connect() or sendmsg() of a cgroup
    NOT_IP = 23  # neither IP nor ARP
    VLAN_DEPTH = 24  # more than two VLAN tags
    TRUNCATED = 25  # a header does not fit the packet
    UNREADABLE = 26  # the kernel would not give us the header bytes
    EXT_HEADERS = 27  # IPv6 extension header chain too long
    SOURCE_ROUTE = 28  # IPv4 LSRR/SSRR, IPv6 routing header with segments left


FIRST_DROP = 16
REASON_COUNT = 32


def is_drop(reason: Reason) -> bool:
    """Tell whether the reason drops."""
    return reason >= FIRST_DROP
