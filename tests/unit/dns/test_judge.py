"""Judging questions and chains by a policy, without a server."""

from __future__ import annotations

import pytest
from tests.unit.dns.world import policy

from netfence.dns.judge import chain_denial, chain_rule, judge
from netfence.policy.modes import DnsMode, Mode


@pytest.mark.parametrize(
    ("mode", "dns", "audit", "denied", "learn", "guard"),
    [
        (Mode.ALLOWLIST, DnsMode.ALLOWLIST, False, True, True, True),
        (Mode.ALLOWLIST, DnsMode.DENYLIST, False, False, True, True),
        (Mode.DISABLED, DnsMode.ALLOWLIST, False, True, True, True),
        (Mode.DENYLIST, DnsMode.DISABLED, False, False, False, False),
        (Mode.BLOCK_ALL, DnsMode.DENYLIST, False, True, False, True),
        (Mode.BLOCK_ALL, DnsMode.DISABLED, True, True, False, False),
        (Mode.BLOCK_ALL, DnsMode.PROXY, True, True, False, True),
    ],
)
def test_modes(mode: Mode, dns: DnsMode, audit: bool, denied: bool, learn: bool, guard: bool) -> None:
    verdict = judge(policy(dns, mode=mode, audit=audit), "a.org", ())
    assert verdict is not None
    assert (verdict.denied, verdict.learn, verdict.guard, verdict.audit) == (denied, learn, guard, audit)


def test_proxy_leaves_it_to_the_control_plane() -> None:
    assert judge(policy(DnsMode.PROXY, allow=["a.org"]), "a.org", ()) is None


@pytest.mark.parametrize(
    ("mode", "dns", "name", "reason", "rule"),
    [
        (Mode.ALLOWLIST, DnsMode.ALLOWLIST, "x.a.org", "allow_rule", "allow a.org and below"),
        (Mode.ALLOWLIST, DnsMode.ALLOWLIST, "b.org", "deny_rule", "deny b.org"),
        (Mode.ALLOWLIST, DnsMode.ALLOWLIST, "c.org", "default_drop", None),
        (Mode.ALLOWLIST, DnsMode.DENYLIST, "c.org", "default_pass", None),
        (Mode.ALLOWLIST, DnsMode.DISABLED, "b.org", "mode_disabled", None),
        (Mode.BLOCK_ALL, DnsMode.ALLOWLIST, "a.org", "block_all", None),
    ],
)
def test_reasons(mode: Mode, dns: DnsMode, name: str, reason: str, rule: str | None) -> None:
    verdict = judge(policy(dns, mode=mode, allow=[".a.org"], deny=["b.org"]), name, ())
    assert verdict is not None
    assert (verdict.reason, verdict.rule and verdict.rule.text) == (reason, rule)


@pytest.mark.parametrize(
    ("allow", "deny", "name", "denied", "judged"),
    [
        (["a.org"], [], "a.org.lan", False, "a.org"),
        ([], ["a.org"], "a.org.lan", True, "a.org"),
        (["host.lan"], [], "host.lan", False, "host.lan"),
        (["*"], ["a.org"], "a.org.lan", True, "a.org"),
        ([".lan"], ["a.org"], "a.org.lan", False, "a.org.lan"),
    ],
    ids=["allowed", "denied", "own-rule", "star-is-no-own-rule", "rule-for-the-search-domain"],
)
def test_search_domains_and_rules(allow: list[str], deny: list[str], name: str, denied: bool, judged: str) -> None:
    dns = DnsMode.ALLOWLIST if allow else DnsMode.DENYLIST
    verdict = judge(policy(dns, allow=allow, deny=deny), name, (".lan",))
    assert verdict is not None
    assert (verdict.denied, verdict.name) == (denied, judged)


def test_a_chain_is_denied_by_explicit_deny_rules_alone() -> None:
    rules = policy(allow=["a.org", "ok.evil.net"], deny=[".evil.net"])
    assert chain_denial(rules, ["b.net", "c.net"]) is None
    assert chain_denial(rules, ["b.net", "ok.evil.net"]) is None
    why = chain_denial(rules, ["b.net", "x.evil.net"])
    assert why is not None
    assert "evil.net" in why
    found = chain_rule(rules, ["b.net", "x.evil.net"])
    assert found is not None
    assert (found[0].text, found[1]) == ("deny evil.net and below", "x.evil.net")
