"""The rebinding guard's decision (semantics.md 18): which special-purpose addresses an upstream answer may carry.

Pure. What is special is `netfence.policy.special`'s to say; cutting addresses out of a message is `message`'s work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from netfence.policy.policy import Policy


class PrivateSpace:
    """The networks of `dns.allow_private`."""

    def __init__(self, keys: Iterable[bytes]) -> None:
        self._nets = [_net(key) for key in keys]

    def __contains__(self, address: bytes) -> bool:
        number = int.from_bytes(address, "big")
        size = len(address)
        return any(size == net_size and number >> shift == net for net_size, shift, net in self._nets)


def _net(key: bytes) -> tuple[int, int, int]:
    """Return address length in octets, host bits and network number of a key."""
    size = len(key) - 1
    shift = size * 8 - key[-1]
    return size, shift, int.from_bytes(key[:-1], "big") >> shift


def permitted(
    special: Iterable[bytes], space: PrivateSpace, policy: Policy, now: float
) -> tuple[frozenset[bytes], float]:
    """Return which special addresses may stay in an answer, and until when (monotonic seconds; inf: no end).

    They may when inside `space` or when the longest live prefix of the policy's CIDR rules allows them.
    """
    stay: set[bytes] = set()
    until = math.inf
    for address in special:
        if address in space:
            stay.add(address)
        elif (found := policy.cidrs.lookup(address, now)) is not None and found[1]:
            stay.add(address)
            until = min(until, policy.cidrs.entries[found[0]].allow)
    return frozenset(stay), until
