"""Names as they were asked for, search domains considered."""

from __future__ import annotations

import pytest

from netfence.policy.domain import DomainRule, DomainTable, RuleKind
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import DnsPolicy, Policy
from netfence.policy.search import Judged, judge_asked, search_suffixes, strip

SUFFIXES = search_suffixes(["corp.example"])


def policy(*rules: DomainRule, mode: Mode = Mode.ALLOWLIST, dns: DnsMode = DnsMode.ALLOWLIST) -> Policy:
    return Policy(mode=mode, dns=DnsPolicy(dns, DomainTable.build(rules)))


def rule(name: str, *, allow: bool = True, kind: RuleKind = RuleKind.EXACT) -> DomainRule:
    return DomainRule(name, kind, allow)


def test_the_longest_suffix_comes_first() -> None:
    assert search_suffixes(["lan", "X.Lan.", "", "."]) == (".x.lan", ".lan")


@pytest.mark.parametrize(
    ("name", "stripped"),
    [
        ("a.org.x.lan", "a.org"),
        ("a.org.lan", "a.org"),
        ("x.lan", "x"),
        ("lan", "lan"),
        ("a.orglan", "a.orglan"),
        ("", ""),
    ],
)
def test_strip_takes_the_longest_search_domain(name: str, stripped: str) -> None:
    assert strip(name, (".x.lan", ".lan")) == stripped


def test_a_denial_of_the_whole_name_ends_what_its_stripped_name_allowed() -> None:
    allowed = policy(rule("db"))
    assert judge_asked(allowed, "db.corp.example", SUFFIXES) == Judged("db", allowed.judge_name("db"))
    assert judge_asked(allowed, "db.corp.example", SUFFIXES).verdict.allowed
    denied = policy(rule("db"), rule("db.corp.example", allow=False))
    assert not judge_asked(denied, "db.corp.example", SUFFIXES).verdict.allowed
    assert judge_asked(denied, "db", SUFFIXES).verdict.allowed
    below = policy(rule("db"), rule("corp.example", allow=False, kind=RuleKind.BELOW))
    assert not judge_asked(below, "db.corp.example", SUFFIXES).verdict.allowed


def test_the_rule_for_all_names_is_no_rule_for_the_whole_name() -> None:
    denied = policy(rule("", kind=RuleKind.SUBTREE), rule("db", allow=False))
    assert not judge_asked(denied, "db.corp.example", SUFFIXES).verdict.allowed
    assert judge_asked(denied, "x.corp.example", SUFFIXES).verdict.allowed


@pytest.mark.parametrize(
    ("mode", "dns", "allowed"),
    [
        (Mode.BLOCK_ALL, DnsMode.ALLOWLIST, False),
        (Mode.ALLOWLIST, DnsMode.DISABLED, True),
        (Mode.ALLOWLIST, DnsMode.PROXY, False),
        (Mode.ALLOWLIST, DnsMode.DENYLIST, True),
    ],
)
def test_modes_say_the_same_with_and_without_search_domains(mode: Mode, dns: DnsMode, allowed: bool) -> None:
    subject = policy(rule("db"), mode=mode, dns=dns)
    assert judge_asked(subject, "db.corp.example", SUFFIXES).verdict.allowed is allowed
    assert subject.judge_name("db").allowed is allowed
