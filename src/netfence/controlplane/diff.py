"""The one command that makes one policy of another, where there is one.

Adding a rule to 100,000 should not send 100,001. A single command is found only where it provably gives what sending
the whole policy would give: the policy core applies it and the outcome is compared. Two cases are therefore left to a
bulk update although they look small: a policy in which another entry has a TTL, because a bulk update starts that
TTL anew and a single command does not, and two changes at once, because a command is atomic and two are not.
"""

from __future__ import annotations

from typing import Final

from netfence.controlplane.policy import Policy, duration
from netfence.errors import NetfenceError
from netfence.policy import commands
from netfence.policy.cidr import NEVER, CidrTable, Entry, Key, cidr_text
from netfence.policy.domain import DomainTable
from netfence.v1 import control_pb2

MAX_PAIRS: Final = 64
"""Pairs of policies whose difference is remembered: one update of many attachments is about a few of them."""

MAX_RULES: Final = 100_000
"""Prefixes up to which two policies are compared: the comparison blocks the loop, some 50 ms for these."""

MAX_DOMAINS: Final = 20_000
"""Domain rules up to which two lists are compared: the comparison blocks the loop, some 10 ms for these."""


_known: dict[tuple[tuple[str, str], tuple[str, str]], bytes | None] = {}  # by names: the policies are not kept


def single_command(old: Policy, new: Policy) -> bytes | None:
    """Return a serialized ControlCommand without id and nonce that makes `new` of `old`, None where none does.

    Policies that mean the same get a command that changes nothing and carries the new version.
    """
    pair = old.key, new.key
    if pair not in _known:
        if len(_known) >= MAX_PAIRS:
            del _known[next(iter(_known))]
        _known[pair] = _single_command(old, new)
    return _known[pair]


def _single_command(old: Policy, new: Policy) -> bytes | None:
    if max(len(old.rules.cidrs), len(new.rules.cidrs)) > MAX_RULES:
        return None
    command = _candidate(old, new)
    if command is None:
        return None
    try:
        outcome = commands.apply(old.rules, command, 0.0)
    except NetfenceError:
        return None
    return _message(command, new.version) if outcome == new.rules else None


def _candidate(old: Policy, new: Policy) -> commands.Command | None:  # noqa: PLR0911 - guard clauses
    """Return the only command that can do it, if any; whether it does is the caller's question."""
    before, after = old.rules, new.rules
    if before.audit != after.audit or before.dns.upstreams != after.dns.upstreams:
        return None
    if before.mode != after.mode:
        return None if old.has_ttl or new.has_ttl else commands.SetMode(after.mode)
    if before.dns.mode != after.dns.mode:
        return None if old.has_ttl or new.has_ttl else commands.SetDnsMode(after.dns.mode)
    if abs(len(before.cidrs) - len(after.cidrs)) > 1:
        return None
    changed = _few(before.cidrs, after.cidrs)
    if changed is None:
        return None
    if not changed:
        if old.has_ttl or new.has_ttl:
            return None
        return _domain_command(before.dns.domains, after.dns.domains) or commands.SetMode(after.mode)
    ((key, value),) = changed
    if any(_timed_elsewhere(rules.cidrs, key) for rules in (before, after)):
        return None
    return _cidr_command(key, before.cidrs.entries.get(key), value)


def _few(before: CidrTable, after: CidrTable) -> list[tuple[Key, Entry | None]] | None:
    """Return the only change, or none, as a list; None for more."""
    changed: list[tuple[Key, Entry | None]] = []
    for change in after.changes_since(before):
        changed.append(change)
        if len(changed) > 1:
            return None
    return changed


def _timed_elsewhere(table: CidrTable, key: Key) -> bool:
    """Tell whether an entry other than this one has a TTL."""
    if table.next_expiry() == NEVER:
        return False
    return any(other != key and value.has_ttl() for other, value in table.entries.items())


def _cidr_command(key: Key, before: Entry | None, after: Entry | None) -> commands.Command | None:
    text = cidr_text(key)
    if after is None:
        return commands.RemoveCidr(text)
    allow, deny = (0.0, 0.0) if before is None else tuple(before)
    # What stays must not have a TTL, which only a bulk update would start anew.
    if after.deny == deny and deny in _TIMELESS and after.allow:
        return commands.AllowCidr(text, 0.0 if after.allow == NEVER else after.allow)
    if after.allow == allow and allow in _TIMELESS and after.deny:
        return commands.DenyCidr(text, 0.0 if after.deny == NEVER else after.deny)
    return None


_TIMELESS: Final = (0.0, NEVER)


def _domain_command(before: DomainTable, after: DomainTable) -> commands.Command | None:
    """Return the command for one domain rule more or less; None when the tables are equal, or differ by more."""
    if max(len(before), len(after)) > MAX_DOMAINS:
        return None
    removed, added = set(before.rules()), set(after.rules())
    removed, added = removed - added, added - removed
    if len(added) == 1 and not removed:
        (rule,) = added
        kind = commands.AllowDomain if rule.allow else commands.DenyDomain
        return kind(rule.domain, rule.include_subdomains)
    if removed and not added:
        return commands.RemoveDomain(next(iter(removed)).domain)
    return None


def _message(command: commands.Command, version: str) -> bytes:
    message = control_pb2.ControlCommand(version=version)
    match command:
        case commands.SetMode(mode):
            message.set_mode.mode = int(mode)  # type: ignore[assignment]
        case commands.SetDnsMode(mode):
            message.set_dns_mode.mode = int(mode)  # type: ignore[assignment]
        case commands.AllowCidr(cidr, ttl_s):
            message.allow_cidr.CopyFrom(_entry(cidr, ttl_s))
        case commands.DenyCidr(cidr, ttl_s):
            message.deny_cidr.CopyFrom(_entry(cidr, ttl_s))
        case commands.RemoveCidr(cidr):
            message.remove_cidr = cidr
        case commands.AllowDomain(domain, below):
            message.allow_domain.CopyFrom(control_pb2.DomainEntry(domain=domain, include_subdomains=below))
        case commands.DenyDomain(domain, below):
            message.deny_domain.CopyFrom(control_pb2.DomainEntry(domain=domain, include_subdomains=below))
        case commands.RemoveDomain(domain):
            message.remove_domain = domain
        case _:
            raise TypeError(f"not a single-rule command: {command!r}")
    return message.SerializeToString()


def _entry(cidr: str, ttl_s: float) -> control_pb2.CIDREntry:
    return control_pb2.CIDREntry(cidr=cidr, ttl=duration(ttl_s) if ttl_s else None)
