"""What a daemon is sent when it connects: what differs, and nothing else."""

from __future__ import annotations

import asyncio

import pytest
from tests.unit.controlplane.fake_daemon import FakeDaemon, until
from tests.unit.controlplane.harness import OPEN, SHUT, WEB, Policies, all_are, run, serving, states

from netfence.controlplane import Cidr, Outcome, Policy, State

LABELLED = Policy("allowlist", allow=["10.0.0.0/8"], version="release-1")
RELABELLED = Policy("allowlist", allow=["10.0.0.0/8"], version="release-2")
HOUR = Policy("allowlist", allow=["10.0.0.0/8", Cidr("192.0.2.7", ttl_s=3600)], version="release-1")


def settled(daemon: FakeDaemon, policy: Policy, attachment_id: str = "a") -> None:
    """Let the daemon have a policy from another life of the control plane."""
    daemon.applied[attachment_id] = policy.rules
    daemon.versions[attachment_id] = policy.version


def test_connecting_daemon_gets_the_policy_of_every_attachment() -> None:
    async def test() -> None:
        policies = Policies()
        policies.by_id["b"] = SHUT
        async with (
            serving(policies) as plane,
            FakeDaemon(plane.address, {"a": {"tenant": "x"}, "b": {}}) as daemon,
        ):
            await until(lambda: all_are(plane, State.IN_SYNC, 2))
            assert daemon.applied == {"a": WEB.rules, "b": SHUT.rules}
            assert daemon.versions == {"a": WEB.version, "b": SHUT.version}
            assert sorted(policies.asked) == ["a", "b"]

    run(test())


def test_sync_ack_comes_before_everything_else() -> None:
    async def test() -> None:
        async with serving(Policies()) as plane:
            daemon = FakeDaemon(plane.address, {"a": {}})
            daemon.reads.clear()
            await daemon.connect()
            await until(lambda: all_are(plane, State.PENDING, 1))
            first = await daemon.stream.read()
            assert first.WhichOneof("command") == "sync_ack"
            assert not first.id
            assert (await daemon.stream.read()).WhichOneof("command") == "bulk_update"
            await daemon.drop()

    run(test())


def test_equal_hash_and_version_send_nothing() -> None:
    async def test() -> None:
        policies = Policies(LABELLED)
        async with serving(policies) as plane:
            daemon = FakeDaemon(plane.address, {"a": {}, "b": {}})
            settled(daemon, LABELLED, "a")
            settled(daemon, OPEN, "b")
            async with daemon:
                await until(lambda: all_are(plane, State.IN_SYNC, 2))
                assert [command.id for command in daemon.commands] == ["b"]

    run(test())


@pytest.mark.parametrize(
    ("has", "wants"), [(LABELLED, RELABELLED), (HOUR, RELABELLED), (LABELLED, OPEN)], ids=["label", "ttl", "rules"]
)
def test_other_version_or_hash_sends_the_whole_policy(has: Policy, wants: Policy) -> None:
    """Also where the hashes are equal: the hash does not tell of entries with a TTL that the old policy may have."""

    async def test() -> None:
        async with serving(Policies(wants)) as plane:
            daemon = FakeDaemon(plane.address, {"a": {}})
            settled(daemon, has)
            async with daemon:
                await until(lambda: all_are(plane, State.IN_SYNC, 1))
                assert daemon.kinds() == ["bulk_update"]
                assert daemon.applied["a"] == wants.rules

    run(test())


def test_other_hash_under_the_same_version_sends_the_whole_policy() -> None:
    async def test() -> None:
        async with serving(Policies(LABELLED)) as plane:
            daemon = FakeDaemon(plane.address, {"a": {}})
            settled(daemon, LABELLED)
            daemon.applied["a"] = SHUT.rules
            async with daemon:
                await until(lambda: all_are(plane, State.IN_SYNC, 1))
                assert daemon.applied["a"] == LABELLED.rules

    run(test())


def test_running_ttl_is_not_started_anew_by_a_reconnect() -> None:
    async def test() -> None:
        async with serving(Policies(HOUR)) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            await daemon.connect()
            await until(lambda: daemon.synced and all_are(plane, State.IN_SYNC, 1))
            assert daemon.kinds() == ["bulk_update"]

    run(test())


def test_policy_that_changed_while_the_daemon_was_away_comes_by_a_single_command() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            await daemon.drop()
            await until(lambda: all_are(plane, State.DISCONNECTED, 1))
            policies.default = Policy("allowlist")
            assert [result.outcome for result in await plane.update()] == [Outcome.DISCONNECTED]
            await daemon.connect()
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            assert daemon.kinds() == ["bulk_update", "remove_cidr"]
            assert daemon.applied["a"] == Policy("allowlist").rules

    run(test())


def test_what_was_acknowledged_is_not_trusted_over_what_the_daemon_reports() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            await daemon.drop()
            daemon.applied["a"] = OPEN.rules  # somebody restored an old state
            policies.default = Policy("allowlist")
            await daemon.connect()
            await until(lambda: daemon.synced and all_are(plane, State.IN_SYNC, 1))
            assert daemon.kinds() == ["bulk_update", "bulk_update"]
            assert daemon.applied["a"] == Policy("allowlist").rules

    run(test())


def test_attachments_that_are_no_longer_listed_are_gone() -> None:
    async def test() -> None:
        async with serving(Policies()) as plane, FakeDaemon(plane.address, {"a": {}, "b": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 2))
            await daemon.drop()
            del daemon.metadata["a"]
            await daemon.connect()
            await until(lambda: states(plane) == {"b": State.IN_SYNC})
            assert [result.attachment.id for result in await plane.update()] == ["b"]

    run(test())


def test_attachment_is_known_by_its_newest_metadata() -> None:
    async def test() -> None:
        async with serving(Policies()) as plane, FakeDaemon(plane.address, {"a": {"v": "1"}}) as daemon:
            await daemon.drop()
            daemon.metadata["a"] = {"v": "2"}
            await daemon.connect()
            await until(lambda: plane.attachments[0].attachment.metadata == {"v": "2"})

    run(test())


def test_lost_result_is_settled_by_the_next_connection() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}, "b": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 2))
            daemon.answers = False  # applies, but the stream breaks before its results
            policies.default = OPEN
            waiting = asyncio.ensure_future(plane.update())
            await until(lambda: len(daemon.commands) == 4)
            daemon.answers = True
            await daemon.connect()
            results = await waiting
            assert {result.outcome for result in results} == {Outcome.DISCONNECTED}
            await until(lambda: all_are(plane, State.IN_SYNC, 2))
            assert len(daemon.commands) == 4  # the daemon reported that it has it

    run(test())


def test_original_daemon_gets_the_whole_policy_on_every_connection_and_no_nonce() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}, old=True) as daemon:
            await until(lambda: all_are(plane, State.UNCONFIRMED, 1))
            assert daemon.kinds() == ["bulk_update"]
            await daemon.connect()
            await daemon.until(lambda: len(daemon.commands) == 2)
            policies.default = Policy("allowlist")  # one rule less
            results = await plane.update()
            assert [result.outcome for result in results] == [Outcome.UNCONFIRMED]
            assert not results.ok
            await daemon.until(lambda: len(daemon.commands) == 3)
            assert daemon.kinds() == ["bulk_update"] * 3
            assert [command.nonce for command in daemon.commands] == [""] * 3
            assert all_are(plane, State.UNCONFIRMED, 1)

    run(test())


def test_daemon_with_results_but_without_hashes_gets_the_whole_policy_on_every_connection() -> None:
    async def test() -> None:
        async with serving(Policies(LABELLED)) as plane:
            daemon = FakeDaemon(plane.address, {"a": {}})
            daemon.hashes = False
            async with daemon:
                await until(lambda: all_are(plane, State.IN_SYNC, 1))
                await daemon.connect()
                await until(lambda: daemon.synced and all_are(plane, State.IN_SYNC, 1))
                assert daemon.kinds() == ["bulk_update"] * 2

    run(test())


def test_subscribed_is_answered_with_the_policy() -> None:
    async def test() -> None:
        async with serving(Policies()) as plane, FakeDaemon(plane.address) as daemon:
            await daemon.attach("new", {"tenant": "acme"})
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            assert daemon.kinds() == ["subscribed_ack"]
            assert daemon.applied["new"] == WEB.rules
            assert daemon.versions["new"] == WEB.version
            assert plane.attachments[0].attachment.metadata == {"tenant": "acme"}
            assert plane.attachments[0].attachment.target == "veth-new"

    run(test())


def test_subscribed_is_answered_before_what_others_wait_for() -> None:
    async def test() -> None:
        policies = Policies()
        many: dict[str, dict[str, str]] = {f"a{number}": {} for number in range(200)}
        async with serving(policies) as plane:
            daemon = FakeDaemon(plane.address, many)
            policies.gate.clear()
            async with daemon:
                await until(lambda: policies.waiting)
                await daemon.attach("new")
                await until(lambda: "new" in states(plane))
                policies.gate.set()
                await until(lambda: all_are(plane, State.IN_SYNC, 201))
            assert policies.asked.index("new") < 20
            assert daemon.kinds().index("subscribed_ack") < 100

    run(test())


def test_original_daemon_gets_an_ack_too() -> None:
    async def test() -> None:
        async with serving(Policies()) as plane, FakeDaemon(plane.address, old=True) as daemon:
            await daemon.attach("new")
            await until(lambda: all_are(plane, State.UNCONFIRMED, 1))
            await daemon.until(lambda: daemon.kinds() == ["subscribed_ack"])

    run(test())


def test_attach_that_waits_is_forgotten_with_its_stream() -> None:
    """Its daemon rolls it back; if it did not, it would list it on the next stream."""

    async def test() -> None:
        policies = Policies()
        policies.gate.clear()
        async with serving(policies) as plane, FakeDaemon(plane.address) as daemon:
            await daemon.attach("new")
            await until(lambda: policies.waiting)
            await daemon.drop()
            await until(lambda: not plane.attachments)
            policies.gate.set()
            await until(lambda: not policies.waiting)
            assert not plane.attachments

    run(test())


def test_unsubscribed_is_gone() -> None:
    async def test() -> None:
        async with serving(Policies()) as plane, FakeDaemon(plane.address, {"a": {}, "b": {}}) as daemon:
            await daemon.detach("a")
            await until(lambda: states(plane) == {"b": State.IN_SYNC})

    run(test())


def test_wrong_guess_about_what_is_in_force_is_repaired_by_the_whole_policy() -> None:
    """A daemon whose policy is not what its results said: the single command's result gives it away."""

    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            daemon.applied["a"] = OPEN.rules
            policies.default = Policy("allowlist", allow=["10.0.0.0/8", "192.0.2.7"])
            assert (await plane.update()).ok
            assert daemon.kinds() == ["bulk_update", "allow_cidr", "bulk_update"]
            assert daemon.applied["a"] == policies.default.rules

    run(test())


def test_daemon_that_hashes_otherwise_is_not_sent_the_same_for_ever() -> None:
    async def test() -> None:
        async with serving(Policies(WEB)) as plane:
            daemon = FakeDaemon(plane.address, {"a": {}})
            daemon.hash_prefix = "other "
            async with daemon:
                await until(lambda: all_are(plane, State.IN_SYNC, 1))
                assert (await plane.update()).ok
                assert daemon.kinds() == ["bulk_update"]

    run(test())


def test_nonces_are_not_reused_on_a_stream_and_die_with_it() -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}, "b": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 2))
            policies.default = OPEN
            await plane.update()
            nonces = [command.nonce for command in daemon.commands]
            assert len(set(nonces)) == 4
            assert all(nonces)
            daemon.answers = False
            policies.default = SHUT
            await plane.update(timeout_s=0.01)
            await daemon.until(lambda: len(daemon.commands) == 6)
            late = daemon.commands[-1]
            daemon.applied["a"] = daemon.applied["b"] = OPEN.rules
            daemon.versions["a"] = daemon.versions["b"] = OPEN.version
            await daemon.connect()
            await until(lambda: daemon.synced)
            await daemon.answer(late)  # a nonce of the stream before
            await daemon.heartbeat(a=1)
            await until(lambda: plane.attachments[0].counters)
            assert all_are(plane, State.PENDING, 2)

    run(test())


@pytest.mark.parametrize("wanted", [WEB, SHUT], ids=["allowlist", "block-all"])
def test_report_of_block_all_is_not_trusted(wanted: Policy) -> None:
    """It may be what the daemon laid over its policy while we were away, and lifts at SyncAck."""

    async def test() -> None:
        below = Policy("denylist", version=wanted.version)  # a version that was used for two contents
        async with serving(Policies(wanted)) as plane:
            daemon = FakeDaemon(plane.address, {"a": {}})
            settled(daemon, below)
            daemon.overlay = True
            async with daemon:
                await until(lambda: all_are(plane, State.IN_SYNC, 1))
                assert daemon.applied["a"] == wanted.rules

    run(test())


def test_what_may_have_been_applied_before_a_loss_is_settled_by_the_whole_policy() -> None:
    """Versions that name two contents, of which the hash does not tell either."""

    async def test() -> None:
        policies = Policies(LABELLED)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 1))
            daemon.answers = False
            policies.default = HOUR
            await plane.update(timeout_s=0.01)
            await daemon.until(lambda: len(daemon.commands) == 2)
            daemon.answers = True
            policies.default = Policy("allowlist", allow=["10.0.0.0/8", "198.51.100.0/24"])
            await daemon.connect()
            await until(lambda: daemon.synced and all_are(plane, State.IN_SYNC, 1))
            assert daemon.applied["a"] == policies.default.rules

    run(test())


@pytest.mark.parametrize("change", ["daemon_version", "old"])
def test_refused_policy_is_sent_again_to_another_program(change: str) -> None:
    async def test() -> None:
        policies = Policies(WEB)
        async with serving(policies) as plane, FakeDaemon(plane.address, {"a": {}}) as daemon:
            daemon.refuses.add(OPEN.version)
            policies.default = OPEN
            await plane.update()
            await until(lambda: all_are(plane, State.REFUSED, 1))
            daemon.refuses.clear()
            await daemon.connect()
            await until(lambda: daemon.synced and all_are(plane, State.REFUSED, 1))
            setattr(daemon, change, True if change == "old" else "1.2.4")
            await daemon.connect()
            await daemon.until(lambda: daemon.applied["a"] == OPEN.rules)

    run(test())
