"""A daemon that speaks the raw protocol, well or badly, and applies policies by the real policy core.

    async with FakeDaemon(plane.address, attachments={"a": {"tenant": "acme"}}) as daemon:
        await daemon.until(lambda: daemon.applied["a"].mode is Mode.ALLOWLIST)

Nothing here imports the kit: what a daemon sees is the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Self

import grpc
import grpc.aio

from netfence.control.convert import command_of
from netfence.errors import InvalidError
from netfence.policy.commands import SetMode, apply
from netfence.policy.modes import Mode
from netfence.policy.policy import EMPTY, Policy
from netfence.v1 import control_pb2, control_pb2_grpc, types_pb2

DEADLINE_S = 10.0
OURS = ("audit", "nonce", "policy_hash", "ttl", "version")

Command = control_pb2.ControlCommand
Event = control_pb2.DaemonEvent


async def until(condition: Callable[[], Any], what: str | Callable[[], str] = "") -> None:
    """Wait until the condition holds; it changes only by what happens on this loop."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110 - of anything, the kit's insides included
                await asyncio.sleep(0.002)
    except TimeoutError:
        said = what if isinstance(what, str) else what()
        raise AssertionError(f"waited {DEADLINE_S:g} s in vain: {said or condition}") from None


class FakeDaemon:
    """A daemon with attachments (id → metadata). Entering it connects and sends SyncRequest; leaving drops it all.

    `old` is the original implementation: no capabilities, hashes, versions or results. `refuses` are versions that it
    refuses; while not `answers` it gives no results, while not `reads` it reads nothing.
    """

    def __init__(
        self,
        address: str,
        attachments: Mapping[str, Mapping[str, str]] | None = None,
        *,
        daemon_id: str = "daemon-1",
        hostname: str = "host-1",
        old: bool = False,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.address = address
        self.daemon_id = daemon_id
        self.hostname = hostname
        self.old = old
        self.metadata: dict[str, dict[str, str]] = {key: dict(value) for key, value in (attachments or {}).items()}
        self.applied: dict[str, Policy] = dict.fromkeys(self.metadata, EMPTY)
        self.versions: dict[str, str] = {}
        self.refuses: set[str] = set()
        self.answers = True
        self.hashes = not old
        self.overlay = False  # whether it has blocked all for the time without us, and says so in its SyncRequest
        self.hash_prefix = ""  # makes its hashes different from everybody's
        self.reads = asyncio.Event()
        self.reads.set()
        self.commands: list[Command] = []  # every command but SyncAck, in order, over all connections
        self.synced = False
        self.status: grpc.StatusCode | None = None  # of the stream that has ended
        self.details = ""
        self.daemon_version = "" if old else "1.2.3"
        self._call_metadata = None if token is None else (("authorization", f"Bearer {token}"),)
        self._credentials = credentials
        self._channel: Any = None
        self.stream: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._sending = asyncio.Lock()

    # -- life ----------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.connect()
        await until(lambda: self.synced or self.status is not None, "SyncAck")
        while self.details == "Internal error from Core":
            # gRPC's aio client says so, and forgets the real status, when it writes just as the stream ends.
            await self.connect()
            await until(lambda: self.synced or self.status is not None, "SyncAck")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drop()

    async def connect(self, *, sync: bool = True) -> None:
        """Open a new channel and stream; send SyncRequest unless told otherwise."""
        await self.drop()
        self.status, self.details, self.synced = None, "", False
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own, as another process has
        if self._credentials is None:
            self._channel = grpc.aio.insecure_channel(self.address, options=options)
        else:
            self._channel = grpc.aio.secure_channel(self.address, self._credentials, options=options)
        self.stub = control_pb2_grpc.ControlPlaneStub(self._channel)
        self.stream = self.stub.Connect(metadata=self._call_metadata)
        self._reader = asyncio.create_task(self._read(self.stream))
        if sync:
            await self.send(Event(sync=self.sync_request()))

    async def drop(self) -> None:
        """Lose the connection."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait({self._reader})
            self._reader = None
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    # -- what it says --------------------------------------------------------------------------------------------------

    def sync_request(self) -> control_pb2.SyncRequest:
        return control_pb2.SyncRequest(
            daemon_id=self.daemon_id,
            hostname=self.hostname,
            attachments=[self._attachment(attachment_id) for attachment_id in self.metadata],
            capabilities=() if self.old else OURS,
            daemon_version=self.daemon_version,
        )

    def _attachment(self, attachment_id: str) -> control_pb2.Attachment:
        policy = self.applied[attachment_id]
        if self.overlay:
            policy = apply(policy, SetMode(Mode.BLOCK_ALL), 0.0)
        return control_pb2.Attachment(
            id=attachment_id,
            target=f"veth-{attachment_id}",
            type=types_pb2.ATTACHMENT_TYPE_TC,
            metadata=self.metadata[attachment_id],
            policy_version="" if self.old else self.versions.get(attachment_id, ""),
            policy_hash=self._hash(policy),
            mode=int(policy.mode),  # type: ignore[arg-type]
        )

    def _hash(self, policy: Policy | None) -> str:
        return "" if policy is None or not self.hashes else self.hash_prefix + policy.hash()

    async def send(self, event: Event) -> None:
        """Send an event; that the stream is gone is no error."""
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            async with self._sending:  # gRPC takes one write at a time
                await self.stream.write(event)

    async def attach(self, attachment_id: str, metadata: Mapping[str, str] | None = None) -> None:
        """Announce a new attachment."""
        self.metadata[attachment_id] = dict(metadata or {})
        self.applied[attachment_id] = EMPTY
        subscribed = control_pb2.Subscribed(
            id=attachment_id,
            target=f"veth-{attachment_id}",
            type=types_pb2.ATTACHMENT_TYPE_TC,
            metadata=self.metadata[attachment_id],
        )
        await self.send(Event(subscribed=subscribed))

    async def detach(self, attachment_id: str, error: str = "") -> None:
        """Announce that an attachment is gone."""
        del self.metadata[attachment_id]
        await self.send(Event(unsubscribed=control_pb2.Unsubscribed(id=attachment_id, reason=2, error=error)))  # type: ignore[arg-type]

    async def heartbeat(self, **stats: int) -> None:
        """Send counters: packets passed by attachment id."""
        entries = [control_pb2.AttachmentStats(id=key, packets_allowed=value) for key, value in stats.items()]
        await self.send(Event(heartbeat=control_pb2.Heartbeat(stats=entries)))

    async def query(self, attachment_id: str, domain: str, qtype: str = "A") -> control_pb2.DnsQueryResponse:
        """Ask about a name. Raises AioRpcError."""
        request = control_pb2.DnsQueryRequest(id=attachment_id, domain=domain, query_type=qtype)
        answer: control_pb2.DnsQueryResponse = await self.stub.QueryDns(
            request, metadata=self._call_metadata, timeout=5
        )
        return answer

    # -- what it hears -------------------------------------------------------------------------------------------------

    def kinds(self, attachment_id: str = "") -> list[str]:
        """Return the kinds of all commands so far, of one attachment if it is given."""
        mine = [one for one in self.commands if not attachment_id or one.id == attachment_id]
        return [one.WhichOneof("command") or "" for one in mine]

    async def until(self, condition: Callable[[], Any], what: str = "") -> None:
        """Wait for a condition, with what it has heard in the message when it does not come."""
        await until(condition, lambda: f"{what}; heard {self.kinds()}, status {self.status} {self.details}")

    async def _read(self, stream: Any) -> None:
        try:
            while True:
                await self.reads.wait()
                command = await stream.read()
                if command is grpc.aio.EOF:
                    break
                await self._take(command)
        except grpc.aio.AioRpcError:
            pass
        self.details = await stream.details()
        self.status = await stream.code()

    async def _take(self, command: Command) -> None:
        if command.WhichOneof("command") == "sync_ack":
            assert not command.id
            self.synced = True
            return
        self.commands.append(command)
        errors = self._apply(command)
        if command.nonce and self.answers and not self.old:
            await self.answer(command, errors)

    async def answer(self, command: Command, errors: Sequence[str] = ()) -> None:
        """Send the result of a command."""
        result = control_pb2.CommandResult(
            nonce=command.nonce,
            id=command.id,
            version=self.versions.get(command.id, ""),
            ok=not errors,
            errors=errors,
            policy_hash=self._hash(self.applied.get(command.id)),
        )
        await self.send(Event(command_result=result))

    def _apply(self, command: Command) -> Sequence[str]:
        if command.id not in self.metadata:
            return ("unknown id",)
        if command.version in self.refuses:
            return (f"version {command.version} is refused", "for two reasons")
        try:
            self.applied[command.id] = apply(self.applied[command.id], command_of(command), 0.0)
        except InvalidError as error:
            return error.errors
        self.versions[command.id] = command.version
        return ()


@contextlib.asynccontextmanager
async def daemons(count: int, address: str, per_daemon: int = 1) -> AsyncIterator[list[FakeDaemon]]:
    """Run daemons 0 to count-1, each with attachments `d<n>-<m>`."""
    async with contextlib.AsyncExitStack() as stack:
        made = [
            FakeDaemon(
                address,
                {f"d{number}-{index}": {"daemon": str(number)} for index in range(per_daemon)},
                daemon_id=f"daemon-{number}",
            )
            for number in range(count)
        ]
        for daemon in made:
            await stack.enter_async_context(daemon)
        yield made
