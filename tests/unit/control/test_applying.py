"""From a command to its result: acks and who waits for them, order, refusals with every fault, peers that misbehave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Literal

import pytest
from structlog.testing import capture_logs
from tests.unit.control.peer import (
    ALLOWLIST,
    BLOCK_ALL,
    DENYLIST,
    DISABLED,
    SYNC_ACK,
    ControlCommand,
    FakeHost,
    ack,
    set_mode,
    until,
    view_of,
)

from netfence.control import applying as module
from netfence.control import inbox as inbox_module
from netfence.control import outbox as outbox_module
from netfence.control.applying import Commands, Waiting
from netfence.control.convert import command_of
from netfence.control.outbox import Outbox, Result
from netfence.control.peek import head_of
from netfence.control.port import FirstPolicy
from netfence.errors import ExhaustedError, InvalidError, NetfenceError, NotFoundError, UnavailableError
from netfence.policy.commands import BulkUpdate
from netfence.policy.limits import MAX_ERROR_TEXT
from netfence.v1 import control_pb2


class Bench:
    """Commands for a host that has attachment a; results as they go out."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self.outbox.begin(())
        self.host = FakeHost(view_of("a", policy_version="v0", policy_hash="h0"))
        self.commands = Commands(self.outbox, 1 << 20)
        self.commands.serve(self.host)

    async def take(self, *messages: ControlCommand) -> None:
        """Take messages in one breath."""
        for message in messages:
            data = message.SerializeToString()
            await self.commands.take(head_of(data), data)

    async def send(self, *messages: ControlCommand) -> list[Result]:
        """Take messages and return the results of all so far."""
        await self.take(*messages)
        await self.drained()
        return await self.results()

    async def drained(self) -> None:
        await asyncio.wait_for(self.commands.drained(), 5)

    async def results(self) -> list[Result]:
        found = []
        while len(self.outbox):
            event = await self.outbox.take()
            assert isinstance(event, Result)
            found.append(event)
        return found

    def wait_for(self, attachment_id: str) -> Waiting:
        """Begin an attach as the life cycle does."""
        view = view_of(attachment_id)
        self.host.attaching[attachment_id] = view
        return self.commands.wait_for(view)

    async def attach(self, attachment_id: str, failure: BaseException | None = None) -> FirstPolicy:
        """Attach: wait for the policy, put it in force or fail, tell how it went."""
        waiting = self.wait_for(attachment_id)
        policy = await asyncio.wait_for(waiting.policy, 5)
        await asyncio.sleep(0.01)  # the kernel's and the disk's work
        assert self.host.applied == []
        if failure is None:
            self.host.views[attachment_id] = self.host.attaching.pop(attachment_id)
            self.host._apply(attachment_id, policy.update, policy.version)
        policy.settled(failure)
        return policy


def on_bench(work: Callable[[Bench], Awaitable[None]]) -> None:
    async def test() -> None:
        bench = Bench()
        await work(bench)
        await bench.commands.close()

    asyncio.run(asyncio.wait_for(test(), 20))


# -- commands of attachments that are there ---------------------------------------------------------------------------


def test_a_command_with_a_nonce_is_applied_and_answered() -> None:
    async def work(bench: Bench) -> None:
        (result,) = await bench.send(set_mode("a", DENYLIST, "v1"))
        assert result == Result("v1", "a", "v1", ok=True, policy_hash=bench.host.policies["a"].hash())
        assert bench.host.views["a"].mode == DENYLIST
        assert (bench.commands.counts.applied, bench.commands.counts.refused) == (1, 0)

    on_bench(work)


def test_without_a_nonce_nothing_is_answered_but_counted() -> None:
    async def work(bench: Bench) -> None:
        good, bad = set_mode("a", DENYLIST), set_mode("a", 9)  # type: ignore[arg-type]
        with capture_logs() as logs:
            assert await bench.send(good, bad) == []
        assert (bench.commands.counts.applied, bench.commands.counts.refused) == (1, 1)
        assert [entry["event"] for entry in logs] == ["command_refused"]

    on_bench(work)


def test_a_refused_command_tells_every_fault_and_what_is_still_in_force() -> None:
    async def work(bench: Bench) -> None:
        update = control_pb2.BulkUpdate(
            mode=0,  # type: ignore[arg-type]
            allow_cidrs=[control_pb2.CIDREntry(cidr="x"), control_pb2.CIDREntry(cidr="10.0.0.0/8")],
            dns=control_pb2.DnsConfig(mode=0),  # type: ignore[arg-type]
        )
        update.allow_cidrs[1].ttl.seconds = -1
        (result,) = await bench.send(ControlCommand(id="a", bulk_update=update, version="v1", nonce="n"))
        assert not result.ok
        assert len(result.errors) == 4
        for word in ("mode", "allow_cidrs[0]", "allow_cidrs[1]: ttl", "dns"):
            assert any(word in error for error in result.errors), word
        assert (result.version, result.policy_hash) == ("v0", "h0")
        assert bench.host.batches == []

    on_bench(work)


@pytest.mark.parametrize(
    "message",
    [ControlCommand(id="a", nonce="n"), ControlCommand(id="a", nonce="n", sync_ack=control_pb2.SyncAck())],
    ids=["nothing", "sync-ack"],
)
def test_a_command_that_is_none_is_refused(message: ControlCommand) -> None:
    async def work(bench: Bench) -> None:
        (result,) = await bench.send(message)
        assert not result.ok
        assert "sync_ack" in result.errors[0] or "none" in result.errors[0]
        assert bench.commands.counts.refused == 1

    on_bench(work)


def test_a_command_that_we_do_not_know_is_refused() -> None:
    async def work(bench: Bench) -> None:
        unknown = ControlCommand.FromString(ControlCommand(id="a", nonce="n").SerializeToString() + b"\xf2\x01\x00")
        (result,) = await bench.send(unknown)
        assert not result.ok

    on_bench(work)


def test_one_bad_command_among_good_ones_is_refused_alone_and_all_go_together() -> None:
    async def work(bench: Bench) -> None:
        bad = set_mode("a", 9, "bad")  # type: ignore[arg-type]
        late = ControlCommand(id="a", nonce="late", remove_cidr="x")
        results = await bench.send(set_mode("a", DISABLED, "v1"), bad, late, set_mode("a", DENYLIST, "v2"))
        assert [(one.nonce, one.ok) for one in results] == [
            ("v1", True), ("bad", False), ("late", False), ("v2", True),
        ]  # fmt: skip
        assert len(bench.host.batches) == 1
        assert {(one.version, one.policy_hash) for one in results} == {("v2", bench.host.policies["a"].hash())}
        assert bench.host.views["a"].mode == DENYLIST

    on_bench(work)


def test_for_an_unknown_id_a_command_is_ignored_counted_and_answered() -> None:
    async def work(bench: Bench) -> None:
        with capture_logs() as logs:
            results = await bench.send(ack("gone"), set_mode("gone"), ControlCommand(), SYNC_ACK)
        assert results == [Result("ack v1", "gone", "", ok=False, errors=("no attachment 'gone'",))]
        assert bench.commands.counts.unknown == 4
        assert [entry["event"] for entry in logs] == ["command_for_unknown_attachment"]
        assert bench.host.batches == []

    on_bench(work)


def test_an_attachment_that_leaves_meanwhile_is_unknown() -> None:
    async def work(bench: Bench) -> None:
        bench.host.gate.clear()
        await bench.take(set_mode("a", DISABLED, "v1"), set_mode("a", DISABLED, "v2"))
        await until(lambda: bench.host.batches)
        del bench.host.views["a"]
        bench.host.gate.set()
        await bench.drained()
        results = await bench.results()
        assert [(one.nonce, one.ok, one.version) for one in results] == [("v1", False, ""), ("v2", False, "")]
        assert bench.commands.counts.unknown == 2

    on_bench(work)


def test_what_the_host_refuses_is_answered_with_its_reason() -> None:
    async def work(bench: Bench) -> None:
        def full(*_: object) -> NetfenceError:
            return ExhaustedError("the table is full")

        bench.host._apply = full  # type: ignore[method-assign,assignment]
        (result,) = await bench.send(set_mode("a", DISABLED, "v1"))
        assert (result.ok, result.errors) == (False, ("the table is full",))

    on_bench(work)


def test_a_defect_in_the_host_is_answered_too_and_the_next_command_applied() -> None:
    async def work(bench: Bench) -> None:
        bench.host.failure = RuntimeError("secret of ours")
        with capture_logs() as logs:
            (result,) = await bench.send(set_mode("a", DISABLED, "v1"))
        assert not result.ok
        assert "log" in result.errors[0]
        assert "secret" not in result.errors[0]
        assert logs[0]["event"] == "commands_failed"
        bench.host.failure = None
        (result,) = await bench.send(set_mode("a", DISABLED, "v2"))
        assert result.ok

    on_bench(work)


def test_refusals_do_not_fill_the_log() -> None:
    async def work(bench: Bench) -> None:
        with capture_logs() as logs:
            results = await bench.send(*(set_mode("a", 9, f"v{number}") for number in range(50)))  # type: ignore[arg-type]
        assert len(results) == bench.commands.counts.refused == 50
        assert len(logs) == 1

    on_bench(work)


def test_the_log_names_some_faults_and_counts_all() -> None:
    async def work(bench: Bench) -> None:
        entries = [control_pb2.CIDREntry(cidr="x")] * 20
        update = control_pb2.BulkUpdate(mode=ALLOWLIST, allow_cidrs=entries)
        with capture_logs() as logs:
            (result,) = await bench.send(ControlCommand(id="a", bulk_update=update, version="v1", nonce="n"))
        assert len(result.errors) == 20
        (entry,) = logs
        assert (entry["faults"], len(entry["errors"])) == (20, module.MAX_LOGGED_ERRORS)
        assert (entry["attachment"], entry["command"], entry["version"]) == ("a", "bulk_update", "v1")

    on_bench(work)


def test_nothing_is_applied_while_results_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MAX_RESULTS", 2)

    async def work(bench: Bench) -> None:
        await bench.take(set_mode("a", DISABLED, "v1"), set_mode("a", DISABLED, "v2"))
        await bench.drained()
        await bench.take(set_mode("a", DISABLED, "v3"))
        draining = asyncio.ensure_future(bench.commands.drained())
        await asyncio.sleep(0.02)
        assert not draining.done()
        assert [version for _, version in bench.host.applied] == ["v1", "v2"]
        assert len(await bench.results()) == 2
        await asyncio.wait_for(draining, 1)
        assert [one.nonce for one in await bench.results()] == ["v3"]

    on_bench(work)


def test_the_faults_of_one_command_fit_a_message() -> None:
    async def work(bench: Bench) -> None:
        def many(*_: object) -> NetfenceError:
            return InvalidError(["x" * 1000] * 5000)

        bench.host._apply = many  # type: ignore[method-assign,assignment]
        (result,) = await bench.send(set_mode("a", DISABLED, "v1"))
        assert sum(map(len, result.errors)) < 2 << 20
        assert result.errors[-1] == f"and {5000 - len(result.errors) + 1} more faults"

    on_bench(work)


@pytest.mark.parametrize(
    ("mode", "dns", "warned"),
    [(ALLOWLIST, None, True), (ALLOWLIST, control_pb2.DnsConfig(mode=1), False), (DENYLIST, None, False)],  # type: ignore[arg-type]
    ids=["allowlist-without", "allowlist-with", "denylist-without"],
)
def test_an_allowlist_that_forgets_dns_is_warned_about(
    mode: int, dns: control_pb2.DnsConfig | None, warned: bool
) -> None:
    async def work(bench: Bench) -> None:
        update = control_pb2.BulkUpdate(mode=mode, dns=dns)  # type: ignore[arg-type]
        with capture_logs() as logs:
            (result,) = await bench.send(ControlCommand(id="a", bulk_update=update, nonce="n"))
        assert result.ok
        assert [entry["event"] for entry in logs] == ["allowlist_without_dns"] * warned

    on_bench(work)


def test_a_large_command_is_converted_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    convert = command_of

    def noted(message: ControlCommand) -> object:
        threads.append(threading.current_thread())
        return convert(message)

    monkeypatch.setattr(module, "command_of", noted)

    async def work(bench: Bench) -> None:
        entries = [control_pb2.CIDREntry(cidr=f"10.{n >> 8}.{n & 255}.0/24") for n in range(5000)]
        update = control_pb2.BulkUpdate(mode=ALLOWLIST, allow_cidrs=entries)
        large = ControlCommand(id="a", bulk_update=update, version="v1", nonce="v1")
        results = await bench.send(large, set_mode("a", DISABLED, "v2"))
        assert [(one.nonce, one.ok) for one in results] == [("v1", True), ("v2", True)]  # in order all the same
        assert [thread is threading.main_thread() for thread in threads] == [False, True]

    on_bench(work)


# -- acks -------------------------------------------------------------------------------------------------------------


def test_an_ack_ends_the_wait_and_is_answered_when_its_policy_is_in_force() -> None:
    async def work(bench: Bench) -> None:
        attaching = asyncio.ensure_future(bench.attach("b"))
        await until(bench.commands.awaiting)
        (result,) = await bench.send(ack("b", ALLOWLIST, "10.0.0.0/8"))
        first = await attaching
        assert isinstance(first.update, BulkUpdate)
        assert (first.update.mode, list(first.update.allow_cidrs), first.version) == (ALLOWLIST, ["10.0.0.0/8"], "v1")
        assert result == Result("ack v1", "b", "v1", ok=True, policy_hash=bench.host.policies["b"].hash())
        assert bench.commands.counts.applied == 1

    on_bench(work)


def test_commands_behind_the_ack_wait_until_it_is_in_force() -> None:
    async def work(bench: Bench) -> None:
        attaching = asyncio.ensure_future(bench.attach("b"))
        await until(bench.commands.awaiting)
        results = await bench.send(ack("b", BLOCK_ALL), set_mode("b", DENYLIST, "v2"), ack("b", DISABLED, version="v3"))
        await attaching
        assert [(one.nonce, one.ok) for one in results] == [("ack v1", True), ("v2", True), ("ack v3", True)]
        assert [version for _, version in bench.host.applied] == ["v2", "v3"]
        assert bench.host.views["b"].mode == DISABLED

    on_bench(work)


def test_a_second_ack_while_the_first_is_being_applied_is_a_bulk_update() -> None:
    async def work(bench: Bench) -> None:
        attaching = asyncio.ensure_future(bench.attach("b"))
        await until(bench.commands.awaiting)
        await bench.take(ack("b", BLOCK_ALL))
        await until(lambda: not bench.commands.awaiting())
        results = await bench.send(ack("b", DISABLED, version="v2"))
        await attaching
        assert [(one.nonce, one.ok, one.version) for one in results] == [
            ("ack v1", True, "v1"), ("ack v2", True, "v2"),
        ]  # fmt: skip
        assert bench.host.applied == [("b", "v2")]

    on_bench(work)


def test_a_late_ack_of_an_attachment_is_a_bulk_update() -> None:
    async def work(bench: Bench) -> None:
        (result,) = await bench.send(ack("a", DISABLED))
        assert (result.ok, result.version) == (True, "v1")
        assert bench.host.views["a"].mode == DISABLED

    on_bench(work)


def test_a_command_before_the_ack_is_refused_and_the_attach_goes_on_waiting() -> None:
    async def work(bench: Bench) -> None:
        attaching = asyncio.ensure_future(bench.attach("b"))
        await until(bench.commands.awaiting)
        results = await bench.send(set_mode("b", DISABLED, "v0"), ControlCommand(id="b", nonce="none"))
        assert [(one.nonce, one.ok) for one in results] == [("v0", False), ("none", False)]
        assert "set_mode: the attachment waits for its SubscribedAck" in results[0].errors[0]
        assert [view.id for view in bench.commands.awaiting()] == ["b"]
        assert bench.host.batches == []
        await bench.send(ack("b"))
        await attaching

    on_bench(work)


def test_a_bad_ack_fails_the_attach_with_every_fault() -> None:
    async def work(bench: Bench) -> None:
        waiting = bench.wait_for("b")
        bad = ack("b", ALLOWLIST, "x", "y")
        bad.subscribed_ack.allow_cidrs.add(cidr="10.0.0.0/8").ttl.seconds = -1
        await bench.take(bad)
        with pytest.raises(InvalidError) as raised:
            await asyncio.wait_for(waiting.policy, 1)
        assert len(raised.value.errors) == 3
        assert await bench.results() == []  # not before the roll-back has begun
        bench.commands.forget("b")
        await bench.drained()
        (result,) = await bench.results()
        assert (result.nonce, result.ok, len(result.errors)) == ("ack v1", False, 3)
        assert bench.host.batches == []

    on_bench(work)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (InvalidError(["mode: 0", "x: y"]), ("mode: 0", "x: y")),
        (ExhaustedError("full"), ("full",)),
        (OSError(28, "no space"), ("[Errno 28] no space",)),
    ],
    ids=["invalid", "exhausted", "other"],
)
def test_a_first_policy_that_cannot_be_applied_is_refused_with_the_reason(
    failure: Exception, expected: tuple[str, ...]
) -> None:
    async def work(bench: Bench) -> None:
        attaching = asyncio.ensure_future(bench.attach("b", failure))
        await until(bench.commands.awaiting)
        (result,) = await bench.send(ack("b"))
        await attaching
        assert (result.ok, result.errors) == (False, expected)
        assert (bench.commands.counts.applied, bench.commands.counts.refused) == (0, 1)

    on_bench(work)


def test_of_several_words_about_an_attach_the_first_counts() -> None:
    async def work(bench: Bench) -> None:
        waiting = bench.wait_for("b")
        waiting.settle(None)
        waiting.settle(NetfenceError("later"))
        assert waiting.failure is None

    on_bench(work)


def test_an_attach_forgotten_while_its_policy_waits_answers_the_ack() -> None:
    async def work(bench: Bench) -> None:
        waiting = bench.wait_for("b")
        await bench.take(ack("b"))
        await until(waiting.policy.done)
        bench.commands.forget("b")  # the caller went away before it was applied
        await bench.drained()
        (result,) = await bench.results()
        assert (result.ok, result.errors) == (False, ("the attach failed",))
        bench.commands.forget("b")

    on_bench(work)


def test_an_ack_after_its_attach_failed_is_for_nobody() -> None:
    async def work(bench: Bench) -> None:
        waiting = bench.wait_for("b")
        bench.commands.forget("b")
        del bench.host.attaching["b"]
        assert waiting.policy.cancelled()
        (result,) = await bench.send(ack("b"))
        assert (result.ok, result.errors) == (False, ("no attachment 'b'",))

    on_bench(work)


def test_an_ack_between_the_failure_of_its_attach_and_the_roll_back_waits_for_that() -> None:
    async def work(bench: Bench) -> None:
        waiting = bench.wait_for("b")
        bench.commands.fail(["b"], "lost")
        with pytest.raises(UnavailableError):
            await waiting.policy
        await bench.take(ack("b"), set_mode("b", DISABLED, "v2"))
        await asyncio.sleep(0.01)
        assert await bench.results() == []
        assert bench.host.batches == []
        bench.commands.forget("b")
        del bench.host.attaching["b"]
        await bench.drained()
        assert [(one.nonce, one.ok) for one in await bench.results()] == [("ack v1", False), ("v2", False)]

    on_bench(work)


def test_whoever_is_told_that_its_stream_is_lost_fails_unless_it_has_its_policy() -> None:
    async def work(bench: Bench) -> None:
        first, second = bench.wait_for("b"), bench.wait_for("c")
        await bench.take(ack("c"))
        await until(second.policy.done)
        assert [view.id for view in bench.commands.awaiting()] == ["b"]
        assert [view.id for view in bench.commands.decided()] == ["c"]
        bench.commands.fail(["b", "c", "nobody"], "lost")
        with pytest.raises(UnavailableError, match="attach to veth-b: lost"):
            await first.policy
        assert (await second.policy).version == "v1"
        assert [view.id for view in bench.commands.decided()] == ["c"]
        assert bench.commands.awaiting() == []
        second.settle(None)
        await bench.drained()
        assert [view.id for view in bench.commands.decided()] == ["c"]  # in force, and not attached yet
        bench.commands.attached("c")
        assert bench.commands.decided() == []

    on_bench(work)


def test_waiting_for_those_who_wait_ends_with_them_or_in_time() -> None:
    async def work(bench: Bench) -> None:
        await asyncio.wait_for(bench.commands.none_awaiting(100), 1)
        bench.wait_for("b")
        await asyncio.wait_for(bench.commands.none_awaiting(0.01), 1)
        ended = asyncio.ensure_future(bench.commands.none_awaiting(100))
        await asyncio.sleep(0.01)
        assert not ended.done()
        bench.commands.forget("b")
        await asyncio.wait_for(ended, 1)

    on_bench(work)


def test_nothing_is_applied_before_there_is_a_host() -> None:
    async def work(bench: Bench) -> None:
        commands = Commands(bench.outbox, 100)
        data = set_mode("a", DISABLED, "v1").SerializeToString()
        await commands.take(head_of(data), data)
        assert commands.counts.unknown == 1
        (result,) = await bench.results()
        assert not result.ok

    on_bench(work)


def test_an_attachment_gone_is_not_waited_for_by_name_alone() -> None:
    async def work(bench: Bench) -> None:
        bench.host.failure = NotFoundError("detached")
        (result,) = await bench.send(set_mode("a", DISABLED, "v1"))
        assert result.errors == ("no attachment 'a'",)

    on_bench(work)


def test_who_is_attached_is_kept_without_the_update_that_it_was_given() -> None:
    async def work(bench: Bench) -> None:
        attaching = asyncio.ensure_future(bench.attach("b"))
        await until(bench.commands.awaiting)
        await bench.send(ack("b"))
        await attaching
        assert bench.commands._waiting == {}
        assert bench.commands._through.keys() == {"b"}
        assert [view.id for view in bench.commands.decided()] == ["b"]
        bench.commands.forget("b")  # detached before any stream told of it
        assert bench.commands.decided() == []

    on_bench(work)


def test_a_result_always_says_why() -> None:
    async def work(bench: Bench) -> None:
        waiting = bench.wait_for("b")
        await bench.take(ack("b"))
        policy = await waiting.policy
        policy.settled(asyncio.CancelledError())  # what `Attachment.begin` says when its caller hangs up
        bench.commands.forget("b")
        await bench.drained()
        (result,) = await bench.results()
        assert (result.ok, result.errors) == (False, ("the caller of attach went away",))

    on_bench(work)


class Turns(asyncio.Event):
    """An event that counts who waits for it, and fails whoever does it again and again without a pause."""

    turns = 0

    async def wait(self) -> Literal[True]:
        self.turns += 1
        if self.turns > 100:
            raise AssertionError("it waits in circles and stops the loop")
        return await super().wait()


@pytest.mark.parametrize("together", [True, False], ids=["one-batch", "next-batch"])
def test_a_command_behind_an_ack_that_failed_waits_for_the_roll_back(
    monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """The kernel or the disk refuses the first policy: the attach is settled before `forget` is called."""
    if not together:
        monkeypatch.setattr(inbox_module, "MAX_TOGETHER", 1)

    async def work(bench: Bench) -> None:
        waiting = bench.wait_for("b")
        waiting.settled = Turns()
        await bench.take(ack("b"), set_mode("b", DISABLED, "v2"))
        policy = await waiting.policy
        policy.settled(ExhaustedError("full"))
        for _ in range(10):
            await asyncio.sleep(0)
        bench.commands.forget("b")
        del bench.host.attaching["b"]
        await bench.drained()
        assert [(one.nonce, one.ok) for one in await bench.results()] == [("ack v1", False), ("v2", False)]

    on_bench(work)


# -- bounds, and what cannot be read -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"\x1a\x01\xff", b"\x32\x02\xff\xfe", b"\x3a\x02\x12\x05"],
    ids=["set-mode-cut-short", "text-not-utf8", "bulk-update-cut-short"],
)
@pytest.mark.parametrize("counted", [False, True], ids=["small", "as-if-large"])
def test_a_command_whose_body_cannot_be_read_is_refused(
    body: bytes, monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    if counted:
        monkeypatch.setattr(module, "COUNTED_BYTES", 1)

    async def work(bench: Bench) -> None:
        data = ControlCommand(id="a", version="v1", nonce="n").SerializeToString() + body
        await bench.commands.take(head_of(data), data)
        (result,) = await bench.send()
        assert (result.nonce, result.ok, result.version) == ("n", False, "v0")
        assert f"{len(data)} bytes that cannot be read" in result.errors[0]
        assert bench.host.batches == []
        assert (await bench.send(set_mode("a", DENYLIST, "v2")))[0].ok

    on_bench(work)


@pytest.mark.parametrize("letter", ["v", "ü"], ids=["ascii", "two-bytes"])
def test_a_version_too_long_is_refused_and_answered(letter: str) -> None:
    async def work(bench: Bench) -> None:
        longest = letter * (module.MAX_VERSION_BYTES // len(letter.encode()))
        good, bad = (ControlCommand(id="a", set_mode={"mode": DENYLIST}, nonce="n") for _ in range(2))
        good.version, bad.version = longest, longest + letter
        with capture_logs() as logs:
            (fine,) = await bench.send(good)
            (refused,) = await bench.send(bad)
        assert (fine.ok, fine.version) == (True, longest)
        assert (refused.ok, refused.version) == (False, longest)  # what is in force
        assert f"{len(bad.version.encode())} bytes long; at most 1024" in refused.errors[0]
        assert len(logs[0]["version"]) == MAX_ERROR_TEXT

    on_bench(work)


@pytest.mark.parametrize("letter", ["n", "ü"], ids=["ascii", "two-bytes"])
def test_a_nonce_too_long_is_refused_and_not_answered(letter: str) -> None:
    async def work(bench: Bench) -> None:
        longest = letter * (module.MAX_NONCE_BYTES // len(letter.encode()))
        good, bad = (ControlCommand(id="a", set_mode={"mode": DENYLIST}) for _ in range(2))
        good.nonce, bad.nonce = longest, longest + letter
        assert [one.nonce for one in await bench.send(good, bad)] == [longest]
        assert (bench.commands.counts.applied, bench.commands.counts.refused) == (1, 1)
        assert len(bench.host.applied) == 1

    on_bench(work)


@pytest.mark.parametrize("letter", ["i", "ü"], ids=["ascii", "two-bytes"])
def test_an_id_too_long_is_counted_and_not_answered(letter: str) -> None:
    async def work(bench: Bench) -> None:
        longest = letter * (module.MAX_ID_BYTES // len(letter.encode()))
        with capture_logs() as logs:
            results = await bench.send(
                *(set_mode(one, DISABLED, "v") for one in (letter * 10_000, longest, longest + letter))
            )
        assert [one.id for one in results] == [longest]
        assert bench.commands.counts.unknown == 3
        assert len(logs[0]["attachment"]) == MAX_ERROR_TEXT

    on_bench(work)


@pytest.mark.parametrize("kind", ["bulk_update", "subscribed_ack"])
def test_too_many_entries_are_refused_before_they_are_parsed(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(module, "MAX_CIDR_RULES", 3)
    monkeypatch.setattr(module, "MAX_DOMAIN_RULES", 2)
    read: list[ControlCommand] = []

    def noted(message: ControlCommand) -> object:
        read.append(message)
        return command_of(message)

    monkeypatch.setattr(module, "command_of", noted)

    def message(cidrs: int, domains: int) -> ControlCommand:
        command = ControlCommand(id="a", nonce=f"{cidrs} {domains}")
        body = getattr(command, kind)
        body.mode = DENYLIST
        body.allow_cidrs.extend(control_pb2.CIDREntry(cidr=f"10.{one}.0.0/16") for one in range(cidrs))
        body.dns.mode = 2
        body.dns.deny_domains.extend(control_pb2.DomainEntry(domain=f"{one}.test") for one in range(domains))
        return command

    async def work(bench: Bench) -> None:
        few, many = message(3, 2), message(3, 40)
        monkeypatch.setattr(module, "COUNTED_BYTES", many.ByteSize() + 1)
        assert [one.ok for one in await bench.send(many)] == [True]  # a small one is not counted
        monkeypatch.setattr(module, "COUNTED_BYTES", many.ByteSize())
        (refused,) = await bench.send(many)
        monkeypatch.setattr(module, "COUNTED_BYTES", 0)
        (fine,) = await bench.send(few)
        assert (fine.ok, refused.ok) == (True, False)
        assert "more than 5 CIDRs and domains" in refused.errors[0]
        assert read == [many, few]

    on_bench(work)


def test_a_defect_in_the_host_is_answered_to_each_that_it_may_have_hit() -> None:
    async def work(bench: Bench) -> None:
        bench.host.failure = RuntimeError("secret of ours")
        bad = set_mode("a", 9, "bad")  # type: ignore[arg-type]
        with capture_logs():
            results = await bench.send(set_mode("a", DISABLED, "v1"), bad, set_mode("a", DISABLED, "v2"))
        assert sorted(one.nonce for one in results) == ["bad", "v1", "v2"]
        assert not any(one.ok for one in results)
        assert all("internal error" in one.errors[0] for one in results)
        assert bench.commands.counts.refused == 3

    on_bench(work)
