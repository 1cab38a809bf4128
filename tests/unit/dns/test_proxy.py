"""The book of control-plane decisions: merged, remembered, bounded, emptied."""

from __future__ import annotations

import asyncio

import pytest
from tests.unit.dns.world import Clock, Decision, FakeGate, packed, policy, run

from netfence.dns import proxy as proxy_module
from netfence.dns.judge import Verdict
from netfence.dns.proxy import ProxyBook
from netfence.errors import DeadlineError, NetfenceError, UnavailableError
from netfence.policy.modes import DnsMode

Result = Verdict | NetfenceError


def book(decision: Decision | None = None) -> tuple[ProxyBook, FakeGate, Clock]:
    gate, clock = FakeGate(policy(DnsMode.PROXY)), Clock()
    if decision is not None:

        async def decide(_name: str, _qtype: str) -> Decision:
            await asyncio.sleep(0)
            return decision

        gate.decide = decide
    return ProxyBook(gate, clock), gate, clock


async def decided(subject: ProxyBook, name: str = "a.org", qtype: int = 1) -> Result:
    future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
    subject.decide(name, qtype, future.set_result)
    return await future


def test_types_are_asked_for_by_name() -> None:
    async def go() -> None:
        subject, gate, _ = book(Decision())
        for qtype in (1, 28, 65, 16, 60000):
            await decided(subject, qtype=qtype)
        assert [qtype for _, qtype in gate.asked] == ["A", "AAAA", "HTTPS", "TXT", "TYPE60000"]

    run(go())


def test_a_decision_without_ttl_is_not_remembered_and_its_addresses_live_300_s() -> None:
    async def go() -> None:
        subject, _, _ = book(Decision(ips=packed("93.184.216.34")))
        verdict = await decided(subject)
        assert isinstance(verdict, Verdict)
        assert (verdict.ttl_s, verdict.learn, verdict.denied) == (300, True, False)
        assert subject.known("a.org", 1) is None

    run(go())


def test_a_decision_is_remembered_until_its_ttl() -> None:
    async def go() -> None:
        subject, _, clock = book(Decision(allow=False, ttl_s=30.0))
        verdict = await decided(subject)
        assert subject.known("a.org", 1) is verdict
        assert subject.known("a.org", 28) is None
        clock.now += 30
        assert subject.known("a.org", 1) is None

    run(go())


def test_a_change_of_policy_empties_the_book_and_what_is_on_its_way_is_not_joined() -> None:
    async def go() -> None:
        subject, gate, _ = book(Decision(ttl_s=30.0))
        await decided(subject)
        first = asyncio.ensure_future(decided(subject, "b.org"))
        await asyncio.sleep(0)
        gate.generation += 1
        assert subject.known("a.org", 1) is None
        await decided(subject, "b.org")
        await first
        assert [name for name, _ in gate.asked] == ["a.org", "b.org", "b.org"]

    run(go())


def test_an_answer_of_an_older_generation_is_not_remembered() -> None:
    async def go() -> None:
        subject, gate, _ = book(Decision(ttl_s=30.0))
        waiting = asyncio.ensure_future(decided(subject))
        await asyncio.sleep(0)
        gate.generation += 1
        assert isinstance(await waiting, Verdict)
        assert subject.known("a.org", 1) is None

    run(go())


@pytest.mark.parametrize("error", [DeadlineError("late"), UnavailableError("gone"), RuntimeError("a bug")])
def test_every_failure_reaches_all_who_wait(error: Exception) -> None:
    async def go() -> None:
        subject, gate, _ = book()

        async def fail(_name: str, _qtype: str) -> Decision:
            await asyncio.sleep(0)
            raise error

        gate.decide = fail
        results = await asyncio.gather(decided(subject), decided(subject))
        assert all(isinstance(result, NetfenceError) for result in results)
        assert len(gate.asked) == 1
        assert subject.known("a.org", 1) is None

    run(go())


def test_the_book_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_module, "MAX_DECISIONS", 3)

    async def go() -> None:
        subject, _, _ = book(Decision(ttl_s=30.0))
        for n in range(5):
            await decided(subject, f"n{n}.org")
        assert [subject.known(f"n{n}.org", 1) is not None for n in range(5)] == [False, False, True, True, True]

    run(go())
