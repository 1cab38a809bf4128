"""One stream against a real server: what is said first, why it ends, and peers that misbehave."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import grpc.aio
import pytest
from structlog.testing import capture_logs
from tests.unit.control.peer import SYNC_ACK, ControlCommand, DaemonEvent, Peer, serving, set_mode, until, view_of

from netfence.control import outbox as outbox_module
from netfence.control import stream as module
from netfence.control.channel import make_channel
from netfence.control.credentials import Secrets
from netfence.control.events import sync_event
from netfence.control.outbox import Heartbeat, Outbox, Result
from netfence.control.peek import Head
from netfence.control.port import UnsubscribeReason
from netfence.control.stream import EndedError, Stream

SIZE = 64 << 10


class Owner:
    """Keeps the commands; `gate` closed has no room for them."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self.commands: list[tuple[Head, bytes]] = []
        self.syncs = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None

    def sync_message(self) -> DaemonEvent:
        self.outbox.begin(())
        return sync_event("daemon", "host", {}, [view_of("a")])

    def synced(self) -> None:
        self.syncs += 1

    async def take(self, head: Head, data: bytes) -> None:
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.commands.append((head, data))


class Bench:
    """A control plane, and a stream to it that is not begun."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.outbox = Outbox()
        self.owner = Owner(self.outbox)
        self.running: asyncio.Task[None] | None = None
        self.make(peer.address)

    def make(self, address: str) -> None:
        """Make the stream to an address."""
        self.channel = make_channel(address, Secrets(), max_message_size=SIZE)
        self.stream = Stream(self.channel, (("authorization", "Bearer t"),), self.owner, self.outbox)

    def run(self) -> asyncio.Task[None]:
        self.running = asyncio.create_task(self.stream.run())
        return self.running

    async def ended(self) -> EndedError:
        """Wait for the end and return the reason."""
        with pytest.raises(EndedError) as raised:
            await asyncio.wait_for(self.running or self.run(), 5)
        return raised.value


def on_bench(directory: Path, work: Callable[[Bench], Awaitable[None]]) -> None:
    async def test() -> None:
        async with AsyncExitStack() as stack:
            bench = Bench(await stack.enter_async_context(serving(directory)))
            before = asyncio.all_tasks()
            try:
                await work(bench)
            finally:
                if bench.running is not None:
                    bench.running.cancel()
                    await asyncio.gather(bench.running, return_exceptions=True)
                await bench.channel.close()
            left = [task.get_name() for task in asyncio.all_tasks() - before if task.get_name().startswith("stream ")]
            assert left == []

    asyncio.run(asyncio.wait_for(test(), 20))


def test_the_sync_request_is_first_and_events_follow_without_waiting_for_the_ack(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.acks = False
        bench.outbox.subscribed(view_of("b"))
        bench.outbox.heartbeat(Heartbeat(()))
        bench.run()
        connection = await bench.peer.connection()
        await connection.first("heartbeat")
        assert connection.kinds() == ["sync", "subscribed", "heartbeat"]
        assert connection.events[0].sync.attachments[0].id == "a"
        assert connection.metadata["authorization"] == "Bearer t"
        assert not bench.stream.synced
        assert bench.owner.syncs == 0
        await connection.send(SYNC_ACK)
        await until(lambda: bench.stream.synced)
        assert bench.owner.syncs == 1
        await asyncio.wait_for(bench.outbox.emptied(), 1)

    on_bench(tmp_path, work)


def test_commands_go_to_the_owner_before_the_ack_too(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.acks = False
        bench.run()
        connection = await bench.peer.connection()
        empty = ControlCommand(id="x")
        await connection.send(set_mode("a"), empty, SYNC_ACK, set_mode("b"))
        await until(lambda: len(bench.owner.commands) == 3)
        sent = (set_mode("a"), empty, set_mode("b"))
        heads = [Head("a", "", "", "set_mode"), Head("x", "", "", ""), Head("b", "", "", "set_mode")]
        assert bench.owner.commands == [(head, one.SerializeToString()) for head, one in zip(heads, sent, strict=True)]

    on_bench(tmp_path, work)


def test_a_second_sync_ack_is_ignored(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.run()
        connection = await bench.peer.connection()
        await until(lambda: bench.stream.synced)
        with capture_logs() as logs:
            await connection.send(SYNC_ACK, set_mode("a"))
            await until(lambda: bench.owner.commands)
        assert bench.owner.syncs == 1
        assert [entry["event"] for entry in logs] == ["second_sync_ack"]
        assert not bench.running or not bench.running.done()

    on_bench(tmp_path, work)


def test_without_a_sync_ack_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SYNC_ACK_S", 0.05)

    async def work(bench: Bench) -> None:
        bench.peer.acks = False
        assert "no SyncAck within 0.05 s" in str(await bench.ended())

    on_bench(tmp_path, work)


def test_with_a_sync_ack_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SYNC_ACK_S", 0.2)

    async def work(bench: Bench) -> None:
        bench.run()
        await until(lambda: bench.stream.synced)
        began = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() > began + 0.3)
        assert bench.running is not None
        assert not bench.running.done()

    on_bench(tmp_path, work)


def test_bytes_that_are_no_command_end_it(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.run()
        connection = await bench.peer.connection()
        await connection.send(set_mode("a"), b"\xff\xff\xff", set_mode("b"))
        assert "3 bytes that are no ControlCommand" in str(await bench.ended())
        assert [one.id for one, _ in bench.owner.commands] == ["a"]

    on_bench(tmp_path, work)


@pytest.mark.parametrize("synced", [False, True], ids=["before-the-ack", "after-it"])
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.OK, "it ended the stream"),
        (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED: because"),
        (grpc.StatusCode.CANCELLED, "CANCELLED: because"),
        (grpc.StatusCode.INTERNAL, "INTERNAL: because"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_status_is_the_reason(tmp_path: Path, code: grpc.StatusCode, expected: str, synced: bool) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.acks = synced
        bench.run()
        connection = await bench.peer.connection()
        if synced:
            await until(lambda: bench.stream.synced)
        connection.end(code, "because")
        error = await bench.ended()
        assert str(error) == expected
        assert not error.too_large
        assert bench.stream.synced is synced

    on_bench(tmp_path, work)


def test_a_server_that_does_not_know_the_method(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.refuses = (grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        assert str(await bench.ended()) == "UNIMPLEMENTED: Method not found!"

    on_bench(tmp_path, work)


def test_a_message_too_large_is_told_as_such(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.run()
        connection = await bench.peer.connection()
        await connection.send(bytes(SIZE + 1))
        error = await bench.ended()
        assert error.too_large
        assert "larger than max" in str(error)

    on_bench(tmp_path, work)


def test_a_full_server_is_not_taken_for_a_large_message(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.refuses = (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many daemons")
        error = await bench.ended()
        assert (str(error), error.too_large) == ("RESOURCE_EXHAUSTED: too many daemons", False)

    on_bench(tmp_path, work)


def test_a_refused_connection_is_told_at_once_with_its_reason(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.make(f"unix:{tmp_path}/nobody")
        began = asyncio.get_running_loop().time()
        assert "cannot connect" in str(await bench.ended())
        assert asyncio.get_running_loop().time() - began < module.CONNECT_S / 2

    on_bench(tmp_path, work)


def test_who_accepts_and_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_S", 0.05)

    async def work(bench: Bench) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            bench.make(f"127.0.0.1:{listener.getsockname()[1]}")
            assert "no connection within 0.05 s" in str(await bench.ended())

    on_bench(tmp_path, work)


def test_closing_ends_it_without_a_reason_and_the_peer_hears_it(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        running = bench.run()
        connection = await bench.peer.connection()
        await until(lambda: bench.stream.synced)
        await asyncio.sleep(0)
        bench.stream.close()
        await asyncio.wait_for(running, 2)
        await until(lambda: connection.over)

    on_bench(tmp_path, work)


def test_cancelling_ends_it_too(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        running = bench.run()
        connection = await bench.peer.connection()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, 2)
        await until(lambda: connection.over)

    on_bench(tmp_path, work)


def test_a_defect_of_ours_is_not_blamed_on_the_peer(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.owner.failure = RuntimeError("a defect")
        running = bench.run()
        await (await bench.peer.connection()).send(set_mode("a"))
        with pytest.raises(RuntimeError, match="a defect"):
            await asyncio.wait_for(running, 2)

    on_bench(tmp_path, work)


def test_commands_are_left_unread_while_the_owner_has_no_room(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.owner.gate.clear()
        bench.run()
        connection = await bench.peer.connection()
        sent: list[int] = []
        filling = asyncio.create_task(flood(connection.send, sent))
        await stalls(lambda: len(sent))
        assert not filling.done()
        bench.owner.gate.set()
        await asyncio.wait_for(filling, 10)
        await until(lambda: len(bench.owner.commands) == FLOOD)

    on_bench(tmp_path, work)


FLOOD = 400  # commands of 50 kB: more than sockets and HTTP/2 windows hold


async def flood(send: Callable[[ControlCommand], Awaitable[None]], sent: list[int]) -> None:
    """Send many large commands."""
    for number in range(FLOOD):
        await send(ControlCommand(id="a" * 50_000, nonce=str(number)))
        sent.append(number)


async def stalls(count: Callable[[], int]) -> None:
    """Wait until a number is not 0 and stays the same for a while."""
    last, since = -1, 0.0
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(5):
        while last <= 0 or loop.time() - since < 0.1:
            if count() != last:
                last, since = count(), loop.time()
            await asyncio.sleep(0.005)


def test_a_peer_that_does_not_read_gets_no_more_of_its_commands_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-closed: it sends and reads nothing, so the results fill every buffer on the way, and then ours."""
    monkeypatch.setattr(outbox_module, "MAX_RESULTS", 20)

    async def work(bench: Bench) -> None:
        take = bench.owner.take

        async def answer(head: Head, data: bytes) -> None:
            await bench.outbox.room()  # as `Commands` does
            await take(head, data)
            bench.outbox.result(Result(head.nonce, "a", "v" * 50_000, ok=True))

        bench.owner.take = answer  # type: ignore[method-assign]
        bench.peer.reads = False
        bench.run()
        connection = await bench.peer.connection()
        await until(lambda: bench.stream.synced)
        sending = asyncio.create_task(flood(connection.send, []))
        await stalls(lambda: len(bench.owner.commands))
        assert len(bench.outbox) == 20
        assert len(bench.owner.commands) < FLOOD
        reading = asyncio.create_task(connection.read_all())
        await asyncio.wait_for(sending, 10)
        await connection.first("command_result", FLOOD)
        assert len(bench.owner.commands) == FLOOD
        reading.cancel()

    on_bench(tmp_path, work)


def test_events_keep_flowing_for_as_long_as_it_stands(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.run()
        connection = await bench.peer.connection()
        for number in range(20):
            bench.outbox.unsubscribed(str(number), UnsubscribeReason.DETACHED, "")
            await connection.first("unsubscribed", number + 1)
        assert [one.id for one in connection.all("unsubscribed")] == [str(number) for number in range(20)]

    on_bench(tmp_path, work)


def test_a_command_of_which_only_the_head_can_be_read_is_the_owners(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.run()
        connection = await bench.peer.connection()
        odd = ControlCommand(id="a", nonce="n").SerializeToString() + b"\x1a\x01\xff"
        await connection.send(odd, set_mode("a"))
        await until(lambda: len(bench.owner.commands) == 2)
        assert bench.owner.commands[0] == (Head("a", "n", "", "set_mode"), odd)

    on_bench(tmp_path, work)


def test_a_peer_that_takes_nothing_for_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITE_S", 0.2)

    async def work(bench: Bench) -> None:
        bench.peer.reads = False
        bench.run()
        await bench.peer.connection()
        await until(lambda: bench.stream.synced)
        for number in range(400):  # more than what is between us
            bench.outbox.unsubscribed(str(number), UnsubscribeReason.ERROR, "e" * 50_000)
        assert "it has taken nothing of what we write for 0.2 s" in str(await bench.ended())
        assert len(bench.outbox) > 10

    on_bench(tmp_path, work)


def test_why_a_connection_failed_is_asked_for_with_a_call_that_does_nothing(tmp_path: Path) -> None:
    """The channel may have come up meanwhile: a Connect would be a second stream of this daemon."""

    async def work(bench: Bench) -> None:
        with pytest.raises(EndedError, match="cannot connect"):
            await bench.stream._tell_why_not()
        assert bench.peer.called == ["/grpc.health.v1.Health/Check"]

    on_bench(tmp_path, work)


def test_finished_it_has_been_read_to_its_end(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await asyncio.wait_for(bench.stream.finish(), 1)  # nothing was begun
        bench.run()
        connection = await bench.peer.connection()
        for number in range(200):
            bench.outbox.unsubscribed(str(number), UnsubscribeReason.ERROR, "e" * 10_000)
        await asyncio.wait_for(bench.outbox.emptied(), 5)
        await asyncio.wait_for(bench.stream.finish(), 5)
        assert len(connection.all("unsubscribed")) == 200
        assert connection.over
        assert str(await bench.ended()) == "it ended the stream"
        await asyncio.wait_for(bench.stream.finish(), 1)  # it is over

    on_bench(tmp_path, work)


def test_finishing_waits_for_the_peer(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.peer.reads = False
        bench.run()
        connection = await bench.peer.connection()
        await until(lambda: bench.stream.synced)
        finishing = asyncio.create_task(bench.stream.finish())
        reading = asyncio.create_task(connection.read_all())
        await asyncio.wait_for(reading, 5)  # to the end of what we say
        assert not finishing.done()
        connection.end()
        await asyncio.wait_for(finishing, 5)

    on_bench(tmp_path, work)
