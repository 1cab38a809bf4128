"""Judging one question, and one answer, by a policy. Pure: the decisions of `handler`, without its waiting.

Order (semantics.md 14): packet mode `block_all` denies whatever the DNS mode; DNS mode `disabled` forwards; `proxy`
leaves the decision to the control plane (`judge` returns None); else the domain rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import Policy


class Verdict(NamedTuple):
    """What happens to a question.

    `name` is the name that was judged (search domain stripped) and that holds the leases. `denied` and `audit`
    together: answered all the same, opened not. `guard`: the rebinding guard and the TTL cap apply to upstream
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
    found = policy.judge_name(name)
    if (found.rule is None or not found.rule.name) and (stripped := strip(name, suffixes)) != name:
        name, found = stripped, policy.judge_name(stripped)
    return Verdict(name, denied=not found.allowed, why=found.why, audit=policy.audit)


def strip(name: str, suffixes: Iterable[str]) -> str:
    """Return the name without the first search domain that it ends with.

    A name for which the operator wrote a rule (other than ``*``) is judged as it is: the caller asks here only after.
    """
    for suffix in suffixes:
        if name.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def chain_denial(policy: Policy, chain: Iterable[str]) -> str | None:
    """Return why an answer is denied for a name that it leads through (semantics.md 16), None when it is not."""
    domains = policy.dns.domains
    for name in chain:
        rule = domains.match(name)
        if rule is not None and not rule.allow:
            return f"rule: {rule.text}, for {name}, which the answer leads to"
    return None
