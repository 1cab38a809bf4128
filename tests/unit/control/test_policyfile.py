"""The policy file: what it says becomes updates, the first match wins, and every fault is told with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from netfence.control.policyfile import NO_RULE, PolicyFile, load_policy_file, parse_policy_file, update_version
from netfence.control.port import AttachmentView
from netfence.errors import InvalidError
from netfence.policy.commands import BulkUpdate, CidrSpec, DnsSpec, DomainSpec
from netfence.policy.modes import DnsMode, Mode

SPEC_EXAMPLE = """
attachments:                      # the first match wins
  - match: {metadata: {tenant: acme}, interface: "veth*"}   # also cgroup: "/sys/fs/cgroup/…*"; all given must match
    mode: allowlist                 # `audit: true` may stand beside it
    allow_cidrs: ["10.0.0.0/16", {cidr: "192.0.2.7", ttl: 1h}]
    deny_cidrs: ["10.0.13.0/24"]
    dns:
      mode: allowlist
      allow: ["pypi.org", "*.pypi.org"]
      deny: ["internal.pypi.org"]
      upstreams: ["192.0.2.53"]
default: {mode: block_all}
"""


def read(text: str) -> PolicyFile:
    return parse_policy_file(text.encode(), Path("p.yaml"))


def faults(text: str) -> list[str]:
    with pytest.raises(InvalidError) as raised:
        read(text)
    return list(raised.value.errors)


def view(kind: str, target: str, **metadata: str) -> AttachmentView:
    return AttachmentView("id", target, kind, metadata)


def test_the_example_of_the_specification() -> None:
    file = read(SPEC_EXAMPLE)
    assert file.rules[0].update == BulkUpdate(
        mode=Mode.ALLOWLIST,
        allow_cidrs=("10.0.0.0/16", CidrSpec("192.0.2.7", 3600.0)),
        deny_cidrs=("10.0.13.0/24",),
        dns=DnsSpec(
            mode=DnsMode.ALLOWLIST,
            allow=(DomainSpec("pypi.org"), DomainSpec("*.pypi.org")),
            deny=(DomainSpec("internal.pypi.org"),),
            upstreams=("192.0.2.53",),
        ),
        audit=False,
    )
    assert file.default is not None
    assert file.default.update == BulkUpdate(mode=Mode.BLOCK_ALL)
    assert file.warnings == ()


MATCHES = """
attachments:
  - {match: {interface: "veth*", metadata: {tenant: acme}}, mode: allowlist}
  - {match: {interface: "veth?"}, mode: denylist}
  - {match: {cgroup: "/sys/fs/cgroup/box*"}, mode: disabled}
  - {match: {metadata: {tenant: acme, tier: "1"}}, mode: denylist, audit: true}
"""


@pytest.mark.parametrize(
    ("who", "line"),
    [
        (view("interface", "veth7", tenant="acme", more="x"), 3),
        (view("interface", "veth7", tenant="other"), 4),
        (view("interface", "veth7"), 4),
        (view("interface", "veth77"), 0),
        (view("interface", "VETH7"), 0),
        (view("cgroup", "/sys/fs/cgroup/box/inner"), 5),
        (view("interface", "/sys/fs/cgroup/box"), 0),
        (view("cgroup", "veth7"), 0),
        (view("interface", "tap0", tenant="acme", tier="1"), 6),
        (view("cgroup", "/else", tenant="acme", tier="1"), 6),
        (view("interface", "tap0", tenant="acme", tier="2"), 0),
        (view("interface", "tap0", tenant="acme"), 0),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else f"{value.target}-{'-'.join(value.metadata.values())}",
)
def test_the_first_entry_whose_every_condition_holds_wins(who: AttachmentView, line: int) -> None:
    assert read(MATCHES).decide(who).line == line


def test_without_a_match_and_without_default_all_is_blocked() -> None:
    rule = read(MATCHES).decide(view("interface", "eth0"))
    assert rule is NO_RULE
    assert rule.update == BulkUpdate(mode=Mode.BLOCK_ALL)


def test_every_fault_is_told_in_the_order_of_lines() -> None:
    text = """
attachments:
  - match: {metadata: {tenant: acme}, interface: "veth*"}
    mode: allowlist
    allow_cidrs: ["10.0.0.0/16", 10.1/8]
    deny_cidrs:
      - {cidr: "192.0.2.7", ttl: soon}
      - {ttl: 1h}
      - {cidr: "192.0.2.8", ttl: 99999d}
    dns:
      mode: allowlst
      allow: ["pypi.org", "a..b"]
      upstreams: ["192.0.2.53", foo]
  - match: {}
    mod: allowlist
    audit: yes
  - match: {interface: a, cgroup: b}
    mode: 3
    allow_cidrs: x
    dns: {mode: proxy}
defualt: 1
"""
    expected = [
        ("5: attachments[0].allow_cidrs[1]: '10.1/8' is not a CIDR"),
        ("7: attachments[0].deny_cidrs[0].ttl: 'soon': a duration"),
        ("8: attachments[0].deny_cidrs[1].cidr: missing"),
        ("9: attachments[0].deny_cidrs[2]: TTL "),
        ("11: attachments[0].dns.mode: 'allowlst': one of disabled, allowlist, denylist"),
        ("12: attachments[0].dns.allow[1]: 'a..b' is not a domain"),
        ("13: attachments[0].dns.upstreams[1]: 'foo' is not an upstream"),
        ("14: attachments[1].match: no condition, so it would hide every entry below"),
        ("14: attachments[1].mode: missing; one of disabled, allowlist, block_all, denylist"),
        ("15: attachments[1].mod: unknown key; did you mean `mode`?"),
        ("16: attachments[1].audit: 'yes': true or false"),
        ("17: attachments[2].match: `interface` and `cgroup` together match nothing"),
        ("18: attachments[2].mode: '3': one of"),
        ("19: attachments[2].allow_cidrs: must be a list, not text"),
        ("20: attachments[2].dns.mode: 'proxy': needs control_plane.url; one of"),
        ("21: defualt: unknown key; did you mean `default`?"),
    ]
    found = faults(text)
    assert len(found) == len(expected)
    for fault, begin in zip(found, expected, strict=True):
        assert fault.startswith(f"p.yaml:{begin}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "p.yaml:1: file: empty"),
        ("{}", "p.yaml:1: file: neither `attachments` nor `default`"),
        ("- a", "p.yaml:1: file: must be a mapping, not a list"),
        ("attachments: {a: b}", "p.yaml:1: attachments: must be a list, not a mapping"),
        ("attachments: [x]", "p.yaml:1: attachments[0]: must be a mapping, not text"),
        ("default: {mode: block_all, match: {interface: x}}", "p.yaml:1: default.match: unknown key"),
        ("default: {mode: [block_all]}", "p.yaml:1: default.mode: must be text, not a list"),
        ("default: {mode: denylist, audit: 'true'}\nx: 1", "p.yaml:1: default.audit: 'true': true or false"),
        ("default: {mode: denylist, dns: {allow: []}}", "p.yaml:1: default.dns.mode: missing"),
        ("default: {mode: denylist, allow_cidrs: [[]]}", "p.yaml:1: default.allow_cidrs[0]: must be a mapping"),
        ("default: {mode: denylist, allow_cidrs: [~]}", "p.yaml:1: default.allow_cidrs[0]: must be a mapping"),
        ("default:\n  mode: disabled\n  dns: {mode: denylist, deny: [{do: x}]}", "p.yaml:3: default.dns.deny[0].do"),
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_bad_shapes(text: str, says: str) -> None:
    assert faults(text)[0].startswith(says)


def test_what_only_the_whole_shows_is_told_at_the_entry() -> None:
    nested = ", ".join(f'{{cidr: "10.0.0.0/{length}", ttl: 60}}' for length in range(8, 20))
    assert faults(f"\n\ndefault: {{mode: allowlist, allow_cidrs: [{nested}], dns: {{mode: disabled}}}}")[0].startswith(
        "p.yaml:3: default: 10.0.0.0/"
    )


def test_subdomains_in_both_forms() -> None:
    text = "default: {mode: denylist, dns: {mode: denylist, deny: [{domain: a.b, include_subdomains: true}, '*.c']}}"
    rule = read(text).default
    assert rule is not None
    assert rule.update.dns is not None
    assert rule.update.dns.deny == (DomainSpec("a.b", include_subdomains=True), DomainSpec("*.c"))


def test_an_allowlist_without_dns_is_warned_about() -> None:
    (warning,) = read("default: {mode: allowlist}").warnings
    assert warning.startswith("p.yaml:1: default: no `dns`")


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="read policy file: No such file or directory; check policy_file"):
        load_policy_file(tmp_path / "nowhere.yaml")


ONE = BulkUpdate(mode=2, allow_cidrs=["10.0.0.0/8"], dns=DnsSpec(2, [DomainSpec("a")], [], ["192.0.2.1"]))


@pytest.mark.parametrize(
    "other",
    [
        BulkUpdate(mode=4, allow_cidrs=["10.0.0.0/8"], dns=ONE.dns),
        BulkUpdate(mode=2, deny_cidrs=["10.0.0.0/8"], dns=ONE.dns),
        BulkUpdate(mode=2, allow_cidrs=["10.0.0.0/8"], dns=ONE.dns, audit=True),
        BulkUpdate(mode=2, allow_cidrs=["10.0.0.0/8"]),
        BulkUpdate(mode=2, allow_cidrs=[CidrSpec("10.0.0.0/8", 5)], dns=ONE.dns),
        BulkUpdate(mode=2, allow_cidrs=["10.0.0.0/8"], dns=DnsSpec(2, [], [DomainSpec("a")], ["192.0.2.1"])),
        BulkUpdate(mode=2, allow_cidrs=["10.0.0.0/8"], dns=DnsSpec(2, [DomainSpec("a", True)], [], ["192.0.2.1"])),
        BulkUpdate(mode=2, allow_cidrs=["10.0.0.0/8"], dns=DnsSpec(2, [DomainSpec("a")], [], [])),
    ],
    ids=["mode", "list", "audit", "no-dns", "ttl", "domain-list", "subdomains", "upstreams"],
)
def test_the_version_tells_whether_a_rule_says_something_else(other: BulkUpdate) -> None:
    same = BulkUpdate(mode=2, allow_cidrs=[CidrSpec("10.0.0.0/8")], dns=ONE.dns)
    assert update_version(same) == update_version(ONE)
    assert update_version(other) != update_version(ONE)


def test_a_large_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    lines = "".join(f"    - 10.{i >> 8 & 255}.{i & 255}.{i >> 16}/32\n" for i in range(100_000))
    path.write_text(f"default:\n  mode: denylist\n  deny_cidrs:\n{lines}")
    rule = load_policy_file(path).default
    assert rule is not None
    assert len(rule.update.deny_cidrs) == 100_000
