"""What the kernel and the DNS servers report, in the words of the API."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Any

import pytest

from netfence.dataplane.plane import Flow
from netfence.dns.decision import Decision
from netfence.flow_views import dns_view, packet_view
from netfence.policy.cidr import CidrTable, parse_cidr
from netfence.policy.domain import DomainRule, RuleKind
from netfence.policy.modes import Mode, Reason
from netfence.policy.policy import Policy


def wide(text: str) -> bytes:
    """Return an address as the kernel has it."""
    if ":" in text:
        return socket.inet_pton(socket.AF_INET6, text)
    return bytes(10) + b"\xff\xff" + socket.inet_pton(socket.AF_INET, text)


def flow(**changes: Any) -> Flow:
    whole: dict[str, Any] = {
        "slot": 1,
        "at": 100.0,
        "would": False,
        "reason": int(Reason.DENY_RULE),
        "protocol": 17,
        "source": wide("10.0.0.2"),
        "destination": wide("203.0.113.9"),
        "source_port": 4000,
        "destination_port": 53,
        "length": 60,
        "lost": 0,
    }
    return Flow(**(whole | changes))


@dataclass
class Judging:
    policy: Policy = field(
        default_factory=lambda: Policy(
            mode=Mode.DENYLIST,
            cidrs=CidrTable().deny(parse_cidr("203.0.113.0/24")).deny(parse_cidr("203.0.113.8/29"), 90.0),
        )
    )
    name: str = ""

    def name_for(self, _address: bytes) -> str:
        return self.name


def test_a_dropped_packet() -> None:
    view = packet_view("a", Judging(name="new.test"), flow(), 1000.0, {})
    assert (view.time, view.id, view.kind, view.verdict) == (1100.0, "a", "packet", "drop")
    assert (view.reason, view.protocol) == ("deny_rule", "udp")
    assert (view.source, view.destination) == ("10.0.0.2:4000", "203.0.113.9:53")
    assert view.domain == "new.test"
    assert view.rule == "deny 203.0.113.0/24"  # the longer one had expired by then


def test_ipv6_has_brackets() -> None:
    view = packet_view("a", Judging(), flow(source=wide("2001:db8::1"), destination=wide("2001:db8::2")), 0.0, {})
    assert (view.source, view.destination, view.rule) == ("[2001:db8::1]:4000", "[2001:db8::2]:53", "")


@pytest.mark.parametrize(
    ("protocol", "word"), [(1, "icmp"), (6, "tcp"), (58, "icmpv6"), (132, "132"), (0, "")], ids=str
)
def test_protocols(protocol: int, word: str) -> None:
    view = packet_view("a", Judging(), flow(protocol=protocol, source_port=0, destination_port=0), 0.0, {})
    assert (view.protocol, view.source, view.destination) == (word, "10.0.0.2", "203.0.113.9")


def test_what_could_not_be_read_is_empty() -> None:
    unread = flow(reason=int(Reason.NOT_IP), protocol=0, source=bytes(16), destination=bytes(16))
    view = packet_view("a", Judging(name="x.test"), unread, 0.0, {})
    assert (view.reason, view.protocol, view.source, view.destination) == ("not_ip", "", "", "")
    assert (view.domain, view.rule) == ("", "")


@pytest.mark.parametrize(
    ("reason", "rule"),
    [
        (Reason.DENY_RULE, "deny 203.0.113.0/24"),
        (Reason.CONNECT, "deny 203.0.113.0/24"),
        (Reason.DEFAULT_DROP, ""),
        (Reason.BLOCK_ALL, ""),
        (Reason.METADATA, ""),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_rule_is_told_where_one_decided(reason: Reason, rule: str) -> None:
    assert packet_view("a", Judging(), flow(reason=int(reason)), 0.0, {}).rule == rule


def test_a_refused_connect_for_other_reasons_has_no_rule() -> None:
    allowed = Policy(mode=Mode.ALLOWLIST, cidrs=CidrTable().allow(parse_cidr("203.0.113.0/24")))
    assert packet_view("a", Judging(allowed), flow(reason=int(Reason.CONNECT)), 0.0, {}).rule == ""


def test_a_reason_of_a_newer_kernel_side_is_its_number() -> None:
    assert packet_view("a", Judging(), flow(reason=31, would=True), 0.0, {}).reason == "31"


def test_rules_are_looked_up_once_in_a_tick() -> None:
    rules = {wide("203.0.113.9")[12:]: "deny something"}
    assert packet_view("a", Judging(), flow(), 0.0, rules).rule == "deny something"
    packet_view("a", Judging(), flow(destination=wide("203.0.113.10")), 0.0, rules)
    assert rules[wide("203.0.113.10")[12:]] == "deny 203.0.113.0/24"


def test_a_query() -> None:
    rule = DomainRule("evil.test", RuleKind.SUBTREE, allow=False)
    view = dns_view("a", Decision("drop", "deny_rule", "x.evil.test", 28, False, ("10.0.0.2", 5353), rule), 7.5)
    assert (view.time, view.id, view.kind, view.verdict, view.reason) == (7.5, "a", "dns", "drop", "deny_rule")
    assert (view.protocol, view.source, view.destination) == ("udp", "10.0.0.2:5353", "AAAA")
    assert (view.domain, view.rule) == ("x.evil.test", "deny evil.test and below")


def test_a_query_of_an_unknown_type_over_tcp_from_ipv6() -> None:
    view = dns_view("a", Decision("pass", "default_pass", "", 65280, True, ("2001:db8::1", 99, 0, 0), None), 0.0)
    assert (view.protocol, view.source, view.destination, view.rule) == ("tcp", "[2001:db8::1]:99", "TYPE65280", "")
    assert dns_view("a", Decision("pass", "default_pass", "", 1, True, None, None), 0.0).source == ""
