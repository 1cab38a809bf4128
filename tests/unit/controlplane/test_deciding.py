"""`policy_for`: how often and how many at a time it is asked, and what its failures do."""

from __future__ import annotations

import asyncio
import gc
import itertools
import weakref
from typing import Any

import pytest
import structlog
from tests.unit.controlplane.fake_daemon import FakeDaemon, daemons, until
from tests.unit.controlplane.harness import OPEN, WEB, Policies, all_are, run, serving, states

from netfence.controlplane import Attachment, Limits, Outcome, Policy, State, deciding
from netfence.controlplane.entry import Entry
from netfence.controlplane.hush import Hush
from netfence.controlplane.session import Session


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deciding, "RETRY_FIRST_S", 0.02)


def test_failure_is_logged_told_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        policies = Policies(WEB)
        policies.by_id["a"] = ValueError("no such tenant")
        with structlog.testing.capture_logs() as logs:
            async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}, "b": {}}) as daemon:
                await until(lambda: states(plane) == {"a": State.UNDECIDED, "b": State.IN_SYNC})
                assert plane.attachments[0].errors == ("policy_for: ValueError: no such tenant",)
                results = await plane.update("a")
                assert [result.outcome for result in results] == [Outcome.UNDECIDED]
                assert results.all[0].errors == ("policy_for: ValueError: no such tenant",)
                await until(lambda: policies.asked.count("a") >= 4)
                policies.by_id["a"] = OPEN
                await until(lambda: all_are(plane, State.IN_SYNC, 2))
                assert daemon.applied["a"] == OPEN.rules
                assert not plane.attachments[0].errors
                assert policies.asked.count("b") == 1
        failures = [entry for entry in logs if entry["event"] == "policy_for_failed"]
        assert failures
        assert failures[0]["attachment"] == "a"
        assert "ValueError: no such tenant" in failures[0]["exception"]

    monkeypatch.setattr(deciding, "hush", Hush(structlog.get_logger("test")))
    run(test())


def test_what_is_in_force_stays_while_policy_for_fails() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            policies.default = RuntimeError("data base gone")
            await plane.update()
            assert daemon.applied["a"] == WEB.rules
            status = plane.attachments[0]
            assert (status.state, status.version) == (State.UNDECIDED, WEB.version)

    run(test())


def test_original_daemon_is_sent_nothing_again_while_policy_for_fails() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}, old=True) as daemon:
            await until(lambda: all_are(plane, State.UNCONFIRMED, 1))
            policies.default = RuntimeError("data base gone")
            await plane.update()
            await until(lambda: len(policies.asked) > 3)
            policies.default = OPEN
            await daemon.until(lambda: daemon.applied["a"] == OPEN.rules)
            assert len(daemon.commands) == 2

    run(test())


def test_failures_are_tried_again_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    jitter: list[tuple[float, float]] = []

    def most(least: float, most: float) -> float:
        jitter.append((least, most))
        return most

    async def test() -> None:
        policies = Policies(ValueError("x"))
        with structlog.testing.capture_logs() as logs:
            async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}):
                await until(lambda: len(policies.asked) >= 5)
        delays = [entry["retry_s"] for entry in logs if entry["event"] == "policy_for_failed"]
        assert delays[:5] == [0.1, 0.2, 0.4, 0.4, 0.4]
        assert set(jitter) == {(0.5, 1)}

    monkeypatch.setattr(deciding, "RETRY_FIRST_S", 0.1)
    monkeypatch.setattr(deciding, "RETRY_MOST_S", 0.4)
    monkeypatch.setattr("random.uniform", most)
    monkeypatch.setattr(deciding, "hush", Hush(structlog.get_logger("test")))
    run(test())


def test_question_asked_during_a_second_try_is_not_lost() -> None:
    async def test() -> None:
        policies = Policies(ValueError("x"))
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: len(policies.asked) >= 2)
            policies.gate.clear()
            await until(lambda: policies.waiting)
            update = asyncio.ensure_future(plane.update())
            await asyncio.sleep(0)
            policies.default = WEB
            policies.gate.set()
            assert (await update).ok
            assert daemon.applied["a"] == WEB.rules

    run(test())


def test_nothing_is_asked_about_a_daemon_that_went() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        policies.gate.clear()
        policies.held = {"a"}
        limits = Limits(decisions_per_daemon=1)
        many: dict[str, dict[str, str]] = {"a": {}, "b": {}, "c": {}}
        async with serving(policies, limits=limits) as plane, FakeDaemon(plane.address, many) as daemon:
            await until(lambda: policies.waiting)
            await daemon.drop()
            await until(lambda: all_are(plane, State.DISCONNECTED, 3))
            policies.gate.set()
            async with FakeDaemon(plane.address, {"d": {}}, daemon_id="other"):
                await until(lambda: states(plane)["d"] is State.IN_SYNC)
            assert policies.asked == ["a", "d"]

    run(test())


def test_questions_that_waited_when_the_daemon_went_are_asked_when_it_is_back() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        policies.gate.clear()
        policies.held = {"a"}
        limits = Limits(decisions_per_daemon=1)
        many: dict[str, dict[str, str]] = {"a": {}, "b": {}, "c": {}}
        async with serving(policies, limits=limits) as plane, FakeDaemon(plane.address, many) as daemon:
            await until(lambda: policies.waiting)
            await daemon.connect()
            await until(lambda: daemon.synced)
            policies.gate.set()
            await until(lambda: all_are(plane, State.IN_SYNC, 3))

    run(test())


def test_attachment_that_goes_before_its_turn_holds_up_nobody() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        policies.gate.clear()
        policies.held = {"a"}
        limits = Limits(decisions_per_daemon=1)
        many: dict[str, dict[str, str]] = {"a": {}, "b": {}, "c": {}}
        async with serving(policies, limits=limits) as plane, FakeDaemon(plane.address, many) as daemon:
            await until(lambda: policies.waiting)
            await daemon.detach("b")
            await until(lambda: "b" not in states(plane))
            policies.gate.set()
            await until(lambda: all_are(plane, State.IN_SYNC, 2))
            assert policies.asked == ["a", "c"]

    run(test())


def test_answers_without_waiting_leave_the_loop_to_others() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        many: dict[str, dict[str, str]] = {f"a{number}": {} for number in range(500)}
        limits = Limits(decisions=1)
        async with serving(policies, limits=limits) as plane, FakeDaemon(plane.address, many):
            await until(lambda: all_are(plane, State.IN_SYNC, 500))
            seen = [0]
            policies.asked.clear()
            assert plane._deciders is not None
            for entry in plane._book.entries():
                plane._deciders.ask(entry)
            while len(policies.asked) < 500:
                await asyncio.sleep(0)
                seen.append(len(policies.asked))
            assert max(after - before for before, after in itertools.pairwise(seen)) < 50

    run(test())


def test_failing_attachment_is_left_alone_when_it_is_gone() -> None:
    async def test() -> None:
        policies = Policies(ValueError("x"))
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: len(policies.asked) > 1)
            await daemon.detach("a")
            await until(lambda: not plane.attachments)
            asked = len(policies.asked)
            await asyncio.sleep(0.2)  # several times the back-off
            assert len(policies.asked) == asked

    run(test())


def test_failing_attachment_is_left_alone_while_its_daemon_is_away() -> None:
    async def test() -> None:
        policies = Policies(ValueError("x"))
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: len(policies.asked) > 1)
            await daemon.drop()
            await until(lambda: all_are(plane, State.DISCONNECTED, 1))
            asked = len(policies.asked)
            await asyncio.sleep(0.2)
            assert len(policies.asked) == asked
            policies.default = WEB
            await daemon.connect()
            await until(lambda: all_are(plane, State.IN_SYNC, 1))

    run(test())


def test_answer_that_takes_too_long_is_a_failure() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        policies.held.add("a")
        policies.gate.clear()
        limits = Limits(policy_timeout_s=0.05)
        async with serving(policies, limits=limits) as plane, FakeDaemon(plane.address, {"a": {}, "b": {}}):
            await until(lambda: states(plane) == {"a": State.UNDECIDED, "b": State.IN_SYNC})
            assert plane.attachments[0].errors == ("policy_for: TimeoutError: no answer within 0.05 s",)

    run(test())


@pytest.mark.parametrize("answer", [None, "allowlist", {"mode": "allowlist"}])
def test_answer_that_is_no_policy_is_a_failure(answer: Any) -> None:
    async def policy_for(_: Attachment) -> Any:
        return answer

    async def test() -> None:
        async with serving(policy_for) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.UNDECIDED, 1))
            assert "not a netfence.controlplane.Policy" in plane.attachments[0].errors[0]
            assert not daemon.commands

    run(test())


def test_cancelled_inside_is_a_failure_like_others() -> None:
    """Something that `policy_for` waits for was cancelled; the worker must live on."""

    async def policy_for(attachment: Attachment) -> Policy:
        if attachment.id == "a":
            raise asyncio.CancelledError
        return WEB

    async def test() -> None:
        limits = Limits(decisions=1)
        many: dict[str, dict[str, str]] = {"a": {}, "b": {}, "c": {}}
        async with serving(policy_for, limits=limits) as plane, FakeDaemon(plane.address, many):
            await until(lambda: states(plane) == {"a": State.UNDECIDED, "b": State.IN_SYNC, "c": State.IN_SYNC})

    run(test())


def test_concurrency_is_bounded_in_all_and_for_each_daemon() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        policies.gate.clear()
        limits = Limits(decisions=10, decisions_per_daemon=4)
        async with serving(policies, limits=limits) as plane, daemons(1, plane.address, 20) as first:
            await until(lambda: policies.waiting == 4)
            assert plane.daemons[0].attachments == 20
            async with FakeDaemon(plane.address, {f"x{number}": {} for number in range(20)}, daemon_id="x"):
                await until(lambda: policies.waiting == 8)
                async with FakeDaemon(plane.address, {f"y{number}": {} for number in range(20)}, daemon_id="y"):
                    await until(lambda: policies.waiting == 10)
                    policies.gate.set()
                    await until(lambda: all_are(plane, State.IN_SYNC, 60))
            assert policies.most_waiting == 10
            assert first[0].status is None

    run(test())


def test_hanging_calls_for_one_daemon_leave_room_for_the_others() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        policies.gate.clear()
        policies.held = {f"d0-{number}" for number in range(20)}
        limits = Limits(decisions=4, decisions_per_daemon=2)
        async with serving(policies, limits=limits) as plane, daemons(3, plane.address, 20):
            await until(
                lambda: (
                    [state for key, state in states(plane).items() if not key.startswith("d0-")] == [State.IN_SYNC] * 40
                )
            )
            assert policies.waiting == 2
            policies.gate.set()
            await until(lambda: all_are(plane, State.IN_SYNC, 60))

    run(test())


def test_daemons_take_turns() -> None:
    """A daemon with one attachment does not wait for all two hundred of another."""

    async def test() -> None:
        policies = Policies(WEB)
        policies.gate.clear()
        policies.held = {"m0"}
        limits = Limits(decisions=1, decisions_per_daemon=1)
        many: dict[str, dict[str, str]] = {f"m{number}": {} for number in range(200)}
        async with (
            serving(policies, limits=limits) as plane,
            FakeDaemon(plane.address, many),
            FakeDaemon(plane.address, {"one": {}}, daemon_id="small"),
        ):
            await until(lambda: policies.waiting == 1)
            policies.gate.set()
            await until(lambda: all_are(plane, State.IN_SYNC, 201))
            assert policies.asked.index("one") < 5

    run(test())


def test_equal_policies_are_kept_once() -> None:
    async def policy_for(_: Attachment) -> Policy:
        return Policy("allowlist", allow=["10.0.0.0/8"])

    async def test() -> None:
        async with serving(policy_for) as plane, FakeDaemon(plane.address, {"a": {}, "b": {}}):
            await until(lambda: all_are(plane, State.IN_SYNC, 2))
            one, other = plane._book.entries()
            assert one._wanted is other._wanted is not None

    run(test())


def test_reconnect_in_the_middle_of_a_question_asks_again() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        policies.gate.clear()
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: policies.waiting)
            await daemon.connect()
            await until(lambda: daemon.synced)
            policies.default = OPEN
            policies.gate.set()
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            assert daemon.applied["a"] == OPEN.rules

    run(test())


def test_policies_that_nobody_has_any_more_are_freed() -> None:
    async def test() -> None:
        policies = Policies(Policy("allowlist", version="the first"))
        kept = weakref.ref(policies.default)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}):
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            policies.default = Policy("allowlist", allow=["192.0.2.1"], version="the second")  # by a single command
            assert (await plane.update()).ok
            gc.collect()
            assert kept() is None

    run(test())


class Mute(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_exception_without_a_text_stops_nobody() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        policies.by_id["a"] = Mute()
        limits = Limits(decisions=1)
        async with serving(policies, limits=limits) as plane, FakeDaemon(plane.address, {"a": {}, "b": {}}):
            await until(lambda: states(plane) == {"a": State.UNDECIDED, "b": State.IN_SYNC})
            assert plane.attachments[0].errors == ("policy_for: Mute: it has no text: its __str__ raises",)
            policies.by_id.clear()
            await until(lambda: all_are(plane, State.IN_SYNC, 2))

    run(test())


@pytest.mark.parametrize("where", ["decide", "offer"])
def test_defect_about_one_attachment_stops_nobody_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    broken = True
    methods: dict[str, Any] = {"decide": Entry.decide, "offer": Session.offer}

    def decide(entry: Entry, *args: Any) -> None:
        if broken and entry.attachment.id == "a":
            raise KeyError("defect")
        methods["decide"](entry, *args)

    def offer(session: Session, entry: Entry) -> None:
        if broken and entry.attachment.id == "a":
            raise KeyError("defect")
        methods["offer"](session, entry)

    monkeypatch.setattr(deciding, "RETRY_MOST_S", 0.02)
    if where == "decide":
        monkeypatch.setattr(Entry, "decide", decide)
    else:
        monkeypatch.setattr(Session, "offer", offer)

    async def test() -> None:
        nonlocal broken
        limits = Limits(decisions=1)
        async with serving(Policies(WEB), limits=limits) as plane, FakeDaemon(plane.address, {"a": {}, "b": {}}):
            await until(lambda: states(plane)["b"] is State.IN_SYNC)
            assert states(plane)["a"] is not State.IN_SYNC
            broken = False
            await until(lambda: all_are(plane, State.IN_SYNC, 2))

    run(test())
