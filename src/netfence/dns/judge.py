"""Judging one question, and one answer, by a policy. Pure: the decisions of `handler`, without its waiting.

Order (semantics.md 14): packet mode `block_all` denies whatever the DNS mode; DNS mode `disabled` forwards; `proxy`
leaves the decision to the control plane (`judge` returns None); else the domain rules, search domains considered
(`netfence.policy.search`, by which the attachment judges the holders of leases too).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import Policy
from netfence.policy.search import judge_asked


class Verdict(NamedTuple):
    """What happens to a question.

    `name` is the name that was judged (search domain stripped); leases are held by the name as asked for. `denied` and
    `audit` together: answered all the same, opened not. `guard`: the rebinding guard and the TTL cap apply to upstream
    answers. `ips` are the control plane's own addresses, `ttl_s` and `since` their TTL and its begin. `until` ends the
    verdict itself.
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


def judge(policy: Policy, name: str, suffixes: Iterable[str]) -> Verdict | None:
    """Judge a question's name; None: ask the control plane. `suffixes` are search domains with a leading dot."""
    mode = policy.dns.mode
    if policy.mode is Mode.BLOCK_ALL:
        guard = mode is not DnsMode.DISABLED
        return Verdict(name, denied=True, why="mode block_all", learn=False, guard=guard, audit=policy.audit)
    if mode is DnsMode.DISABLED:
        return Verdict(name, denied=False, why="DNS mode disabled", learn=False, guard=False)
    if mode is DnsMode.PROXY:
        return None
    judged, found = judge_asked(policy, name, suffixes)
    return Verdict(judged, denied=not found.allowed, why=found.why, audit=policy.audit)


def chain_denial(policy: Policy, chain: Iterable[str]) -> str | None:
    """Return why an answer is denied for a name that it leads through (semantics.md 16), None when it is not."""
    domains = policy.dns.domains
    for name in chain:
        rule = domains.match(name)
        if rule is not None and not rule.allow:
            return f"rule: {rule.text}, for {name}, which the answer leads to"
    return None
