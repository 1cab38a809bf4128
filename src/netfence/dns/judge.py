"""Judging one question, and one answer, by a policy. Pure: the decisions of `handler`, without its waiting.

Order (semantics.md 14): packet mode `block_all` denies whatever the DNS mode; DNS mode `disabled` forwards; `proxy`
leaves the decision to the control plane (`judge` returns None); else the domain rules, search domains considered
(`netfence.policy.search`, by which the attachment judges the holders of leases too).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from netfence.dns.decision import Reason
from netfence.policy.domain import DomainRule
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import NameVerdict, Policy
from netfence.policy.search import judge_asked


class Verdict(NamedTuple):
    """What happens to a question.

    `name` is the name that was judged (search domain stripped); leases are held by the name as asked for. `denied` and
    `audit` together: answered all the same, opened not. `guard`: the rebinding guard and the TTL cap apply to upstream
    answers. `ips` are the control plane's own addresses, `ttl_s` and `since` their TTL and its begin. `until` ends the
    verdict itself. `reason` and `rule` are what those who watch are told.
    """

    name: str
    denied: bool
    why: str
    learn: bool = True
    guard: bool = True
    audit: bool = False
    ips: tuple[bytes, ...] = ()
    ttl_s: int = 0
    since: float = 0.0
    until: float = math.inf
    reason: Reason = "control_plane"
    rule: DomainRule | None = None


def judge(policy: Policy, name: str, suffixes: Iterable[str]) -> Verdict | None:
    """Judge a question's name; None: ask the control plane. `suffixes` are search domains with a leading dot."""
    mode = policy.dns.mode
    if policy.mode is Mode.BLOCK_ALL:
        guard = mode is not DnsMode.DISABLED
        why = "mode block_all"
        return Verdict(name, denied=True, why=why, learn=False, guard=guard, audit=policy.audit, reason="block_all")
    if mode is DnsMode.DISABLED:
        return Verdict(name, denied=False, why="DNS mode disabled", learn=False, guard=False, reason="mode_disabled")
    if mode is DnsMode.PROXY:
        return None
    judged, found = judge_asked(policy, name, suffixes)
    reason, rule = _reason(found), found.rule
    return Verdict(judged, denied=not found.allowed, why=found.why, audit=policy.audit, reason=reason, rule=rule)


def _reason(found: NameVerdict) -> Reason:
    if found.rule is None:
        return "default_pass" if found.allowed else "default_drop"
    return "allow_rule" if found.allowed else "deny_rule"


def chain_denial(policy: Policy, chain: Iterable[str]) -> str | None:
    """Return why an answer is denied for a name that it leads through (semantics.md 16), None when it is not."""
    found = chain_rule(policy, chain)
    return None if found is None else f"rule: {found[0].text}, for {found[1]}, which the answer leads to"


def chain_rule(policy: Policy, chain: Iterable[str]) -> tuple[DomainRule, str] | None:
    """Return the rule that denies an answer, and the name on its chain that it denies; None when none does."""
    domains = policy.dns.domains
    for name in chain:
        rule = domains.match(name)
        if rule is not None and not rule.allow:
            return rule, name
    return None
