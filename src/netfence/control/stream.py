"""One connection to a control plane, from its SyncRequest to its end (wire.md, "Behaviour of the stream").

Owns reading and writing, the SyncAck that is waited for, and why it ended. What waits to be told is `outbox`'s, what
commands do is the owner's (`StreamOwner`); which control plane is asked and when again is `remote`'s.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, Protocol

import grpc
import grpc.aio
import structlog

from netfence.control.events import event_message
from netfence.control.outbox import Outbox
from netfence.control.peek import Head, head_of
from netfence.v1 import control_pb2

CONNECT_S: Final = 5.0
"""How long a connection may take to be made, name resolution and TLS included, before the next endpoint is tried."""

SYNC_ACK_S: Final = 20.0
"""How long a control plane may take to acknowledge a SyncRequest: after its restart a thousand daemons send one."""

WRITE_S: Final = 60.0
"""How long one event may wait for a peer that does not read: it is of no use to us, and we count it as away."""

CONNECT: Final = "/netfence.v1.ControlPlane/Connect"
HEALTH: Final = "/grpc.health.v1.Health/Check"

Metadata = tuple[tuple[str, str], ...]

log = structlog.get_logger(__name__)


class EndedError(Exception):
    """The stream is over; the text says why. `too_large`: a message was; trying again soon would not help."""

    def __init__(self, why: str, *, too_large: bool = False) -> None:
        super().__init__(why)
        self.too_large = too_large


class StreamOwner(Protocol):
    """Whose stream it is."""

    def sync_message(self) -> control_pb2.DaemonEvent:
        """Return the SyncRequest of this moment, and let events follow that are not in it."""
        ...

    def synced(self) -> None:
        """Note that the control plane has acknowledged the SyncRequest."""
        ...

    async def take(self, head: Head, data: bytes) -> None:
        """Take a command that came as `data`; may wait while there is no room for it."""
        ...


class Stream:
    """See the module. `run` it once."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Metadata, owner: StreamOwner, outbox: Outbox) -> None:
        self._channel, self._metadata, self._owner, self._outbox = channel, metadata, owner, outbox
        self._call: Any = None
        self._synced = asyncio.Event()
        self._closing, self._ended = asyncio.Event(), asyncio.Event()

    @property
    def synced(self) -> bool:
        """Tell whether the SyncAck came."""
        return self._synced.is_set()

    def close(self) -> None:
        """End it from our side; `run` returns."""
        self._closing.set()

    async def finish(self) -> None:
        """Say that nothing more is written and wait until the peer, having read it all, ends the stream."""
        if self._call is not None and not self._ended.is_set():
            await self._call.done_writing()
            await self._ended.wait()

    async def run(self) -> None:
        """Connect, sync, and serve until it ends. Raises EndedError with the reason; returns after `close`."""
        await self._connected()
        connect = self._channel.stream_stream(
            CONNECT, request_serializer=control_pb2.DaemonEvent.SerializeToString, response_deserializer=None
        )
        self._call = connect(metadata=self._metadata)
        parts = {
            asyncio.create_task(part, name=f"stream {name}")
            for name, part in {
                "read": self._read(),
                "write": self._write(),
                "sync": self._await_sync(),
                "close": self._closing.wait(),
            }.items()
        }
        try:
            done: set[asyncio.Task[Any]] = set()
            while not done:
                done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
                done = {part for part in done if part.get_name() != "stream sync" or part.exception() is not None}
                parts -= {part for part in parts if part.done()} - done
            await self._end(done)
        finally:
            self._call.cancel()
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            self._ended.set()
            self._call = None  # it holds the connection, and our exceptions hold us until they are collected

    async def _connected(self) -> None:
        """Wait until the channel stands; EndedError as soon as it cannot."""
        state = self._channel.get_state(try_to_connect=True)
        try:
            async with asyncio.timeout(CONNECT_S):
                while state is not grpc.ChannelConnectivity.READY:
                    if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                        await self._tell_why_not()
                    await self._channel.wait_for_state_change(state)
                    state = self._channel.get_state(try_to_connect=True)
        except TimeoutError:
            raise EndedError(f"no connection within {CONNECT_S:g} s") from None

    async def _tell_why_not(self) -> None:
        """Raise the reason why the channel failed: a call on it hears it at once.

        A harmless call: the channel may have come up meanwhile.
        """
        probe = self._channel.unary_unary(HEALTH, request_serializer=None, response_deserializer=None)
        try:
            await probe(b"", timeout=1.0)
        except grpc.aio.AioRpcError as error:
            raise EndedError(f"cannot connect: {error.details()}") from None
        raise EndedError("cannot connect")

    async def _write(self) -> None:
        await self._write_one(self._owner.sync_message())
        while True:
            event = await self._outbox.take()
            await self._write_one(event_message(event))
            self._outbox.written()

    async def _write_one(self, message: control_pb2.DaemonEvent) -> None:
        """Write one event; EndedError when the peer does not take it: keepalive would not notice."""
        try:
            async with asyncio.timeout(WRITE_S):
                await self._call.write(message)
        except TimeoutError:
            raise EndedError(f"it has taken nothing of what we write for {WRITE_S:g} s") from None

    async def _read(self) -> None:
        while True:
            data = await self._call.read()
            if data is grpc.aio.EOF:
                return
            try:
                head = head_of(data)
            except ValueError:
                # A command that we cannot read may be a denial: everything is compared anew on the next stream.
                raise EndedError(f"it sent {len(data)} bytes that are no ControlCommand") from None
            if head.kind == "sync_ack":
                self._note_sync()
            else:
                await self._owner.take(head, data)

    def _note_sync(self) -> None:
        if self.synced:
            log.warning("second_sync_ack", effect="ignored")
            return
        self._synced.set()
        self._owner.synced()

    async def _await_sync(self) -> None:
        try:
            async with asyncio.timeout(SYNC_ACK_S):
                await self._synced.wait()
        except TimeoutError:
            raise EndedError(f"no SyncAck within {SYNC_ACK_S:g} s") from None

    async def _end(self, done: set[asyncio.Task[Any]]) -> None:
        """Raise why it ended; of several reasons the one that says most."""
        if self._closing.is_set():
            return
        failures = [failure for part in done if (failure := part.exception()) is not None]
        for failure in failures:
            if isinstance(failure, EndedError):
                raise failure
            if not isinstance(failure, grpc.aio.AioRpcError | asyncio.InvalidStateError | grpc.aio.UsageError):
                raise failure
        raise await self._status()

    async def _status(self) -> EndedError:
        """Return the status that the call ended with, as our reason."""
        try:
            async with asyncio.timeout(1.0):
                code, details = await self._call.code(), await self._call.details()
        except TimeoutError:
            return EndedError("it does not take what we write")
        except asyncio.CancelledError:
            if not self._call.cancelled():
                raise
            return EndedError("cancelled")
        if code is grpc.StatusCode.OK:
            return EndedError("it ended the stream")
        too_large = code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (details or "")
        return EndedError(f"{code.name}: {details}", too_large=too_large)
