"""What a DNS server needs to know of the configuration, as one immutable value.

The composition root makes it from `netfence.config`; attribute names are the keys of `dns.*` there, with units. Also
here: an upstream's text as an address to connect to.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from netfence.dns.wire import NXDOMAIN, REFUSED
from netfence.policy.search import search_suffixes
from netfence.policy.upstream import canonical_upstream, parse_upstream

REJECT_RCODES = {"refused": REFUSED, "nxdomain": NXDOMAIN}


@dataclass(frozen=True, slots=True)
class DnsSettings:
    """Settings shared by all DNS servers of the daemon.

    `upstreams` are the defaults, ``host[:port]``, tried in order. `allow_private` are keys of `netfence.policy` (packed
    masked address and one octet of prefix length). `search_domains` are names without the final dot, lower case.
    `max_qps` 0 means no limit. Durations in seconds. Raises ValueError for a bad upstream or rcode.
    """

    upstreams: tuple[str, ...] = ()
    timeout_s: float = 2.0
    attempts: int = 2
    reject_rcode: str = "refused"
    min_lease_s: float = 300.0
    lease_grace_s: float = 60.0
    max_lease_s: float = 86_400.0
    allow_private: tuple[bytes, ...] = ()
    search_domains: tuple[str, ...] = ()
    max_qps: int = 0
    search_suffixes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.reject_rcode not in REJECT_RCODES:
            raise ValueError(f"dns.reject_rcode {self.reject_rcode!r}: must be one of {', '.join(REJECT_RCODES)}")
        object.__setattr__(self, "upstreams", tuple(map(canonical_upstream, self.upstreams)))
        object.__setattr__(self, "search_suffixes", search_suffixes(self.search_domains))

    @property
    def denial_rcode(self) -> int:
        """Return the rcode of a denied query."""
        return REJECT_RCODES[self.reject_rcode]


class Upstream(NamedTuple):
    """A name server: its text form, and family and address for `socket.connect`."""

    text: str
    family: int
    address: tuple[Any, ...]


@lru_cache(maxsize=1024)
def upstream_of(text: str) -> Upstream:
    """Return the upstream that a text means (`netfence.policy.upstream`); ValueError with the reason."""
    host, port = parse_upstream(text)
    if ":" in host:
        return Upstream(text, socket.AF_INET6, (host, port, 0, 0))
    return Upstream(text, socket.AF_INET, (host, port))


@lru_cache(maxsize=256)
def upstreams_of(texts: tuple[str, ...]) -> tuple[Upstream, ...]:
    """Return the upstreams that a policy's texts mean; ValueError with the reason."""
    return tuple(upstream_of(text) for text in texts)
