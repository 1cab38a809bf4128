"""`ControlPlane`: what a user of the kit holds in hands. Puts the parts together and adds nothing of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import resource
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeAlias

import structlog
import uvloop

from netfence.controlplane.book import Book
from netfence.controlplane.deciding import Deciders, PolicyFor
from netfence.controlplane.entry import Entry
from netfence.controlplane.hush import Hush
from netfence.controlplane.limits import SWEEP_S, Limits
from netfence.controlplane.push import Push
from netfence.controlplane.server import Admit, AnswerDns, Server, Servicer, is_local, listen
from netfence.controlplane.tls import ServerTls
from netfence.controlplane.tokens import TokenCheck, Tokens
from netfence.controlplane.views import Attachment, AttachmentStatus, DaemonStatus, Results
from netfence.errors import NetfenceError

Where: TypeAlias = str | Mapping[str, str] | Callable[[Attachment], bool] | None

hush = Hush(structlog.get_logger(__name__))


class ControlPlane:
    """A control plane: gives every attachment of every daemon that connects the policy that `policy_for` says.

    ::

        async def policy_for(attachment: Attachment) -> Policy:
            return POLICIES[attachment.metadata["tenant"]]


        plane = ControlPlane(policy_for)
        async with plane.serving("unix:/run/plane.sock"):
            ...
            results = await plane.update({"tenant": "acme"})  # POLICIES changed: bring them up to date
            print(results)  # 20 applied, 1 refused

    `policy_for` is asked about every attachment when its daemon connects or it is attached, and on `update`. While it
    raises, the attachment keeps what it has and it is asked again with back-off. `answer_dns` decides names for
    attachments in DNS mode ``proxy``, as ``await answer_dns(attachment, name, qtype)`` with the name in lower case and
    without its final dot. `admit` may turn daemons away by what they present and who they proved to be, as
    ``admit(daemon, peer)``. `limits` has the bounds.

    Use it on one event loop, and from that loop's thread.
    """

    def __init__(
        self,
        policy_for: PolicyFor,
        *,
        answer_dns: AnswerDns | None = None,
        admit: Admit | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._answer_dns = answer_dns
        self._admit = admit
        self._policy_for = policy_for
        self._deciders: Deciders | None = None
        self._book = Book(self._ask, self._limits)
        self._server: Server | None = None

    @contextlib.asynccontextmanager
    async def serving(
        self,
        address: str,
        *,
        tls: ServerTls | None = None,
        tokens: Tokens | None = None,
        insecure: bool = False,
    ) -> AsyncIterator[ControlPlane]:
        """Serve at ``host:port`` (port 0: a free one, see `address`) or ``unix:/path`` (mode 0600) inside the `with`.

        Without `tls`, an address that others than this host can reach is refused unless `insecure`. With `tokens`
        daemons must present one of them. Raises InvalidError or PreconditionError where it cannot be served; daemons
        that are connected at the end are told to go, and come back to the next one. Should what decides policies ever
        end by itself, which is a defect, the body is cancelled and NetfenceError raised: restart the process.
        """
        if self._deciders is not None:
            raise RuntimeError("this control plane is serving already")
        check = None if tokens is None else TokenCheck(tokens)
        servicer = Servicer(self._book, self._answer_dns, self._admit, check, self._limits)
        self._deciders = Deciders(self._policy_for, self._decided, self._limits)
        try:
            self._server = await listen(servicer, address, tls, insecure=insecure, limits=self._limits)
        except BaseException:
            self._deciders = None
            raise
        work = asyncio.create_task(self._work(self._deciders), name="control plane")
        body = asyncio.current_task()
        work.add_done_callback(functools.partial(_give_up, body))
        proof = (tls is not None and tls.client_ca is not None) or tokens is not None or self._admit is not None
        if not proof and not is_local(address):
            effect = "whoever reaches it can connect as any daemon, and is told its policies"
            remedy = "give client_ca (--tls-client-ca), tokens (--token-file) or admit"
            hush.warning("anybody_may_connect", address=self._server.address, effect=effect, remedy=remedy)
        hush.info("control_plane_ready", address=self._server.address, tls=tls is not None, tokens=tokens is not None)
        try:
            yield self
        except asyncio.CancelledError:
            if not _failed(work) or body is None or body.uncancel():
                raise
        finally:
            for record in self._book.records():
                if record.link is not None:
                    record.link.end("UNAVAILABLE", "the control plane is stopping; connect again")
            await self._server.close()
            work.cancel()
            await asyncio.wait({work})
            self._deciders = self._server = None
        if _failed(work):
            raise NetfenceError("the control plane has failed; see its log, and restart it") from work.exception()

    def run(
        self,
        address: str,
        *,
        tls: ServerTls | None = None,
        tokens: Tokens | None = None,
        insecure: bool = False,
    ) -> None:
        """Serve until SIGINT or SIGTERM; arguments as for `serving`. Blocks; for a program that does nothing else.

        SIGHUP is ignored where nobody handles it: to lose its terminal, or to be told to reload, is no reason to end.
        """

        async def serve() -> None:
            stopped = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stopped.set)
            if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
                asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: None)
            async with self.serving(address, tls=tls, tokens=tokens, insecure=insecure):
                await stopped.wait()

        raise_open_files()
        uvloop.run(serve())

    @property
    def address(self) -> str:
        """Where it serves, ``host:port`` or ``unix:/path``; empty while it does not."""
        return "" if self._server is None else self._server.address

    @property
    def daemons(self) -> tuple[DaemonStatus, ...]:
        """Every daemon, those included that were here within `Limits.forget_after_s`: a snapshot."""
        return tuple(record.status() for record in self._book.records())

    @property
    def attachments(self) -> tuple[AttachmentStatus, ...]:
        """Every attachment of every daemon: a snapshot, some 2 µs an attachment."""
        return tuple(entry.status() for entry in self._book.entries())

    @property
    def changes(self) -> int:
        """A number that grows with whatever the snapshots show: as long as it stays, none need be taken."""
        return self._book.changes

    async def update(self, where: Where = None, *, timeout_s: float = 30.0, retry_refused: bool = False) -> Results:
        """Ask `policy_for` again, send what differs, and return each daemon's result.

        `where` tells which attachments: an id, a mapping that their metadata must contain, a predicate, or None for
        all. Returns when every one is settled or `timeout_s` is over; what is not settled then goes on by itself and
        is PENDING in the results. With `retry_refused` what a daemon has refused is sent to it once more, as after a
        repair on its host. Never raises for what a daemon did.
        """
        if self._deciders is None:
            raise RuntimeError("update: this control plane is not serving")
        entries = self._select(where)
        push = Push(entries)
        for entry in entries:
            if retry_refused:
                entry.forget_refusal()
            self._ask(entry)
            entry.join(push)
            if entry.record.link is None:
                entry.lose()
        return await push.wait(timeout_s)

    # -- leaves --------------------------------------------------------------------------------------------------------

    def _select(self, where: Where) -> list[Entry]:
        if where is None:
            return list(self._book.entries())
        if isinstance(where, str):
            return self._book.with_id(where)
        if isinstance(where, Mapping):
            wanted = dict(where).items()
            return [entry for entry in self._book.entries() if wanted <= entry.attachment.metadata.items()]
        return [entry for entry in self._book.entries() if where(entry.attachment)]

    def _ask(self, entry: Entry) -> None:
        if self._deciders is not None and entry.record.link is not None:
            self._deciders.ask(entry)

    def _decided(self, entry: Entry) -> None:
        self._book.changes += 1
        if entry.record.link is not None:
            entry.record.link.offer(entry)

    async def _work(self, deciders: Deciders) -> None:
        """Do what goes on by itself."""
        async with asyncio.TaskGroup() as group:
            group.create_task(deciders.run(), name="deciders")
            group.create_task(self._sweep(), name="sweep")

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._book.sweep()


def raise_open_files() -> None:
    """Allow this process as many open files as it may have: every daemon is one, and 1024 is a common soft limit."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ValueError, OSError) as error:  # the hard limit may be above what the kernel grants
        hush.warning("open_files_not_raised", limit=soft, error=str(error))


def _give_up(body: asyncio.Task[Any] | None, work: asyncio.Task[None]) -> None:
    """End the body of `serving` with its work: a process that lives on and decides nothing would not be restarted."""
    if _failed(work):
        hush.error("control_plane_failed", effect="policies are decided no more", exc_info=work.exception())
        if body is not None:
            body.cancel()


def _failed(work: asyncio.Task[None]) -> bool:
    return work.done() and not work.cancelled() and work.exception() is not None
