"""The policy of one attachment: an immutable value, and what it says about an address or a name.

Owns the judgement that needs only the policy, and the canonical text whose digest is `policy_hash`. Refuses to know
leases, packets and who asks: the data plane and the DNS server do. Change rules through `commands.apply`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from netfence.policy.cidr import NEVER, CidrTable, Key, cidr_text
from netfence.policy.domain import DomainRule, DomainTable
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.ordering import RANGE, sort_in_pieces


class NameVerdict(NamedTuple):
    """What the policy says about a name; `why` is for humans (EDE text, `why`, `watch`)."""

    allowed: bool
    rule: DomainRule | None
    why: str


@dataclass(frozen=True, slots=True)
class DnsPolicy:
    """How the DNS server of the attachment answers.

    `upstreams` are canonical `host:port` texts, in the order to try; empty means the daemon's own.
    """

    mode: DnsMode = DnsMode.DISABLED
    domains: DomainTable = field(default_factory=DomainTable)
    upstreams: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """Everything an attachment is held to. The default is `block_all`."""

    mode: Mode = Mode.BLOCK_ALL
    audit: bool = False
    cidrs: CidrTable = field(default_factory=CidrTable)
    dns: DnsPolicy = field(default_factory=DnsPolicy)
    _hash: str = field(default="", init=False, repr=False, compare=False)

    def live(self, now: float) -> Policy:
        """Return the policy without CIDR entries that are expired at `now`; itself when none is.

        What it says does not change by that, nor does its hash, which is not computed anew.
        """
        cidrs = self.cidrs.live(now)
        if cidrs is self.cidrs:
            return self
        policy = replace(self, cidrs=cidrs)
        object.__setattr__(policy, "_hash", self._hash)
        return policy

    def judge_address(self, address: bytes, now: float) -> tuple[Key, bool] | None:
        """Return the CIDR rule that decides about a packed address and whether it allows; None: no rule says.

        What the rules say, whatever the mode; `allows_address` is the question of the rebinding guard.
        """
        return self.cidrs.lookup(address, now)

    def allows_address(self, address: bytes, now: float) -> bool:
        """Tell whether an allow CIDR decides about the packed address (semantics.md 18)."""
        found = self.cidrs.lookup(address, now)
        return found is not None and found[1]

    def judge_name(self, name: str) -> NameVerdict:
        """Judge a queried name (semantics.md 14). Explicit rules on names of a CNAME chain: `dns.domains.match`.

        In mode proxy the rules have no say and neither have we: the verdict is "denied", for the server asks the
        control plane instead and whoever forgets to must not open anything. Under `audit` the verdict is the same;
        the caller answers all the same and reports it as `would_drop`.
        """
        if self.mode is Mode.BLOCK_ALL and not self.audit:
            return _BLOCK_ALL
        mode = self.dns.mode
        if mode is DnsMode.DISABLED:
            return _DNS_DISABLED
        if mode is DnsMode.PROXY:
            return _PROXY
        rule = self.dns.domains.match(name)
        if rule is not None:
            return NameVerdict(rule.allow, rule, f"rule: {rule.text}")
        return _NO_RULE_ALLOWLIST if mode is DnsMode.ALLOWLIST else _NO_RULE_DENYLIST

    def canonical_lines(self) -> Iterator[str]:
        """Yield the lines of the canonical text, unsorted (wire.md behaviour 7, docs/policy-hash.md)."""
        yield f"mode=POLICY_MODE_{self.mode.name}"
        yield f"audit={int(self.audit)}"
        yield f"dns_mode=DNS_MODE_{self.dns.mode.name}"
        for index, upstream in enumerate(self.dns.upstreams):
            yield f"upstream={index}:{upstream}"
        for key, entry in self.cidrs.entries.items():
            if entry.allow == NEVER:
                yield f"allow {cidr_text(key)}"
            if entry.deny == NEVER:
                yield f"deny {cidr_text(key)}"
        for rule in self.dns.domains.rules():
            yield rule.hash_line

    def hash(self) -> str:
        """Return the hex SHA-256 of the canonical text. Computed once; some 0.2 s for 100,000 rules."""
        if not self._hash:
            lines = sort_in_pieces(list(self.canonical_lines()))  # all ASCII: text order is byte order
            digest = hashlib.sha256(lines[0].encode())
            for start in range(1, len(lines), RANGE):
                digest.update(("\n" + "\n".join(lines[start : start + RANGE])).encode())
            object.__setattr__(self, "_hash", digest.hexdigest())
        return self._hash


_BLOCK_ALL: Final = NameVerdict(False, None, "mode block_all")
_DNS_DISABLED: Final = NameVerdict(True, None, "dns mode disabled")
_PROXY: Final = NameVerdict(False, None, "dns mode proxy: the control plane decides")
_NO_RULE_ALLOWLIST: Final = NameVerdict(False, None, "dns mode allowlist: no rule allows it")
_NO_RULE_DENYLIST: Final = NameVerdict(True, None, "dns mode denylist: no rule denies it")

EMPTY: Final = Policy()
"""The policy that lets nothing out: mode block_all, no rules."""
