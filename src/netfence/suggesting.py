"""`netfenced suggest`: the smallest allowlist policy that would have let through what audit mode let through.

Rules in force stay; then come names that were denied and resolved all the same; then, for destinations of no such name,
CIDRs, merged where a supernet is wholly covered. What was seen comes from the kernel (`dataplane.flows.SeenMap`) and
from the attachment's memory of names (`audited`). What may be allowed of it is `sightings`' to say, and how it is
written `policy_yaml`'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from netfence import __version__
from netfence.api.views import SuggestionView
from netfence.dataplane.plane import Seen
from netfence.dns.guard import PrivateSpace
from netfence.errors import ExhaustedError, NotFoundError, PreconditionError
from netfence.lifecycle import Lifecycle, Live
from netfence.policy.cidr import Rule
from netfence.policy.domain import DomainRule, RuleKind
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import Policy
from netfence.policy.prefix import cidr_text, key_of, normal
from netfence.policy.search import judge_asked
from netfence.policy_yaml import Item, cidr_item, domain_item, items, match_lines, quoted
from netfence.sightings import Facts, Sorted, Traffic, count, cut, plain

MAX_RULES: Final = 20_000
"""Rules of the policy in force that a suggestion repeats: nobody reads more, and gRPC's messages end at 4 MiB."""

MAX_LEASED: Final = 1024
"""Names in use that no rule tells, in DNS mode denylist: as many as audited ones are remembered."""

MAX_BYTES: Final = 3 << 20
"""Size of a suggestion, for the same reason."""

_BEFORE: Final = "in force before"


async def suggest(lifecycle: Lifecycle, attachment_id: str) -> SuggestionView:
    """Make a policy of what was seen. Raises NotFoundError, PreconditionError (nothing recorded), ExhaustedError."""
    live = lifecycle.find(attachment_id, "suggest")
    what = f"suggest for {live.row.name}"
    seen, missed = await asyncio.to_thread(lifecycle.parts.plane.seen, live.row.slot)
    if live.ended or live.attachment.closed:  # the slot may be another's
        raise NotFoundError(f"{what}: it was detached meanwhile")
    facts = _facts(lifecycle, live, seen, missed)
    policy = facts.policy
    if not (policy.audit or seen or missed or facts.names):
        raise PreconditionError(
            f"{what}: it is not in audit mode, and nothing was recorded; set `audit: true` in its policy, let the"
            " workload do its work, and ask again"
        )
    rules = len(policy.cidrs) + len(policy.dns.domains)
    if rules > MAX_RULES:
        raise ExhaustedError(
            f"{what}: its policy has {rules} rules, and a suggestion repeats up to {MAX_RULES}; audit with fewer"
        )
    held, leased = _held(live, seen)
    endpoints = [one.endpoint for one in lifecycle.every() if one is not live]
    suffixes = lifecycle.parts.dns.search_suffixes

    def work() -> str:
        found, unlisted = _leased(policy, held, leased, suffixes)
        foreign = frozenset((one.packed, one.port) for one in endpoints)
        return write(replace(facts, leased=found, unlisted=unlisted, foreign_dns=foreign))

    text = await asyncio.to_thread(work)
    if len(text) > MAX_BYTES:
        raise ExhaustedError(f"{what}: it has {len(text)} bytes, {MAX_BYTES} are the limit; audit with fewer rules")
    return SuggestionView(text, missed)


def _facts(lifecycle: Lifecycle, live: Live, seen: Sequence[Seen], missed: int) -> Facts:
    """Return what is to be had in a moment, on the event loop; `suggest` has the rest made in a thread."""
    row, attachment = live.row, live.attachment
    others = [one for one in lifecycle.every() if one is not live]
    return Facts(
        id=row.id,
        target=row.name,
        kind=row.kind,
        policy=attachment.commanded,
        metadata=dict(row.metadata),
        alone=not any(row.metadata.items() <= one.row.metadata.items() for one in others),
        seen=seen,
        missed=missed,
        names=[(name, known.copy()) for name, known in attachment.audited.names()],
        forgotten=attachment.audited.forgotten,
        private=PrivateSpace(lifecycle.parts.dns.allow_private),
        now=time.monotonic(),
    )


def _held(live: Live, seen: Sequence[Seen]) -> tuple[Mapping[bytes, Sequence[str]], Sequence[str]]:
    """Return the names that opened addresses which were seen, and, in DNS mode denylist, all that opened any."""
    attachment = live.attachment
    held = {address: attachment.names_of(address) for address in {normal(one.destination) for one in seen}}
    return held, attachment.leased_names() if attachment.commanded.dns.mode is DnsMode.DENYLIST else ()


def _leased(
    policy: Policy, held: Mapping[bytes, Sequence[str]], leased: Sequence[str], suffixes: Sequence[str]
) -> tuple[dict[str, list[bytes]], int]:
    """Return names that opened addresses, with those that were seen, and how many names are left out.

    In DNS mode denylist all names that nothing denies, which no rule tells; else those of addresses that were seen. As
    they are judged: without search domains. A workload can have 65,536 of them, a fifth of a second: for a thread.
    """
    found: dict[str, list[bytes]] = {}
    for address, names in held.items():
        for name in names:
            found.setdefault(judge_asked(policy, name, suffixes).name, []).append(address)
    for name in leased[:MAX_LEASED]:
        found.setdefault(judge_asked(policy, name, suffixes).name, [])
    return found, max(len(leased) - MAX_LEASED, 0)


def write(facts: Facts) -> str:
    """Return the suggestion as a policy file."""
    found, policy = Sorted(facts), facts.policy
    lines = [*_head(facts, found), "attachments:", *_match(facts)]
    lines += ["    mode: allowlist", "    # audit: true  # to try it: nothing is dropped, and what would be is counted"]
    lines += items("allow_cidrs", _allow_cidrs(facts, found), 4)
    lines += items("deny_cidrs", (_kept(rule, facts) for rule in _rules(facts, allow=False)), 4)
    lines += ["    dns:", f"      mode: {_dns_mode(policy)}"]
    lines += items("upstreams", (Item(quoted(upstream)) for upstream in policy.dns.upstreams), 6)
    lines += items("allow", _allow_names(facts, found), 6)
    denied = sorted(rule for rule in policy.dns.domains.rules() if not rule.allow)
    lines += items("deny", (domain_item(rule, _BEFORE) for rule in denied), 6)
    return "\n".join([*lines, "default:", "  mode: block_all", ""])


def _head(facts: Facts, found: Sorted) -> Iterator[str]:
    """Yield the comments above it."""
    packets = count(sum(one.packets for one in facts.seen), "packet")
    queries = count(sum(known.queries for _, known in facts.names), "query", "queries")
    yield f"# Suggested by netfenced {__version__} for attachment {facts.id} ({quoted(facts.target)}):"
    yield "# an allowlist that lets through what audit mode let through. Read it before use: an audited workload can"
    yield "# ask for whatever it likes. What is commented out was seen too, and is not for a machine to allow."
    yield f"# Seen: {packets} that would have been dropped, {queries} that would have been denied."
    for what, traffic in found.never.items():
        yield f"# No rule lets through {traffic} {what}."
    if facts.missed:
        yield f"# NOT RECORDED: {count(facts.missed, 'packet')} to more destinations than the table has room for."
    if facts.forgotten:
        yield f"# FORGOTTEN: {count(facts.forgotten, 'name')} beyond the limit; those asked for last are here."
    if facts.unlisted:
        yield f"# NOT LISTED: {count(facts.unlisted, 'name')} in use that no rule tells."
    if facts.policy.mode is Mode.DENYLIST:
        yield "# MODE DENYLIST: what passed by default was not recorded; audit in mode allowlist or block_all for it."
    if _dns_mode(facts.policy) == "disabled":
        yield "# DNS MODE DISABLED: no name was judged; audit in DNS mode allowlist to have names, not addresses."
    if facts.policy.dns.mode is DnsMode.PROXY:
        yield "# DNS MODE PROXY: names that the control plane allowed are not known here."


def _match(facts: Facts) -> Iterator[str]:
    """Yield a `match` that holds for this attachment alone: by its metadata if that will do, it outlives names."""
    by_target = not facts.metadata or not facts.alone
    interface = facts.target if by_target and facts.kind == "interface" else None
    cgroup = facts.target if by_target and facts.kind == "cgroup" else None
    first, *rest = match_lines(facts.metadata, interface, cgroup, 4)
    yield f"  - {first.strip()}"
    yield from rest


def _allow_cidrs(facts: Facts, found: Sorted) -> Iterator[Item]:
    for rule in _rules(facts, allow=True):
        yield _kept(rule, facts, found.by_cidr.get(rule.cidr))
    for cidr, traffic in found.merged():
        yield cidr_item(cidr, note=str(traffic))
    for address, (traffic, why) in sorted(found.proposed.items(), key=lambda one: (len(one[0]), one[0])):
        yield cidr_item(cidr_text(key_of(address, 8 * len(address))), note=f"{traffic}; {why}", proposed=True)


def _rules(facts: Facts, *, allow: bool) -> list[Rule]:
    """Return the live CIDR rules of one list."""
    return [rule for rule in facts.policy.cidrs.rules() if rule.allow is allow and rule.expiry > facts.now]


def _kept(rule: Rule, facts: Facts, traffic: Traffic | None = None) -> Item:
    return cidr_item(rule.cidr, rule.expiry - facts.now, _BEFORE + (f"; {traffic}" if traffic else ""))


def _allow_names(facts: Facts, found: Sorted) -> Iterator[Item]:
    queries = {name: count(known.queries, "query", "queries") for name, known in facts.names}
    for rule in sorted(rule for rule in facts.policy.dns.domains.rules() if rule.allow):
        traffic = found.by_domain.get(rule)
        yield domain_item(rule, _BEFORE + (f"; {traffic}" if traffic and traffic.packets else ""))
    for name, traffic in sorted(found.names.items(), key=lambda one: one[0]):
        asked = queries.get(name, "resolved before, by no rule")
        yield domain_item(DomainRule(name, RuleKind.EXACT, allow=True), f"{asked}; {traffic}")
    for name, why in sorted(found.refused.items()):
        told = name if plain(name) else cut(name)  # what no rule can name is no entry of any
        yield Item(quoted(told), f"{queries.get(name, 'resolved before')}; {quoted(why)}", proposed=True)


def _dns_mode(policy: Policy) -> str:
    """Return the DNS mode of the suggestion: names that were never judged cannot be listed."""
    unjudged = policy.dns.mode is DnsMode.DISABLED and policy.mode is not Mode.BLOCK_ALL
    return "disabled" if unjudged else "allowlist"
