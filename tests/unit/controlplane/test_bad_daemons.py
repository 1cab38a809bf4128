"""Daemons that misbehave: turned away or ignored, never a crash, never felt by the others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from tests.unit.controlplane.fake_daemon import Event, FakeDaemon, until
from tests.unit.controlplane.harness import OPEN, SHUT, WEB, Policies, all_are, run, serving

from netfence.controlplane import ControlPlane, Limits, State
from netfence.controlplane import session as session_module
from netfence.v1 import control_pb2

Say = Callable[[FakeDaemon], Awaitable[Any]]


@contextlib.asynccontextmanager
async def unimpressed(limits: Limits | None = None) -> AsyncIterator[ControlPlane]:
    """Serve, with a daemon that behaves; check at the end that it has noticed nothing."""
    policies = Policies(WEB)
    async with serving(policies, limits=limits) as plane, FakeDaemon(plane.address, {"good": {}}) as good:
        await until(lambda: all_are(plane, State.IN_SYNC, 1))
        yield plane
        policies.default = OPEN
        assert (await plane.update("good")).ok
        assert good.applied["good"] == OPEN.rules
        assert good.status is None


async def bad_daemon(plane: ControlPlane) -> FakeDaemon:
    return FakeDaemon(plane.address, {"bad": {}}, daemon_id="bad")


def sync(**fields: Any) -> Event:
    return Event(sync=control_pb2.SyncRequest(**fields))


FIRST = {
    "heartbeat": (Event(heartbeat=control_pb2.Heartbeat()), "INVALID_ARGUMENT", "SyncRequest first"),
    "subscribed": (Event(subscribed=control_pb2.Subscribed(id="x")), "INVALID_ARGUMENT", "SyncRequest first"),
    "nothing": (Event(), "INVALID_ARGUMENT", "SyncRequest first"),
    "no-daemon-id": (sync(), "INVALID_ARGUMENT", "daemon_id"),
    "long-daemon-id": (sync(daemon_id="x" * 129), "INVALID_ARGUMENT", "daemon_id"),
    "empty-attachment-id": (
        sync(daemon_id="bad", attachments=[control_pb2.Attachment()]),
        "INVALID_ARGUMENT",
        "attachment's id",
    ),
    "too-many-attachments": (
        sync(daemon_id="bad", attachments=[control_pb2.Attachment(id=str(number)) for number in range(11)]),
        "RESOURCE_EXHAUSTED",
        "11 attachments",
    ),
}


@pytest.mark.parametrize(("event", "code", "why"), FIRST.values(), ids=FIRST)
def test_bad_first_event_ends_the_stream(event: Event, code: str, why: str) -> None:
    async def test() -> None:
        async with unimpressed(Limits(max_attachments=10)) as plane:
            daemon = await bad_daemon(plane)
            await daemon.connect(sync=False)
            await daemon.send(event)
            await daemon.until(lambda: daemon.status)
            assert daemon.status is not None
            assert daemon.status.name == code
            assert why in daemon.details
            assert [status.daemon.id for status in plane.daemons] == ["daemon-1"]
            await daemon.drop()

    run(test())


def test_stream_without_a_first_event_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "FIRST_EVENT_S", 0.05)

    async def test() -> None:
        async with unimpressed() as plane:
            daemon = await bad_daemon(plane)
            await daemon.connect(sync=False)
            await daemon.until(lambda: daemon.status is grpc.StatusCode.DEADLINE_EXCEEDED)
            await daemon.drop()

    run(test())


def test_stream_that_ends_before_its_first_event() -> None:
    async def test() -> None:
        async with unimpressed() as plane:
            daemon = await bad_daemon(plane)
            await daemon.connect(sync=False)
            await daemon.stream.done_writing()
            await daemon.until(lambda: daemon.status is grpc.StatusCode.INVALID_ARGUMENT)
            await daemon.drop()

    run(test())


def test_half_closed_stream_ends_well() -> None:
    async def test() -> None:
        async with unimpressed() as plane, await bad_daemon(plane) as daemon:
            await daemon.stream.done_writing()
            await daemon.until(lambda: daemon.status is grpc.StatusCode.OK)
            await until(lambda: not plane.daemons[1].connected)

    run(test())


def test_second_sync_request_ends_the_stream() -> None:
    async def test() -> None:
        async with unimpressed() as plane, await bad_daemon(plane) as daemon:
            await daemon.send(Event(sync=daemon.sync_request()))
            await daemon.until(lambda: daemon.status is grpc.StatusCode.INVALID_ARGUMENT)
            assert "second SyncRequest" in daemon.details

    run(test())


async def garbage(daemon: FakeDaemon, data: bytes) -> Any:
    """Send bytes as the first event of a stream, and return the stream."""
    stream = daemon._channel.stream_stream("/netfence.v1.ControlPlane/Connect")()
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await stream.write(data)
    return stream


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff", b"\x0a\x05\x0a", b"\x0a\x03\x0a\x01\xff"], ids=["tag", "cut", "utf-8"]
)
def test_garbage_ends_the_stream(data: bytes) -> None:
    async def test() -> None:
        async with unimpressed() as plane, await bad_daemon(plane) as daemon:
            stream = await garbage(daemon, data)
            assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(test())


def test_garbage_later_ends_the_stream_too() -> None:
    async def test() -> None:
        async with unimpressed() as plane, await bad_daemon(plane) as daemon:
            stream = await garbage(daemon, Event(sync=daemon.sync_request()).SerializeToString())
            assert control_pb2.ControlCommand.FromString(await stream.read()).HasField("sync_ack")
            await stream.write(b"\xff\xff")
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await stream.read() is not grpc.aio.EOF:  # the status comes after what was sent before
                    pass
            assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(test())


def test_huge_message_ends_the_stream() -> None:
    async def test() -> None:
        async with unimpressed(Limits(max_message_bytes=100_000)) as plane, await bad_daemon(plane) as daemon:
            stats = [control_pb2.AttachmentStats(id="x" * 100_000)]
            await daemon.send(Event(heartbeat=control_pb2.Heartbeat(stats=stats)))
            await daemon.until(lambda: daemon.status is grpc.StatusCode.RESOURCE_EXHAUSTED)

    run(test())


IGNORED: dict[str, Event] = {
    "heartbeat of unknown": Event(heartbeat=control_pb2.Heartbeat(stats=[control_pb2.AttachmentStats(id="nobody")])),
    "unsubscribed of unknown": Event(unsubscribed=control_pb2.Unsubscribed(id="nobody")),
    "unsubscribed of another daemon's": Event(unsubscribed=control_pb2.Unsubscribed(id="good")),
    "result of no command": Event(command_result=control_pb2.CommandResult(nonce="77", id="bad", ok=True)),
    "result without nonce": Event(command_result=control_pb2.CommandResult(id="bad")),
    "event of a newer protocol": Event.FromString(b"\xa2\x38\x02ab"),
    "empty event": Event(),
    "subscribed without id": Event(subscribed=control_pb2.Subscribed()),
    "subscribed with a long id": Event(subscribed=control_pb2.Subscribed(id="x" * 300)),
}


@pytest.mark.parametrize("event", IGNORED.values(), ids=IGNORED)
def test_odd_events_are_ignored(event: Event) -> None:
    async def test() -> None:
        async with unimpressed() as plane, await bad_daemon(plane) as daemon:
            await until(lambda: all_are(plane, State.IN_SYNC, 2))
            await daemon.send(event)
            await daemon.heartbeat(bad=1)  # it has been read when this has
            await until(lambda: plane.attachments[1].counters)
            assert daemon.status is None
            assert all_are(plane, State.IN_SYNC, 2)

    run(test())


def test_result_for_another_attachment_is_no_result() -> None:
    async def test() -> None:
        async with unimpressed() as plane:
            daemon = await bad_daemon(plane)
            daemon.answers = False
            async with daemon:
                await daemon.until(lambda: daemon.commands)
                lie = control_pb2.CommandResult(nonce=daemon.commands[0].nonce, id="good", ok=True)
                await daemon.send(Event(command_result=lie))
                await daemon.heartbeat(bad=1)
                await until(lambda: plane.attachments[1].counters)
                assert plane.attachments[1].state is State.PENDING
                await daemon.answer(daemon.commands[0])
                await until(lambda: plane.attachments[1].state is State.IN_SYNC)

    run(test())


def test_too_many_attachments_are_ignored_one_by_one() -> None:
    async def test() -> None:
        async with unimpressed(Limits(max_attachments=3)) as plane, await bad_daemon(plane) as daemon:
            for number in range(10):
                await daemon.attach(f"new-{number}")
            await daemon.heartbeat(bad=1)
            await until(lambda: plane.attachments[1].counters)
            assert plane.daemons[1].attachments == 3
            await daemon.detach("bad")
            await daemon.attach("in-its-place")
            await until(lambda: "in-its-place" in {status.attachment.id for status in plane.attachments})

    run(test())


def test_same_attachment_subscribed_twice_is_answered_twice() -> None:
    async def test() -> None:
        async with unimpressed() as plane, await bad_daemon(plane) as daemon:
            await daemon.attach("twice")
            await daemon.attach("twice")
            await daemon.until(lambda: daemon.kinds("twice").count("subscribed_ack") >= 1)
            await until(lambda: all_are(plane, State.IN_SYNC, 3))
            assert len(await plane.update("twice")) == 1

    run(test())


def test_newest_connection_of_a_daemon_wins() -> None:
    async def test() -> None:
        async with unimpressed() as plane, FakeDaemon(plane.address, {"twin": {}}, daemon_id="twin") as one:
            await until(lambda: all_are(plane, State.IN_SYNC, 2))
            one.answers = False  # a command is under way on the old stream
            policies = plane._policy_for
            assert isinstance(policies, Policies)
            policies.by_id["twin"] = SHUT
            await plane.update("twin", timeout_s=0.01)
            await one.until(lambda: len(one.commands) == 2)
            other = FakeDaemon(plane.address, {"twin": {}}, daemon_id="twin", hostname="host-2")
            async with other:
                await one.until(lambda: one.status is grpc.StatusCode.ABORTED)
                assert "host-2" in one.details
                await until(lambda: all_are(plane, State.IN_SYNC, 2))
                assert plane.daemons[1].daemon.hostname == "host-2"
                assert plane.daemons[1].connected
                assert other.status is None

    run(test())


@pytest.mark.parametrize(("events", "filler"), [(150, 0), (50, 8192)], ids=["many", "large"])
def test_flood_is_read_slowly_and_the_others_do_not_feel_it(
    monkeypatch: pytest.MonkeyPatch, events: int, filler: int
) -> None:
    monkeypatch.setattr(session_module, "BURST_S", 1.0)

    async def test() -> None:
        async with unimpressed(Limits(events_per_s=100)) as plane, await bad_daemon(plane) as daemon:
            loop = asyncio.get_running_loop()
            begun = loop.time()
            for number in range(events):  # a burst of 100 and half a second of more
                await daemon.heartbeat(**{"bad": number, "x" * filler: 0})
            await until(
                lambda: (
                    plane.attachments[1].counters is not None
                    and plane.attachments[1].counters.packets_allowed == events - 1
                )
            )
            assert loop.time() - begun > 0.4
            assert daemon.status is None

    run(test())


def test_one_daemon_more_than_there_may_be() -> None:
    async def test() -> None:
        async with unimpressed(Limits(max_daemons=2)) as plane:
            async with await bad_daemon(plane) as second:
                third = FakeDaemon(plane.address, {}, daemon_id="third")
                async with third:
                    assert third.status is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert second.status is None
            await until(lambda: not plane.daemons[1].connected)
            third = FakeDaemon(plane.address, {}, daemon_id="third")
            async with third:  # takes the place of one that is away
                assert third.synced
                assert [status.daemon.id for status in plane.daemons] == ["daemon-1", "third"]

    run(test())


def test_reconnect_storm() -> None:
    async def test() -> None:
        async with unimpressed() as plane:
            daemon = await bad_daemon(plane)
            for _ in range(30):
                await daemon.connect()
            while not all_are(plane, State.IN_SYNC, 2):
                if daemon.status is not None:  # an older stream came in after the newest: a daemon connects again
                    await daemon.connect()
                await asyncio.sleep(0.01)
            await daemon.drop()
            await until(lambda: not plane.daemons[1].connected)

    run(test())


def test_defect_in_a_stream_is_logged_and_ends_that_stream_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object) -> None:
        raise KeyError("defect")

    async def test() -> None:
        async with unimpressed() as plane, await bad_daemon(plane) as daemon:
            with monkeypatch.context() as patched:
                patched.setattr("netfence.controlplane.book.Book.heartbeat", defect)
                await daemon.heartbeat(bad=1)
                await daemon.until(lambda: daemon.status is grpc.StatusCode.INTERNAL)

    run(test())
