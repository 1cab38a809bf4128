"""Commands: how a policy changes. Each makes a new policy from the old one, or fails whole with every fault named.

The remote control plane, the local policy file and restored state all speak these. Values arrive as they came (raw mode
numbers, text); everything is checked here and nowhere else. `now` is seconds of the monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, Self, TypeAlias, TypeVar

from netfence.errors import ExhaustedError, InvalidError
from netfence.policy.cidr import NEVER, CidrTable, Key, parse_cidr
from netfence.policy.domain import DomainRule, DomainTable, kind_of, parse_domain
from netfence.policy.limits import MAX_CIDR_RULES, MAX_DOMAIN_RULES, MAX_FAULTS, MAX_TTL_S, MAX_UPSTREAMS
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import DnsPolicy, Policy
from netfence.policy.upstream import canonical_upstream

ModeT = TypeVar("ModeT", Mode, DnsMode)


class CidrSpec(NamedTuple):
    """A CIDR as it came; `ttl_s` 0 means for ever."""

    cidr: str
    ttl_s: float = 0.0


class DomainSpec(NamedTuple):
    """A domain as it came: `d`, `*.d` or `*`; with `include_subdomains` d and everything below."""

    domain: str
    include_subdomains: bool = False


@dataclass(frozen=True, slots=True)
class DnsSpec:
    """The DNS part of a bulk update; `mode` is a number of proto DnsMode, no upstreams means the daemon's own."""

    mode: int
    allow: Sequence[DomainSpec] = ()
    deny: Sequence[DomainSpec] = ()
    upstreams: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class SetMode:
    """Change the packet mode (a number of proto PolicyMode)."""

    mode: int


@dataclass(frozen=True, slots=True)
class AllowCidr:
    """Put a prefix into the allow list, replacing its expiry there; `ttl_s` 0 means for ever."""

    cidr: str
    ttl_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DenyCidr:
    """Put a prefix into the deny list, replacing its expiry there; `ttl_s` 0 means for ever."""

    cidr: str
    ttl_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RemoveCidr:
    """Remove exactly this prefix from both lists; one that is in neither changes nothing and is no error."""

    cidr: str


@dataclass(frozen=True, slots=True)
class SetDnsMode:
    """Change the DNS mode (a number of proto DnsMode)."""

    mode: int


@dataclass(frozen=True, slots=True)
class AllowDomain:
    """Add an allow rule for a domain."""

    domain: str
    include_subdomains: bool = False


@dataclass(frozen=True, slots=True)
class DenyDomain:
    """Add a deny rule for a domain."""

    domain: str
    include_subdomains: bool = False


@dataclass(frozen=True, slots=True)
class RemoveDomain:
    """Remove from both lists: `d` its exact and subtree rules, `*.d` that rule, `*` that rule. Absent is no error."""

    domain: str


@dataclass(frozen=True, slots=True)
class BulkUpdate:
    """Replace the whole policy. CIDRs may be plain texts where they have no TTL.

    No `dns` means DNS mode disabled and no domain rules (wire.md behaviour 6).
    """

    mode: int
    allow_cidrs: Sequence[CidrSpec | str] = ()
    deny_cidrs: Sequence[CidrSpec | str] = ()
    dns: DnsSpec | None = None
    audit: bool = False


Command: TypeAlias = (
    SetMode | AllowCidr | DenyCidr | RemoveCidr | SetDnsMode | AllowDomain | DenyDomain | RemoveDomain | BulkUpdate
)


def apply(policy: Policy, command: Command, now: float) -> Policy:
    """Return the policy that the command makes of this one; the same object when nothing changes.

    CIDR entries that are expired at `now` are dropped on the way. Raises InvalidError with every fault of the command,
    ExhaustedError where a table would be too full; the old policy stays valid and unchanged.
    """
    if isinstance(command, BulkUpdate):
        return _bulk(command, now)
    try:
        return _apply_one(policy, command, now)
    except ValueError as fault:
        raise InvalidError([f"{_NAMES[type(command)]}: {text}" for text in fault.args]) from None


def _apply_one(policy: Policy, command: Command, now: float) -> Policy:
    """Apply a single-rule command; ValueError with the faults as arguments."""
    match command:
        case SetMode(mode):
            return _updated(policy, policy.cidrs.live(now), policy.dns, _mode(Mode, mode))
        case AllowCidr(cidr, ttl_s) | DenyCidr(cidr, ttl_s):
            key, expiry = _timed_key(cidr, ttl_s, now)
            live = policy.cidrs.live(now)
            change = live.allow if isinstance(command, AllowCidr) else live.deny
            return _updated(policy, change(key, expiry), policy.dns)
        case RemoveCidr(cidr):
            return _updated(policy, policy.cidrs.live(now).without(parse_cidr(cidr)), policy.dns)
        case SetDnsMode(mode):
            return _updated(policy, policy.cidrs.live(now), replace(policy.dns, mode=_mode(DnsMode, mode)))
        case AllowDomain(domain, below) | DenyDomain(domain, below):
            rule = _rule(domain, below, allow=isinstance(command, AllowDomain))
            return _with_domains(policy, policy.dns.domains.with_(rule), now)
        case RemoveDomain(domain):
            name, below_only = parse_domain(domain)
            return _with_domains(policy, policy.dns.domains.without(name, below_only=below_only), now)
    raise TypeError(f"not a command: {command!r}")


_NAMES: Final[dict[type, str]] = {
    SetMode: "set_mode",
    AllowCidr: "allow_cidr",
    DenyCidr: "deny_cidr",
    RemoveCidr: "remove_cidr",
    SetDnsMode: "set_dns_mode",
    AllowDomain: "allow_domain",
    DenyDomain: "deny_domain",
    RemoveDomain: "remove_domain",
}


def _updated(policy: Policy, cidrs: CidrTable, dns: DnsPolicy, mode: Mode | None = None) -> Policy:
    """Return the policy with these parts, itself when they are what it has."""
    mode = policy.mode if mode is None else mode
    same_dns = dns is policy.dns or (dns.mode is policy.dns.mode and dns.domains is policy.dns.domains)
    if mode is policy.mode and cidrs is policy.cidrs and same_dns:
        return policy
    return replace(policy, mode=mode, cidrs=cidrs, dns=dns)


def _with_domains(policy: Policy, domains: DomainTable, now: float) -> Policy:
    return _updated(policy, policy.cidrs.live(now), replace(policy.dns, domains=domains))


def _mode(kind: type[ModeT], number: int) -> ModeT:
    """Return the mode of that number; ValueError naming what is allowed (0, UNSPECIFIED, is not: wire.md 6)."""
    try:
        return kind(number)
    except ValueError:
        allowed = ", ".join(f"{mode.value} {mode.name.lower()}" for mode in kind)
        what = "DNS mode" if kind is DnsMode else "mode"
        said = "UNSPECIFIED (0)" if number == 0 else repr(number)
        raise ValueError(f"{what} {said} is not allowed; allowed are {allowed}") from None


def _expiry(ttl_s: float, now: float) -> float:
    """Return the expiry of a TTL in seconds; ValueError unless it is 0 (for ever) or positive and bounded."""
    if ttl_s == 0:
        return NEVER
    if math.isnan(ttl_s) or ttl_s < 0 or ttl_s > MAX_TTL_S:
        raise ValueError(f"TTL {ttl_s:g}s is not allowed; allowed are 0 (for ever) to {MAX_TTL_S:.0f} seconds")
    return now + ttl_s


def _timed_key(cidr: str, ttl_s: float, now: float) -> tuple[Key, float]:
    """Return key and expiry; ValueError with all faults as arguments."""
    faults: list[str] = []
    pairs = list(_keys([CidrSpec(cidr, ttl_s)], "", faults, now))
    if faults:
        raise ValueError(*faults)
    return pairs[0]


def _rule(domain: str, include_subdomains: bool, *, allow: bool) -> DomainRule:
    name, below_only = parse_domain(domain)
    return DomainRule(name, kind_of(name, below_only=below_only, include_subdomains=include_subdomains), allow)


def _bulk(update: BulkUpdate, now: float) -> Policy:
    """Make the policy of a bulk update; InvalidError with every fault, ExhaustedError on too many rules."""
    faults = _Faults()
    names = len(update.dns.allow) + len(update.dns.deny) if update.dns else 0
    refuse_too_many(len(update.allow_cidrs) + len(update.deny_cidrs), names)
    mode = _checked_mode(Mode, update.mode, "mode", faults)
    cidrs = _cidrs(update, faults, now)
    dns = DnsPolicy() if update.dns is None else _dns(update.dns, faults)
    if faults or mode is None or dns is None:
        raise InvalidError(faults.told())
    return Policy(mode=mode, audit=update.audit, cidrs=cidrs, dns=dns)


class _Faults(list[str]):
    """The first `MAX_FAULTS` faults, and how many more there were."""

    more = 0

    def append(self, fault: str) -> None:
        if len(self) < MAX_FAULTS:
            super().append(fault)
        else:
            self.more += 1

    def __iadd__(self, faults: Iterable[str]) -> Self:  # type: ignore[misc,override]  # list's own takes any
        for fault in faults:
            self.append(fault)
        return self

    def told(self) -> list[str]:
        return [*self, f"and {self.more} more faults"] if self.more else self


def refuse_too_many(cidrs: int, domains: int) -> None:
    """Raise ExhaustedError for lists that are too long, before anything is read of them."""
    faults = [
        f"{count} {what}, and an attachment may have {limit}"
        for what, count, limit in (("CIDRs", cidrs, MAX_CIDR_RULES), ("domains", domains, MAX_DOMAIN_RULES))
        if count > limit
    ]
    if faults:
        raise ExhaustedError("; ".join(faults))


def _checked_mode(kind: type[ModeT], number: int, where: str, faults: list[str]) -> ModeT | None:
    try:
        return _mode(kind, number)
    except ValueError as fault:
        faults.append(f"{where}: {fault}")
        return None


def _keys(specs: Sequence[CidrSpec | str], where: str, faults: list[str], now: float) -> Iterator[tuple[Key, float]]:
    """Yield (key, expiry) of the good entries, note the faults of the bad ones with their place in `where`."""
    for index, spec in enumerate(specs):
        try:
            if isinstance(spec, str):
                yield parse_cidr(spec), NEVER
            elif spec.ttl_s == 0:
                yield parse_cidr(spec.cidr), NEVER
            else:
                yield parse_cidr(spec.cidr), _expiry(spec.ttl_s, now)
        except ValueError:
            faults += _spec_faults(spec, f"{where}[{index}]: " if where else "", now)


def _spec_faults(spec: CidrSpec | str, prefix: str, now: float) -> Iterator[str]:
    """Say everything that is wrong with one entry: its text, its TTL or both."""
    cidr, ttl_s = CidrSpec(spec) if isinstance(spec, str) else spec
    try:
        parse_cidr(cidr)
    except ValueError as fault:
        yield f"{prefix}{fault}"
    try:
        _expiry(ttl_s, now)
    except ValueError as fault:
        yield f"{prefix}{fault}"


def _cidrs(update: BulkUpdate, faults: list[str], now: float) -> CidrTable:
    """Read both CIDR lists; the faults are noted."""
    try:
        return CidrTable.build(
            _keys(update.allow_cidrs, "allow_cidrs", faults, now),
            _keys(update.deny_cidrs, "deny_cidrs", faults, now),
            expected=len(update.allow_cidrs) + len(update.deny_cidrs),
        )
    except ValueError as fault:  # nested too deep
        faults += fault.args
        return CidrTable()


def _rules(specs: Sequence[DomainSpec], where: str, faults: list[str], *, allow: bool) -> Iterator[DomainRule]:
    """Yield the rules of the good entries, note the faults of the bad ones."""
    for index, (domain, include_subdomains) in enumerate(specs):
        try:
            yield _rule(domain, include_subdomains, allow=allow)
        except ValueError as fault:
            faults.append(f"{where}[{index}]: {fault}")


def _dns(spec: DnsSpec, faults: list[str]) -> DnsPolicy | None:
    """Read the DNS part; the faults are noted, None only with a bad mode."""
    mode = _checked_mode(DnsMode, spec.mode, "dns.mode", faults)

    def rules() -> Iterator[DomainRule]:
        yield from _rules(spec.allow, "dns.allow_domains", faults, allow=True)
        yield from _rules(spec.deny, "dns.deny_domains", faults, allow=False)

    domains = DomainTable.build(rules(), expected=len(spec.allow) + len(spec.deny))
    upstreams: list[str] = []
    if len(spec.upstreams) > MAX_UPSTREAMS:
        faults.append(f"dns.upstream_servers: {len(spec.upstreams)} given, at most {MAX_UPSTREAMS} are allowed")
    for index, text in enumerate(spec.upstreams[:MAX_UPSTREAMS]):
        try:
            upstreams.append(canonical_upstream(text))
        except ValueError as fault:
            faults.append(f"dns.upstream_servers[{index}]: {fault}")
    return None if mode is None else DnsPolicy(mode, domains, tuple(upstreams))
