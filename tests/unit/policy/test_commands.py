"""Commands: what each changes, and that a bad one names every fault and changes nothing."""

from __future__ import annotations

import math

import pytest

from netfence.errors import ExhaustedError, InvalidError
from netfence.policy import commands
from netfence.policy.cidr import NEVER, Entry, parse_cidr
from netfence.policy.commands import (
    AllowCidr,
    AllowDomain,
    BulkUpdate,
    CidrSpec,
    Command,
    DenyCidr,
    DenyDomain,
    DnsSpec,
    DomainSpec,
    RemoveCidr,
    RemoveDomain,
    SetDnsMode,
    SetMode,
    apply,
)
from netfence.policy.limits import MAX_TTL_NESTING, MAX_TTL_S, MAX_UPSTREAMS
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import EMPTY, Policy

NOW = 1000.0
INTRANET = parse_cidr("10.0.0.0/8")
SERVER = parse_cidr("192.0.2.7")

FULL_UPDATE = BulkUpdate(
    mode=Mode.ALLOWLIST,
    allow_cidrs=["10.0.0.1/8", CidrSpec("192.0.2.7", 60.0)],
    deny_cidrs=[CidrSpec("10.0.13.0/24"), "2001:db8::/32"],
    dns=DnsSpec(
        DnsMode.ALLOWLIST,
        allow=[DomainSpec("pypi.org", include_subdomains=True), DomainSpec("*.Example.com")],
        deny=[DomainSpec("internal.pypi.org")],
        upstreams=["192.0.2.53", "[2001:db8::53]:5353"],
    ),
    audit=True,
)
FULL = apply(EMPTY, FULL_UPDATE, NOW)


def test_bulk_update_sets_everything() -> None:
    assert (FULL.mode, FULL.audit) == (Mode.ALLOWLIST, True)
    assert dict(FULL.cidrs.entries) == {
        INTRANET: Entry(NEVER, 0.0),
        SERVER: Entry(NOW + 60.0, 0.0),
        parse_cidr("10.0.13.0/24"): Entry(0.0, NEVER),
        parse_cidr("2001:db8::/32"): Entry(0.0, NEVER),
    }
    assert FULL.dns.mode is DnsMode.ALLOWLIST
    assert {rule.text for rule in FULL.dns.domains.rules()} == {
        "allow pypi.org and below",
        "allow *.example.com",
        "deny internal.pypi.org",
    }
    assert FULL.dns.upstreams == ("192.0.2.53:53", "[2001:db8::53]:5353")


def test_bulk_update_replaces_everything() -> None:
    assert apply(FULL, BulkUpdate(Mode.BLOCK_ALL), NOW) == EMPTY


def test_bulk_update_without_dns_means_dns_disabled_and_no_rules() -> None:
    policy = apply(FULL, BulkUpdate(Mode.ALLOWLIST), NOW)
    assert policy.dns.mode is DnsMode.DISABLED
    assert len(policy.dns.domains) == 0
    assert policy.dns.upstreams == ()


@pytest.mark.parametrize("mode", Mode)
def test_set_mode_changes_only_the_mode(mode: Mode) -> None:
    policy = apply(FULL, SetMode(mode.value), NOW)
    assert policy == Policy(mode=mode, audit=FULL.audit, cidrs=FULL.cidrs, dns=FULL.dns)


@pytest.mark.parametrize("mode", DnsMode)
def test_set_dns_mode_changes_only_the_dns_mode(mode: DnsMode) -> None:
    policy = apply(FULL, SetDnsMode(mode.value), NOW)
    assert policy.dns.mode is mode
    assert (policy.dns.domains, policy.dns.upstreams) == (FULL.dns.domains, FULL.dns.upstreams)
    assert (policy.mode, policy.cidrs) == (FULL.mode, FULL.cidrs)


@pytest.mark.parametrize(
    ("command", "entry"),
    [
        pytest.param(AllowCidr("10.9.9.9/8"), Entry(NEVER, 0.0), id="allow-again"),
        pytest.param(AllowCidr("10.0.0.0/8", 5), Entry(NOW + 5, 0.0), id="allow-shortens"),
        pytest.param(DenyCidr("10.0.0.0/8"), Entry(NEVER, NEVER), id="deny-beside-allow"),
        pytest.param(DenyCidr("::ffff:10.0.0.0/104", 5), Entry(NEVER, NOW + 5), id="deny-mapped-with-ttl"),
        pytest.param(RemoveCidr("10.0.0.0/8"), None, id="remove"),
    ],
)
def test_cidr_commands(command: Command, entry: Entry | None) -> None:
    before = dict(FULL.cidrs.entries)
    policy = apply(FULL, command, NOW)
    assert policy.cidrs.entries.get(INTRANET) == entry
    assert dict(FULL.cidrs.entries) == before
    assert {key: value for key, value in policy.cidrs.entries.items() if key != INTRANET} == {
        key: value for key, value in before.items() if key != INTRANET
    }


def test_a_denied_prefix_stays_denied_when_it_is_allowed_too() -> None:
    policy = apply(apply(EMPTY, DenyCidr("10.0.0.0/8"), NOW), AllowCidr("10.0.0.0/8"), NOW)
    assert policy.judge_address(bytes((10, 0, 0, 1)), NOW) == (INTRANET, False)


def test_domain_commands() -> None:
    policy = apply(EMPTY, AllowDomain("D.example."), NOW)
    policy = apply(policy, AllowDomain("d.example", include_subdomains=True), NOW)
    policy = apply(policy, DenyDomain("*.d.example", include_subdomains=True), NOW)
    policy = apply(policy, AllowDomain("*"), NOW)
    texts = {"allow d.example", "allow d.example and below", "deny *.d.example", "allow *"}
    assert {rule.text for rule in policy.dns.domains.rules()} == texts
    policy = apply(policy, RemoveDomain("d.example"), NOW)
    assert {rule.text for rule in policy.dns.domains.rules()} == {"deny *.d.example", "allow *"}
    policy = apply(policy, RemoveDomain("*.d.example"), NOW)
    assert {rule.text for rule in policy.dns.domains.rules()} == {"allow *"}
    assert apply(policy, RemoveDomain("*"), NOW) == EMPTY


@pytest.mark.parametrize(
    "command",
    [
        SetMode(Mode.ALLOWLIST),
        SetDnsMode(DnsMode.ALLOWLIST),
        AllowCidr("10.0.0.0/8"),
        RemoveCidr("10.0.0.0/9"),
        RemoveCidr("2001:db9::/32"),
        AllowDomain("pypi.org", include_subdomains=True),
        RemoveDomain("pypi.com"),
    ],
    ids=lambda command: type(command).__name__,
)
def test_a_command_that_changes_nothing_says_so(command: Command) -> None:
    policy = apply(FULL, command, NOW)
    assert policy == FULL
    if not isinstance(command, AllowCidr):
        assert policy is FULL


@pytest.mark.parametrize(
    "command", [SetMode(3), SetDnsMode(3), RemoveCidr("172.16.0.0/12"), RemoveDomain("d"), AllowCidr("172.16.0.0/12")],
    ids=lambda command: type(command).__name__,
)  # fmt: skip
def test_every_command_drops_expired_entries(command: Command) -> None:
    assert SERVER in FULL.cidrs.entries
    assert SERVER not in apply(FULL, command, NOW + 60.0).cidrs.entries


@pytest.mark.parametrize("ttl_s", [0, 0.0, -0.0])
def test_no_ttl_is_for_ever(ttl_s: float) -> None:
    assert apply(EMPTY, AllowCidr("192.0.2.7", ttl_s), NOW).cidrs.entries[SERVER].allow == NEVER
    bulk = BulkUpdate(Mode.ALLOWLIST, [CidrSpec("192.0.2.7", ttl_s)])
    assert apply(EMPTY, bulk, NOW).cidrs.entries[SERVER].allow == NEVER


BAD_TTLS = [-1.0, -1e-9, math.nan, math.inf, -math.inf, MAX_TTL_S + 1, 1e308]


@pytest.mark.parametrize("ttl_s", BAD_TTLS)
@pytest.mark.parametrize("make", [AllowCidr, DenyCidr])
def test_bad_ttls_are_refused(make: type[AllowCidr | DenyCidr], ttl_s: float) -> None:
    with pytest.raises(InvalidError, match=r"TTL .* is not allowed; allowed are 0 \(for ever\) to 315360000 seconds"):
        apply(FULL, make("192.0.2.7", ttl_s), NOW)
    with pytest.raises(InvalidError, match=r"allow_cidrs\[0\]: TTL"):
        apply(FULL, BulkUpdate(Mode.ALLOWLIST, [CidrSpec("192.0.2.7", ttl_s)]), NOW)
    assert apply(EMPTY, make("192.0.2.7", MAX_TTL_S), NOW).cidrs.next_expiry() == NOW + MAX_TTL_S


MODES = "allowed are 1 disabled, 2 allowlist, 3 block_all, 4 denylist"
EXAMPLES = "expected e.g. 192.0.2.0/24, 192.0.2.7 or 2001:db8::/32"
STARS = "a * may only stand alone or as the whole first label (*.example.com)"
UPSTREAMS = "expected an IP address with an optional port, such as 192.0.2.53, 192.0.2.53:5353 or [2001:db8::53]:5353"
DNS_MODES = "allowed are 1 disabled, 2 allowlist, 3 denylist, 4 proxy"


@pytest.mark.parametrize(
    ("command", "errors"),
    [
        pytest.param(SetMode(0), [f"set_mode: mode UNSPECIFIED (0) is not allowed; {MODES}"], id="mode-0"),
        pytest.param(SetMode(5), [f"set_mode: mode 5 is not allowed; {MODES}"], id="mode-5"),
        pytest.param(SetMode(-1), [f"set_mode: mode -1 is not allowed; {MODES}"], id="mode-negative"),
        pytest.param(
            SetDnsMode(0), [f"set_dns_mode: DNS mode UNSPECIFIED (0) is not allowed; {DNS_MODES}"], id="dns-mode-0"
        ),
        pytest.param(
            AllowCidr("10/8", -1),
            [
                "allow_cidr: '10/8' is not a CIDR or address: short forms are not supported, write all four numbers",
                "allow_cidr: TTL -1s is not allowed; allowed are 0 (for ever) to 315360000 seconds",
            ],
            id="cidr-and-ttl",
        ),
        pytest.param(
            RemoveCidr("x"),
            ["remove_cidr: 'x' is not a CIDR or address; expected e.g. 192.0.2.0/24, 192.0.2.7 or 2001:db8::/32"],
            id="remove-cidr",
        ),
        pytest.param(
            DenyDomain("a..b"), ["deny_domain: 'a..b' is not a domain: it has an empty label"], id="domain"
        ),
        pytest.param(
            RemoveDomain(""),
            ["remove_domain: '' is not a domain: the name is empty (for all names write *)"],
            id="remove-domain",
        ),
        pytest.param(
            BulkUpdate(
                0,
                ["192.0.2.1", "bad", CidrSpec("10.0.0.0/33", -1)],
                [CidrSpec("::1", math.nan)],
                DnsSpec(9, [DomainSpec("x.example"), DomainSpec("*x")], [DomainSpec("")], ["192.0.2.53", "ns.example"]),
            ),
            [
                f"mode: mode UNSPECIFIED (0) is not allowed; {MODES}",
                f"allow_cidrs[1]: 'bad' is not a CIDR or address; {EXAMPLES}",
                "allow_cidrs[2]: '10.0.0.0/33' is not a CIDR: the prefix length must be a decimal number from 0 to 32",
                "allow_cidrs[2]: TTL -1s is not allowed; allowed are 0 (for ever) to 315360000 seconds",
                "deny_cidrs[0]: TTL nans is not allowed; allowed are 0 (for ever) to 315360000 seconds",
                f"dns.mode: DNS mode 9 is not allowed; {DNS_MODES}",
                f"dns.allow_domains[1]: '*x' is not a domain: {STARS}",
                "dns.deny_domains[0]: '' is not a domain: the name is empty (for all names write *)",
                f"dns.upstream_servers[1]: 'ns.example' is not an upstream: {UPSTREAMS}",
            ],
            id="bulk-everything-at-once",
        ),
        pytest.param(
            BulkUpdate(2, dns=DnsSpec(1, upstreams=["192.0.2.53"] * (MAX_UPSTREAMS + 1))),
            [f"dns.upstream_servers: {MAX_UPSTREAMS + 1} given, at most {MAX_UPSTREAMS} are allowed"],
            id="too-many-upstreams",
        ),
        pytest.param(
            BulkUpdate(2, [CidrSpec(f"10.0.0.0/{8 + step}", 60.0) for step in range(MAX_TTL_NESTING + 2)] + ["bad"]),
            [
                f"allow_cidrs[6]: 'bad' is not a CIDR or address; {EXAMPLES}",
                "10.0.0.0/12: more than 4 prefixes with a TTL contain one another here",
                "10.0.0.0/13: more than 4 prefixes with a TTL contain one another here",
            ],
            id="nested-too-deep",
        ),
    ],
)  # fmt: skip
def test_a_bad_command_names_every_fault_and_changes_nothing(command: Command, errors: list[str]) -> None:
    before, digest = dict(FULL.cidrs.entries), FULL.hash()
    with pytest.raises(InvalidError) as caught:
        apply(FULL, command, NOW)
    assert list(caught.value.errors) == errors
    assert dict(FULL.cidrs.entries) == before
    assert apply(EMPTY, FULL_UPDATE, NOW) == FULL
    assert Policy(FULL.mode, FULL.audit, FULL.cidrs, FULL.dns).hash() == digest


def test_single_commands_refuse_deep_nesting() -> None:
    policy = EMPTY
    for step in range(MAX_TTL_NESTING):
        policy = apply(policy, AllowCidr(f"10.0.0.0/{8 + step}", 60.0), NOW)
    with pytest.raises(InvalidError, match=r"deny_cidr: 10\.0\.0\.0/30: more than 4 prefixes with a TTL"):
        apply(policy, DenyCidr("10.0.0.0/30", 60.0), NOW)
    assert len(apply(policy, DenyCidr("10.0.0.0/30", 60.0), NOW + 60.0).cidrs) == 1, "the expired ones are gone"


def test_too_many_rules_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "MAX_CIDR_RULES", 3)
    monkeypatch.setattr(commands, "MAX_DOMAIN_RULES", 1)
    dns = DnsSpec(2, [DomainSpec("bad..")], [DomainSpec("bad..")])
    with pytest.raises(
        ExhaustedError, match="4 CIDRs, and an attachment may have 3; 2 domains, and an attachment may have 1"
    ):
        apply(FULL, BulkUpdate(2, ["bad"] * 2, ["bad"] * 2, dns), NOW)


def test_what_is_no_command_is_a_mistake_of_ours() -> None:
    with pytest.raises(TypeError, match="not a command"):
        apply(EMPTY, "set_mode", NOW)  # type: ignore[arg-type]


def test_a_big_policy_changes_by_one_rule_without_touching_the_rest() -> None:
    """Single commands on big tables share what they do not change: that is what makes them fast."""
    big = apply(EMPTY, BulkUpdate(2, [f"10.{i >> 8}.{i & 255}.0/24" for i in range(5000)]), NOW)
    changed = apply(big, AllowCidr("192.0.2.7"), NOW)
    assert list(changed.cidrs.changes_since(big.cidrs)) == [(SERVER, Entry(NEVER, 0.0))]
    old, new = big.cidrs.family(4).entries, changed.cidrs.family(4).entries
    assert sum(a is not b for a, b in zip(old._shards, new._shards, strict=True)) == 1


def test_faults_are_written_out_to_a_bound_and_the_rest_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "MAX_FAULTS", 5)
    names = DnsSpec(mode=0, allow=[DomainSpec("a..b")] * 3, upstreams=["x"])
    with pytest.raises(InvalidError) as raised:
        apply(EMPTY, BulkUpdate(mode=0, allow_cidrs=["x"] * 4, dns=names), NOW)
    errors = raised.value.errors
    assert len(errors) == 6
    assert errors[0].startswith("mode: ")
    assert errors[4].startswith("allow_cidrs[3]: ")
    assert errors[5] == "and 5 more faults"


def test_a_command_with_as_many_faults_as_are_written_out_counts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "MAX_FAULTS", 5)
    with pytest.raises(InvalidError) as raised:
        apply(EMPTY, BulkUpdate(mode=Mode.ALLOWLIST, deny_cidrs=["x"] * 5), NOW)
    assert [error.split(":")[0] for error in raised.value.errors] == [f"deny_cidrs[{index}]" for index in range(5)]


def test_of_too_many_upstreams_only_as_many_as_allowed_are_read() -> None:
    update = BulkUpdate(mode=Mode.BLOCK_ALL, dns=DnsSpec(DnsMode.DISABLED, upstreams=["nonsense"] * 100_000))
    with pytest.raises(InvalidError) as caught:
        apply(EMPTY, update, 0.0)
    assert caught.value.errors[0] == "dns.upstream_servers: 100000 given, at most 8 are allowed"
    assert len(caught.value.errors) == 1 + 8
