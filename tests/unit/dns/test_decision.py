"""Who watches is told of every query that is counted, once, with what became of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from tests.unit.dns.test_answer import build
from tests.unit.dns.test_handler import Upstreams, handler, taken
from tests.unit.dns.world import PUBLIC, FakeGate, deciding, packed, policy, question, run, world
from tests.unit.dns.world import Decision as Decided

from netfence.dns import handler as handler_module
from netfence.dns.decision import Decision, Reason, type_text
from netfence.dns.handler import Handler
from netfence.errors import ExhaustedError, UnavailableError
from netfence.policy.modes import DnsMode, Mode

ANSWER = build(f"a.org. 300 IN A {PUBLIC}")
PRIVATE = build("a.org. 300 IN A 10.0.0.1", authority="org. 900 IN SOA ns.org. root.org. ( 1 2 3 4 50 )")
CHAIN = build(f"a.org. 300 IN CNAME b.net.\nb.net. 300 IN A {PUBLIC}")
PEER = ("10.0.0.2", 5353)


def watched(gate: FakeGate, upstreams: Any = None, **options: Any) -> tuple[Handler, list[Decision]]:
    subject = handler(gate, Upstreams(ANSWER) if upstreams is None else upstreams, **options)
    told: list[Decision] = []
    subject.watch(told.append)
    return subject, told


def words(told: list[Decision]) -> list[tuple[str, str]]:
    return [(decision.word, decision.reason) for decision in told]


def test_what_passed_and_what_did_not() -> None:
    gate = FakeGate(policy(allow=[".a.org"], deny=["x.a.org"]))
    subject, told = watched(gate)
    for name in ("a.org", "x.a.org", "b.org"):
        taken(subject, question(name))
    assert words(told) == [("pass", "allow_rule"), ("drop", "deny_rule"), ("drop", "default_drop")]
    assert [decision.rule and decision.rule.text for decision in told] == [
        "allow a.org and below", "deny x.a.org", None
    ]  # fmt: skip
    assert gate.counts == {True: 1, False: 2}


def test_who_asked_for_what_by_which_way() -> None:
    subject, told = watched(FakeGate(policy(allow=["a.org"])))
    subject.take(question("A.org", "AAAA"), lambda _: None, tcp=False, peer=PEER)
    subject.take(question("b.org", "HTTPS"), lambda _: None, tcp=True, peer=None)
    assert [(one.name, type_text(one.qtype), one.tcp, one.peer) for one in told] == [
        ("a.org", "AAAA", False, PEER),
        ("b.org", "HTTPS", True, None),
    ]


@pytest.mark.parametrize(("qtype", "text"), [(1, "A"), (28, "AAAA"), (65, "HTTPS"), (65280, "TYPE65280")], ids=str)
def test_types_have_names(qtype: int, text: str) -> None:
    assert type_text(qtype) == text


def test_ready_replies_are_not_used_while_somebody_watches() -> None:
    gate = FakeGate(policy(allow=["a.org"]))
    subject = handler(gate, Upstreams(ANSWER))
    told: list[Decision] = []
    for name in ("a.org", "b.org"):
        taken(subject, question(name, edns=1232))
        assert subject.ready(question(name, edns=1232)) is not None
    subject.watch(told.append)
    for _ in range(2):
        for name in ("a.org", "b.org"):
            assert subject.ready(question(name, edns=1232)) is None
            taken(subject, question(name, edns=1232))
    assert words(told) == [("pass", "allow_rule"), ("drop", "default_drop")] * 2
    subject.watch(None)
    taken(subject, question("a.org", edns=1232))
    assert subject.ready(question("a.org", edns=1232)) is not None
    assert len(told) == 4


def test_who_wants_no_passes_leaves_their_replies_ready() -> None:
    subject = handler(FakeGate(policy(allow=["a.org"])), Upstreams(ANSWER))
    told: list[Decision] = []
    subject.watch(told.append, passes=False)
    for name in ("a.org", "b.org"):
        taken(subject, question(name, edns=1232))
    assert subject.ready(question("a.org", edns=1232)) is not None
    assert subject.ready(question("b.org", edns=1232)) is None


def test_an_answer_of_nothing_but_special_addresses_is_told_each_time() -> None:
    subject = handler(FakeGate(policy(allow=["a.org"])), Upstreams(PRIVATE))
    taken(subject, question("a.org", edns=1232))
    assert subject.ready(question("a.org", edns=1232)) is not None
    told: list[Decision] = []
    subject.watch(told.append, passes=False)
    for _ in range(2):
        assert subject.ready(question("a.org", edns=1232)) is None
        taken(subject, question("a.org", edns=1232))
    assert words(told) == [("drop", "rebinding")] * 2


def test_a_denied_name_in_the_chain() -> None:
    subject, told = watched(FakeGate(policy(allow=["a.org"], deny=["b.net"])), Upstreams(CHAIN))
    taken(subject, question("a.org"))
    assert words(told) == [("drop", "chain")]
    assert told[0].name == "a.org"
    assert told[0].rule is not None
    assert told[0].rule.text == "deny b.net"


def test_what_audit_lets_through_would_have_been_dropped() -> None:
    gate = FakeGate(policy(allow=["a.org"], deny=["b.net"], audit=True))
    subject, told = watched(gate, Upstreams(CHAIN))
    taken(subject, question("a.org"))
    taken(subject, question("c.org"))
    gate.policy = policy(mode=Mode.BLOCK_ALL, audit=True)
    taken(subject, question("a.org"))
    assert words(told) == [("would_drop", "chain"), ("would_drop", "default_drop"), ("would_drop", "block_all")]
    assert gate.counts == {True: 3, False: 0}


CASES: dict[str, Callable[[pytest.MonkeyPatch], list[Decision]]] = {}


def case(reason: str) -> Callable[[Callable[[pytest.MonkeyPatch], list[Decision]]], None]:
    def add(make: Callable[[pytest.MonkeyPatch], list[Decision]]) -> None:
        CASES[reason] = make

    return add


@case("pass mode_disabled")
def _(_patch: pytest.MonkeyPatch) -> list[Decision]:
    subject, told = watched(FakeGate(policy(DnsMode.DISABLED)))
    taken(subject, question("a.org"))
    return told


@case("pass default_pass")
def _(_patch: pytest.MonkeyPatch) -> list[Decision]:
    subject, told = watched(FakeGate(policy(DnsMode.DENYLIST)))
    taken(subject, question("a.org"))
    return told


@case("drop block_all")
def _(_patch: pytest.MonkeyPatch) -> list[Decision]:
    subject, told = watched(FakeGate(policy(mode=Mode.BLOCK_ALL)))
    taken(subject, question("a.org"))
    return told


@case("pass upstream")
def _(_patch: pytest.MonkeyPatch) -> list[Decision]:
    upstreams = Upstreams()
    subject, told = watched(FakeGate(policy(allow=["a.org"])), upstreams)
    taken(subject, question("a.org"))
    upstreams.asked[0][1](UnavailableError("no upstream"))
    return told


@case("drop no_lease")
def _(_patch: pytest.MonkeyPatch) -> list[Decision]:
    gate = FakeGate(policy(allow=["a.org"]))
    gate.refuse = ExhaustedError("full")
    subject, told = watched(gate)
    taken(subject, question("a.org"))
    return told


@case("drop rate")
def _(_patch: pytest.MonkeyPatch) -> list[Decision]:
    subject, told = watched(FakeGate(policy(allow=["a.org"])), max_qps=1)
    taken(subject, question("a.org"))
    taken(subject, question("a.org"))
    return told[1:]


@case("drop overload")
def _(patch: pytest.MonkeyPatch) -> list[Decision]:
    patch.setattr(handler_module, "MAX_OUTSTANDING", 0)
    subject, told = watched(FakeGate(policy(allow=["a.org"])), Upstreams())
    taken(subject, question("a.org"))
    return told


@case("drop policy_changes")
def _(patch: pytest.MonkeyPatch) -> list[Decision]:
    patch.setattr(handler_module, "MAX_REJUDGE", 0)
    gate, upstreams = FakeGate(policy(allow=["a.org"])), Upstreams()
    subject, told = watched(gate, upstreams)
    taken(subject, question("a.org"))
    gate.policy = policy(allow=["a.org"])
    upstreams.asked[0][1](UnavailableError("x"))
    return told


@case("drop refused")
def _(_patch: pytest.MonkeyPatch) -> list[Decision]:
    subject, told = watched(FakeGate(policy(allow=["a.org"])))
    taken(subject, question("a.org", "ANY"))
    return told


def test_the_contract_explains_every_reason() -> None:
    contract = (Path(__file__).parents[3] / "proto/netfence/v1/daemon.proto").read_text(encoding="utf-8")
    _, _, comment = contract.partition("// Why. Of a packet")
    comment, _, _ = comment.partition("string reason")
    assert [word for word in get_args(Reason) if f'"{word}"' not in comment] == []


@pytest.mark.parametrize("name", CASES)
def test_reasons(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (told,) = CASES[name](monkeypatch)
    assert f"{told.word} {told.reason}" == name
    assert told.name == "a.org"
    assert told.reason in get_args(Reason)


def test_the_control_planes_decisions() -> None:
    async def go() -> None:
        async with world(policy(DnsMode.PROXY), f"a.org. 300 IN A {PUBLIC}") as here:
            told: list[Decision] = []
            here.server.watch(told.append)
            here.gate.decide = deciding(Decided(allow=True, ips=packed(PUBLIC)))
            await here.ask("a.org")
            here.gate.decide = deciding(Decided(allow=False))
            await here.ask("b.org", tcp=True)
            here.gate.decide = None
            await here.ask("c.org")
            assert words(told) == [("pass", "control_plane"), ("drop", "control_plane"), ("drop", "undecided")]
            assert [one.tcp for one in told] == [False, True, False]
            assert all(one.peer is not None and one.peer[0] == "127.0.0.1" for one in told)

    run(go())


def test_an_answer_too_large_for_udp_is_told_as_it_was_judged() -> None:
    many = build("\n".join(f"a.org. 300 IN A 93.184.{n // 250}.{n % 250}" for n in range(200)))
    subject, told = watched(FakeGate(policy(allow=["a.org"])), Upstreams(many))
    taken(subject, question("a.org"))
    taken(subject, question("a.org"), tcp=True)
    subject.gate.policy = policy(audit=True)  # type: ignore[misc]
    taken(subject, question("a.org"))
    assert words(told) == [("pass", "allow_rule")] * 2 + [("would_drop", "default_drop")]


def test_every_query_that_is_counted_is_told_once() -> None:
    gate = FakeGate(policy(allow=["a.org"], deny=["b.org"]))
    subject, told = watched(gate)
    for data in (question("a.org"), question("b.org"), question("a.org", "ANY"), question("c.org"), b"\0" * 12, b""):
        taken(subject, data)
    assert len(told) == sum(gate.counts.values()) == 4
