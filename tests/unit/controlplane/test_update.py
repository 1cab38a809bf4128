"""`update` and the snapshots: whom it asks about, what it sends, what it waits for, what it tells."""

from __future__ import annotations

import asyncio
import functools
import gc
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from tests.unit.controlplane.fake_daemon import FakeDaemon, daemons, until
from tests.unit.controlplane.harness import OPEN, SHUT, WEB, WEB_AND_ONE, Policies, all_are, run, serving, states

from netfence.controlplane import Attachment, ControlPlane, Limits, Outcome, Policy, Result, Results, State
from netfence.controlplane import session as session_module

TENANTS: Mapping[str, Mapping[str, str]] = {
    "a": {"tenant": "acme", "role": "web"},
    "b": {"tenant": "acme"},
    "c": {"tenant": "other"},
}


def _longer(grown: list[Any], than: int) -> bool:
    return len(grown) > than


def outcomes(results: Results) -> dict[str, Outcome]:
    return {result.attachment.id: result.outcome for result in results}


@pytest.mark.parametrize(
    ("where", "selected"),
    [
        (None, "abc"),
        ("b", "b"),
        ("nobody", ""),
        ({"tenant": "acme"}, "ab"),
        ({"tenant": "acme", "role": "web"}, "a"),
        ({"role": ""}, ""),
        ({}, "abc"),
        (lambda attachment: attachment.target == "veth-c", "c"),
        (lambda attachment: attachment.daemon.hostname == "host-1", "abc"),
    ],
    ids=["all", "id", "unknown-id", "metadata", "two-keys", "key-missing", "no-keys", "target", "daemon"],
)
def test_where(where: str | Mapping[str, str] | Callable[[Attachment], bool] | None, selected: str) -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, TENANTS) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 3))
            policies.default = OPEN
            policies.asked.clear()
            results = await plane.update(where)
            assert outcomes(results) == dict.fromkeys(selected, Outcome.APPLIED)
            assert sorted(policies.asked) == list(selected)
            assert {key for key, policy in daemon.applied.items() if policy == OPEN.rules} == set(selected)

    run(test())


def test_update_waits_for_the_daemons_result() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            daemon.answers = False
            policies.default = OPEN
            update = asyncio.ensure_future(plane.update())
            await daemon.until(lambda: len(daemon.commands) == 2)
            assert not update.done()
            assert all_are(plane, State.PENDING, 1)
            assert plane.daemons[0].awaited_results == 1
            await daemon.answer(daemon.commands[-1])
            results = await update
            assert results.ok
            assert results.all[0].version == OPEN.version
            assert plane.daemons[0].awaited_results == 0

    run(test())


def test_update_sends_a_single_command_where_that_does() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            policies.default = WEB_AND_ONE
            assert (await plane.update()).ok
            policies.default = OPEN
            assert (await plane.update()).ok
            assert daemon.kinds() == ["bulk_update", "allow_cidr", "bulk_update"]
            assert daemon.commands[1].version == WEB_AND_ONE.version
            assert daemon.commands[1].nonce
            assert daemon.versions["a"] == OPEN.version

    run(test())


def test_update_with_the_same_policy_sends_nothing() -> None:
    async def test() -> None:
        async with serving(Policies(WEB)) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            results = await plane.update()
            assert outcomes(results) == {"a": Outcome.UNCHANGED}
            assert results.ok
            assert len(daemon.commands) == 1

    run(test())


def test_refused_policy_is_told_and_never_sent_again_until_there_is_another() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}, "b": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 2))
            daemon.refuses.add(OPEN.version)
            policies.by_id["a"] = OPEN
            results = Results()
            for _ in range(2):
                results = await plane.update()
                assert outcomes(results) == {"a": Outcome.REFUSED, "b": Outcome.UNCHANGED}
                assert results.failed[0].errors == (f"version {OPEN.version} is refused", "for two reasons")
                assert not results.ok
            refused = next(status for status in plane.attachments if status.attachment.id == "a")
            assert refused.state is State.REFUSED
            assert refused.errors == results.failed[0].errors
            assert (refused.version, refused.wanted_version) == (WEB.version, OPEN.version)
            await daemon.connect()  # nor by the resync
            await until(lambda: daemon.synced and states(plane) == {"a": State.REFUSED, "b": State.IN_SYNC})
            assert len(daemon.commands) == 3
            policies.by_id["a"] = SHUT
            assert (await plane.update("a")).ok
            assert daemon.applied["a"] == SHUT.rules
            daemon.refuses.clear()
            policies.by_id["a"] = OPEN  # there was another one in between
            assert (await plane.update("a")).ok

    run(test())


def test_going_back_from_a_refused_policy_sends_nothing() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            daemon.refuses.add(OPEN.version)
            policies.default = OPEN
            await plane.update()
            policies.default = WEB
            assert outcomes(await plane.update()) == {"a": Outcome.UNCHANGED}
            assert all_are(plane, State.IN_SYNC, 1)
            assert plane.attachments[0].errors == ()

    run(test())


def test_refused_ack_is_told() -> None:
    async def test() -> None:
        async with serving(Policies(WEB)) as plane, FakeDaemon(plane.address) as daemon:
            daemon.refuses.add(WEB.version)
            await daemon.attach("new")
            await until(lambda: all_are(plane, State.REFUSED, 1))
            await daemon.detach("new", error="the ack was refused")
            await until(lambda: not plane.attachments)

    run(test())


def test_time_over_is_pending_and_goes_on_by_itself() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}, "b": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 2))
            daemon.answers = False
            policies.default = OPEN
            assert set(outcomes(await plane.update(timeout_s=0.01)).values()) == {Outcome.PENDING}
            await daemon.until(lambda: len(daemon.commands) == 4)
            for command in daemon.commands[2:]:
                await daemon.answer(command)
            await until(lambda: all_are(plane, State.IN_SYNC, 2))

    run(test())


def test_only_the_newest_policy_waits() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            daemon.answers = False
            updates = []
            for number in range(20):
                policies.default = Policy("allowlist", version=f"v{number}")
                updates.append(asyncio.ensure_future(plane.update()))
                await until(functools.partial(_longer, policies.asked, len(policies.asked)))
            await daemon.until(lambda: len(daemon.commands) == 2)
            daemon.answers = True
            await daemon.answer(daemon.commands[-1])
            results = await asyncio.gather(*updates)
            assert [command.version for command in daemon.commands[1:]] == ["v0", "v19"]
            assert [result.all[0].version for result in results[1:]] == ["v19"] * 19
            assert all(result.ok for result in results)

    run(test())


def test_question_asked_while_an_answer_is_awaited_is_asked_again() -> None:
    """Or an update would return before the policy that it is about was even looked up."""

    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            policies.gate.clear()
            first = asyncio.ensure_future(plane.update())
            await until(lambda: policies.waiting)
            second = asyncio.ensure_future(plane.update())
            await asyncio.sleep(0)
            policies.default = OPEN
            policies.gate.set()
            assert (await first).ok
            results = await second
            assert results.ok
            assert results.all[0].version == OPEN.version
            assert len(policies.asked) == 3
            assert daemon.applied["a"] == OPEN.rules

    run(test())


def test_window_bounds_what_is_in_flight() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        many = [f"a{number}" for number in range(50)]
        limits = Limits(in_flight_per_daemon=8)
        async with serving(policies, limits=limits) as plane, FakeDaemon(plane.address) as daemon:
            daemon.answers = False
            daemon.metadata = {attachment_id: {} for attachment_id in many}
            daemon.applied = dict.fromkeys(many, SHUT.rules)
            await daemon.connect()
            await until(lambda: all_are(plane, State.PENDING, 50))
            await daemon.until(lambda: len(daemon.commands) == 8)
            assert plane.daemons[0].awaited_results == 8
            for number in range(50):
                await daemon.until(functools.partial(_longer, daemon.commands, number))
                assert len(daemon.commands) <= 8 + number
                await daemon.answer(daemon.commands[number])
            await until(lambda: all_are(plane, State.IN_SYNC, 50))

    run(test())


def test_stuck_daemons_do_not_slow_the_others() -> None:
    """One gives no results, one reads nothing: large policies, so that its stream is full."""

    async def test() -> None:
        large = [Policy("denylist", deny=[f"10.{n >> 8}.{n & 255}.{m}" for n in range(6000)]) for m in range(2)]
        assert len(large[0].bulk_body) > 60_000
        policies = Policies(large[0])
        async with serving(policies) as plane, daemons(5, plane.address, 20) as fleet:
            await until(lambda: all_are(plane, State.IN_SYNC, 100))
            fleet[0].answers = False
            fleet[1].reads.clear()
            policies.default = large[1]
            update = asyncio.ensure_future(plane.update())
            well = {f"daemon-{number}" for number in (2, 3, 4)}
            await until(
                lambda: all(
                    status.version == large[1].version
                    for status in plane.attachments
                    if status.attachment.daemon.id in well
                )
            )
            assert not update.done()
            update.cancel()

    run(test())


def test_silent_daemon_is_disconnected_and_brought_up_to_date_when_it_is_back() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        limits = Limits(result_timeout_s=0.2)
        async with serving(policies, limits=limits) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            daemon.answers = False
            policies.default = OPEN
            assert outcomes(await plane.update()) == {"a": Outcome.DISCONNECTED}
            await daemon.until(lambda: daemon.status)
            assert daemon.status.name == "DEADLINE_EXCEEDED"  # type: ignore[union-attr]
            daemon.answers = True
            await daemon.connect()
            await until(lambda: all_are(plane, State.IN_SYNC, 1))

    run(test())


def test_daemon_that_answers_slowly_is_not_taken_for_silent() -> None:
    """What counts is the time since its last result, not the age of a command: a long queue is no silence."""

    async def test() -> None:
        policies = Policies(WEB)
        many = [f"a{number}" for number in range(10)]
        limits = Limits(result_timeout_s=2.0)
        async with serving(policies, limits=limits) as plane, FakeDaemon(plane.address) as daemon:
            daemon.answers = False
            for attachment_id in many:
                await daemon.attach(attachment_id)
            await daemon.until(lambda: len(daemon.commands) == 10)
            for command in list(daemon.commands):
                await asyncio.sleep(0.35)  # the daemon's work
                await daemon.answer(command)
            await until(lambda: all_are(plane, State.IN_SYNC, 10))
            assert daemon.status is None

    run(test())


def test_daemon_that_reads_nothing_is_disconnected() -> None:
    async def test() -> None:
        large = [Policy("denylist", deny=[f"10.{n >> 8}.{n & 255}.{m}" for n in range(20_000)]) for m in range(2)]
        policies = Policies(large[0])
        limits = Limits(result_timeout_s=0.5)
        async with serving(policies, limits=limits) as plane, FakeDaemon(plane.address, {"a": {}, "b": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 2))
            daemon.reads.clear()
            policies.default = large[1]
            assert Outcome.DISCONNECTED in outcomes(await plane.update()).values()  # a last one may have been read
            await until(lambda: not plane.daemons[0].connected)

    run(test())


def test_original_daemon_that_reads_nothing_is_disconnected() -> None:
    """It owes no results that could be missed; what tells is that nothing can be written, after gRPC's 8 MB or so."""

    async def test() -> None:
        large = Policy("denylist", deny=[f"10.{n >> 8}.{n & 255}.0/24" for n in range(20_000)])
        limits = Limits(result_timeout_s=0.5)
        many: dict[str, dict[str, str]] = {f"a{number}": {} for number in range(80)}
        async with serving(Policies(large), limits=limits) as plane:
            daemon = FakeDaemon(plane.address, many, old=True)
            await daemon.connect()
            daemon.reads.clear()
            await until(lambda: plane.daemons)
            await until(lambda: not plane.daemons[0].connected)
            await daemon.drop()

    run(test())


def test_large_policies_go_out_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(session_module, "LARGE_BYTES", 0)
        monkeypatch.setattr("netfence.controlplane.server.MAX_LARGE_WRITES", 1)
        policies = Policies(WEB)
        async with serving(policies) as plane, daemons(5, plane.address, 5):
            await until(lambda: all_are(plane, State.IN_SYNC, 25))

    run(test())


def test_detached_meanwhile_is_gone() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            daemon.answers = False
            policies.default = OPEN
            update = asyncio.ensure_future(plane.update())
            await daemon.until(lambda: len(daemon.commands) == 2)
            await daemon.detach("a")
            results = await update
            assert outcomes(results) == {"a": Outcome.GONE}
            assert results.ok
            await until(lambda: plane.daemons[0].awaited_results == 0)  # its place in the window is free again

    run(test())


def test_cancelled_and_timed_out_updates_leave_nothing_behind() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            daemon.answers = False
            policies.default = OPEN
            for _ in range(3):
                await plane.update(timeout_s=0.01)
            update = asyncio.ensure_future(plane.update())
            await asyncio.sleep(0.01)
            update.cancel()
            await asyncio.wait({update})
            entry = plane._book.with_id("a")[0]
            assert entry._pushes == []

    run(test())


def test_equal_ids_of_two_daemons_are_two_attachments() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with (
            serving(policies) as plane,
            FakeDaemon(plane.address, {"a": {}}) as one,
            FakeDaemon(plane.address, {"a": {}}, daemon_id="daemon-2") as other,
        ):
            await until(lambda: all_are(plane, State.IN_SYNC, 2))
            policies.default = OPEN
            assert len(await plane.update("a")) == 2
            assert one.applied["a"] == other.applied["a"] == OPEN.rules
            await one.detach("a")
            await until(lambda: len(plane.attachments) == 1)
            assert len(await plane.update("a")) == 1

    run(test())


def test_update_needs_a_serving_plane() -> None:
    async def test() -> None:
        with pytest.raises(RuntimeError):
            await ControlPlane(Policies()).update()

    run(test())


def test_heartbeats_and_connection_show_in_the_snapshots() -> None:
    async def test() -> None:
        async with serving(Policies()) as plane, FakeDaemon(plane.address, {"a": {}, "b": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 2))
            assert plane.attachments[0].counters is None
            seen = plane.daemons[0].last_seen
            await daemon.heartbeat(a=17, unknown=3)
            await until(lambda: plane.attachments[0].counters)
            counters = plane.attachments[0].counters
            assert counters is not None
            assert counters.packets_allowed == 17
            status = plane.daemons[0]
            assert counters.at >= seen
            assert status.last_seen >= seen
            assert status.connected
            assert (status.daemon.id, status.daemon.hostname, status.daemon.version) == ("daemon-1", "host-1", "1.2.3")
            assert status.attachments == 2
            assert "nonce" in status.daemon.capabilities
            await daemon.drop()
            await until(lambda: not plane.daemons[0].connected)
            assert plane.daemons[0].since >= status.since
            assert all_are(plane, State.DISCONNECTED, 2)
            assert plane.attachments[0].version == WEB.version

    run(test())


def test_daemon_that_stays_away_is_forgotten() -> None:
    async def test() -> None:
        limits = Limits(forget_after_s=0.0)
        async with serving(Policies(), limits=limits) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            await daemon.drop()
            await until(lambda: not plane.daemons)
            assert not plane.attachments
            gc.collect()

    run(test())


def test_results_tell_themselves() -> None:
    attachment: Any = None
    results = Results(
        tuple(Result(attachment, outcome) for outcome in (Outcome.APPLIED, Outcome.REFUSED, Outcome.APPLIED))
    )
    assert str(results) == "2 applied, 1 refused"
    assert str(Results()) == "nothing to update"
    assert Results().ok
    assert len(results.failed) == 1


@pytest.mark.parametrize("between", ["applied", "in-force"])
def test_refusal_of_what_is_no_longer_wanted_is_not_final(between: str) -> None:
    async def test() -> None:
        policies = Policies(SHUT)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            daemon.answers = False
            policies.default = WEB
            first = asyncio.ensure_future(plane.update())
            await daemon.until(lambda: len(daemon.commands) == 2)
            policies.default = OPEN if between == "applied" else SHUT
            second = asyncio.ensure_future(plane.update())
            await until(lambda: plane.attachments[0].wanted_version == policies.default.version)  # type: ignore[union-attr]
            daemon.applied["a"], daemon.versions["a"] = SHUT.rules, SHUT.version
            daemon.answers = True
            await daemon.answer(daemon.commands[1], ("not now",))
            assert outcomes(await first) == {"a": Outcome.REFUSED}
            assert (await second).ok
            assert all_are(plane, State.IN_SYNC, 1)
            assert plane.attachments[0].errors == ()
            policies.default = WEB
            assert outcomes(await plane.update()) == {"a": Outcome.APPLIED}
            assert daemon.applied["a"] == WEB.rules

    run(test())


def test_refused_policy_is_sent_again_where_that_is_wanted() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            daemon.refuses.add(OPEN.version)
            policies.default = OPEN
            await plane.update()
            assert outcomes(await plane.update(retry_refused=True)) == {"a": Outcome.REFUSED}
            assert len(daemon.commands) == 3
            assert plane.attachments[0].errors
            daemon.refuses.clear()
            assert not (await plane.update()).ok
            assert outcomes(await plane.update(retry_refused=True)) == {"a": Outcome.APPLIED}

    run(test())


def test_first_policy_does_not_stand_behind_the_window() -> None:
    """Somebody waits for the attach, and results of large policies take a daemon long."""

    async def test() -> None:
        policies = Policies(WEB)
        many: dict[str, dict[str, str]] = {f"a{number}": {} for number in range(5)}
        limits = Limits(in_flight_per_daemon=2)
        async with serving(policies, limits=limits) as plane, FakeDaemon(plane.address, many) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 5))
            daemon.answers = False
            policies.default = OPEN
            await plane.update(timeout_s=0.01)
            await daemon.until(lambda: len(daemon.commands) == 7)
            await daemon.attach("new")
            await daemon.until(lambda: daemon.applied["new"] == OPEN.rules)
            assert len(daemon.commands) == 8

    run(test())


def test_single_result_that_never_comes_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netfence.controlplane.plane.SWEEP_S", 0.02)

    async def test() -> None:
        policies = Policies(WEB)
        limits = Limits(result_timeout_s=0.3)
        async with serving(policies, limits=limits) as plane, FakeDaemon(plane.address, {"a": {}, "b": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 2))
            daemon.answers = False
            policies.by_id["a"] = OPEN
            await plane.update("a", timeout_s=0.01)
            await daemon.until(lambda: len(daemon.commands) == 3)
            daemon.answers = True
            number = 0
            while daemon.status is None:
                number += 1
                policies.by_id["b"] = Policy("allowlist", version=f"v{number}")
                await plane.update("b")
                await asyncio.sleep(0.05)
            assert "a command" in daemon.details or daemon.details == "Internal error from Core"  # as in FakeDaemon
            assert number > 2

    run(test())


def test_namesake_that_is_away_is_not_meant() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}, daemon_id="before") as old:
            await old.drop()
            await until(lambda: all_are(plane, State.DISCONNECTED, 1))
            assert outcomes(await plane.update("a")) == {"a": Outcome.DISCONNECTED}
            async with FakeDaemon(plane.address, {"a": {}}, daemon_id="now"):
                policies.default = OPEN
                results = await plane.update("a")
                assert [result.attachment.daemon.id for result in results] == ["now"]
                assert results.ok

    run(test())


def test_attachments_of_daemons_that_are_away_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        limits = Limits(max_away_bytes=20_000)  # two of four attachments, but not one and one of seven
        async with serving(Policies(), limits=limits) as plane, daemons(4, plane.address, 4) as fleet:
            await until(lambda: all_are(plane, State.IN_SYNC, 16))
            for attachment_id in ("new", "newer", "newest"):
                await fleet[2].attach(attachment_id)
            await until(lambda: all_are(plane, State.IN_SYNC, 19))
            for number in (0, 2, 1):
                await fleet[number].drop()
                await until(functools.partial(_is_away, plane, f"daemon-{number}"))
            monkeypatch.setattr("netfence.controlplane.book.time.time", lambda: 0.0)  # who is away is not too old
            plane._book.sweep()
            assert {status.daemon.id for status in plane.daemons} == {"daemon-1", "daemon-3"}

    run(test())


def _is_away(plane: ControlPlane, daemon_id: str) -> bool:
    return any(status.daemon.id == daemon_id and not status.connected for status in plane.daemons)
