"""What may be asked about, and what is told of what a kernel test can hardly bring about: start, staleness, proxy."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.dns.world import policy
from tests.unit.test_store import ROW

from netfence.api.views import ExplanationView
from netfence.dataplane.explain import Judged, Rules
from netfence.dns.explain import Looked
from netfence.dns.judge import Verdict, judge
from netfence.errors import InvalidError, NotFoundError
from netfence.explaining import MAX_ADDRESSES, explain, parse_subject
from netfence.policy.modes import DnsMode, Mode, Reason
from netfence.policy.policy import Policy

A, B = bytes((93, 184, 216, 34)), bytes((8, 8, 4, 4))
NO_RULE = Rules(None, None, ())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("192.0.2.7", (bytes((192, 0, 2, 7)), "")),
        ("::ffff:192.0.2.7", (bytes((192, 0, 2, 7)), "")),
        ("2001:DB8::1", (bytes.fromhex("20010db8") + bytes(11) + b"\1", "")),
        (" PyPI.org. ", (None, "pypi.org")),
        ("bücher.example", (None, "xn--bcher-kva.example")),
        ("_dns.x-1.test", (None, "_dns.x-1.test")),
        ("3com.test1", (None, "3com.test1")),
    ],
)
def test_subjects(text: str, found: tuple[bytes | None, str]) -> None:
    assert parse_subject(text) == found


@pytest.mark.parametrize(
    "text", ["", ".", "*", "*.test", "a..b", "a b", "192.0.2.0/24", "192.0.2.300", "192.0.2", "[::1]", "fe80::1%eth0",
             "x" * 64 + ".test", "a.test\x1b[2J", "a.test\n"[:-1] + "\x00"]
)  # fmt: skip
def test_what_is_neither_is_refused_and_cannot_harm_a_terminal(text: str) -> None:
    with pytest.raises(InvalidError) as raised:
        parse_subject(text)
    assert str(raised.value).startswith("why: ")


def told(
    rules: Policy,
    subject: str,
    *,
    looked: list[Looked] | None = None,
    judged: Judged | None = None,
    stale: bool = False,
    closed: bool = False,
    held: tuple[bytes, ...] = (),
) -> ExplanationView:
    """Explain over parts that say what a test wants."""

    async def trace(_name: str) -> list[Looked]:
        return looked or []

    default = Judged(Reason.DEFAULT_DROP, False, Mode.ALLOWLIST, False, NO_RULE, None)
    attachment = SimpleNamespace(
        policy=rules, generation=1, closed=closed, held_by=lambda _: held, names_of=lambda _: ("a.test",)
    )
    endpoint = SimpleNamespace(packed=bytes(4), port=11000)
    live = SimpleNamespace(
        attachment=attachment, row=ROW, ended=False, server=SimpleNamespace(trace=trace), endpoint=endpoint
    )
    plane = SimpleNamespace(judge_address=lambda _slot, _address: judged or default)
    parts = SimpleNamespace(plane=plane, control=SimpleNamespace(stale=stale))
    lifecycle: Any = SimpleNamespace(parts=parts, find=lambda _id, _what: live, every=lambda: [live])
    return asyncio.run(explain(lifecycle, "one", subject))


def test_before_the_first_policy_it_says_what_is_awaited() -> None:
    start = Judged(Reason.START, False, Mode.BLOCK_ALL, True, None, None)
    found = told(policy(mode=Mode.BLOCK_ALL), "8.8.4.4", judged=start)
    assert [(one.verdict, one.reason) for one in found.addresses] == [("drop", "start")]
    assert found.remedies == ("have the control plane send the first policy; until then start_mode holds",)


def test_the_chain_goes_from_the_name_to_the_verdict_link_by_link() -> None:
    rules = policy(allow=["a.test"])
    verdict = judge(rules, "a.test", ())
    chain = ("b.test", "c.test")
    looked = [
        Looked("A", verdict, "upstream", "NOERROR", chain, (B,), ttl_s=60),
        Looked("AAAA", verdict, "cache", "NXDOMAIN"),
    ]
    leased = Judged(Reason.LEASE, False, Mode.ALLOWLIST, False, NO_RULE, 90.0)
    found = told(rules, "a.test", looked=looked, judged=leased)
    assert found.steps == (
        ("mode", ROW.name, "packets allowlist, names allowlist"),
        ("name", "a.test", "rule: allow a.test"),
        ("cname", "b.test", "A of a.test leads to it"),
        ("cname", "c.test", "A of a.test leads to it"),
        ("answer", "a.test", "A: 8.8.4.4; from upstream, TTL 60 s"),
        ("answer", "a.test", "AAAA: NXDOMAIN; from cache"),
        ("address", "8.8.4.4", "global"),
        ("rule", "8.8.4.4", "no CIDR rule covers it"),
        ("lease", "8.8.4.4", "live for 1 m 30 s more, opened by a.test"),
    )
    assert [(one.address, one.verdict, one.reason) for one in found.addresses] == [("8.8.4.4", "pass", "lease")]


def test_a_control_plane_that_is_away_is_the_reason() -> None:
    blocked = Judged(Reason.BLOCK_ALL, False, Mode.BLOCK_ALL, False, None, None)
    found = told(policy(mode=Mode.BLOCK_ALL), "8.8.4.4", judged=blocked, stale=True)
    assert found.remedies == ("bring the control plane back (control_plane.max_stale is over)",)
    assert "away for longer than max_stale" in found.steps[0][2]


def test_in_mode_proxy_nothing_is_asked_and_nothing_claimed() -> None:
    found = told(policy(DnsMode.PROXY), "a.test", looked=[Looked("A", None), Looked("AAAA", None)])
    assert (found.name_verdict, found.addresses) == ("", ())
    assert "the control plane decides when the workload asks" in found.steps[1][2]
    assert "127.0.0.1:11000" in found.remedies[0]
    denied = Verdict("a.test", denied=True, why="denied by the control plane")
    found = told(policy(DnsMode.PROXY), "a.test", looked=[Looked("A", denied), Looked("AAAA", None)])
    asked = "let the workload resolve a.test through DNS 127.0.0.1:11000: the control plane is asked then"
    assert (found.name_verdict, found.remedies) == ("", ("have the control plane allow a.test", asked))
    assert [text.partition(": ")[0] for kind, _, text in found.steps if kind == "name"] == ["A", "AAAA"]
    found = told(policy(DnsMode.PROXY), "a.test", looked=[Looked("A", denied), Looked("AAAA", denied)])
    assert (found.name_verdict, found.remedies) == ("drop", ("have the control plane allow a.test",))


def test_resolving_is_no_remedy_where_the_control_plane_keeps_answers_out_of_the_filter() -> None:
    answered = Verdict("a.test", denied=False, why="allowed by the control plane", learn=False)
    looked = [Looked("A", answered, "cache", "NOERROR", addresses=(B,)), Looked("AAAA", answered)]
    found = told(policy(DnsMode.PROXY), "a.test", looked=looked)
    assert found.name_verdict == "pass"
    assert found.remedies == ("allow_cidrs: 8.8.4.4/32, or have the control plane say add_to_filter of a.test",)


@pytest.mark.parametrize(
    ("deny", "remedy"),
    [
        ("a.test", "dns.allow: a.test in place of deny a.test"),
        (".test", "dns.allow: a.test"),
        (".a.test", "dns.allow: a.test"),
    ],
)
def test_a_denied_name_is_allowed_by_what_is_more_specific(deny: str, remedy: str) -> None:
    rules = policy(deny=[deny])
    verdict = judge(rules, "a.test", ())
    found = told(rules, "a.test", looked=[Looked("A", verdict)])
    assert (found.name_verdict, found.remedies) == ("drop", (remedy,))
    left = [] if "in place of" in remedy else [deny]
    better = judge(policy(allow=["a.test"], deny=left), "a.test", ())
    assert better is not None
    assert not better.denied


def test_names_in_dns_mode_disabled_open_nothing_and_many_addresses_are_cut() -> None:
    rules = policy(DnsMode.DISABLED)
    addresses = tuple(number.to_bytes(4, "big") for number in range(0x08080000, 0x08080000 + MAX_ADDRESSES + 3))
    looked = [Looked("A", judge(rules, "a.test", ()), "cache", "NOERROR", addresses=addresses)]
    found = told(rules, "a.test", looked=looked, held=(A,))
    assert len(found.addresses) == MAX_ADDRESSES
    assert ("answer", "a.test", "4 more addresses, not looked at") in found.steps
    assert all("in mode disabled answers open nothing" in remedy for remedy in found.remedies)


def test_an_expired_rule_and_a_lease_that_ran_out_are_told() -> None:
    rules = Rules(None, None, (B + b"\x20", B[:3] + b"\0\x18"))
    judged = Judged(Reason.DEFAULT_DROP, True, Mode.ALLOWLIST, False, rules, -75.0)
    found = told(policy(audit=True), "8.8.4.4", judged=judged)
    kinds = [(kind, text) for kind, _, text in found.steps[2:]]
    assert kinds == [
        ("rule", "expired"),
        ("rule", "expired"),
        ("rule", "no CIDR rule covers it"),
        ("lease", "ran out 1 m 15 s ago, opened by a.test; running TCP may go on"),
        ("default", "mode allowlist: what nothing allows is dropped"),
    ]
    assert (found.addresses[0].verdict, found.addresses[0].lease_s) == ("would_drop", None)
    again = "or the workload resolves a.test through DNS 127.0.0.1:11000 again"
    assert found.remedies == (f"allow_cidrs: 8.8.4.4/32, {again}",)


def test_one_that_is_detached_meanwhile_is_not_told_of() -> None:
    with pytest.raises(NotFoundError, match="detached meanwhile"):
        told(policy(), "a.test", closed=True)
