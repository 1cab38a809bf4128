"""A control plane that does what a test tells it, and a daemon's side that records: `remote` is tested between them.

A `Peer` is a real gRPC server; every stream that a daemon opens is a `Connection`, which keeps the daemon's events and
sends what the test wants, good or bad: raw bytes too.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from netfence.control.port import AttachmentView, StatsView
from netfence.errors import NetfenceError, NotFoundError
from netfence.policy.commands import Command, apply
from netfence.policy.policy import EMPTY, Policy
from netfence.v1 import control_pb2, types_pb2

ControlCommand = control_pb2.ControlCommand
DaemonEvent = control_pb2.DaemonEvent

DISABLED, ALLOWLIST, BLOCK_ALL, DENYLIST = (
    types_pb2.POLICY_MODE_DISABLED,
    types_pb2.POLICY_MODE_ALLOWLIST,
    types_pb2.POLICY_MODE_BLOCK_ALL,
    types_pb2.POLICY_MODE_DENYLIST,
)
SYNC_ACK = ControlCommand(sync_ack=control_pb2.SyncAck())


def ack(attachment_id: str, mode: types_pb2.PolicyMode = DENYLIST, *cidrs: str, version: str = "v1") -> ControlCommand:
    """Return a SubscribedAck with a nonce of its own."""
    entries = [control_pb2.CIDREntry(cidr=cidr) for cidr in cidrs]
    policy = control_pb2.SubscribedAck(mode=mode, allow_cidrs=entries)
    return ControlCommand(id=attachment_id, subscribed_ack=policy, version=version, nonce=f"ack {version}")


def set_mode(attachment_id: str, mode: types_pb2.PolicyMode = DISABLED, version: str = "") -> ControlCommand:
    """Return a SetMode; its nonce is its version."""
    return ControlCommand(id=attachment_id, set_mode=control_pb2.SetMode(mode=mode), version=version, nonce=version)


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.001)


class Connection:
    """One stream of a daemon, seen from the control plane."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._ended: asyncio.Future[tuple[grpc.StatusCode, str]] = asyncio.get_running_loop().create_future()
        self.events: list[DaemonEvent] = []
        self.metadata = {item.key: item.value for item in context.invocation_metadata()}
        self.over = False
        self._sending = asyncio.Lock()  # gRPC takes one write at a time

    async def send(self, *commands: ControlCommand | bytes) -> None:
        """Send commands, or bytes that are none, one after the other."""
        async with self._sending:
            for command in commands:
                await self._context.write(command if isinstance(command, bytes) else command.SerializeToString())

    def end(self, code: grpc.StatusCode = grpc.StatusCode.OK, details: str = "") -> None:
        """End the stream with a status."""
        if not self._ended.done():
            self._ended.set_result((code, details))

    def kinds(self) -> list[str]:
        """Return the kinds of the events that came, in order."""
        return [str(event.WhichOneof("event")) for event in self.events]

    def all(self, kind: str) -> list[Any]:
        """Return the events of one kind that came."""
        return [getattr(event, kind) for event in self.events if event.WhichOneof("event") == kind]

    async def first(self, kind: str, count: int = 1) -> Any:
        """Wait for the event of a kind, or the `count`th of them."""
        await until(lambda: len(self.all(kind)) >= count)
        return self.all(kind)[count - 1]

    async def result(self, nonce: str) -> Any:
        """Wait for the result of the command with this nonce."""
        await until(lambda: any(one.nonce == nonce for one in self.all("command_result")))
        return next(one for one in self.all("command_result") if one.nonce == nonce)

    async def read_all(self) -> None:
        """Read until the daemon says no more."""
        while (data := await self._context.read()) is not grpc.aio.EOF:
            self.events.append(DaemonEvent.FromString(data))

    async def serve(self, *, acks: bool, reads: bool) -> None:
        """Acknowledge the SyncRequest, then read, until the test or the daemon ends the stream."""
        reading = asyncio.create_task(self.read_all() if reads else self._context.read())
        try:
            if acks:
                await until(lambda: self.events or not reads)
                await self.send(SYNC_ACK)
            await asyncio.wait({self._ended, reading} if reads else {self._ended}, return_when=asyncio.FIRST_COMPLETED)
            async with self._sending:  # gRPC loses a status that is sent while a write is under way
                if self._ended.done() and (status := self._ended.result())[0] is not grpc.StatusCode.OK:
                    await self._context.abort(*status)
        finally:
            self.over = True
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


class Peer(grpc.GenericRpcHandler):
    """The control plane. `acks` SyncRequests unless told otherwise, `reads` likewise, `refuses` streams at once."""

    def __init__(self) -> None:
        self.address = ""
        self.connections: list[Connection] = []
        self.acks = self.reads = True
        self.refuses: tuple[grpc.StatusCode, str] | None = None
        self.called: list[str] = []
        self.questions: list[control_pb2.DnsQueryRequest] = []
        self.asked_with: list[dict[str, str]] = []
        self.answer: Callable[[control_pb2.DnsQueryRequest], Awaitable[control_pb2.DnsQueryResponse]] = _yes

    def service(self, details: Any) -> Any:
        """Return the method that is called."""
        self.called.append(details.method)
        if details.method.endswith("/Connect"):
            return grpc.stream_stream_rpc_method_handler(self._connect)
        return grpc.unary_unary_rpc_method_handler(
            self._query,
            request_deserializer=control_pb2.DnsQueryRequest.FromString,
            response_serializer=control_pb2.DnsQueryResponse.SerializeToString,
        )

    async def connection(self, count: int = 1) -> Connection:
        """Wait for the `count`th stream, and for its first event where events are read."""
        await until(lambda: len(self.connections) >= count)
        found = self.connections[count - 1]
        if self.reads:
            await until(lambda: found.events)
        return found

    async def _connect(self, _events: Any, context: Any) -> None:
        connection = Connection(context)
        self.connections.append(connection)
        if self.refuses is not None:
            connection.events.append(DaemonEvent.FromString(await context.read()))  # who still writes hears no status
            connection.over = True
            await context.abort(*self.refuses)
        await connection.serve(acks=self.acks, reads=self.reads)

    async def _query(self, request: control_pb2.DnsQueryRequest, context: Any) -> control_pb2.DnsQueryResponse:
        self.questions.append(request)
        self.asked_with.append({item.key: item.value for item in context.invocation_metadata()})
        return await self.answer(request)


async def _yes(_request: control_pb2.DnsQueryRequest) -> control_pb2.DnsQueryResponse:
    return control_pb2.DnsQueryResponse(allow=True)


@asynccontextmanager
async def serving(directory: Path, name: str = "cp") -> AsyncIterator[Peer]:
    """Serve a control plane on a unix socket."""
    peer = Peer()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((peer,))
    peer.address = f"unix:{directory}/{name}"
    server.add_insecure_port(peer.address)
    await server.start()
    try:
        yield peer
    finally:
        for connection in peer.connections:
            connection.end()
        await server.stop(None)


class Soon(random.Random):
    """Chance that always takes the least, of the pauses between tries too; keeps what was asked of it."""

    def __init__(self) -> None:
        super().__init__(0)
        self.asked: list[tuple[float, float]] = []

    def uniform(self, a: float, b: float) -> float:
        """Return the lower end, or a moment where that would be no pause at all."""
        self.asked.append((a, b))
        return a or 0.002


def view_of(attachment_id: str, **changed: Any) -> AttachmentView:
    """Return an attachment as the daemon shows it before it has a policy."""
    return replace(
        AttachmentView(
            attachment_id, f"veth-{attachment_id}", "interface", {"tenant": "acme"}, "192.0.2.1:53", BLOCK_ALL, 1
        ),
        **changed,
    )


class FakeHost:
    """A `ControlHost` whose attachments are policies alone; `gate` closed holds up every command."""

    def __init__(self, *views: AttachmentView) -> None:
        self.views = {view.id: view for view in views}
        self.attaching: dict[str, AttachmentView] = {}
        self.policies: dict[str, Policy] = {}
        self.batches: list[tuple[str, list[tuple[Command, str]]]] = []
        self.failure: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.counted = 0
        self.contacts = 0
        self.contact_failure: Exception | None = None
        self.followed: list[bool] = []
        self.follow_failures = 0
        self.stale: Callable[[], bool] = lambda: False

    @property
    def applied(self) -> list[tuple[str, str]]:
        """Whom which versions were applied to, or refused, in order."""
        return [(one, version) for one, commands in self.batches for _, version in commands]

    def attachments(self) -> Sequence[AttachmentView]:
        return list(self.views.values())

    def view(self, attachment_id: str) -> AttachmentView | None:
        return self.views.get(attachment_id) or self.attaching.get(attachment_id)

    async def apply(self, attachment_id: str, command: Command, version: str = "") -> None:
        (refusal,) = await self.apply_all(attachment_id, [(command, version)])
        if refusal is not None:
            raise refusal

    async def apply_all(
        self, attachment_id: str, commands: Sequence[tuple[Command, str]]
    ) -> Sequence[NetfenceError | None]:
        self.batches.append((attachment_id, list(commands)))
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        if attachment_id not in self.views:
            raise NotFoundError(f"apply a command: no attachment {attachment_id}")
        return [self._apply(attachment_id, command, version) for command, version in commands]

    def _apply(self, attachment_id: str, command: Command, version: str) -> NetfenceError | None:
        try:
            policy = apply(self.policies.get(attachment_id, EMPTY), command, 0.0)
        except NetfenceError as error:
            return error
        self.policies[attachment_id] = policy
        self.views[attachment_id] = replace(
            self.views[attachment_id],
            mode=int(policy.mode),
            policy_version=version,
            policy_hash=policy.hash(),
            acked=True,
        )
        return None

    async def stats(self) -> Sequence[StatsView]:
        self.counted += 1
        return [StatsView(one, (self.counted, 2), (3, 4), 5, 6, 7, "hash") for one in self.views]

    async def follow_staleness(self) -> None:
        if self.follow_failures:
            self.follow_failures -= 1
            raise NetfenceError("the kernel does not")
        self.followed.append(self.stale())

    async def save_contact(self) -> None:
        self.contacts += 1
        if self.contact_failure is not None:
            raise self.contact_failure
