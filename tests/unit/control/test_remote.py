"""The remote control plane end to end over real streams: attaches, lost streams, endpoints, secrets, staleness."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs
from tests.unit.control.peer import (
    BLOCK_ALL,
    DENYLIST,
    DISABLED,
    SYNC_ACK,
    Connection,
    ControlCommand,
    FakeHost,
    Peer,
    Soon,
    ack,
    serving,
    set_mode,
    until,
    view_of,
)

from netfence.config import ControlPlane
from netfence.control import backoff as backoff_module
from netfence.control import contact as contact_module
from netfence.control import remote as module
from netfence.control import stream as stream_module
from netfence.control.credentials import Credentials, load
from netfence.control.port import ConnectionState, FirstPolicy, UnsubscribeReason
from netfence.control.remote import RemoteControl
from netfence.errors import DeadlineError, InvalidError, NetfenceError, UnavailableError
from netfence.v1 import control_pb2, types_pb2

ERROR, REMOVED, DETACHED = UnsubscribeReason.ERROR, UnsubscribeReason.REMOVED, UnsubscribeReason.DETACHED


class Patient(Soon):
    """Chance that takes a minute where it may be more than three seconds."""

    def uniform(self, a: float, b: float) -> float:
        super().uniform(a, b)
        return 60.0 if b > 3 else 0.01


class Bench:
    """A daemon's remote control and the control planes it may reach; `settings` change before `start`."""

    def __init__(self, peers: list[Peer], **settings: Any) -> None:
        self.peers = peers
        self.peer = peers[0]
        self.rng = Soon()
        self.host = FakeHost(view_of("a", policy_version="v0", policy_hash="h0", mode=DENYLIST))
        urls = tuple(peer.address for peer in peers)
        self.settings = ControlPlane(**{"url": urls, "heartbeat_interval": 3600, **settings})
        self.control = RemoteControl(self.settings, load(self.settings), {"site": "x"}, self.rng)
        self.host.stale = lambda: self.control.stale
        self.control.introduce("daemon", None)
        self.running: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.running = asyncio.create_task(self.control.run(self.host))

    async def stop(self) -> None:
        if self.running is not None:
            self.running.cancel()
            await asyncio.gather(self.running, return_exceptions=True)

    async def connected(self, count: int = 1, peer: Peer | None = None) -> Connection:
        """Wait until the `count`th stream of a peer is synced."""
        connection = await (peer or self.peer).connection(count)
        await until(lambda: self.control.state is ConnectionState.CONNECTED)
        return connection

    async def asked(self, count: int) -> None:
        """Wait until so many pauses were asked for."""
        await until(lambda: len(self.rng.asked) >= count)

    async def attach(self, attachment_id: str = "b") -> FirstPolicy | None:
        """Attach as the life cycle does, to the host's table or with a roll-back."""
        view = self.host.attaching[attachment_id] = view_of(attachment_id, acked=False)
        try:
            first = await self.control.subscribe(view)
        except NetfenceError as error:
            await self.control.unsubscribe(attachment_id, ERROR, str(error))
            del self.host.attaching[attachment_id]
            raise
        self.host.views[attachment_id] = replace(self.host.attaching.pop(attachment_id), acked=first is not None)
        if first is not None:
            self.host._apply(attachment_id, first.update, first.version)
            first.settled(None)
        return first

    def attaching(self, attachment_id: str = "b") -> asyncio.Task[FirstPolicy | None]:
        return asyncio.create_task(self.attach(attachment_id))


def on_bench(
    directory: Path, work: Callable[[Bench], Awaitable[None]], *, peers: int = 1, start: bool = True, **settings: Any
) -> None:
    async def test() -> None:
        async with AsyncExitStack() as stack:
            found = [await stack.enter_async_context(serving(directory, f"cp{number}")) for number in range(peers)]
            bench = Bench(found, **settings)
            if start:
                bench.start()
            try:
                await work(bench)
                assert bench.running is None or not bench.running.done()
            finally:
                await bench.stop()

    asyncio.run(asyncio.wait_for(test(), 20))


def ids(connection: Connection) -> list[str]:
    """Return whom the SyncRequest of a stream lists."""
    return [one.id for one in connection.events[0].sync.attachments]


# -- the stream (wire.md, behaviour 1) --------------------------------------------------------------------------------


def test_it_connects_and_says_who_it_is_and_what_it_has(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        assert bench.control.state is ConnectionState.DISCONNECTED
        assert bench.control.address == bench.peer.address
        bench.control.check("veth0")
        bench.start()
        connection = await bench.connected()
        sync = connection.events[0].sync
        assert (sync.daemon_id, sync.hostname, dict(sync.metadata)) == ("daemon", socket.gethostname(), {"site": "x"})
        (one,) = sync.attachments
        assert (one.id, one.policy_version, one.policy_hash, one.mode) == ("a", "v0", "h0", DENYLIST)
        assert connection.kinds() == ["sync"]

    on_bench(tmp_path, work, start=False)


def test_until_the_sync_ack_it_is_connecting(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.acks = False
        bench.start()
        connection = await bench.peer.connection()
        assert bench.control.state is ConnectionState.CONNECTING
        await connection.send(SYNC_ACK)
        await until(lambda: bench.control.state is ConnectionState.CONNECTED)

    on_bench(tmp_path, work, start=False)


def test_commands_before_the_sync_ack_are_applied(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.acks = False
        bench.start()
        connection = await bench.peer.connection()
        await connection.send(set_mode("a", DISABLED, "v1"))
        assert (await connection.result("v1")).ok

    on_bench(tmp_path, work, start=False)


@pytest.mark.parametrize("code", [grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL], ids=str)
def test_a_lost_stream_is_made_anew_with_everything_told_anew(tmp_path: Path, code: grpc.StatusCode) -> None:
    async def work(bench: Bench) -> None:
        first = await bench.connected()
        bench.host.views["a"] = view_of("a", policy_version="v7")
        with capture_logs() as logs:
            first.end(code, "because")
            second = await bench.connected(2)
        assert second.events[0].sync.attachments[0].policy_version == "v7"
        lost = next(entry for entry in logs if entry["event"] == "control_plane_lost")
        assert lost["effect"] == "the last policies stay in force"
        assert bench.host.batches == []

    on_bench(tmp_path, work)


@pytest.mark.parametrize("how", ["no-sync-ack", "garbage", "unimplemented"])
def test_a_control_plane_that_makes_no_sense_is_asked_again_ever_more_rarely(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "SYNC_ACK_S", 0.02)

    async def work(bench: Bench) -> None:
        bench.peer.acks = False
        if how == "unimplemented":
            bench.peer.refuses = (grpc.StatusCode.UNIMPLEMENTED, "no such method")
        bench.start()
        for count in range(1, 5):
            await bench.peer.connection(count)
            if how == "garbage":
                await (await bench.peer.connection(count)).send(b"\xff")
        await until(lambda: len(bench.rng.asked) >= 4)
        assert bench.rng.asked[:4] == [(0, 3), (0, 6), (0, 12), (0, 24)]
        assert bench.control.state is not ConnectionState.CONNECTED
        bench.peer.acks, bench.peer.refuses = True, None
        await until(lambda: bench.control.state is ConnectionState.CONNECTED)

    on_bench(tmp_path, work, start=False)


@pytest.mark.parametrize(("window_s", "expected"), [(0, 3), (3, 12)], ids=["stood", "fell-at-once"])
def test_only_a_stream_that_stood_for_the_window_makes_the_next_tries_soon(
    tmp_path: Path, window_s: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not window_s:
        monkeypatch.setattr(backoff_module.Backoff, "window_s", 0)

    async def work(bench: Bench) -> None:
        for count in (1, 2, 3):
            (await bench.connected(count)).end()
            await bench.asked(count)
        assert bench.rng.asked[2] == (0, expected)

    on_bench(tmp_path, work)


def test_endpoints_are_tried_in_order_until_one_has_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff_module.Backoff, "window_s", 0)  # every stream stood for long enough

    async def work(bench: Bench) -> None:
        first, second, third = bench.peers
        first.refuses = (grpc.StatusCode.UNAVAILABLE, "not the leader")
        second.acks = True
        bench.start()
        connection = await bench.connected(1, second)
        assert bench.control.address == second.address
        assert bench.rng.asked == []  # no pause between endpoints
        first.refuses = None
        connection.end()
        await bench.connected(2, first)  # in order again
        assert bench.rng.asked == [(0, 3)]
        assert third.connections == []
        assert bench.control.address == first.address
        await bench.stop()
        bench.running = None
        assert bench.control.address == ", ".join(peer.address for peer in bench.peers)

    on_bench(tmp_path, work, peers=3, start=False)


def test_an_endpoint_whose_streams_come_and_go_hides_no_other(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        first, second = bench.peers
        (await bench.connected(1, first)).end()
        connection = await bench.connected(1, second)
        assert bench.control.address == second.address
        assert bench.rng.asked == [(0, 3)]  # not the whole fleet at once
        connection.end()
        await bench.connected(2, first)
        assert bench.rng.asked == [(0, 3), (0, 3)]  # behind the last one the back-off's pause alone

    on_bench(tmp_path, work, peers=2)


def test_an_endpoint_that_refuses_the_stream_costs_no_attach(tmp_path: Path) -> None:
    """First endpoint: a proxy without backend, a replica that is not the leader. The second one answers."""

    async def work(bench: Bench) -> None:
        first, second = bench.peers
        first.refuses = (grpc.StatusCode.UNAVAILABLE, "not the leader")
        attaching = bench.attaching()
        await asyncio.sleep(0)
        bench.start()
        connection = await bench.connected(1, second)
        await connection.first("subscribed")
        await connection.send(ack("b"))
        await attaching

    on_bench(tmp_path, work, peers=2, start=False)


def test_an_attach_told_on_a_stream_that_never_synced_is_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "SYNC_ACK_S", 0.2)

    async def work(bench: Bench) -> None:
        bench.peer.acks = False
        attaching = bench.attaching()
        await asyncio.sleep(0)
        bench.start()
        await (await bench.peer.connection()).first("subscribed")
        await until(lambda: bench.peer.connections[0].over)
        bench.peer.acks = True
        connection = await bench.connected(len(bench.peer.connections) + 1)
        assert (await connection.first("subscribed")).id == "b"
        assert connection.kinds() == ["sync", "subscribed"]
        assert not attaching.done()
        await connection.send(ack("b"))
        await attaching

    on_bench(tmp_path, work, start=False)


def test_an_endpoint_that_nobody_serves_is_no_obstacle(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        assert bench.control.address == f"unix:{tmp_path}/nobody, {bench.peer.address}"
        bench.start()
        await bench.connected()
        assert bench.control.address == bench.peer.address

    on_bench(tmp_path, work, start=False, url=(f"unix:{tmp_path}/nobody", f"unix:{tmp_path}/cp0"))


def test_a_message_too_large_is_said_loudly_and_not_asked_for_again_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backoff_module, "CAP_S", 0.2)

    async def work(bench: Bench) -> None:
        connection = await bench.connected()
        with capture_logs() as logs:
            await connection.send(bytes((64 << 10) + 1))
            await until(lambda: bench.rng.asked)
            waiting = bench.attaching()  # no attach makes it any better
            await until(lambda: len(bench.peer.connections) == 2)
        assert bench.rng.asked[0] == (0.1, 0.2)
        assert len(bench.rng.asked) == 1
        entry = next(entry for entry in logs if entry["event"] == "message_too_large")
        assert (entry["limit"], entry["log_level"]) == (64 << 10, "error")
        assert "max_message_size" in entry["remedy"]
        waiting.cancel()

    on_bench(tmp_path, work, max_message_size=64 << 10)


def test_the_sync_request_tells_what_came_of_all_commands_before_it(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        first = await bench.connected()
        bench.host.gate.clear()
        await first.send(set_mode("a", DISABLED, "v1"))
        await until(lambda: bench.host.batches)
        first.end()
        await until(lambda: bench.control.state is ConnectionState.DISCONNECTED)
        await asyncio.sleep(0.05)
        assert len(bench.peer.connections) == 1
        bench.host.gate.set()
        second = await bench.connected(2)
        assert second.events[0].sync.attachments[0].policy_version == "v1"
        assert (await second.first("command_result")).version == "v1"

    on_bench(tmp_path, work)


def test_results_over_a_lost_stream_are_the_newest_without_nonce(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.reads = False
        bench.start()
        first = await bench.connected()
        counts = bench.control._commands.counts
        for number in range(400):  # more than what is between us and a peer that does not read
            entries = [control_pb2.CIDREntry(cidr=f"{number} is none")] * 250
            await first.send(ControlCommand(id="a", bulk_update=control_pb2.BulkUpdate(allow_cidrs=entries), nonce="n"))
        await until(lambda: counts.refused == 400, 15)
        assert len(bench.control._outbox) > 1
        bench.peer.reads = True
        first.end()
        second = await bench.connected(2)
        await second.send(set_mode("a", DISABLED, "v9"))
        await second.result("v9")
        late, newest = second.all("command_result")
        assert (late.nonce, late.ok, late.version, newest.nonce) == ("", False, "v0", "v9")
        assert "399 is none" in late.errors[1]
        assert late.errors[-1] == "and 231 more faults"  # and the one about the mode

    on_bench(tmp_path, work, start=False)


def test_a_result_made_after_its_stream_was_lost_keeps_no_nonce(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        first = await bench.connected()
        bench.host.gate.clear()
        await first.send(*(set_mode("a", DISABLED, f"v{number}") for number in range(5)))
        await until(lambda: bench.host.batches)
        first.end()
        await until(lambda: bench.control.state is ConnectionState.DISCONNECTED)
        bench.host.gate.set()
        second = await bench.connected(2)
        await second.first("command_result")
        await second.send(set_mode("a", DISABLED, "v9"))
        await second.result("v9")
        assert [(one.nonce, one.version) for one in second.all("command_result")] == [("", "v4"), ("v9", "v9")]

    on_bench(tmp_path, work)


# -- attaches (behaviour 2) -------------------------------------------------------------------------------------------


def test_an_attach_returns_with_its_policy(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        connection = await bench.connected()
        attaching = bench.attaching()
        subscribed = await connection.first("subscribed")
        assert (subscribed.id, subscribed.target, dict(subscribed.metadata)) == ("b", "veth-b", {"tenant": "acme"})
        assert not attaching.done()
        await connection.send(ack("b", BLOCK_ALL))
        first = await attaching
        assert first is not None
        assert (first.update.mode, first.version) == (BLOCK_ALL, "v1")
        assert (await connection.result("ack v1")).ok

    on_bench(tmp_path, work)


def test_once_the_policy_is_decided_subscribe_returns_before_a_later_command_is_taken(tmp_path: Path) -> None:
    """Ack and command in one breath: the policy is in force before the command is asked for."""

    async def work(bench: Bench) -> None:
        connection = await bench.connected()
        attaching = bench.attaching()
        await connection.first("subscribed")
        await connection.send(ack("b", BLOCK_ALL), set_mode("b", DISABLED, "v2"))
        await attaching
        assert [one.ok for one in (await connection.result("ack v1"), await connection.result("v2"))] == [True, True]
        assert (bench.host.views["b"].mode, bench.host.views["b"].policy_version) == (DISABLED, "v2")
        assert [one.nonce for one in connection.all("command_result")] == ["ack v1", "v2"]

    on_bench(tmp_path, work)


def test_an_attach_made_while_connecting_is_announced_behind_the_sync_request(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        attaching = bench.attaching()
        await asyncio.sleep(0)
        bench.start()
        connection = await bench.connected()
        await connection.first("subscribed")
        assert connection.kinds() == ["sync", "subscribed"]
        assert ids(connection) == ["a"]
        await connection.send(ack("b"))
        await attaching

    on_bench(tmp_path, work, start=False)


def test_without_an_ack_in_time_the_attach_fails_and_is_told_to_be_over(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        connection = await bench.connected()
        with pytest.raises(
            DeadlineError, match=r"attach to veth-b: .*cp0 sent no SubscribedAck within 0\.1 s; .*raise"
        ):
            await bench.attach()
        gone = await connection.first("unsubscribed")
        assert (gone.id, gone.reason) == ("b", types_pb2.UNSUBSCRIBE_REASON_ERROR)
        assert "no SubscribedAck" in gone.error
        await connection.send(ack("b"))
        assert list((await connection.result("ack v1")).errors) == ["no attachment 'b'"]

    on_bench(tmp_path, work, subscribe_ack_timeout=0.1)


def test_without_a_connection_in_time_the_attach_fails_and_nobody_hears_of_it(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        with pytest.raises(
            UnavailableError, match=r"no control plane at .*later within 0\.05 s: cannot connect: .*check"
        ):
            await bench.attach()
        async with serving(tmp_path, "later") as peer:
            connection = await bench.connected(1, peer)
            await connection.send(set_mode("a", DISABLED, "v1"))
            await connection.result("v1")
            assert connection.kinds() == ["sync", "command_result"]
            await bench.stop()
            bench.running = None

    on_bench(tmp_path, work, subscribe_ack_timeout=0.05, url=(f"unix:{tmp_path}/later",))


def test_not_being_connected_is_waited_out(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await until(lambda: bench.rng.asked)
        attaching = bench.attaching()
        await until(lambda: len(bench.rng.asked) > 2)
        assert not attaching.done()
        async with serving(tmp_path, "later") as peer:
            connection = await bench.connected(1, peer)
            await connection.first("subscribed")
            await connection.send(ack("b"))
            await attaching
            await bench.stop()
            bench.running = None

    on_bench(tmp_path, work, url=(f"unix:{tmp_path}/later",))


def test_an_attach_that_waits_shortens_the_pause_between_tries(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.control._rng = bench.control._backoff._rng = bench.rng = Patient()
        bench.control._backoff.longest()  # as after many failures
        first = await bench.connected()
        first.end()
        await until(lambda: len(bench.rng.asked) == 2)
        await asyncio.sleep(0.02)
        assert len(bench.peer.connections) == 1
        attaching = bench.attaching()
        second = await bench.connected(2)
        assert bench.rng.asked[2] == (0, 3)
        await second.first("subscribed")
        await second.send(ack("b"))
        await attaching

    on_bench(tmp_path, work)


def test_an_attach_that_waits_already_shortens_every_pause(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.control._rng = bench.control._backoff._rng = bench.rng = Patient()
        bench.control._backoff.longest()
        attaching = bench.attaching()
        await asyncio.sleep(0)
        bench.start()
        await bench.asked(7)
        assert bench.rng.asked[1:] == [(0, 30), (0, 3)] * 3
        attaching.cancel()

    on_bench(tmp_path, work, start=False, url=(f"unix:{tmp_path}/nobody",))


def test_an_attach_that_was_not_announced_yet_outlives_its_stream(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.reads = False
        bench.start()
        first = await bench.connected()
        for number in range(400):  # more than what is between us and a peer that does not read
            await bench.control.unsubscribe(str(number), ERROR, "e" * 50_000)
        attaching = bench.attaching()
        await asyncio.sleep(0.05)
        assert bench.control._outbox.waits("b")
        bench.peer.reads = True
        first.end()
        second = await bench.connected(2)
        await second.first("subscribed")
        await second.send(ack("b"))
        await attaching

    on_bench(tmp_path, work, start=False)


def test_an_ack_with_bad_entries_fails_the_attach_with_every_fault_and_applies_nothing(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        connection = await bench.connected()
        attaching = bench.attaching()
        await connection.first("subscribed")
        bad = ack("b", DENYLIST, "10.0.0.0/8", "x")
        bad.subscribed_ack.deny_cidrs.add(cidr="192.0.2.1").ttl.seconds = -1
        bad.subscribed_ack.dns.SetInParent()
        await connection.send(bad)
        with pytest.raises(InvalidError) as raised:
            await attaching
        assert len(raised.value.errors) == 3
        result = await connection.result("ack v1")
        assert (result.ok, len(result.errors), result.version) == (False, 3, "")
        gone = await connection.first("unsubscribed")
        assert gone.reason == types_pb2.UNSUBSCRIBE_REASON_ERROR
        assert "allow_cidrs[1]" in gone.error
        assert bench.host.policies == {}

    on_bench(tmp_path, work)


def test_a_lost_stream_fails_the_attaches_that_were_announced_on_it(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        first = await bench.connected()
        attaching = bench.attaching()
        await first.first("subscribed")
        first.end(grpc.StatusCode.UNAVAILABLE, "going down")
        with pytest.raises(
            UnavailableError, match=r"ended before its SubscribedAck: UNAVAILABLE: going down.*try again"
        ):
            await attaching
        second = await bench.connected(2)
        gone = await second.first("unsubscribed")
        assert (gone.id, gone.reason) == ("b", types_pb2.UNSUBSCRIBE_REASON_ERROR)
        assert second.kinds() == ["sync", "unsubscribed"]
        assert ids(second) == ["a"]

    on_bench(tmp_path, work, subscribe_ack_timeout=60)


def test_an_attach_that_is_decided_but_not_through_is_in_the_next_sync_request(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        first = await bench.connected()
        view = bench.host.attaching["b"] = view_of("b", acked=False)
        subscribing = asyncio.create_task(bench.control.subscribe(view))
        await first.first("subscribed")
        await first.send(ack("b", DENYLIST))
        policy = await subscribing
        assert policy is not None
        first.end()
        await until(lambda: bench.control.state is ConnectionState.DISCONNECTED)
        bench.host.attaching["b"] = replace(view, mode=DENYLIST, policy_version="v1", acked=True)
        policy.settled(None)  # in force; what follows of the attach takes its time
        second = await bench.connected(2)
        assert ids(second) == ["a", "b"]
        assert second.events[0].sync.attachments[1].policy_version == "v1"
        assert "subscribed" not in second.kinds()
        bench.host.views["b"] = bench.host.attaching.pop("b")
        second.end()
        third = await bench.connected(3)
        assert ids(third) == ["a", "b"]
        assert bench.control._commands._waiting == {}

    on_bench(tmp_path, work)


def test_an_attach_that_fails_in_the_daemon_is_told_to_be_over(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        connection = await bench.connected()
        view = bench.host.attaching["b"] = view_of("b", acked=False)
        subscribing = asyncio.create_task(bench.control.subscribe(view))
        await connection.first("subscribed")
        await connection.send(ack("b"))
        policy = await subscribing
        assert policy is not None
        policy.settled(NetfenceError("disk full"))
        await bench.control.unsubscribe("b", ERROR, "disk full")
        result = await connection.result("ack v1")
        assert (result.ok, list(result.errors)) == (False, ["disk full"])
        assert (await connection.first("unsubscribed")).error == "disk full"

    on_bench(tmp_path, work)


def test_a_caller_that_goes_away_leaves_nobody_waiting(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        connection = await bench.connected()
        attaching = bench.attaching()
        await connection.first("subscribed")
        attaching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attaching
        await bench.control.unsubscribe("b", ERROR, "the caller went away")
        await connection.first("unsubscribed")
        del bench.host.attaching["b"]
        await connection.send(ack("b"))
        assert not (await connection.result("ack v1")).ok
        assert bench.control._commands.awaiting() == []

    on_bench(tmp_path, work)


def test_who_left_before_its_policy_was_decided_is_in_no_sync_request(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        first = await bench.connected()
        attaching = bench.attaching()
        await first.first("subscribed")
        first.end()
        second = await bench.connected(2)
        assert ids(second) == ["a"]
        with pytest.raises(UnavailableError):
            await attaching

    on_bench(tmp_path, work)


@pytest.mark.parametrize("twice", [False, True], ids=["late", "second"])
def test_a_second_or_late_ack_is_applied_like_a_bulk_update(tmp_path: Path, twice: bool) -> None:
    async def work(bench: Bench) -> None:
        connection = await bench.connected()
        if twice:
            await connection.send(ack("a", BLOCK_ALL, version="v1"))
        await connection.send(ack("a", DISABLED, version="v2"))
        result = await connection.result("ack v2")
        assert (result.ok, result.version) == (True, "v2")
        assert bench.host.views["a"].mode == DISABLED

    on_bench(tmp_path, work)


def test_acks_twice_on_one_anothers_heels(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        connection = await bench.connected()
        attaching = bench.attaching()
        await connection.first("subscribed")
        await connection.send(ack("b", BLOCK_ALL), ack("b", DISABLED, version="v2"))
        first = await attaching
        assert first is not None
        assert first.version == "v1"
        assert (await connection.result("ack v2")).version == "v2"
        assert bench.host.views["b"].mode == DISABLED

    on_bench(tmp_path, work)


# -- timeout 0 --------------------------------------------------------------------------------------------------------


def test_with_a_timeout_of_0_nobody_waits_and_it_is_announced_on_each_stream_until_it_has_a_policy(
    tmp_path: Path,
) -> None:
    async def work(bench: Bench) -> None:
        assert await bench.attach() is None
        bench.start()
        for count in (1, 2):
            connection = await bench.connected(count)
            await connection.first("subscribed")
            await connection.send(set_mode("a", DISABLED, f"n{count}"))
            await connection.result(f"n{count}")
            assert ids(connection) == ["a"]
            assert [one.id for one in connection.all("subscribed")] == ["b"]
            assert "unsubscribed" not in connection.kinds()
            if count == 2:
                await connection.send(ack("b"))
                assert (await connection.result("ack v1")).ok
            connection.end()
        third = await bench.connected(3)
        assert ids(third) == ["a", "b"]
        await third.send(set_mode("a", DISABLED, "n3"))
        await third.result("n3")
        assert bench.control._unwaited == set()
        assert "subscribed" not in third.kinds()

    on_bench(tmp_path, work, start=False, subscribe_ack_timeout=0)


def test_with_a_timeout_of_0_an_attach_that_is_still_being_stored_is_announced_and_not_listed(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        view = bench.host.attaching["b"] = view_of("b", acked=False)
        assert await bench.control.subscribe(view) is None
        bench.start()
        for count in (1, 2):
            connection = await bench.connected(count)
            assert (await connection.first("subscribed")).id == "b"
            assert ids(connection) == ["a"]
            connection.end()

    on_bench(tmp_path, work, start=False, subscribe_ack_timeout=0)


def test_who_was_restored_without_a_policy_is_announced_too(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.host.views["b"] = view_of("b", acked=False)
        bench.start()
        connection = await bench.connected()
        assert (await connection.first("subscribed")).id == "b"
        assert ids(connection) == ["a"]

    on_bench(tmp_path, work, start=False)


def test_detached_before_it_was_told_it_is_not_announced(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.attach()
        del bench.host.views["b"]
        await bench.control.unsubscribe("b", DETACHED)
        assert bench.control._unwaited == set()
        bench.start()
        connection = await bench.connected()
        await connection.send(set_mode("a", DISABLED, "v1"))
        await connection.result("v1")
        assert connection.kinds() == ["sync", "command_result"]

    on_bench(tmp_path, work, start=False, subscribe_ack_timeout=0)


# -- what is told (behaviour 3, 4, 6) ---------------------------------------------------------------------------------


def test_targets_lost_while_the_daemon_was_down_follow_the_sync_request(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.control.unsubscribe("old", REMOVED)
        bench.start()
        connection = await bench.connected()
        gone = await connection.first("unsubscribed")
        assert (gone.id, gone.reason, gone.error) == ("old", types_pb2.UNSUBSCRIBE_REASON_REMOVED, "")
        assert connection.kinds() == ["sync", "unsubscribed"]

    on_bench(tmp_path, work, start=False)


def test_an_end_is_told_again_after_a_lost_stream(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        first = await bench.connected()
        await bench.control.unsubscribe("x", DETACHED)
        await first.first("unsubscribed")
        first.end()
        second = await bench.connected(2)
        assert (await second.first("unsubscribed")).id == "x"

    on_bench(tmp_path, work)


def test_a_bad_command_changes_nothing_and_tells_every_fault(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        connection = await bench.connected()
        update = control_pb2.BulkUpdate(allow_cidrs=[control_pb2.CIDREntry(cidr="x")])
        with capture_logs() as logs:
            await connection.send(ControlCommand(id="a", bulk_update=update), set_mode("a", 0, "n"))  # type: ignore[arg-type]
            result = await connection.result("n")
        assert (result.ok, result.version, result.policy_hash) == (False, "v0", "h0")
        assert bench.control._commands.counts.refused == 2
        assert [entry["event"] for entry in logs] == ["command_refused"]
        assert len(connection.all("command_result")) == 1
        assert bench.host.policies == {}

    on_bench(tmp_path, work)


def test_heartbeats_tell_the_counters_and_are_coalesced(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.refuses = (grpc.StatusCode.UNAVAILABLE, "later")
        bench.start()
        await until(lambda: bench.host.counted >= 2)
        bench.peer.refuses = None
        await until(lambda: bench.control.state is ConnectionState.CONNECTED)
        connection = bench.peer.connections[-1]
        beat = await connection.first("heartbeat")
        assert beat.stats[0].packets_allowed >= 2
        assert (beat.stats[0].id, beat.stats[0].bytes_blocked, beat.stats[0].policy_hash) == ("a", 4, "hash")
        following = await connection.first("heartbeat", 2)
        assert following.stats[0].packets_allowed == beat.stats[0].packets_allowed + 1

    on_bench(tmp_path, work, start=False, heartbeat_interval=0.1)


def test_counters_that_cannot_be_read_cost_a_heartbeat_and_no_stream(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        connection = await bench.connected()
        stats = bench.host.stats

        async def broken() -> Any:
            bench.host.stats = stats  # type: ignore[method-assign]
            raise OSError(5, "input/output error")

        bench.host.stats = broken  # type: ignore[method-assign]
        with capture_logs() as logs:
            await until(lambda: connection.all("heartbeat"))
        assert "heartbeat_failed" in [entry["event"] for entry in logs]
        assert len(bench.peer.connections) == 1

    on_bench(tmp_path, work, heartbeat_interval=0.1)


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_are_asked_for_over_the_connection_and_fail_without_it(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        with pytest.raises(UnavailableError, match="not connected"):
            await bench.control.query_dns("a", "pypi.org", "A")
        bench.start()
        connection = await bench.connected()
        assert (await bench.control.query_dns("a", "pypi.org", "A")).allow
        assert bench.peer.questions[0].domain == "pypi.org."

        async def silent(_request: control_pb2.DnsQueryRequest) -> control_pb2.DnsQueryResponse:
            await asyncio.Event().wait()
            raise AssertionError

        bench.peer.answer = silent
        asking = asyncio.create_task(bench.control.query_dns("a", "pypi.org", "A"))
        await until(lambda: len(bench.peer.questions) == 2)
        connection.end()
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(asking, 2)
        await bench.stop()
        bench.running = None
        with pytest.raises(UnavailableError, match="not connected"):
            await bench.control.query_dns("a", "pypi.org", "A")

    on_bench(tmp_path, work, start=False, query_timeout=60)


# -- secrets ----------------------------------------------------------------------------------------------------------


def test_new_secrets_make_a_new_connection_when_no_attach_waits_on_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Credentials, "watch", lambda _self: asyncio.Event().wait())  # SIGHUP alone
    token = tmp_path / "token"
    token.write_text("first")
    token.chmod(0o600)

    async def work(bench: Bench) -> None:
        first = await bench.connected()
        assert first.metadata["authorization"] == "Bearer first"
        attaching = bench.attaching()
        await first.first("subscribed")
        token.write_text("second")
        await bench.control.reload()
        await until(lambda: bench.rng.asked)
        await until(lambda: bench.control._outbox._held)
        later = bench.attaching("c")  # has not been announced: the next stream's, and nobody waits for it
        await asyncio.sleep(0.05)
        assert not first.over
        assert [one.id for one in first.all("subscribed")] == ["b"]
        await first.send(ack("b"))
        await attaching
        with capture_logs() as logs:
            second = await bench.connected(2)
        assert second.metadata["authorization"] == "Bearer second"
        assert ids(second) == ["a", "b"]
        assert (await second.first("subscribed")).id == "c"
        await second.send(ack("c", version="v2"))
        await later
        assert not [entry for entry in logs if entry["event"] == "control_plane_lost"]
        assert bench.rng.asked[0] == (0, 3)  # a fleet's files change at once
        assert bench.control._backoff._window == backoff_module.FIRST_S  # and then no pause of the back-off
        assert first.over

    on_bench(tmp_path, work, token_file=token)


# -- the end ----------------------------------------------------------------------------------------------------------


def test_drain_waits_until_what_is_to_be_told_has_been(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        connection = await bench.connected()
        for number in range(100):
            await bench.control.unsubscribe(str(number), DETACHED)
        with capture_logs() as logs:
            await asyncio.wait_for(bench.control.drain(), 2)
        assert len(connection.all("unsubscribed")) == 100  # read, not only written
        assert "events_not_told" not in [entry["event"] for entry in logs]

    on_bench(tmp_path, work)


def test_what_was_drained_is_not_torn_away_by_the_end(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        connection = await bench.connected()
        for number in range(100):
            await bench.control.unsubscribe(str(number), DETACHED)
        await asyncio.wait_for(bench.control.drain(), 2)
        await bench.stop()
        bench.running = None
        await until(lambda: connection.over)
        assert len(connection.all("unsubscribed")) == 100

    on_bench(tmp_path, work)


def test_drain_does_not_wait_for_ever_for_a_peer_that_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DRAIN_S", 0.05)

    async def work(bench: Bench) -> None:
        bench.peer.reads = False
        bench.start()
        connection = await bench.connected()
        await asyncio.wait_for(bench.control.drain(), 1)
        assert not connection.over

    on_bench(tmp_path, work, start=False)


def test_drain_does_not_wait_for_ever_nor_without_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAIN_S", 0.05)

    async def work(bench: Bench) -> None:
        await bench.control.unsubscribe("x", DETACHED)
        await asyncio.wait_for(bench.control.drain(), 1)
        bench.peer.reads = False
        bench.start()
        await bench.connected()
        for number in range(400):
            await bench.control.unsubscribe(str(number), ERROR, "e" * 50_000)
        with capture_logs() as logs:
            await asyncio.wait_for(bench.control.drain(), 1)
        (entry,) = logs
        assert entry["event"] == "events_not_told"
        assert entry["count"] > 10

    on_bench(tmp_path, work, start=False)


def test_run_ends_by_cancellation_with_everything_of_it(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        before = asyncio.all_tasks()
        bench.start()
        connection = await bench.connected()
        bench.host.gate.clear()
        await connection.send(set_mode("a", DISABLED, "v1"))
        await until(lambda: bench.host.batches)
        await bench.stop()
        await until(lambda: connection.over)
        names = {task.get_name() for task in asyncio.all_tasks() - before}
        assert not [name for name in names if name.startswith(("stream", "renew", "commands"))]
        assert bench.control.state is ConnectionState.DISCONNECTED
        bench.host.gate.set()
        bench.start()  # and it may begin again
        await bench.connected(2)

    on_bench(tmp_path, work, start=False)


# -- staleness (semantics.md 25) --------------------------------------------------------------------------------------


def test_without_max_stale_it_is_never_stale(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.control.introduce("daemon", 1e9)
        assert not bench.control.stale
        bench.start()
        (await bench.connected()).end()
        await bench.connected(2)
        assert not bench.control.stale
        assert bench.host.followed == []
        assert bench.host.contacts == 0

    on_bench(tmp_path, work, start=False, stale_action="block_all")


def test_away_for_too_long_everything_is_blocked_until_the_next_sync_ack(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        first = await bench.connected()
        began = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() > began + 0.15)
        assert bench.host.followed == []  # a stream that stands is no absence
        with capture_logs() as logs:
            bench.peer.refuses = (grpc.StatusCode.UNAVAILABLE, "down")
            lost = asyncio.get_running_loop().time()
            first.end()
            await until(lambda: bench.host.followed)
            assert asyncio.get_running_loop().time() - lost > 0.08
            assert bench.control._contact._last >= lost
            assert bench.control.stale
            assert bench.host.followed == [True]
            bench.peer.acks = False
            bench.peer.refuses = None
            await until(lambda: not bench.peer.connections[-1].over and bench.peer.connections[-1].events)
            assert bench.control.stale
            await bench.peer.connections[-1].send(SYNC_ACK)
            await until(lambda: bench.host.followed == [True, False])
        assert not bench.control.stale
        told = [entry["event"] for entry in logs if entry["event"] in {"control_plane_stale", "control_plane_back"}]
        assert told == ["control_plane_stale", "control_plane_back"]

    on_bench(tmp_path, work, max_stale=0.1, stale_action="block_all")


def test_with_keep_it_is_only_said(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.refuses = (grpc.StatusCode.UNAVAILABLE, "down")
        with capture_logs() as logs:
            bench.start()
            await until(lambda: any(entry["event"] == "control_plane_stale" for entry in logs))
        assert not bench.control.stale
        assert bench.host.followed == []

    on_bench(tmp_path, work, start=False, max_stale=0.1, stale_action="keep")


@pytest.mark.parametrize(
    ("away_s", "action", "stale"),
    [(None, "block_all", False), (5.0, "block_all", False), (11.0, "block_all", True), (11.0, "keep", False)],
    ids=["never-here", "short", "long", "long-keep"],
)
def test_a_restart_does_not_begin_to_count_anew(tmp_path: Path, away_s: float | None, action: str, stale: bool) -> None:
    async def work(bench: Bench) -> None:
        bench.control.introduce("daemon", away_s)
        assert bench.control.stale is stale
        bench.start()
        await bench.connected()
        await until(lambda: not bench.control.stale)
        if stale:
            await until(lambda: bench.host.followed)
        assert bench.host.followed == [False] * stale  # what was restored asked for itself

    on_bench(tmp_path, work, start=False, max_stale=10.0, stale_action=action)


def test_what_is_left_of_the_time_is_counted_over_a_restart(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.refuses = (grpc.StatusCode.UNAVAILABLE, "down")
        bench.control.introduce("daemon", 9.9)
        assert not bench.control.stale
        bench.start()
        await until(lambda: bench.host.followed == [True], 1.0)

    on_bench(tmp_path, work, start=False, max_stale=10.0, stale_action="block_all")


def test_attachments_that_could_not_be_blocked_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact_module, "FOLLOW_AGAIN_S", 0.01)

    async def work(bench: Bench) -> None:
        bench.peer.refuses = (grpc.StatusCode.UNAVAILABLE, "down")
        bench.host.follow_failures = 3
        bench.control.introduce("daemon", 9.97)
        with capture_logs() as logs:
            bench.start()
            await until(lambda: bench.host.followed)
        assert bench.host.followed == [True]
        assert [entry["event"] for entry in logs].count("staleness_not_followed") == 3

    on_bench(tmp_path, work, start=False, max_stale=10.0, stale_action="block_all")


@pytest.mark.parametrize("failure", [NetfenceError("disk full"), OSError(5, "input/output error")], ids=["ours", "any"])
def test_the_contact_is_stored_while_it_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    monkeypatch.setattr(contact_module, "STORE_S", 0.01)
    monkeypatch.setattr(contact_module, "STORE_LEAST_S", 0.01)

    async def work(bench: Bench) -> None:
        bench.peer.acks = False
        bench.start()
        connection = await bench.peer.connection()
        await asyncio.sleep(0.05)
        assert bench.host.contacts == 0
        await connection.send(SYNC_ACK)
        await until(lambda: bench.host.contacts >= 2)
        bench.host.contact_failure = failure
        with capture_logs() as logs:
            await until(lambda: logs)
        assert logs[0]["event"] == "contact_not_stored"
        bench.host.contact_failure = None
        count = bench.host.contacts
        await until(lambda: bench.host.contacts > count)

    on_bench(tmp_path, work, start=False, max_stale=100.0)
