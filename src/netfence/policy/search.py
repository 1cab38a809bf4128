"""What the policy says about a name as it was asked for, search domains included (`dns.search_domains`).

Owns one rule: a name below a search domain for which the operator wrote no rule (other than ``*``) is judged as the
name without it. The DNS server judges questions by this, and whoever keeps leases must judge their holders, which are
the names as asked for, by the same: else a denial of the whole name would leave its leases open.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from netfence.policy.policy import NameVerdict, Policy


class Judged(NamedTuple):
    """The verdict about a name, and the name it was passed on: that asked for, or without its search domain."""

    name: str
    verdict: NameVerdict


def search_suffixes(domains: Iterable[str]) -> tuple[str, ...]:
    """Return search domains as `judge_asked` takes them: lower case, with a leading dot, the longest first.

    So of two nested search domains the whole of the longer one is stripped.
    """
    suffixes = {"." + name.strip(".").lower() for name in domains if name.strip(".")}
    return tuple(sorted(suffixes, key=lambda suffix: (-len(suffix), suffix)))


def judge_asked(policy: Policy, name: str, suffixes: Iterable[str]) -> Judged:
    """Judge a name as it was asked for; `suffixes` are of `search_suffixes`. See `Policy.judge_name` for the modes."""
    found = policy.judge_name(name)
    if (found.rule is None or not found.rule.name) and (stripped := strip(name, suffixes)) != name:
        return Judged(stripped, policy.judge_name(stripped))
    return Judged(name, found)


def strip(name: str, suffixes: Iterable[str]) -> str:
    """Return the name without the first of the suffixes that it ends with; never empty unless it was."""
    for suffix in suffixes:
        if name.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name
