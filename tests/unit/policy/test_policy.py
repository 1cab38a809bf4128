"""The policy value: judging names, and `policy_hash` with the three vectors of docs/policy-hash.md."""

from __future__ import annotations

import hashlib
import re
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import NamedTuple

import pytest

from netfence.policy import policy as policy_module
from netfence.policy.commands import AllowCidr, BulkUpdate, CidrSpec, DnsSpec, DomainSpec, SetMode, apply
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import EMPTY, Policy

DOCS = Path(__file__).parents[3] / "docs" / "policy-hash.md"
NOW = 1000.0

# Each as a control plane would send it: unsorted, with host bits, upper case, U-labels, TTLs.
VECTORS = {
    "Vector 1": BulkUpdate(Mode.BLOCK_ALL),
    "Vector 2": BulkUpdate(
        Mode.ALLOWLIST,
        allow_cidrs=["10.0.0.1/8", "192.0.2.7", CidrSpec("198.51.100.0/24", 3600.0)],
        deny_cidrs=["10.0.13.0/24", "2001:DB8::1/32"],
        dns=DnsSpec(
            DnsMode.ALLOWLIST,
            allow=[DomainSpec("PyPI.org.", include_subdomains=True), DomainSpec("*.Bücher.example")],
            deny=[DomainSpec("internal.pypi.org")],
            upstreams=["192.0.2.53", "2001:db8::53"],
        ),
    ),
    "Vector 3": BulkUpdate(
        Mode.DENYLIST,
        allow_cidrs=["::/0", "0.0.0.0/0"],
        deny_cidrs=["0.0.0.0/0", "::ffff:203.0.113.9", CidrSpec("203.0.113.9", 60.0)],
        dns=DnsSpec(DnsMode.PROXY, allow=[DomainSpec("*", include_subdomains=True)], upstreams=["[2001:db8::53]:5353"]),
        audit=True,
    ),
}


class Documented(NamedTuple):
    text: str
    digest: str


def documented(title: str) -> Documented:
    section = DOCS.read_text(encoding="utf-8").partition(f"## {title}")[2].partition("\n## ")[0]
    blocks = re.findall(r"```text\n(.*?)\n```", section, re.DOTALL)
    return Documented(*blocks)


@pytest.mark.parametrize("title", VECTORS)
def test_policy_hash_vectors(title: str) -> None:
    policy = apply(EMPTY, VECTORS[title], NOW)
    expected = documented(title)
    assert "\n".join(sorted(policy.canonical_lines(), key=str.encode)) == expected.text
    assert hashlib.sha256(expected.text.encode()).hexdigest() == expected.digest
    assert policy.hash() == expected.digest


def test_the_hash_is_of_the_content_not_of_how_it_came_about() -> None:
    policy = apply(EMPTY, VECTORS["Vector 2"], NOW)
    stepwise = apply(apply(apply(policy, AllowCidr("172.16.0.1"), NOW), SetMode(1), NOW), SetMode(2), NOW)
    assert stepwise.hash() != policy.hash()
    assert Policy(Mode.ALLOWLIST, audit=False, cidrs=policy.cidrs, dns=policy.dns).hash() == policy.hash()


def test_the_hash_in_pieces_is_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = apply(EMPTY, VECTORS["Vector 2"], NOW)
    monkeypatch.setattr(policy_module, "RANGE", 2)
    assert policy.hash() == documented("Vector 2").digest


def test_removing_what_expired_does_not_change_the_hash() -> None:
    policy = apply(EMPTY, VECTORS["Vector 2"], NOW)
    digest = policy.hash()
    swept = policy.live(NOW + 3600.0)
    assert len(swept.cidrs) == len(policy.cidrs) - 1
    assert swept._hash == digest, "not computed anew"
    assert swept.hash() == digest
    assert apply(swept, SetMode(1), NOW).hash() != digest, "the kept hash is not passed on to a changed policy"
    assert policy.live(NOW) is policy


def test_policies_are_values() -> None:
    assert apply(EMPTY, VECTORS["Vector 2"], NOW) == apply(EMPTY, VECTORS["Vector 2"], NOW)
    assert apply(EMPTY, VECTORS["Vector 1"], NOW) == EMPTY
    with pytest.raises(FrozenInstanceError):
        EMPTY.mode = Mode.DISABLED  # type: ignore[misc]


def named(mode: Mode, dns_mode: DnsMode, *, audit: bool = False) -> Policy:
    dns = DnsSpec(
        dns_mode,
        allow=[DomainSpec("good.example", include_subdomains=True)],
        deny=[DomainSpec("bad.example"), DomainSpec("bad.good.example")],
    )
    return apply(EMPTY, BulkUpdate(mode, dns=dns, audit=audit), NOW)


@pytest.mark.parametrize(
    ("dns_mode", "name", "allowed", "why"),
    [
        (DnsMode.DISABLED, "bad.example", True, "dns mode disabled"),
        (DnsMode.ALLOWLIST, "good.example", True, "rule: allow good.example and below"),
        (DnsMode.ALLOWLIST, "www.good.example", True, "rule: allow good.example and below"),
        (DnsMode.ALLOWLIST, "bad.good.example", False, "rule: deny bad.good.example"),
        (DnsMode.ALLOWLIST, "other.example", False, "dns mode allowlist: no rule allows it"),
        (DnsMode.DENYLIST, "bad.example", False, "rule: deny bad.example"),
        (DnsMode.DENYLIST, "good.example", True, "rule: allow good.example and below"),
        (DnsMode.DENYLIST, "other.example", True, "dns mode denylist: no rule denies it"),
        (DnsMode.PROXY, "good.example", False, "dns mode proxy: the control plane decides"),
    ],
)
@pytest.mark.parametrize(
    ("mode", "audit"),
    [(Mode.ALLOWLIST, False), (Mode.DENYLIST, True), (Mode.DISABLED, False), (Mode.BLOCK_ALL, True)],
    ids=["allowlist", "denylist-audit", "disabled", "block_all-audit"],
)
def test_judge_name(mode: Mode, audit: bool, dns_mode: DnsMode, name: str, allowed: bool, why: str) -> None:
    verdict = named(mode, dns_mode, audit=audit).judge_name(name)
    assert (verdict.allowed, verdict.why) == (allowed, why)
    assert (verdict.rule is not None) == why.startswith("rule: ")


@pytest.mark.parametrize("dns_mode", DnsMode)
def test_block_all_denies_every_name(dns_mode: DnsMode) -> None:
    verdict = named(Mode.BLOCK_ALL, dns_mode).judge_name("good.example")
    assert (verdict.allowed, verdict.rule, verdict.why) == (False, None, "mode block_all")


def test_a_deny_rule_on_a_name_of_a_chain_is_found_whatever_the_mode() -> None:
    for dns_mode in DnsMode:
        found = named(Mode.ALLOWLIST, dns_mode).dns.domains.match("bad.example")
        assert found is not None
        assert not found.allow


def test_judge_address() -> None:
    policy = apply(EMPTY, VECTORS["Vector 2"], NOW)
    inside, hole, server = bytes((10, 0, 0, 9)), bytes((10, 0, 13, 9)), bytes((198, 51, 100, 1))
    assert policy.judge_address(hole, NOW) == (bytes((10, 0, 13, 0, 24)), False)
    assert policy.judge_address(bytes((8, 8, 8, 8)), NOW) is None
    assert [policy.allows_address(address, NOW) for address in (inside, hole, server)] == [True, False, True]
    assert not policy.allows_address(server, NOW + 3600.0)
