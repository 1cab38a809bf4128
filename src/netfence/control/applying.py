"""Commands of the stream, from their arrival to their result; and attaches that wait for their first policy.

Owns what a command does to whom (wire.md, "Behaviour of the stream" 2 and 3): a SubscribedAck ends the wait of an
attach or is a bulk update like any other; what is refused is refused whole, logged, counted and, if it carried a nonce,
answered. Knows no connection: results go to the `outbox`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

import structlog
from google.protobuf.message import DecodeError

from netfence.control.convert import command_of
from netfence.control.events import fitting
from netfence.control.inbox import Inbox
from netfence.control.outbox import Outbox, Result
from netfence.control.peek import KINDS, Head, entries_of
from netfence.control.port import AttachmentView, ControlHost, FirstPolicy
from netfence.errors import ExhaustedError, InvalidError, NetfenceError, NotFoundError, UnavailableError
from netfence.log import LogLimit
from netfence.policy.commands import BulkUpdate, Command
from netfence.policy.limits import MAX_CIDR_RULES, MAX_DOMAIN_RULES, MAX_ERROR_TEXT
from netfence.policy.modes import Mode
from netfence.policy.prefix import shown
from netfence.tally import Durations
from netfence.v1 import control_pb2

LARGE_BYTES: Final = 64 << 10
"""A command from which on it is converted in a thread: about 10 ms for a megabyte."""

COUNTED_BYTES: Final = 2 << 20
"""A command from which on its entries are counted before it is parsed: below, even a million empty ones cost no more
than a tenth of a second and 56 MB."""

OTHER_FIELDS: Final = 32
"""Fields of a policy that are no CIDR and no domain: modes, audit, eight upstreams, and some that we do not know."""

MAX_ID_BYTES: Final = 128
"""Bytes of an id that is answered: ours have 36."""

MAX_NONCE_BYTES: Final = 256
"""Bytes of a nonce, which waits for its result with us."""

MAX_VERSION_BYTES: Final = 1024
"""Bytes of a version, which is stored and stands in every SyncRequest: 2 MB for all attachments there can be."""

HEAD_BYTES: Final = 200
"""What a waiting command takes beside its bytes."""

MAX_LOGGED_ERRORS: Final = 5
"""Faults of one refused command in the log; the CommandResult has all of them."""

NO_KIND: Final = "none"
"""What a command is called that is none we know."""

Outcome = Literal["applied", "refused", "unknown"]

Arrived = tuple[Head, bytes, float]  # a command as it came: its head, all of it, and when (monotonic seconds)

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Waiting:
    """An attach that waits for its policy; `settled` when it has it in force, or has failed, with `failure` why."""

    view: AttachmentView
    policy: asyncio.Future[FirstPolicy]
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    failure: BaseException | None = None

    def settle(self, failure: BaseException | None) -> None:
        """Note how it went; the first word counts."""
        if not self.settled.is_set():
            self.failure = failure
            self.settled.set()


@dataclass(slots=True)
class Counts:
    """What came of all commands since the start, also by kind; and how long each took from arrival to result."""

    applied: int = 0
    refused: int = 0
    unknown: int = 0
    by_kind: dict[tuple[str, Outcome], int] = field(
        default_factory=lambda: {(kind, one): 0 for kind in (*KINDS, NO_KIND) for one in get_args(Outcome)}
    )
    durations: Durations = field(default_factory=lambda: Durations((0.005, 0.025, 0.1, 0.5, 2.5, 10.0)))

    def note(self, head: Head, outcome: Outcome) -> None:
        """Count one."""
        setattr(self, outcome, getattr(self, outcome) + 1)
        self.by_kind[head.kind if head.kind in KINDS else NO_KIND, outcome] += 1


class Commands:
    """See the module. Use it on one event loop."""

    def __init__(self, outbox: Outbox, max_bytes: int) -> None:
        self._outbox = outbox
        self._inbox: Inbox[Arrived] = Inbox(self._work, max_bytes)
        self._waiting: dict[str, Waiting] = {}
        self._through: dict[str, AttachmentView] = {}  # have their policy in force; perhaps not attached yet
        self._host: ControlHost | None = None
        self._unknown_limit, self._refused_limit = LogLimit(), LogLimit()
        self.counts = Counts()

    def serve(self, host: ControlHost) -> None:
        """Apply commands to this host from now on."""
        self._host = host

    # -- attaches -----------------------------------------------------------------------------------------------------

    def wait_for(self, view: AttachmentView) -> Waiting:
        """Note that an attach waits for its policy, until `forget`."""
        waiting = self._waiting[view.id] = Waiting(view, asyncio.get_running_loop().create_future())
        return waiting

    def forget(self, attachment_id: str) -> None:
        """Note that an attachment is gone, or was never attached."""
        self._through.pop(attachment_id, None)
        waiting = self._waiting.pop(attachment_id, None)
        if waiting is not None:
            if not waiting.policy.cancel() and not waiting.policy.cancelled():
                waiting.policy.exception()  # nobody may have asked for it: the caller went away
            waiting.settle(NotFoundError("the attach failed"))

    def fail(self, attachment_ids: Sequence[str], why: str) -> None:
        """Let these attaches fail, unless they have their policy already."""
        for attachment_id in attachment_ids:
            waiting = self._waiting.get(attachment_id)
            if waiting is not None and not waiting.policy.done():
                waiting.policy.set_exception(UnavailableError(f"attach to {waiting.view.target}: {why}"))

    def awaiting(self) -> list[AttachmentView]:
        """Return the attaches that have no policy yet."""
        return [waiting.view for waiting in self._waiting.values() if not waiting.policy.done()]

    async def none_awaiting(self, timeout_s: float) -> None:
        """Wait until the attaches that were announced and not answered are, or have failed; `timeout_s` at most."""
        waiting = (one for one in self._waiting.values() if not self._outbox.waits(one.view.id))
        told = [one.policy for one in waiting if not one.policy.done()]
        if told:
            await asyncio.wait(told, timeout=timeout_s)

    def decided(self) -> list[AttachmentView]:
        """Return the attaches that have their policy and are about to put it in force."""
        decided = (waiting for waiting in self._waiting.values() if waiting.policy.done())
        views = [one.view for one in decided if not one.policy.cancelled() and one.policy.exception() is None]
        return [*views, *self._through.values()]

    def attached(self, attachment_id: str) -> None:
        """Note that an attach is through."""
        self._through.pop(attachment_id, None)

    # -- commands -----------------------------------------------------------------------------------------------------

    async def take(self, head: Head, data: bytes) -> None:
        """Queue a command that came as `data`; waits while too much is queued."""
        if head.id in self._waiting or (self._host is not None and self._host.view(head.id) is not None):
            await self._inbox.put(head.id, (head, data, time.monotonic()), len(data) + HEAD_BYTES)
        else:
            await self._outbox.room()
            self._unknown(head)

    async def drained(self) -> None:
        """Wait until every command that was taken has been applied or refused."""
        await self._inbox.drained()

    async def close(self) -> None:
        """Stop applying."""
        await self._inbox.close()

    async def _work(self, attachment_id: str, arrived: Sequence[Arrived]) -> None:
        """Do what the inbox hands over; not before there is room for what will be said about it."""
        await self._outbox.room()
        ready: list[tuple[Head, Command]] = []
        for head, data, _ in arrived:
            command = await _converted(head, data)
            waiting = self._waiting.get(attachment_id)
            if waiting is not None and waiting.policy.done():
                await waiting.settled.wait()
                waiting = self._waiting.get(attachment_id)
                if waiting is not None:  # it failed: what is rolled back takes nothing more
                    self._unknown(head)
                    continue
            if waiting is not None:
                await self._first(waiting, head, command)
            elif isinstance(command, NetfenceError):
                self._refuse(head, command)
            else:
                ready.append((head, command))
        if ready and self._host is not None:
            await self._apply(self._host, attachment_id, ready)
        now = time.monotonic()
        for *_, began in arrived:
            self.counts.durations.note(now - began)

    async def _apply(self, host: ControlHost, attachment_id: str, ready: Sequence[tuple[Head, Command]]) -> None:
        try:
            outcomes = await host.apply_all(attachment_id, [(command, head.version) for head, command in ready])
        except NotFoundError:
            for head, _ in ready:
                self._unknown(head)
            return
        except Exception as error:
            log.exception("commands_failed", attachment=attachment_id, error=str(error))
            outcomes = [NetfenceError("internal error; the daemon's log has the details")] * len(ready)
        for (head, command), refusal in zip(ready, outcomes, strict=True):
            if refusal is None:
                self._applied(head, command)
            else:
                self._refuse(head, refusal)

    async def _first(self, waiting: Waiting, head: Head, command: Command | NetfenceError) -> None:
        """Let a SubscribedAck end the wait of its attach, and wait until that is through."""
        if head.kind != "subscribed_ack" or not isinstance(command, BulkUpdate | NetfenceError):
            what = f"{head.kind or 'command'}: the attachment waits for its SubscribedAck; send that first"
            self._refuse(head, command if isinstance(command, NetfenceError) else InvalidError(what))
            return
        if isinstance(command, BulkUpdate):
            waiting.policy.set_result(FirstPolicy(command, head.version, waiting.settle))
        else:
            waiting.policy.set_exception(command)
        await waiting.settled.wait()
        failure = waiting.failure
        if failure is None and isinstance(command, BulkUpdate):
            if self._waiting.get(head.id) is waiting:  # else it is gone again; the update that it holds may be large
                self._through[head.id] = self._waiting.pop(head.id).view
            self._applied(head, command)
        else:
            said = command if isinstance(command, NetfenceError) else failure
            why = str(said) or "the caller of attach went away"
            self._refuse(head, said if isinstance(said, NetfenceError) else NetfenceError(why))

    def _applied(self, head: Head, command: Command) -> None:
        self.counts.note(head, "applied")
        if isinstance(command, BulkUpdate) and command.dns is None and command.mode == Mode.ALLOWLIST:
            effect = "the workload may ask for every name and none opens an address"
            log.warning("allowlist_without_dns", attachment=head.id, version=head.version, effect=effect)
        self._answer(head, ok=True)

    def _refuse(self, head: Head, error: NetfenceError) -> None:
        self.counts.note(head, "refused")
        errors = _errors(error)
        if self._refused_limit.due(time.monotonic()):
            log.warning(
                "command_refused",
                attachment=head.id,
                command=head.kind or "none",
                version=head.version[:MAX_ERROR_TEXT],
                errors=[*errors[:MAX_LOGGED_ERRORS]],
                faults=len(errors),
                since_start=self.counts.refused,
            )
        self._answer(head, ok=False, errors=errors)

    def _unknown(self, head: Head) -> None:
        self.counts.note(head, "unknown")
        if self._unknown_limit.due(time.monotonic()):
            kind = head.kind or "none"
            log.warning(
                "command_for_unknown_attachment",
                attachment=head.id[:MAX_ERROR_TEXT],
                command=kind,
                effect="ignored",
                since_start=self.counts.unknown,
            )
        self._answer(head, ok=False, errors=(f"no attachment {shown(head.id)}",))

    def _answer(self, head: Head, *, ok: bool, errors: tuple[str, ...] = ()) -> None:
        if not head.nonce or _size(head.nonce) > MAX_NONCE_BYTES or _size(head.id) > MAX_ID_BYTES:
            return
        view = self._host.view(head.id) if self._host is not None else None
        # With the hash, as of now: of commands applied together the last one's.
        version = view.policy_version if view is not None else ""
        policy_hash = view.policy_hash if view is not None else ""
        self._outbox.result(Result(head.nonce, head.id, version, ok, fitting(errors), policy_hash))


async def _converted(head: Head, data: bytes) -> Command | NetfenceError:
    """Return the command, or why it is none; a large one is read in a thread."""
    if (size := _size(head.version)) > MAX_VERSION_BYTES:
        return InvalidError(f"version: {size} bytes long; at most {MAX_VERSION_BYTES} are allowed")
    if (size := _size(head.nonce)) > MAX_NONCE_BYTES:
        return InvalidError(f"nonce: {size} bytes long; at most {MAX_NONCE_BYTES} are allowed")
    try:
        return await asyncio.to_thread(_read, data) if len(data) >= LARGE_BYTES else _read(data)
    except NetfenceError as error:
        return error


def _read(data: bytes) -> Command:
    try:
        if len(data) >= COUNTED_BYTES:
            most = MAX_CIDR_RULES + MAX_DOMAIN_RULES
            if entries_of(data, most + OTHER_FIELDS) > most + OTHER_FIELDS:
                raise ExhaustedError(
                    f"more than {most} CIDRs and domains: an attachment may have {MAX_CIDR_RULES} of each"
                )
        return command_of(control_pb2.ControlCommand.FromString(data))
    except (DecodeError, ValueError) as error:
        raise InvalidError(f"command: {len(data)} bytes that cannot be read: {error}") from None


def _size(text: str) -> int:
    return len(text.encode())


def _errors(error: NetfenceError) -> tuple[str, ...]:
    return error.errors if isinstance(error, InvalidError) else (str(error),)
