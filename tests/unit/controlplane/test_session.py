"""A stream that has been taken over: nothing of it counts any more. Its moments are too short to meet from outside."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
from tests.unit.controlplane.fake_daemon import until
from tests.unit.controlplane.harness import OPEN, SHUT, run

from netfence.controlplane import Limits, State
from netfence.controlplane import session as session_module
from netfence.controlplane.book import Book
from netfence.controlplane.entry import Entry
from netfence.controlplane.limits import LAST_WRITE_S
from netfence.controlplane.session import Session
from netfence.controlplane.views import daemon_of
from netfence.errors import InvalidError
from netfence.v1 import control_pb2


class Context:
    """A stream without gRPC: `events` are read, commands are kept in `written`."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.written: list[control_pb2.ControlCommand] = []
        self.may_write = asyncio.Event()
        self.may_write.set()

    async def read(self) -> Any:
        return await self.events.get()

    async def write(self, data: bytes) -> None:
        await self.may_write.wait()
        self.written.append(control_pb2.ControlCommand.FromString(data))


SYNC = control_pb2.SyncRequest(
    daemon_id="d", capabilities=["nonce"], attachments=[control_pb2.Attachment(id=name) for name in "ab"]
)


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def decide(book: Book, policy: Any) -> None:
    for entry in book.entries():
        entry.asked += 1
        entry.decide(policy, entry.asked)
        assert entry.record.link is not None
        entry.record.link.offer(entry)


def test_taken_over_stream_neither_sends_nor_counts() -> None:
    async def test() -> None:
        asked: list[Entry] = []
        book = Book(asked.append, Limits())
        contexts = [Context(), Context()]
        sessions = [Session(context, book, Limits(), asyncio.Semaphore(1)) for context in contexts]
        daemon = daemon_of(SYNC, "test")
        old = asyncio.ensure_future(sessions[0].run(daemon, SYNC))
        await turns()
        contexts[0].may_write.clear()
        decide(book, OPEN)
        await turns()  # the writer is in the middle of `a`, and `b` is next
        new = asyncio.ensure_future(sessions[1].run(daemon, SYNC))
        # Before the old stream notices: its write is done, and its daemon says things.
        contexts[0].may_write.set()
        gone = control_pb2.DaemonEvent(unsubscribed=control_pb2.Unsubscribed(id="a"))
        result = control_pb2.CommandResult(nonce="1", id="a", ok=False)
        contexts[0].events.put_nowait(gone.SerializeToString())
        contexts[0].events.put_nowait(control_pb2.DaemonEvent(command_result=result).SerializeToString())
        await turns()
        ended = await old
        assert ended is not None
        assert ended.code == "ABORTED"
        assert [command.id for command in contexts[0].written] == ["", "a"]
        assert [entry.attachment.id for entry in book.entries()] == ["a", "b"]
        decide(book, SHUT)
        await turns()
        assert [command.id for command in contexts[1].written] == ["", "a", "b"]
        for command in contexts[1].written[1:]:
            answer = control_pb2.CommandResult(nonce=command.nonce, id=command.id, ok=True, policy_hash=SHUT.hash)
            contexts[1].events.put_nowait(control_pb2.DaemonEvent(command_result=answer).SerializeToString())
        contexts[1].events.put_nowait(grpc.aio.EOF)
        assert await new is None
        assert [entry.policy_hash for entry in book.entries()] == [SHUT.hash] * 2
        assert {entry.status().state for entry in book.entries()} == {State.DISCONNECTED}

    run(test())


@pytest.mark.parametrize("how", ["by us", "by the daemon", "by its mistake"])
def test_stream_ends_behind_the_write_that_is_under_way(how: str) -> None:
    """A status that is sent while a write is under way is lost by gRPC, and the daemon would sit on a dead stream."""

    async def test() -> None:
        book = Book(lambda _: None, Limits())
        context = Context()
        session = Session(context, book, Limits(), asyncio.Semaphore(1))
        stream = asyncio.ensure_future(session.run(daemon_of(SYNC, "test"), SYNC))
        await turns()
        context.may_write.clear()
        decide(book, OPEN)
        await turns()  # the writer is in the middle of `a`, and `b` is next
        if how == "by us":
            session.end("UNAVAILABLE", "so says the test")
        elif how == "by the daemon":
            context.events.put_nowait(grpc.aio.EOF)
        else:
            context.events.put_nowait(control_pb2.DaemonEvent(sync=SYNC).SerializeToString())
        await turns()
        assert not stream.done()
        context.may_write.set()
        await asyncio.wait({stream}, timeout=LAST_WRITE_S / 2)
        assert stream.done()
        assert [command.id for command in context.written] == ["", "a"]
        assert isinstance(stream.exception(), InvalidError if how == "by its mistake" else type(None))

    run(test())


def test_stream_ends_though_its_daemon_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "LAST_WRITE_S", 0.05)

    async def test() -> None:
        book = Book(lambda _: None, Limits())
        context = Context()
        context.may_write.clear()
        session = Session(context, book, Limits(), asyncio.Semaphore(1))
        stream = asyncio.ensure_future(session.run(daemon_of(SYNC, "test"), SYNC))
        await turns()
        session.end("DEADLINE_EXCEEDED", "so says the test")
        ended = await asyncio.wait_for(stream, 5.0)
        assert ended is not None
        assert ended.code == "DEADLINE_EXCEEDED"

    run(test())


def test_arrival_that_fails_leaves_no_link() -> None:
    """Or its daemon would be shown as connected for ever, by a stream that is dead."""

    def defect(_: Entry) -> None:
        raise KeyError("defect")

    async def test() -> None:
        book = Book(defect, Limits())
        with pytest.raises(KeyError):
            await Session(Context(), book, Limits(), asyncio.Semaphore(1)).run(daemon_of(SYNC, "test"), SYNC)
        assert [record.link for record in book.records()] == [None]

    run(test())


def test_daemons_that_do_not_read_hold_no_place_of_large_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "LARGE_BYTES", 0)
    monkeypatch.setattr(session_module, "LARGE_HOLD_S", 0.02)

    async def test() -> None:
        asked: list[Entry] = []
        book = Book(asked.append, Limits())
        large = asyncio.Semaphore(1)
        contexts = [Context(), Context()]
        streams = []
        for number, context in enumerate(contexts):
            sync = control_pb2.SyncRequest(
                daemon_id=str(number), capabilities=["nonce"], attachments=[control_pb2.Attachment(id="a")]
            )
            session = Session(context, book, Limits(), large)
            streams.append(asyncio.ensure_future(session.run(daemon_of(sync, "test"), sync)))
            await turns()
        contexts[0].may_write.clear()
        decide(book, OPEN)
        await until(lambda: len(contexts[1].written) == 2)
        assert len(contexts[0].written) == 1
        contexts[0].may_write.set()
        await until(lambda: len(contexts[0].written) == 2)
        contexts[0].may_write.clear()
        decide(book, SHUT)
        await turns()
        for stream in streams:  # also in the middle of a write
            stream.cancel()
        await asyncio.wait(streams)
        assert not large.locked()
        await turns()
        assert not [task for task in asyncio.all_tasks() if "write" in task.get_name()]

    run(test())
