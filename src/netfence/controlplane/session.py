"""One daemon's stream: events in, commands out, each at the daemon's own pace.

Owns the stream, its nonces and its window. What is to be sent is in the entries; the stream keeps only whose turn it
is, so a daemon that reads slowly, or never, costs a line of ids. A stream that is stuck is ended, because the next one
begins with what the daemon really has.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final, NamedTuple

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from netfence.controlplane.book import Book
from netfence.controlplane.entry import Entry, Record
from netfence.controlplane.hush import Hush
from netfence.controlplane.limits import (
    BURST_S,
    EVENT_BYTES,
    FIRST_EVENT_S,
    LARGE_BYTES,
    LARGE_HOLD_S,
    LAST_WRITE_S,
    OLDEST_RESULT,
    Limits,
)
from netfence.controlplane.views import Daemon, daemon_of
from netfence.errors import DeadlineError, InvalidError, NetfenceError
from netfence.v1 import control_pb2

SYNC_ACK: Final = control_pb2.ControlCommand(sync_ack=control_pb2.SyncAck()).SerializeToString()

Context = grpc.aio.ServicerContext

hush = Hush(structlog.get_logger(__name__))


class Ended(NamedTuple):
    """The status to end a stream with: a gRPC code's name and the reason."""

    code: str
    why: str


class Session:
    """A stream from its SyncRequest to its end; a `Link` for the book."""

    def __init__(self, context: Any, book: Book, limits: Limits, large: asyncio.Semaphore) -> None:  # noqa: ANN401
        self._context = context
        self._book = book
        self._limits = limits
        self._large = large
        # Whose turn it is to be sent something; first policies before others, because somebody waits for the attach.
        self._first: dict[Entry, None] = {}
        self._ready: dict[Entry, None] = {}
        self._wake = asyncio.Event()
        self._nonces = 0
        self._in_flight: dict[str, tuple[Entry, float]] = {}  # by nonce, the oldest first, with the time of sending
        self._progress = time.monotonic()  # of the last result, or of the first command that awaits one
        self._writing_since: float | None = None
        self._over = False  # nothing more is written
        self._ending: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._budget = limits.events_per_s * BURST_S
        self._budget_at = self._progress

    # -- the book's side -----------------------------------------------------------------------------------------------

    def offer(self, entry: Entry) -> None:
        """Send what is due to an attachment, when its turn comes."""
        if entry.due():
            (self._first if entry.fresh else self._ready)[entry] = None
            self._wake.set()

    def end(self, code: str, why: str) -> None:
        """End the stream with a gRPC status code of that name."""
        if not self._ending.done():
            self._ending.set_result(Ended(code, why))

    def check(self, now: float) -> None:
        """End the stream if its daemon reads nothing or answers nothing for too long."""
        most = self._limits.result_timeout_s
        if self._writing_since is not None and now - self._writing_since > most:
            self.end("DEADLINE_EXCEEDED", f"nothing was read for {most:g} s; connect again")
        elif self._in_flight and now - self._progress > most:
            self.end("DEADLINE_EXCEEDED", f"no result for {len(self._in_flight)} commands in {most:g} s; connect again")
        elif self._in_flight and now - next(iter(self._in_flight.values()))[1] > OLDEST_RESULT * most:
            self.end("DEADLINE_EXCEEDED", f"no result for a command in {OLDEST_RESULT * most:g} s; connect again")

    @property
    def awaited(self) -> int:
        """Number of commands whose results are awaited."""
        return len(self._in_flight)

    # -- the stream's side ---------------------------------------------------------------------------------------------

    async def first_event(self, address: str) -> tuple[Daemon, control_pb2.SyncRequest]:
        """Return who connects. Raises InvalidError for anything but a SyncRequest, DeadlineError for nothing."""
        try:
            async with asyncio.timeout(FIRST_EVENT_S):
                raw = await self._context.read()
        except TimeoutError:
            raise DeadlineError(f"no SyncRequest within {FIRST_EVENT_S:g} s; send it first on every stream") from None
        if raw is grpc.aio.EOF:
            raise InvalidError("the stream ended before its SyncRequest; send it first on every stream")
        event = _event(raw)
        if event.WhichOneof("event") != "sync":
            said = event.WhichOneof("event") or "unknown"
            raise InvalidError(f"the first event is {said}; send SyncRequest first on every stream")
        return daemon_of(event.sync, address), event.sync

    async def run(self, daemon: Daemon, sync: control_pb2.SyncRequest) -> Ended | None:
        """Serve the stream to its end; return the status to end it with, None where the daemon ended it.

        Raises InvalidError and ExhaustedError for what the daemon did wrong.
        """
        tasks: list[asyncio.Task[None]] = []
        try:
            record = self._book.arrive(self, daemon, sync)
            tasks = [
                asyncio.create_task(self._read(record), name=f"read {daemon.id}"),
                asyncio.create_task(self._write(), name=f"write {daemon.id}"),
            ]
            either: list[asyncio.Future[Any]] = [*tasks, self._ending]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            self._over = True
            if self._writing_since is not None:  # gRPC loses a status that is sent while a write is under way
                await asyncio.wait({tasks[-1]}, timeout=LAST_WRITE_S)
        finally:
            for task in tasks:
                task.cancel()
            self._book.leave(daemon.id, self)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, NetfenceError):
                raise outcome
            if isinstance(outcome, Exception) and not _is_loss(outcome):
                raise outcome
        return self._ending.result() if self._ending.done() else None

    async def _read(self, record: Record) -> None:
        """Take events until the daemon ends the stream."""
        read = self._context.read
        while (raw := await read()) is not grpc.aio.EOF:
            await self._within_budget(record, len(raw))
            if record.link is not self:  # a newer stream has taken over, and what this one says is of the past
                return
            record.last_seen = time.time()
            self._take(record, _event(raw))

    def _take(self, record: Record, event: control_pb2.DaemonEvent) -> None:
        match event.WhichOneof("event"):
            case "command_result":
                self._result(record, event.command_result)
            case "heartbeat":
                self._book.heartbeat(record, event.heartbeat)
            case "subscribed":
                self._book.subscribe(record, event.subscribed)
            case "unsubscribed":
                self._book.unsubscribe(record, event.unsubscribed)
                self._in_flight = {nonce: sent for nonce, sent in self._in_flight.items() if not sent[0].gone}
                self._wake.set()
            case "sync":
                raise InvalidError("a second SyncRequest; it opens a stream and is never sent again on it")
            case _:  # a newer daemon's
                hush.info("event_ignored", daemon=record.daemon.id)

    def _result(self, record: Record, result: control_pb2.CommandResult) -> None:
        entry, _ = self._in_flight.get(result.nonce, (None, 0))
        if entry is None or entry.attachment.id != result.id:
            hush.info("result_ignored", daemon=record.daemon.id, attachment=result.id[:80], nonce=result.nonce[:80])
            return
        del self._in_flight[result.nonce]
        self._progress = time.monotonic()
        self._book.changes += 1
        self._wake.set()  # there is room in the window
        if entry.gone:
            return
        odd = entry.answered(ok=result.ok, version=result.version, policy_hash=result.policy_hash, errors=result.errors)
        if odd:
            hush.warning(
                "policy_refused" if not result.ok else "policy_differs",
                daemon=record.daemon.id,
                attachment=entry.attachment.id,
                target=entry.attachment.target,
                error=odd[:1000],
            )
        self.offer(entry)

    async def _write(self) -> None:
        """Send what is due, as far as the window has room."""
        await self._put(SYNC_ACK)
        while not self._over:
            await self._wake.wait()
            self._wake.clear()
            while not self._over and (line := self._line()):
                entry = next(iter(line))
                del line[entry]
                await self._send(entry)

    def _line(self) -> dict[Entry, None]:
        """Return who may be sent something now. The window is not for first policies: each has somebody who waits."""
        window = self._limits.in_flight_per_daemon
        if self._first and len(self._in_flight) < window + self._limits.max_attachments:
            return self._first
        return self._ready if len(self._in_flight) < window else {}

    async def _send(self, entry: Entry) -> None:
        if entry.record.link is not self:  # a newer stream has taken over: its results come there
            return
        nonce = ""
        if entry.record.confirms:
            self._nonces += 1
            nonce = str(self._nonces)
        command = entry.command(nonce)
        if command is None:
            return
        if len(command) < LARGE_BYTES:
            await self._put_command(command, nonce, entry)
        else:
            await self._put_large(command, nonce, entry)

    async def _put_large(self, command: bytes, nonce: str, entry: Entry) -> None:
        """Send among the few that may; one whose daemon does not read goes on without holding a place."""
        async with self._large:
            writing = asyncio.create_task(self._put_command(command, nonce, entry), name="write a large command")
            try:
                await asyncio.wait({writing}, timeout=LARGE_HOLD_S)
            except asyncio.CancelledError:
                writing.cancel()
                raise
        await writing

    async def _put_command(self, command: bytes, nonce: str, entry: Entry) -> None:
        if nonce:
            now = time.monotonic()
            if not self._in_flight:
                self._progress = now
            self._in_flight[nonce] = entry, now
        await self._put(command)

    async def _put(self, command: bytes) -> None:
        self._writing_since = time.monotonic()
        await self._context.write(command)
        self._writing_since = None

    async def _within_budget(self, record: Record, size: int) -> None:
        """Wait where a daemon has sent more than its share; meanwhile gRPC's flow control holds it back."""
        now = time.monotonic()
        rate = self._limits.events_per_s
        self._budget = min(rate * BURST_S, self._budget + (now - self._budget_at) * rate) - 1 - size // EVENT_BYTES
        self._budget_at = now
        if self._budget < 0:
            hush.warning("daemon_floods", daemon=record.daemon.id, effect=f"read at {rate:g} events a second")
            await asyncio.sleep(-self._budget / rate)


def _event(raw: bytes) -> control_pb2.DaemonEvent:
    try:
        return control_pb2.DaemonEvent.FromString(raw)
    except DecodeError:
        raise InvalidError(f"an event of {len(raw)} bytes that is no DaemonEvent") from None


def _is_loss(error: Exception) -> bool:
    """Tell whether this is gRPC's way of saying that the peer is gone, which has no kind of its own."""
    return isinstance(error, grpc.aio.BaseError | grpc.aio.UsageError | asyncio.InvalidStateError)
