"""The suggested policy: a valid file that lets through what was seen, and nothing more; names of a hostile workload."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.dns.world import policy

from netfence import sightings, suggesting
from netfence.audited import AuditedName, AuditMemory
from netfence.control.policyfile import parse_policy_file
from netfence.control.port import AttachmentView
from netfence.dataplane.flows import Seen
from netfence.dns.guard import PrivateSpace
from netfence.policy.cidr import CidrTable, parse_cidr
from netfence.policy.commands import apply
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import EMPTY, Policy
from netfence.policy.search import Judged, judge_asked
from netfence.sightings import Facts
from netfence.suggesting import suggest, write

PUBLIC, NEXT, OTHER, PUBLIC6 = "93.184.216.34", "93.184.216.35", "8.8.4.4", "2606:2800:220:1:248:1893:25c8:1946"
METADATA, PRIVATE, MULTICAST = "169.254.169.254", "10.1.2.3", "224.0.0.251"


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def seen(address: str, port: int = 443, protocol: int = 6, packets: int = 1) -> Seen:
    raw = packed(address)
    return Seen(bytes(10) + b"\xff\xff" + raw if len(raw) == 4 else raw, protocol, port, packets, 100 * packets)


def name(*addresses: str, queries: int = 1, chain: tuple[str, ...] = ()) -> AuditedName:
    return AuditedName(queries, dict.fromkeys(map(packed, addresses)), chain)


def facts(rules: Policy | None = None, **more: Any) -> Facts:
    made = Facts(id="one", target="veth0", kind="interface", policy=rules or policy(audit=True))
    return replace(made, **more)


def entry(of: Facts) -> dict[str, Any]:
    """Write the suggestion, have it checked, and return its entry."""
    text = write(of)
    assert text.isascii()
    file = parse_policy_file(text.encode(), Path("p.yaml"))
    assert file.warnings == ()
    view = AttachmentView("one", of.target, of.kind, dict(of.metadata))
    assert file.decide(view) is file.rules[0]
    assert file.decide(AttachmentView("other", "veth1", "interface")) is file.default
    read = yaml.safe_load(text)
    assert read["default"] == {"mode": "block_all"}
    found: dict[str, Any] = read["attachments"][0]
    assert found["mode"] == "allowlist"
    return found


def line(of: Facts, word: str) -> str:
    (found,) = [one.strip() for one in write(of).splitlines() if word in one]
    return found


def test_names_come_first_and_cidrs_for_the_rest_merged() -> None:
    of = facts(
        seen=[
            seen(PUBLIC, packets=40),
            seen(OTHER, packets=3),
            seen("8.8.4.5", 3478, 17, packets=2),
            seen("8.8.4.7"),
            seen(PUBLIC6, 0, 58),
        ],
        names=[("a.test", name(PUBLIC, queries=2)), ("asked.test", name())],
    )
    found = entry(of)
    assert found["allow_cidrs"] == ["8.8.4.4/31", "8.8.4.7/32", f"{PUBLIC6}/128"]
    assert found["dns"] == {"mode": "allowlist", "allow": ["a.test", "asked.test"]}
    assert line(of, "a.test") == '- "a.test"  # 2 queries; 40 packets: tcp/443'
    assert line(of, "asked.test") == '- "asked.test"  # 1 query; no packets'
    assert line(of, "8.8.4.4/31") == '- "8.8.4.4/31"  # 5 packets: tcp/443, udp/3478'
    assert line(of, PUBLIC6) == f'- "{PUBLIC6}/128"  # 1 packet: icmpv6'


def test_what_is_in_force_stays() -> None:
    table = (
        CidrTable().allow(parse_cidr("8.8.0.0/16")).allow(parse_cidr("9.9.9.9"), 100.5).deny(parse_cidr("8.8.8.0/24"))
    )
    table = table.allow(parse_cidr("9.9.9.8"), 10.0)  # over
    rules = replace(policy(allow=[".kept.test", "*.below.test"], deny=["bad.kept.test"], audit=True), cidrs=table)
    rules = replace(rules, dns=replace(rules.dns, upstreams=("192.0.2.53:53",)))
    of = facts(rules, seen=[seen(OTHER), seen("8.8.8.8")], names=[("x.kept.test", name())], now=40.0)
    found = entry(of)
    assert found["allow_cidrs"] == ["8.8.0.0/16", {"cidr": "9.9.9.9/32", "ttl": "61s"}]
    assert found["deny_cidrs"] == ["8.8.8.0/24"]
    assert found["dns"] == {
        "mode": "allowlist",
        "upstreams": ["192.0.2.53:53"],
        "allow": ["*.below.test", {"domain": "kept.test", "include_subdomains": True}],
        "deny": ["bad.kept.test"],
    }
    assert line(of, "8.8.0.0/16") == '- "8.8.0.0/16"  # in force before; 1 packet: tcp/443'
    assert line(of, "8.8.8.8/32") == '# - "8.8.8.8/32"  # 1 packet: tcp/443; deny 8.8.8.0/24 stays'


@pytest.mark.parametrize("mode", [Mode.ALLOWLIST, Mode.BLOCK_ALL], ids=lambda mode: mode.name)
def test_nothing_dangerous_is_opened(mode: Mode) -> None:
    rules = policy(mode=mode, deny=["bad.test", "*.cdn.test"], cidrs=["!93.184.216.35"], audit=True)
    of = facts(
        rules,
        seen=[seen(one) for one in (METADATA, PRIVATE, MULTICAST, NEXT, PUBLIC, OTHER)],
        names=[
            ("bad.test", name(PUBLIC)),
            ("alias.test", name(OTHER, chain=("x.cdn.test",))),
            ("inside.test", name(PRIVATE)),
        ],
    )
    found = entry(of)
    assert found.get("allow_cidrs") is None
    assert found["dns"]["allow"] == ["inside.test"]
    assert "credentials" in line(of, METADATA)
    assert 'of "inside.test", special-purpose' in line(of, PRIVATE)
    assert "special-purpose" in line(of, MULTICAST)
    assert "deny 93.184.216.35/32 stays" in line(of, f'# - "{NEXT}')
    assert 'of "bad.test", which is denied' in line(of, f"{PUBLIC}/32")
    assert 'of "alias.test", which is denied' in line(of, f"{OTHER}/32")
    assert 'deny *.cdn.test, for x.cdn.test, which its answer leads to"' in line(of, '# - "alias.test"')
    assert all(line(of, one).startswith("# - ") for one in (METADATA, PRIVATE, MULTICAST))


@pytest.mark.parametrize(("port", "protocol"), [(53, 17), (53, 6), (853, 6)])
def test_name_servers_that_the_workload_asks_by_itself_are_only_proposed(port: int, protocol: int) -> None:
    of = facts(seen=[seen("8.8.8.8", port, protocol, packets=3), seen("8.8.8.8", 443), seen(PUBLIC, port, protocol)])
    assert entry(of)["allow_cidrs"] is None
    assert line(of, "8.8.8.8").startswith("# ")
    assert "a name server" in write(of)
    allowed = facts(seen=[seen(PUBLIC, port, protocol)], names=[("dns.test", name(PUBLIC))])
    assert entry(allowed)["dns"]["allow"] == ["dns.test"]  # by its name it is as any other


def test_special_addresses_that_the_operator_opened_are_as_any_other() -> None:
    of = facts(seen=[seen(PRIVATE), seen("10.9.9.9")], private=PrivateSpace([parse_cidr("10.1.0.0/16")]))
    assert entry(of)["allow_cidrs"] == [f"{PRIVATE}/32"]
    rules = policy(cidrs=["169.254.0.0/16", "fd00::/8"], audit=True)
    of = facts(rules, seen=[seen(METADATA), seen("fd00:ec2::254"), seen("fd00::1")])
    assert entry(of)["allow_cidrs"] == ["169.254.0.0/16", "fd00::/8"]
    assert "1 packet" in line(of, "169.254.0.0/16")  # long enough a rule opens it already
    assert line(of, "fd00:ec2::254").startswith("# - ")  # this one does not


def test_what_no_rule_lets_through_is_said() -> None:
    own = (packed("127.0.0.1"), 11001)
    zero = Seen(bytes(16), 0, 0, 3, 300)
    of = facts(seen=[seen("127.0.0.1", 11001, 17, 4), seen("127.0.0.1", 80), zero], foreign_dns=frozenset({own}))
    assert entry(of).get("allow_cidrs") is None
    text = write(replace(of, missed=7, forgotten=1))
    assert "# No rule lets through 4 packets: udp/11001 to the DNS server of another attachment." in text
    assert "# No rule lets through 3 packets: protocol 0 to an unknown destination." in text
    assert "# NOT RECORDED: 7 packets to more destinations than the table has room for." in text
    assert "# FORGOTTEN: 1 name beyond the limit" in text
    assert "tcp/80" in line(of, "127.0.0.1/32")


def test_names_that_were_answered_without_a_rule_are_kept_where_none_is_needed() -> None:
    rules = policy(DnsMode.DENYLIST, allow=["ruled.test"], audit=True)
    leased = {"free.test": [packed(PUBLIC)], "ruled.test": [packed(OTHER)]}
    of = facts(rules, seen=[seen(PUBLIC), seen(OTHER)], leased=leased)
    found = entry(of)
    assert found["dns"] == {"mode": "allowlist", "allow": ["ruled.test", "free.test"]}
    assert found.get("allow_cidrs") is None  # their leases will open them
    assert line(of, "ruled.test") == '- "ruled.test"  # in force before; 1 packet: tcp/443'
    assert line(of, "free.test") == '- "free.test"  # resolved before, by no rule; 1 packet: tcp/443'


@pytest.mark.parametrize(
    ("rules", "mode", "said"),
    [
        (policy(DnsMode.DISABLED, audit=True), "disabled", "DNS MODE DISABLED"),
        (policy(DnsMode.DISABLED, mode=Mode.BLOCK_ALL, audit=True), "allowlist", ""),
        (policy(DnsMode.PROXY, audit=True), "allowlist", "DNS MODE PROXY"),
        (policy(mode=Mode.DENYLIST, audit=True), "allowlist", "MODE DENYLIST"),
    ],
    ids=["disabled", "block-all", "proxy", "denylist"],
)
def test_what_audit_could_not_see_is_said(rules: Policy, mode: str, said: str) -> None:
    of = facts(rules)
    assert entry(of)["dns"]["mode"] == mode
    assert said in write(of)
    assert (" MODE " in write(of)) == bool(said)


def test_the_match_is_the_metadata_unless_another_has_it_too() -> None:
    metadata = {"app": "ci", "note": 'a: "b"\n'}
    assert entry(facts(metadata=metadata))["match"] == {"metadata": metadata}
    both = entry(facts(metadata=metadata, alone=False))["match"]
    assert both == {"metadata": metadata, "interface": "veth0"}
    path = "/sys/fs/cgroup/box[1]"
    assert entry(facts(kind="cgroup", target=path))["match"] == {"cgroup": "/sys/fs/cgroup/box[[]1]"}


def test_a_workload_cannot_make_it_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand denied names of one address, and packets to all of its ports: each name is looked at a few times."""
    names = [(f"n{number}.bad.test", name(OTHER)) for number in range(1000)]
    went = [seen(OTHER, port) for port in range(1, 1001)]
    looks = Counter[str]()
    was = sightings.plain

    def plain(one: str) -> bool:
        looks[one] += 1
        return was(one)

    monkeypatch.setattr(sightings, "plain", plain)
    of = facts(policy(deny=["*.bad.test"], audit=True), seen=went, names=names)
    assert "1000 packets" in line(of, f'"{OTHER}/32"')
    assert looks.total() <= 2 * len(names)


def test_a_workload_cannot_make_it_too_large() -> None:
    """As many names as are remembered, as long as can be, that no rule can name; each with addresses of its own."""
    long = "\\001" * 250  # as `wire.label_text` writes an octet
    names = [
        (f"{number}.{long}", name(*(f"10.{number >> 3}.{number & 7}.{low}" for low in range(32))))
        for number in range(1024)
    ]
    went = [seen(f"10.{number >> 3}.{number & 7}.{low}") for number in range(128) for low in range(32)]
    text = write(facts(names=names, seen=went))
    assert text.count("\n      # - ") == len(went)
    assert text.count("\n        # - ") == len(names)
    assert len(text) < suggesting.MAX_BYTES


def test_names_in_use_are_judged_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    used = policy(allow=["*.kept.test"], audit=True)
    attachment = SimpleNamespace(
        commanded=used, closed=False, audited=AuditMemory(),
        names_of=lambda address: ("a.kept.test",) if address == packed(OTHER) else (),
    )  # fmt: skip
    row = SimpleNamespace(id="one", name="veth0", kind="interface", slot=1, metadata={})
    live = SimpleNamespace(row=row, attachment=attachment, ended=False)
    own = SimpleNamespace(row=row, endpoint=SimpleNamespace(packed=packed("127.0.0.1"), port=11001))
    plane = SimpleNamespace(seen=lambda _: ([seen(OTHER, packets=7), seen("127.0.0.1", 11001, 17)], 0))
    parts = SimpleNamespace(plane=plane, dns=SimpleNamespace(search_suffixes=(), allow_private=()))
    lifecycle: Any = SimpleNamespace(find=lambda *_: live, every=lambda: [live, own], parts=parts)
    threads = []

    def judged(policy: Policy, name: str, suffixes: tuple[str, ...]) -> Judged:
        threads.append(threading.current_thread())
        return judge_asked(policy, name, suffixes)

    monkeypatch.setattr(suggesting, "judge_asked", judged)
    told = asyncio.run(asyncio.wait_for(suggest(lifecycle, "one"), 20))
    assert threads
    assert threading.main_thread() not in threads
    assert '- "*.kept.test"  # in force before; 7 packets: tcp/443' in told.policy
    assert "# No rule lets through 1 packet: udp/11001 to the DNS server of another attachment." in told.policy


# What a workload can ask for: `wire.label_text` writes every octet but letters, digits, - and _ as \DDD.
WIRE = st.text(alphabet="abz09-_\\", min_size=1, max_size=8) | st.sampled_from(["\\010", "true", "null", "-", "1e3"])
ASKED = st.lists(WIRE, min_size=1, max_size=3).map(".".join) | st.text(max_size=12)
ADDRESSES = st.builds(
    lambda base, low: str(ipaddress.ip_address((base + low) % 2**32)),
    st.sampled_from([0x08080400, 0x5DB8D820, 0x0A010200, 0xA9FEA9F0]),
    st.integers(0, 40),
)


@given(st.dictionaries(ASKED, st.lists(ADDRESSES, max_size=2), max_size=6), st.lists(ADDRESSES, max_size=20))
def test_it_lets_through_what_was_seen_and_nothing_beside(asked: dict[str, list[str]], went: list[str]) -> None:
    rules = policy(allow=["kept.test"], deny=["bad.test"], cidrs=["8.8.4.16/30", "!8.8.4.0/29"], audit=True)
    names = [(one, name(*addresses)) for one, addresses in asked.items()]
    text = write(facts(rules, names=names, seen=[seen(one) for one in went]))
    (rule,) = parse_policy_file(text.encode(), Path("p.yaml")).rules
    made = apply(EMPTY, rule.update, 0.0)
    named = {
        packed(address)
        for one, addresses in asked.items()
        for address in addresses
        if (found := made.dns.domains.match(one)) is not None and found.allow
    }
    for number in range(0x08080400, 0x08080400 + 48):
        address = number.to_bytes(4, "big")
        was = rules.judge_address(address, 0.0)
        now = made.judge_address(address, 0.0)
        if was is not None:
            assert now == was  # whatever a rule said stays
        elif str(ipaddress.ip_address(address)) not in went:
            assert now is None
        else:
            assert (now is not None and now[1]) or address in named
    for number in (*range(0x0A010200, 0x0A010200 + 48), *range(0xA9FEA9F0, 0xA9FEA9F0 + 48)):
        assert made.judge_address(number.to_bytes(4, "big"), 0.0) is None  # special-purpose: never as a rule
    assert math.isinf(made.cidrs.next_expiry())
    for one in asked:
        found = made.dns.domains.match(one)
        if found is not None and found.name not in ("kept.test", "bad.test"):
            assert (found.name, found.allow) == (one, True)
