"""The remote control plane: a `ControlPort` on the stream of wire.md.

Owns which endpoint is asked and when again, the attaches that wait for it, and heartbeats. One connection is
`stream`'s, its commands `applying`'s, what waits to be told `outbox`'s, names `queries`', TLS and token `credentials`',
what follows from a long absence `contact`'s.

While there is no stream the last policies stay in force and DNS goes on (mode `proxy` answers SERVFAIL).
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Mapping
from typing import Final

import structlog

from netfence.config import ControlPlane
from netfence.control.applying import Commands, Counts
from netfence.control.backoff import FIRST_S, Backoff
from netfence.control.channel import call_metadata, make_channel
from netfence.control.contact import Contact
from netfence.control.credentials import Credentials, Secrets
from netfence.control.events import sync_event
from netfence.control.outbox import Heartbeat, Outbox
from netfence.control.peek import Head
from netfence.control.port import (
    AttachmentView,
    ConnectionState,
    ControlHost,
    FirstPolicy,
    NameDecision,
    UnsubscribeReason,
)
from netfence.control.queries import NameQueries
from netfence.control.stream import EndedError, Stream
from netfence.errors import DeadlineError, UnavailableError
from netfence.v1 import control_pb2

QUEUE_FACTOR: Final = 2
"""Commands that wait to be applied, in messages of the largest size: one being applied, one behind it."""

DRAIN_S: Final = 2.0
"""What a clean stop waits for the last events to be read."""

log = structlog.get_logger(__name__)


class RemoteControl:
    """See the module. Use it on one event loop."""

    def __init__(
        self, settings: ControlPlane, secrets: Secrets, metadata: Mapping[str, str], rng: random.Random | None = None
    ) -> None:
        self._settings, self._metadata = settings, metadata
        self._credentials = Credentials(settings, secrets)
        self._outbox = Outbox()
        self._commands = Commands(self._outbox, QUEUE_FACTOR * settings.max_message_size)
        self._queries = NameQueries(settings.query_timeout)
        self._rng = rng or random.SystemRandom()
        self._backoff = Backoff(self._rng)
        self._stream: Stream | None = None
        self._address = ""
        self._why = "no try has been made yet"
        self._state = ConnectionState.DISCONNECTED
        self._host: ControlHost | None = None
        self._daemon_id = ""
        self._hurry = asyncio.Event()  # an attach waits: try soon
        self._contact = Contact(settings.max_stale, settings.stale_action)
        self._leaving = False  # the daemon ends
        self._unwaited: set[str] = set()  # attached without waiting; perhaps not acked yet
        self.connects = self.losses = self.failures = 0  # streams that were synced, of those lost, tries that failed

    # -- what the daemon asks -----------------------------------------------------------------------------------------

    @property
    def state(self) -> ConnectionState:
        """Tell whether a stream stands and is synced."""
        return self._state

    @property
    def address(self) -> str:
        """Return the endpoint in use, or all that are tried."""
        return self._address or ", ".join(self._settings.url)

    @property
    def stale(self) -> bool:
        """Tell whether the control plane is away for longer than `max_stale` and that is to block everything."""
        return self._contact.stale

    def introduce(self, daemon_id: str, away_s: float | None) -> None:
        """Tell who we are, and for how long the control plane has been away."""
        self._daemon_id = daemon_id
        self._contact.begin(away_s or 0.0)

    def check(self, target: str) -> None:
        """Accept every target."""

    async def run(self, host: ControlHost) -> None:
        """Keep a stream to the control plane until cancelled."""
        self._host = host
        self._commands.serve(host)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep_connected())
                group.create_task(self._beat())
                group.create_task(self._contact.keep(host))
                group.create_task(self._credentials.watch())
        finally:
            await self._commands.close()

    async def reload(self) -> None:
        """Read TLS files and token again."""
        await self._credentials.reload()

    async def drain(self) -> None:
        """Give the last events a moment to be told, and store that the control plane was here until now."""
        if self._state is not ConnectionState.CONNECTED or self._stream is None or self._host is None:
            return
        self._leaving = True
        await self._contact.store(self._host)
        try:
            async with asyncio.timeout(DRAIN_S):
                if not self._outbox.empty:
                    await self._outbox.emptied()
                    await self._stream.finish()
        except TimeoutError:
            if count := len(self._outbox):
                log.warning("events_not_told", count=count, effect="the next SyncRequest tells the same")

    @property
    def counts(self) -> Counts:
        """Return what came of the commands so far."""
        return self._commands.counts

    @property
    def events_waiting(self) -> int:
        """Return how many events wait to be told."""
        return len(self._outbox)

    # -- attachments --------------------------------------------------------------------------------------------------

    async def subscribe(self, view: AttachmentView) -> FirstPolicy | None:
        """Announce an attachment and wait for its policy, `subscribe_ack_timeout` at most; 0: do not wait."""
        timeout_s = self._settings.subscribe_ack_timeout
        self._hurry.set()
        if not timeout_s:
            self._unwaited.add(view.id)
            self._outbox.subscribed(view)
            return None
        waiting = self._commands.wait_for(view)
        self._outbox.subscribed(view)
        try:
            async with asyncio.timeout(timeout_s):
                return await waiting.policy
        except TimeoutError:
            if self._outbox.waits(view.id):
                raise UnavailableError(
                    f"attach to {view.target}: no control plane at {self.address} within {timeout_s:g} s: {self._why};"
                    " check control_plane.url and that it runs"
                ) from None
            raise DeadlineError(
                f"attach to {view.target}: the control plane at {self.address} sent no SubscribedAck within"
                f" {timeout_s:g} s; see its log, or raise control_plane.subscribe_ack_timeout"
            ) from None

    async def unsubscribe(self, attachment_id: str, reason: UnsubscribeReason, error: str = "") -> None:
        """Announce that an attachment is gone."""
        self._commands.forget(attachment_id)
        self._unwaited.discard(attachment_id)
        self._outbox.unsubscribed(attachment_id, reason, error)

    async def query_dns(self, attachment_id: str, name: str, qtype: str) -> NameDecision:
        """Ask about one name."""
        return await self._queries.ask(attachment_id, name, qtype)

    # -- what a stream asks (StreamOwner) -----------------------------------------------------------------------------

    def sync_message(self) -> control_pb2.DaemonEvent:
        """Return the SyncRequest of this moment; whoever has a policy is in it, the others are announced behind it."""
        assert self._host is not None  # noqa: S101 - for mypy: streams live inside `run`
        host = self._host
        views = {view.id: view for view in host.attachments()}
        for attachment_id in views:
            self._commands.attached(attachment_id)
        decided = {view.id for view in self._commands.decided()}
        for attachment_id in decided | self._unwaited:
            if (view := host.view(attachment_id)) is not None:
                views[attachment_id] = view
        acked = [view for view in views.values() if view.acked or view.id in decided]
        unacked = [view for view in views.values() if not (view.acked or view.id in decided)]
        self._unwaited.intersection_update(view.id for view in unacked)
        self._outbox.begin(unacked)
        return sync_event(self._daemon_id, socket.gethostname(), self._metadata, acked)

    def synced(self) -> None:
        """Note that the control plane knows us."""
        self._state = ConnectionState.CONNECTED
        self._contact.came()
        self.connects += 1
        log.info("control_plane_connected", address=self._address)

    async def take(self, head: Head, data: bytes) -> None:
        """Take a command."""
        await self._commands.take(head, data)

    # -- connections --------------------------------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        """Try the endpoints in order, again and again."""
        while True:
            pause_s, hurry = await self._round()
            self._state = ConnectionState.DISCONNECTED
            await self._pause(pause_s, hurry=hurry)

    async def _round(self) -> tuple[float, bool]:
        """Try each endpoint until one had a stream that stood for long; one that comes and goes hides no other.

        Returns the pause before the next round, and whether an attach that waits may shorten it.
        """
        for index, address in enumerate(self._settings.url):
            began = time.monotonic()
            secrets = self._credentials.current
            synced, too_large, ended = await self._connect(address, secrets)
            if ended:
                if too_large:
                    return self._backoff.longest(), False
                if synced and time.monotonic() - began > self._backoff.window_s:
                    self._backoff.reset()
                    break
                if synced and index + 1 < len(self._settings.url):
                    await asyncio.sleep(self._rng.uniform(0.0, FIRST_S))  # not the whole fleet at once
            else:  # by ourselves, for new secrets
                return 0.0, True
        return self._backoff.next(), True

    async def _connect(self, address: str, secrets: Secrets) -> tuple[bool, bool, bool]:
        """Have one stream to `address` until it ends; return whether it synced, met a message too large, and failed."""
        await self._commands.drained()  # the SyncRequest tells what came of them
        self._state = ConnectionState.CONNECTING
        channel = make_channel(address, secrets, max_message_size=self._settings.max_message_size)
        metadata = call_metadata(secrets)
        stream = Stream(channel, metadata, self, self._outbox)
        renew = asyncio.create_task(self._renew(stream, secrets), name="renew secrets")
        self._address, self._stream = address, stream
        self._queries.use(channel, metadata)
        ended = too_large = False
        try:
            await stream.run()
            self._why = "it was ended for new TLS files or a new token"
        except EndedError as error:
            ended, too_large = True, error.too_large
            self._note_end(address, stream, error)
        finally:
            renew.cancel()
            self._queries.use(None)
            self._address, self._stream = "", None
            self._state = ConnectionState.DISCONNECTED
            if stream.synced:
                self._contact.went()
            self._lose(address, synced=stream.synced)
            await channel.close()
        return stream.synced, too_large, ended

    def _lose(self, address: str, *, synced: bool) -> None:
        """Let the attaches fail that were announced on a stream that is no more; one that never synced was none."""
        self._outbox.lost()
        told = [view for view in self._commands.awaiting() if not self._outbox.waits(view.id)]
        if synced:
            why = f"the stream to the control plane at {address} ended before its SubscribedAck: {self._why}"
            self._commands.fail([view.id for view in told], f"{why}; try again")
        else:  # nobody who knows us has heard of them
            for view in told:
                self._outbox.subscribed(view)

    def _note_end(self, address: str, stream: Stream, error: EndedError) -> None:
        self._why = str(error)
        if stream.synced:
            self.losses += 1
        else:
            self.failures += 1
        if error.too_large:
            log.error(
                "message_too_large",
                address=address,
                error=str(error),
                limit=self._settings.max_message_size,
                remedy="raise control_plane.max_message_size, or the peer's own limit",
            )
        elif self._leaving:
            log.info("control_plane_left", address=address)
        elif stream.synced:
            effect = "the last policies stay in force"
            log.warning("control_plane_lost", address=address, error=str(error), effect=effect)
        else:
            log.warning("control_plane_not_reached", address=address, error=str(error))

    async def _renew(self, stream: Stream, used: Secrets) -> None:
        """End a stream whose secrets are not the newest, when no attach waits on it."""
        await self._credentials.changed(used)
        await asyncio.sleep(self._rng.uniform(0.0, FIRST_S))  # a fleet's files change at once
        self._outbox.hold()
        await self._commands.none_awaiting(self._settings.subscribe_ack_timeout)
        log.info("control_plane_reconnects", why="TLS files or token changed")
        stream.close()

    async def _pause(self, seconds: float, *, hurry: bool) -> None:
        """Wait before the next round; with `hurry` an attach that waits shortens it, to `FIRST_S` at most."""
        self._hurry.clear()
        if self._commands.awaiting():
            self._hurry.set()
        try:
            async with asyncio.timeout(seconds):
                if hurry:
                    await self._hurry.wait()
                    await asyncio.sleep(self._rng.uniform(0.0, FIRST_S))
                else:
                    await asyncio.Event().wait()
        except TimeoutError:
            pass

    async def _beat(self) -> None:
        """Tell the counters."""
        assert self._host is not None  # noqa: S101 - for mypy
        while True:
            await asyncio.sleep(self._settings.heartbeat_interval)
            if self._leaving:
                continue
            try:
                self._outbox.heartbeat(Heartbeat(tuple(await self._host.stats())))
            except Exception as error:
                log.exception("heartbeat_failed", error=str(error), effect="the next one comes in time")
