"""One attachment while it lives: the only writer of its policy, and the gate of its DNS server.

Commands run one after the other under a lock: new policy from the old one, switch in the kernel, holds of names that
are no longer allowed dropped, their leases closed, policy stored, acknowledged. Order and failures are chosen so that
nothing opens:

- a refused command changes nothing, neither here nor in the kernel;
- leases are opened in the kernel before they are booked, and closed there after their last hold went;
- when anything fails after the switch, the old policy is switched back in and the command fails. Leases closed
  meanwhile stay closed, the next query opens them again; those that only the new policy allowed are closed;
- work that began is finished even when the caller is cancelled;
- what a death of the daemon cut off between switch and store is undone by the next one, which finds a note of it in the
  kernel: who gave the command was not told that it was carried out.

Commands that wait together are judged one by one and take effect together: one switch, one write to disk.

While the control plane is away for too long (`ControlPort.stale`) `block_all` is in force instead of the policy, which
stays what commands change and what is stored.

Leases are kept by `leasing`. Knows no target, no hook and no socket: those are `lifecycle`'s.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Protocol

import structlog

from netfence import policy_codec
from netfence.audited import AuditMemory
from netfence.control.port import AttachmentView, ControlPort, FirstPolicy
from netfence.dns.gate import ProxyAnswer
from netfence.errors import ExhaustedError, NetfenceError, NotFoundError, PreconditionError
from netfence.judging import Given, Refusals, Versioned, blocked, given, is_large, judge, raise_first, told_apart
from netfence.leasing import PROXY, LeaseKernel, LeaseLimits, Leases, LeaseTable, keeps
from netfence.policy.commands import BulkUpdate, Command
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import EMPTY, Policy
from netfence.policy.search import judge_asked
from netfence.store import Row
from netfence.tally import Tally
from netfence.tasks import finish

COMPLAIN_S = 10.0  # a full lease table is logged at most this often per attachment

log = structlog.get_logger(__name__)


class Kernel(LeaseKernel, Protocol):
    """What an attachment needs of the data plane; see `netfence.dataplane.plane.DataPlane`."""

    async def apply(self, slot: int, policy: Policy, old: Policy | None, *, start: bool = False) -> None:
        """Switch the slot to `policy` (`start`: `start_mode`) between two packets, or raise with `old` in force."""
        ...

    def note_unstored(self, slot: int, unstored: bool) -> None:
        """Note, for the next daemon, that the slot is switched to what is not stored yet, or that it is stored."""
        ...

    def unstored(self, slot: int) -> bool:
        """Tell what was noted last, by a daemon before us too."""
        ...


class Saver(Protocol):
    """What an attachment needs of the store."""

    async def save(self, row: Row, encode: Callable[[], str]) -> None:
        """Store the policy that `encode` tells, and what the row says of it, durably, or raise NetfenceError."""
        ...


def start_policy(mode: Mode) -> Policy:
    """Return what holds between the hook and the first policy: nothing but the packet mode."""
    return replace(EMPTY, mode=mode)


class Attachment:
    """An attachment; implements `netfence.dns.server.Gate`. Use it only on the event loop."""

    def __init__(
        self,
        row: Row,
        policy: Policy,
        *,
        kernel: Kernel,
        store: Saver,
        control: ControlPort,
        limits: LeaseLimits,
        table: LeaseTable,
        tally: Tally | None = None,
    ) -> None:
        self.row = row
        self.active = False  # the first policy is in force and stored
        self._stored = policy  # what commands made
        self._policy = blocked(policy) if control.stale else policy  # in force: that, or block_all while stale
        self.policy_hash = self._policy.hash()
        self._in_kernel: Policy | None = None
        self._generation = 0
        self._made_by: Given | None = None  # keeps the policy shared, while no other command changed it
        self._kernel, self._store, self._control = kernel, store, control
        self._leases = Leases(row.slot, kernel, limits, table)
        self._tally = tally or Tally()
        self._suffixes = limits.suffixes
        self._lock = asyncio.Lock()
        self._closed = False
        self._complaint = self._audit_complaint = 0.0  # when the next one may be logged
        self.audited_names = 0
        self.audited = AuditMemory()
        self.queries_allowed, self.queries_blocked = row.dns_allowed, row.dns_blocked
        self._queries_before = row.dns_allowed, row.dns_blocked
        self.refused_leases = 0
        self.log = log.bind(attachment=row.id, target=row.name)

    # -- what the DNS server asks (Gate) ---------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """Return the policy of this moment."""
        return self._policy

    @property
    def commanded(self) -> Policy:
        """Return what commands made: `policy`, but where block_all is in force in its place (`ControlPort.stale`)."""
        return self._stored

    @property
    def queries(self) -> tuple[int, int]:
        """Return the queries allowed and blocked since the daemon's start; what was stored before is left out."""
        allowed, blocked = self._queries_before
        return self.queries_allowed - allowed, self.queries_blocked - blocked

    @property
    def leases(self) -> int:
        """Return how many addresses are leased."""
        return len(self._leases)

    @property
    def generation(self) -> int:
        """Return a number that changes with every command: answers kept under another one are void."""
        return self._generation

    def note_query(self, allowed: bool) -> None:
        """Count a query."""
        if allowed:
            self.queries_allowed += 1
        else:
            self.queries_blocked += 1

    def learn(self, name: str, addresses: Sequence[bytes], ttl_s: float) -> None:
        """Open leases in the kernel for the packed addresses of an allowed name; microseconds each.

        Judged by the policy of this moment: raises PreconditionError when the name was denied since the question was
        asked, ExhaustedError when no room is left for a new lease, and then opens none of them.
        """
        holder = self._holder(name)
        if holder is None or not addresses:
            return
        try:
            self._leases.open(holder, addresses, ttl_s)
        except NetfenceError as error:
            self._complain(name, error)
            raise

    async def ask_control_plane(self, name: str, qtype: str) -> ProxyAnswer:
        """Ask about one name in DNS mode `proxy`. Raises UnavailableError or DeadlineError."""
        return await self._control.query_dns(self.row.id, name, qtype)

    def note_audit(self, name: str, addresses: Sequence[bytes], why: str, chain: Sequence[str] = ()) -> None:
        """Remember a name that only `audit` let through, and report it: one line in `COMPLAIN_S`, with a count."""
        self.audited_names += 1
        self.audited.note(name, addresses, chain)
        now = time.monotonic()
        if now >= self._audit_complaint:
            self._audit_complaint = now + COMPLAIN_S
            counts = {"addresses": len(addresses), "since_start": self.audited_names}
            self.log.info("would_deny_name", name=name, why=why, **counts)

    # -- commands ---------------------------------------------------------------------------------------------------

    async def apply(self, command: Command, version: str = "") -> None:
        """Apply a command as one and store it (see the module). Finished even when the caller is cancelled.

        Raises InvalidError with every fault, ExhaustedError when a table is full, NotFoundError once closed.
        """
        raise_first(await self.apply_all([(command, version)]))

    async def apply_all(self, commands: Sequence[Versioned]) -> Refusals:
        """Apply commands in order; return for each why it was refused, or None. See `ControlHost.apply_all`."""
        # Taken before any suspension, so that commands take effect in the order of the calls.
        async with self._lock:
            if self._closed:
                raise NotFoundError(f"apply a command to {self.row.id}: it was detached")
            return await finish(self._apply_counted(commands), f"apply {self.row.id}")

    async def _apply_counted(self, commands: Sequence[Versioned]) -> Refusals:
        refusals = await self._apply_each(commands)
        self._tally.note_commands(refusals)
        return refusals

    async def _apply_each(self, commands: Sequence[Versioned]) -> Refusals:
        """Apply commands together; should kernel or store refuse them so, one by one: each has its own fate."""
        try:
            return await self._apply(commands)
        except Exception as error:
            if len(commands) == 1:
                if isinstance(error, NetfenceError):
                    return [error]
                self.log.exception("command_failed", error=str(error))
                what = f"apply {type(commands[0][0]).__name__} to {self.row.id}"
                return [NetfenceError(f"{what}: internal error; the daemon's log has the details")]
        return [refusal for one in commands for refusal in await self._apply_each([one])]

    async def _apply(self, commands: Sequence[Versioned]) -> Refusals:
        old = self._stored
        work = functools.partial(judge, old, commands, time.monotonic())
        steps, refusals = await asyncio.to_thread(work) if is_large(old, commands) else work()
        new = steps[-1]
        done = [one for one, refusal in zip(commands, refusals, strict=True) if refusal is None]
        if not done:
            return refusals
        self._kernel.note_unstored(self.row.slot, True)
        try:
            await self._switch(new)
        except Exception:
            self._kernel.note_unstored(self.row.slot, False)
            raise
        acked = self.row.acked or any(isinstance(command, BulkUpdate) for command, _ in done)
        try:
            for before, after in pairwise(told_apart(steps)):
                await self._leases.drop_denied(before, after)
            digest = await self._digest()
            await self._save(new, done[-1][1], acked=acked)
        except Exception:
            await self._switch_back(new, old)
            raise
        self._kernel.note_unstored(self.row.slot, False)
        self.policy_hash = digest
        self.active = True
        command, version = done[-1]
        self._made_by = given(command, new)
        many = {"commands": len(done)} if len(done) > 1 else {}
        mode = new.mode.name.lower()
        self.log.info("policy_applied", command=type(command).__name__, version=version, mode=mode, **many)
        return refusals

    async def begin(self, first: FirstPolicy | None) -> None:
        """Apply the first policy, as `apply` does; None: stay with the start policy, durably: nobody waits for one.

        After a failure, or when the caller goes away, nothing more is accepted: a command that waits behind this one
        may not bring to life what is being rolled back.
        """
        settled = first.settled if first is not None else None
        try:
            async with self._lock:
                if first is not None:
                    await finish(self._apply_first(first), f"apply {self.row.id}")
                else:
                    await finish(self._begin_unacked(), f"store {self.row.id}")
        except BaseException as error:
            self.shut()
            if settled is not None:
                settled(error)
            raise
        if settled is not None:
            settled(None)

    async def _apply_first(self, first: FirstPolicy) -> None:
        raise_first(await self._apply_counted([(first.update, first.version)]))

    async def _begin_unacked(self) -> None:
        if self._control.stale or self._policy is not self._stored:  # whatever start_mode says
            await self._switch(self._stored)
            self.policy_hash = await self._digest()
        await self._save(self._stored, "", acked=False)
        self.active = True

    def adopt(self, leases: Mapping[bytes, float]) -> None:
        """Book leases (packed address → expiry) that outlived a daemon.

        Nobody knows any more which names hold those, so they are dropped by the first command that denies anything.
        """
        self._leases.adopt(leases)

    async def take_over(self, hook: Callable[[], Awaitable[None]]) -> None:
        """Have the hooks put in place by `hook`, then our policy in force, whatever the kernel had, as one step.

        Raises what `hook` and the kernel raise; NotFoundError once closed.
        """
        async with self._lock:
            if self._closed:
                raise NotFoundError(f"take over {self.row.id}: it was detached")

            async def work() -> None:
                await hook()
                self._in_kernel = None
                row, begun = self.row, self._stored != start_policy(self._stored.mode)
                await self._switch(self._stored, start=not (row.acked or row.policy_version or begun))
                if self._kernel.unstored(row.slot):
                    effect = "the one before it is in force again; nobody was told that it was carried out"
                    self.log.warning("command_undone", why="it was in force and not stored", effect=effect)
                    self._kernel.note_unstored(row.slot, False)
                self.policy_hash = await self._digest()
                self.active = True

            await finish(work(), f"take over {self.row.id}")

    async def follow_staleness(self) -> None:
        """Put in force what `ControlPort.stale` asks for: block_all, or the policy again. Raises what the kernel does.

        Nothing to do for one that is not active yet: what makes it so asks too.
        """
        async with self._lock:
            if self.active and not self._closed:
                await finish(self._follow(), f"follow staleness {self.row.id}")

    async def _follow(self) -> None:
        before = self._policy
        await self._switch(self._stored)
        self.policy_hash = await self._digest()
        if self._policy.mode is not before.mode:
            self.log.warning("staleness_followed", stale=self._control.stale, mode=self._policy.mode.name.lower())

    async def maintain(self, now: float) -> None:
        """Remove what expired: TTL entries from the policy, leases from kernel and book. `now` is monotonic seconds."""
        async with self._lock:
            if self._closed or not self.active:
                return
            await finish(self._maintain(now), f"maintain {self.row.id}")

    async def close(self) -> None:
        """Wait for what is in progress and refuse all further commands and leases."""
        async with self._lock:
            self.shut()

    def shut(self) -> None:
        """Refuse all further commands and leases from this moment on; `close` also waits for what is in progress."""
        self._closed = True
        self._generation += 1

    def reopen(self) -> None:
        """Accept commands again: what it was closed for has failed."""
        self._closed = False

    def end(self) -> None:
        """Give back the room of its leases; it is over, and the kernel has none of them any more."""
        self._leases.end()
        self.audited.clear()

    def names_of(self, address: bytes) -> tuple[str, ...]:
        """Return the names whose answers opened the packed address, the latest last."""
        return self._leases.names_of(address)

    def name_for(self, address: bytes) -> str:
        """Return the name that the packed address was given to last, in an answer that opened it or that audit let by.

        "" for an address that nobody asked for.
        """
        names = self.names_of(address)
        return names[-1] if names else self.audited.name_of(address)

    def held_by(self, name: str) -> tuple[bytes, ...]:
        """Return the packed addresses that answers to the name, as it was asked for, have opened."""
        return self._leases.held_by(name)

    def leased_names(self) -> list[str]:
        """Return the names whose answers hold leases."""
        return self._leases.names()

    async def while_open(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Do something that may meet neither a command nor the end; False, and nothing done, once closed."""
        async with self._lock:
            if not self._closed:
                await work()
            return not self._closed

    @property
    def closed(self) -> bool:
        """Tell whether it was detached."""
        return self._closed

    def rename(self, name: str) -> None:
        """Note the interface's new name."""
        self.row = replace(self.row, name=name)
        self.log = self.log.bind(target=name)

    def view(self) -> AttachmentView:
        """Return what control planes may see."""
        row, policy = self.row, self._policy
        return AttachmentView(
            id=row.id,
            target=row.name,
            kind=row.kind,
            metadata=row.metadata,
            dns_address=dns_address(row),
            mode=int(policy.mode),
            dns_mode=int(policy.dns.mode),
            policy_version=row.policy_version,
            policy_hash=self.policy_hash,
            acked=row.acked,
            xdp=row.hook == "xdp",
        )

    # -- steps ------------------------------------------------------------------------------------------------------

    async def _switch(self, stored: Policy, *, start: bool = False) -> None:
        """Put in force what `stored` says (`start`: nobody gave it yet), or, while we are stale, block_all instead."""
        new = blocked(stored) if self._control.stale else stored
        if new is not self._in_kernel:
            began = time.monotonic()
            await self._kernel.apply(self.row.slot, new, self._in_kernel, start=start and new is stored)
            self._tally.switches.note(time.monotonic() - began)
        self._in_kernel = self._policy = new
        self._stored = stored
        self._generation += 1

    async def _digest(self) -> str:
        """Return the hash of what is in force."""
        policy = self._policy
        return await asyncio.to_thread(policy.hash) if is_large(policy) else policy.hash()

    async def _switch_back(self, new: Policy, old: Policy) -> None:
        """Go back to `old`, also in what only `new` let names open meanwhile. The caller hears of the first failure."""
        try:
            await self._switch(old)
        except Exception as error:
            # The kernel is the truth: the new policy is in force, unstored.
            self.log.exception("policy_not_rolled_back", error=str(error), effect="the refused command is in force")
            return
        self._kernel.note_unstored(self.row.slot, False)
        try:
            await self._leases.drop_denied(new, old)
        except Exception as error:
            self.log.exception("leases_not_rolled_back", error=str(error), effect="closing them is tried again")

    async def _save(self, policy: Policy, version: str, *, acked: bool) -> None:
        try:
            now = policy_codec.Clock.now()
        except OSError as error:  # it reads a file
            tried = f"store the policy of {self.row.id}: read the clock: {error.strerror}"
            raise ExhaustedError(f"{tried}; raise the limit of open files (LimitNOFILE)") from error
        encode = functools.partial(policy_codec.encode, policy, now)
        row = replace(
            self.row,
            policy_version=version,
            dns_allowed=self.queries_allowed,
            dns_blocked=self.queries_blocked,
            acked=acked,
        )
        await self._store.save(row, encode)
        self.row = replace(self.row, policy_version=version, acked=acked)

    async def _maintain(self, now: float) -> None:
        live = replace(self._stored, cidrs=self._stored.cidrs.live(now))
        if live.cidrs is not self._stored.cidrs:
            generation, mode = self._generation, self._policy.mode
            await self._switch(live)
            if self._policy.mode is mode:  # nothing that was in force changed; staleness would be
                self._generation = generation
        await self._leases.sweep(now)

    def _holder(self, name: str) -> str | None:
        """Return who holds the leases of this answer, None when it opens nothing."""
        policy = self._policy
        if self._closed:
            raise NotFoundError(f"open addresses of {name} for {self.row.name}: it was detached")
        if policy.dns.mode is DnsMode.DISABLED:
            return None
        if keeps(policy, PROXY):
            return PROXY
        verdict = judge_asked(policy, name, self._suffixes).verdict
        if verdict.allowed:
            return name
        if policy.audit:
            return None
        raise PreconditionError(f"open addresses of {name} for {self.row.name}: denied meanwhile ({verdict.why})")

    def _complain(self, name: str, error: NetfenceError) -> None:
        self.refused_leases += 1
        if (now := time.monotonic()) >= self._complaint:
            self._complaint = now + COMPLAIN_S
            self.log.warning("lease_refused", name=name, error=str(error), since_start=self.refused_leases)


def dns_address(row: Row) -> str:
    """Return ``host:port``, IPv6 in brackets."""
    return f"[{row.dns_host}]:{row.dns_port}" if ":" in row.dns_host else f"{row.dns_host}:{row.dns_port}"
