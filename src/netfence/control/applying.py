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
from typing import Final

import structlog

from netfence.control.convert import command_of
from netfence.control.events import fitting
from netfence.control.inbox import Inbox
from netfence.control.outbox import Outbox, Result
from netfence.control.port import AttachmentView, ControlHost, FirstPolicy
from netfence.errors import InvalidError, NetfenceError, NotFoundError, UnavailableError
from netfence.log import LogLimit
from netfence.policy.commands import BulkUpdate, Command
from netfence.policy.modes import Mode
from netfence.v1 import control_pb2

LARGE_BYTES: Final = 64 << 10
"""A command from which on it is converted in a thread: about 4 ms for a megabyte."""

MAX_LOGGED_ERRORS: Final = 5
"""Faults of one refused command in the log; the CommandResult has all of them."""

Message = control_pb2.ControlCommand

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
    """What came of all commands since the start."""

    applied: int = 0
    refused: int = 0
    unknown: int = 0


class Commands:
    """See the module. Use it on one event loop."""

    def __init__(self, outbox: Outbox, max_bytes: int) -> None:
        self._outbox = outbox
        self._inbox: Inbox[bytes] = Inbox(self._work, max_bytes)
        self._waiting: dict[str, Waiting] = {}
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
        waiting = self._waiting.pop(attachment_id, None)
        if waiting is not None:
            waiting.policy.cancel()
            waiting.settle(NotFoundError("the attach failed"))

    def fail(self, attachment_ids: Sequence[str], why: str) -> None:
        """Let these attaches fail, unless they have their policy already."""
        for attachment_id in attachment_ids:
            waiting = self._waiting.get(attachment_id)
            if waiting is not None and not waiting.policy.done():
                waiting.policy.set_exception(UnavailableError(f"attach to {waiting.view.target}: {why}"))

    def awaiting(self) -> list[str]:
        """Return the ids of the attaches that have no policy yet."""
        return [one for one, waiting in self._waiting.items() if not waiting.policy.done()]

    async def none_awaiting(self, timeout_s: float) -> None:
        """Wait until the attaches that have no policy at this moment have one or have failed, `timeout_s` at most."""
        open_ones = [waiting.policy for waiting in self._waiting.values() if not waiting.policy.done()]
        if open_ones:
            await asyncio.wait(open_ones, timeout=timeout_s)

    def decided(self) -> list[AttachmentView]:
        """Return the attaches that have their policy and are about to put it in force."""
        decided = (waiting for waiting in self._waiting.values() if waiting.policy.done())
        return [one.view for one in decided if not one.policy.cancelled() and one.policy.exception() is None]

    def attached(self, attachment_id: str) -> None:
        """Note that an attach is through."""
        self._waiting.pop(attachment_id, None)

    # -- commands -----------------------------------------------------------------------------------------------------

    async def take(self, message: Message, data: bytes) -> None:
        """Queue a command that came as `data`; waits while too much is queued."""
        if message.id in self._waiting or (self._host is not None and self._host.view(message.id) is not None):
            # As bytes: a message of a hundred thousand entries takes many times as much.
            await self._inbox.put(message.id, data, len(data))
        else:
            self._unknown(message)

    async def drained(self) -> None:
        """Wait until every command that was taken has been applied or refused."""
        await self._inbox.drained()

    async def close(self) -> None:
        """Stop applying."""
        await self._inbox.close()

    async def _work(self, attachment_id: str, waiting: Sequence[bytes]) -> None:
        """Do what the inbox hands over; not before there is room for what will be said about it."""
        await self._outbox.room()
        await self._apply(attachment_id, [Message.FromString(data) for data in waiting])

    async def _apply(self, attachment_id: str, messages: Sequence[Message]) -> None:
        ready: list[tuple[Message, Command]] = []
        for message in messages:
            waiting = self._waiting.get(attachment_id)
            command = await _converted(message)
            if waiting is not None and not waiting.settled.is_set():
                await self._first(waiting, message, command)
            elif isinstance(command, NetfenceError):
                self._refuse(message, command)
            else:
                ready.append((message, command))
        if not ready or self._host is None:
            return
        try:
            outcomes = await self._host.apply_all(attachment_id, [(one, message.version) for message, one in ready])
        except NotFoundError:
            for message, _ in ready:
                self._unknown(message)
            return
        except Exception as error:
            log.exception("commands_failed", attachment=attachment_id, error=str(error))
            outcomes = [NetfenceError("internal error; the daemon's log has the details")] * len(ready)
        for (message, command), refusal in zip(ready, outcomes, strict=True):
            if refusal is None:
                self._applied(message, command)
            else:
                self._refuse(message, refusal)

    async def _first(self, waiting: Waiting, message: Message, command: Command | NetfenceError) -> None:
        """Let a SubscribedAck end the wait of its attach, and wait until that is through."""
        kind = message.WhichOneof("command")
        if waiting.policy.done():  # a second one, on its heels
            await waiting.settled.wait()
            await self._apply(message.id, [message])
        elif kind != "subscribed_ack":
            what = f"{kind or 'command'}: the attachment waits for its SubscribedAck; send that first"
            self._refuse(message, command if isinstance(command, NetfenceError) else InvalidError(what))
        elif isinstance(command, BulkUpdate):
            waiting.policy.set_result(FirstPolicy(command, message.version, waiting.settle))
            await waiting.settled.wait()
            if waiting.failure is None:
                self._applied(message, command)
            else:
                failure = waiting.failure
                self._refuse(message, failure if isinstance(failure, NetfenceError) else NetfenceError(str(failure)))
        elif isinstance(command, NetfenceError):
            waiting.policy.set_exception(command)
            await waiting.settled.wait()
            self._refuse(message, command)

    def _applied(self, message: Message, command: Command) -> None:
        self.counts.applied += 1
        if isinstance(command, BulkUpdate) and command.dns is None and command.mode == Mode.ALLOWLIST:
            effect = "the workload may ask for every name and none opens an address"
            log.warning("allowlist_without_dns", attachment=message.id, version=message.version, effect=effect)
        self._answer(message, ok=True)

    def _refuse(self, message: Message, error: NetfenceError) -> None:
        self.counts.refused += 1
        errors = _errors(error)
        if self._refused_limit.due(time.monotonic()):
            log.warning(
                "command_refused",
                attachment=message.id,
                command=message.WhichOneof("command") or "none",
                version=message.version,
                errors=[*errors[:MAX_LOGGED_ERRORS]],
                faults=len(errors),
                since_start=self.counts.refused,
            )
        self._answer(message, ok=False, errors=errors)

    def _unknown(self, message: Message) -> None:
        self.counts.unknown += 1
        if self._unknown_limit.due(time.monotonic()):
            kind = message.WhichOneof("command") or "none"
            log.warning(
                "command_for_unknown_attachment",
                attachment=message.id,
                command=kind,
                effect="ignored",
                since_start=self.counts.unknown,
            )
        self._answer(message, ok=False, errors=(f"no attachment {message.id}",))

    def _answer(self, message: Message, *, ok: bool, errors: tuple[str, ...] = ()) -> None:
        if not message.nonce:
            return
        view = self._host.view(message.id) if self._host is not None else None
        version = message.version if ok else (view.policy_version if view is not None else "")
        policy_hash = view.policy_hash if view is not None else ""
        self._outbox.result(Result(message.nonce, message.id, version, ok, fitting(errors), policy_hash))


async def _converted(message: Message) -> Command | NetfenceError:
    try:
        if message.ByteSize() >= LARGE_BYTES:
            return await asyncio.to_thread(command_of, message)
        return command_of(message)
    except NetfenceError as error:
        return error


def _errors(error: NetfenceError) -> tuple[str, ...]:
    return error.errors if isinstance(error, InvalidError) else (str(error),)
