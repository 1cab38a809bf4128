"""What audit mode let through, sorted by what may become of it in a policy; `suggesting` writes it down.

Owns the care: nothing that is dangerous to open ends among what is to be allowed. Cloud metadata, other special-purpose
addresses outside `dns.allow_private` (a name in somebody's hands can point there), and whatever an explicit deny rule
stops, by address or by name, is only proposed. Pure: policies, names and destinations in, a sorting out.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from netfence.audited import AuditedName
from netfence.dataplane.explain import METADATA, METADATA_RULE
from netfence.dataplane.plane import Seen
from netfence.dns.guard import PrivateSpace
from netfence.dns.judge import chain_rule
from netfence.policy.domain import DomainRule, parse_domain
from netfence.policy.policy import Policy
from netfence.policy.prefix import cidr_text, key_of, normal
from netfence.policy.special import is_special
from netfence.policy_yaml import quoted

MAX_PORTS: Final = 6
"""Ports told of one rule."""

MAX_TOLD: Final = 64
"""Characters of a name that a comment tells: a workload can ask for names of a thousand, and each of its addresses may
have such a comment. The whole would be too large to be answered with."""

_PROTOCOLS: Final = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6"}
_WITH_PORTS: Final = (6, 17)
_UNKNOWN: Final = bytes(16)

NAME_SERVICE: Final = (53, 853)
"""DNS, and DNS over TLS or QUIC (RFC 7858, RFC 9250): a way around every rule about names."""


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a suggestion is made of.

    `policy` is what commands made; `names` were audited; `leased` are names that opened addresses, with those of them
    that were seen, and `unlisted` counts names that are left out there; `foreign_dns`: DNS servers of others
    as packed address and port; `alone`: the metadata tells this attachment from all others; `private` is
    `dns.allow_private`; `now` is monotonic seconds.
    """

    id: str
    target: str
    kind: str
    policy: Policy
    metadata: Mapping[str, str] = field(default_factory=dict)
    alone: bool = True
    seen: Sequence[Seen] = ()
    missed: int = 0
    names: Sequence[tuple[str, AuditedName]] = ()
    forgotten: int = 0
    leased: Mapping[str, Sequence[bytes]] = field(default_factory=dict)
    unlisted: int = 0
    foreign_dns: frozenset[tuple[bytes, int]] = frozenset()
    private: PrivateSpace = field(default_factory=lambda: PrivateSpace(()))
    now: float = 0.0


@dataclass(slots=True)
class Traffic:
    """What went to one rule's destinations."""

    packets: int = 0
    ports: Counter[str] = field(default_factory=Counter)

    def add(self, one: Seen) -> None:
        """Count a destination in."""
        self.packets += one.packets
        protocol = _PROTOCOLS.get(one.protocol, f"protocol {one.protocol}")
        self.ports[f"{protocol}/{one.port}" if one.port else protocol] += one.packets

    def update(self, other: Traffic) -> None:
        """Count other traffic in."""
        self.packets += other.packets
        self.ports.update(other.ports)

    def __str__(self) -> str:
        """Tell packets, and the ports that most of them went to."""
        if not self.packets:
            return "no packets"
        told = [port for port, _ in self.ports.most_common(MAX_PORTS)]
        more = f" and {len(self.ports) - MAX_PORTS} more" if len(self.ports) > MAX_PORTS else ""
        return f"{count(self.packets, 'packet')}: {', '.join(told)}{more}"


class Sorted:
    """What was seen.

    To be allowed: `names` and `hosts` (packed; `merged` as CIDRs). Allowed already: `by_cidr` and `by_domain`. Not for
    a machine to allow: `proposed` and `refused`, each with the reason. `never`: what no rule can let through.
    """

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self.names: dict[str, Traffic] = {}
        self.hosts: dict[bytes, Traffic] = {}
        self.by_cidr: dict[str, Traffic] = {}
        self.by_domain: dict[DomainRule, Traffic] = {}
        self.proposed: dict[bytes, tuple[Traffic, str]] = {}
        self.refused: dict[str, str] = {}
        self.never: dict[str, Traffic] = {}
        self._owners: dict[bytes, list[str]] = {}
        self._homes: dict[bytes, Traffic | str] = {}
        self._name_servers = {normal(one.destination) for one in facts.seen if one.port in NAME_SERVICE}
        for name, known in facts.names:
            self._own(name, list(known.addresses))
            self._sort_name(name, known.chain)
        for name, addresses in facts.leased.items():
            self._own(name, addresses)
            if name not in self.refused:
                self._sort_name(name, ())
        for one in facts.seen:
            self._sort_packets(one)

    def _own(self, name: str, addresses: Sequence[bytes]) -> None:
        for address in addresses:
            self._owners.setdefault(address, []).append(name)

    def _sort_name(self, name: str, chain: Sequence[str]) -> None:
        """Sort a name whose answer leads to others: a rule that denies one of those denies it (semantics.md 16)."""
        rule = self._facts.policy.dns.domains.match(name)
        if (denied := chain_rule(self._facts.policy, chain)) is not None:
            self.refused[name] = f"{denied[0].text}, for {cut(denied[1])}, which its answer leads to"
        elif rule is not None and not rule.allow:
            self.refused[name] = rule.text
        elif rule is not None:
            self.by_domain.setdefault(rule, Traffic())
        elif not plain(name):
            self.refused[name] = "no rule can name it"
        else:
            self.names.setdefault(name, Traffic())

    def _sort_packets(self, one: Seen) -> None:
        if one.destination == _UNKNOWN:
            self.never.setdefault("to an unknown destination", Traffic()).add(one)
            return
        address = normal(one.destination)
        if one.protocol in _WITH_PORTS and (address, one.port) in self._facts.foreign_dns:
            self.never.setdefault("to the DNS server of another attachment", Traffic()).add(one)
            return
        rule = self._facts.policy.cidrs.lookup(address, self._facts.now)
        if rule is not None and not rule[1]:
            self._propose(address, one, f"deny {cidr_text(rule[0])} stays")
        elif address in METADATA and (rule is None or rule[0][-1] < METADATA_RULE[len(address)]):
            self._propose(address, one, "cloud metadata: it hands out the machine's own credentials")
        elif rule is not None:
            self.by_cidr.setdefault(cidr_text(rule[0]), Traffic()).add(one)
        else:
            self._sort_address(address, one)

    def _sort_address(self, address: bytes, one: Seen) -> None:
        """Sort packets to an address that no CIDR rule speaks of."""
        owners = self._owners.get(address, [])
        if is_special(address) and address not in self._facts.private:
            what = f"of {quoted(cut(owners[0]))}, " if owners else ""
            self._propose(address, one, f"{what}special-purpose: not allowed without a look")
            return
        if (home := self._homes.get(address)) is None:
            home = self._homes[address] = self._home_of(owners)
        if isinstance(home, Traffic):
            home.add(one)
        elif home:
            self._propose(address, one, f"of {quoted(cut(home))}, which is denied")
        elif address in self._name_servers:
            self._propose(address, one, "a name server: whoever asks it asks past the attachment's own")
        else:
            self.hosts.setdefault(address, Traffic()).add(one)

    def _home_of(self, owners: Sequence[str]) -> Traffic | str:
        """Return where the traffic of an address with these names is counted, or the name that is denied, "" for none.

        Asked once for each address: a workload can give one address a thousand names, and send to all of its ports.
        """
        for name in owners:
            if (traffic := self._traffic_of(name)) is not None:
                return traffic
        return next((name for name in owners if plain(name)), "")

    def _traffic_of(self, name: str) -> Traffic | None:
        """Return where the traffic of a name that is, or is to be, allowed is counted; None for another."""
        if name in self.names or name in self.refused:
            return self.names.get(name)
        rule = self._facts.policy.dns.domains.match(name)
        return self.by_domain.get(rule) if rule is not None else None

    def _propose(self, address: bytes, one: Seen, why: str) -> None:
        self.proposed.setdefault(address, (Traffic(), why))[0].add(one)

    def merged(self) -> Iterator[tuple[str, Traffic]]:
        """Yield the CIDRs that cover the hosts and nothing else, with their traffic, in address order."""
        for size in (4, 16):
            hosts = {address: traffic for address, traffic in self.hosts.items() if len(address) == size}
            keys = {key_of(network.network_address.packed, network.prefixlen) for network in _collapsed(size, hosts)}
            lengths = {key[-1] for key in keys}
            found: dict[bytes, Traffic] = {}
            for address, traffic in hosts.items():
                key = next(key for length in lengths if (key := key_of(address, length)) in keys)
                found.setdefault(key, Traffic()).update(traffic)
            for key in sorted(found):
                yield cidr_text(key), found[key]


def _collapsed(size: int, hosts: Iterable[bytes]) -> Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    if size == 4:
        return ipaddress.collapse_addresses(map(ipaddress.IPv4Network, hosts))
    return ipaddress.collapse_addresses(map(ipaddress.IPv6Network, hosts))


def plain(name: str) -> bool:
    """Tell whether a rule can name exactly this name."""
    try:
        return parse_domain(name) == (name, False)
    except ValueError:
        return False


def cut(name: str) -> str:
    """Return a name as a comment tells it."""
    return name if len(name) <= MAX_TOLD else f"{name[:MAX_TOLD]}..."


def count(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun."""
    return f"{number} {one if number == 1 else many or one + 's'}"
