"""One attachment while it lives: the only writer of its policy, and the gate of its DNS server.

Commands run one after the other under a lock: new policy from the old one, switch in the kernel, holds of names that
are no longer allowed dropped, their leases closed, policy stored, acknowledged. Order and failures are chosen so that
nothing opens:

- a refused command changes nothing, neither here nor in the kernel;
- leases are opened in the kernel before they are booked, and closed there after their last hold went;
- when the store fails after the switch, the old policy is switched back in and the command fails. Leases closed
  meanwhile stay closed: the next query opens them again;
- work that began is finished even when the caller is cancelled.

Knows no target, no hook and no socket: those are `lifecycle`'s.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from netfence import policy_codec
from netfence.control.port import AttachmentView, ControlPort
from netfence.dns.gate import ProxyAnswer
from netfence.errors import ExhaustedError, NetfenceError, NotFoundError, PreconditionError
from netfence.policy.commands import BulkUpdate, Command, apply
from netfence.policy.leases import LeaseBook, lease_expiry
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import EMPTY, Policy
from netfence.store import Row
from netfence.tasks import finish

PROXY = "\0proxy"  # holder of leases the control plane ordered; no name reads like this
UNKNOWN = "\0unknown"  # holder of leases found in the kernel after a restart
BULK = 500  # rules from which a command is worth a thread: below, the thread costs more than the work
CHUNK = 512  # kernel deletes in one go on the event loop, about 1 ms
COMPLAIN_S = 10.0  # a full lease table is logged at most this often per attachment

log = structlog.get_logger(__name__)


class Kernel(Protocol):
    """What an attachment needs of the data plane; see `netfence.dataplane.plane.DataPlane`."""

    async def apply(self, slot: int, policy: Policy, old: Policy | None) -> None:
        """Switch the slot to `policy` between two packets, or raise with `old` still in force."""
        ...

    def open_leases(self, slot: int, addresses: Sequence[bytes], expiry: float) -> None:
        """Open all of these packed addresses until `expiry`, or raise with none of the new ones open."""
        ...

    def close_leases(self, slot: int, addresses: Iterable[bytes]) -> None:
        """Close these packed addresses."""
        ...

    async def sweep(self, slot: int) -> set[bytes]:
        """Remove leases that pass nothing any more and return their packed addresses."""
        ...


class Saver(Protocol):
    """What an attachment needs of the store."""

    async def save(self, row: Row, encode: Callable[[], str]) -> None:
        """Store the policy that `encode` tells, and what the row says of it, durably, or raise NetfenceError."""
        ...


@dataclass(frozen=True, slots=True)
class LeaseLimits:
    """How long leases live, in seconds, and how many there may be (semantics.md 5, 26)."""

    min_s: float
    grace_s: float
    max_s: float
    max_leases: int


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
    ) -> None:
        self.row = row
        self.active = False  # the first policy is in force and stored
        self.policy_hash = policy.hash()
        self._policy = policy
        self._in_kernel: Policy | None = None
        self._generation = 0
        self._kernel, self._store, self._control, self._limits = kernel, store, control, limits
        self._leases = LeaseBook()
        self._lock = asyncio.Lock()
        self._closed = False
        self._complaint = self._audit_complaint = 0.0  # when the next one may be logged
        self.audited_names = 0
        self.queries_allowed, self.queries_blocked = row.dns_allowed, row.dns_blocked
        self.refused_leases = 0
        self.log = log.bind(attachment=row.id, target=row.name)

    # -- what the DNS server asks (Gate) ---------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """Return the policy of this moment."""
        return self._policy

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
        now = time.monotonic()
        limits = self._limits
        expiry = lease_expiry(now, ttl_s, limits.min_s, limits.grace_s, limits.max_s)
        book = self._leases
        try:
            self._make_room(addresses, now)
            self._kernel.open_leases(self.row.slot, addresses, expiry)  # renewals never shorten, there as here
        except NetfenceError as error:
            self.refused_leases += 1
            self._kernel.close_leases(self.row.slot, [address for address in addresses if address not in book])
            self._complain(name, error, now)
            raise
        for address in addresses:
            book.hold(holder, address, expiry)

    async def ask_control_plane(self, name: str, qtype: str) -> ProxyAnswer:
        """Ask about one name in DNS mode `proxy`. Raises UnavailableError or DeadlineError."""
        return await self._control.query_dns(self.row.id, name, qtype)

    def note_audit(self, name: str, addresses: Sequence[bytes], why: str) -> None:
        """Report a name that only `audit` let through; at most one line in `COMPLAIN_S`, the count says how many."""
        self.audited_names += 1
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
        # Taken before any suspension, so that commands take effect in the order of the calls.
        async with self._lock:
            if self._closed:
                raise NotFoundError(f"apply a command to {self.row.id}: it was detached")
            await finish(self._apply(command, version), f"apply {self.row.id}")

    async def _apply(self, command: Command, version: str) -> None:
        old = self._policy
        now = time.monotonic()
        if _rules(command) + len(old.cidrs) + len(old.dns.domains) > BULK:
            new, digest = await asyncio.to_thread(_compute, old, command, now)
        else:
            new, digest = _compute(old, command, now)
        await self._switch(new)
        await self._drop_holds(old, new)
        try:
            await self._save(new, version)
        except NetfenceError:
            await self._switch_back(old)
            raise
        self.policy_hash = digest
        self.active = True
        self.log.info("policy_applied", command=type(command).__name__, version=version, mode=new.mode.name.lower())

    async def keep_start_policy(self) -> None:
        """Go on without a first policy: nobody waits for one. The target stays in `start_mode`, durably."""
        async with self._lock:
            await finish(self._save(self._policy, ""), f"store {self.row.id}")
            self.active = True

    async def take_over(self, leases: Mapping[bytes, float]) -> None:
        """Begin after a restart: with the restored policy, and the leases (address → expiry) that outlived the daemon.

        Nobody knows any more which names hold those, so they are dropped by the first command that denies anything.
        """
        for address, expiry in leases.items():
            self._leases.hold(UNKNOWN, address, expiry)
        async with self._lock:
            await finish(self._switch(self._policy), f"take over {self.row.id}")
            self.active = True

    async def maintain(self, now: float) -> None:
        """Remove what expired: TTL entries from the policy, leases from kernel and book. `now` is monotonic seconds."""
        async with self._lock:
            if self._closed or not self.active:
                return
            await finish(self._maintain(now), f"maintain {self.row.id}")

    async def close(self) -> None:
        """Wait for the command in progress and refuse all further ones."""
        async with self._lock:
            self._closed = True
            self._generation += 1

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
        )

    # -- steps ------------------------------------------------------------------------------------------------------

    async def _switch(self, new: Policy) -> None:
        if new is not self._in_kernel:
            await self._kernel.apply(self.row.slot, new, self._in_kernel)
        self._in_kernel = self._policy = new
        self._generation += 1

    async def _switch_back(self, old: Policy) -> None:
        try:
            await self._switch(old)
        except NetfenceError as error:
            # The kernel is the truth: the new policy is in force, unstored; the caller hears of the first failure.
            effect = "the refused command is in force"
            self.log.error("policy_not_rolled_back", error=str(error), effect=effect)  # noqa: TRY400 - expected kind

    async def _save(self, policy: Policy, version: str) -> None:
        encode = functools.partial(policy_codec.encode, policy, policy_codec.Clock.now())
        allowed, blocked = self.queries_allowed, self.queries_blocked
        row = replace(self.row, policy_version=version, dns_allowed=allowed, dns_blocked=blocked)
        await self._store.save(row, encode)
        self.row = replace(self.row, policy_version=version)

    async def _drop_holds(self, old: Policy, new: Policy) -> None:
        """Drop the holds that `new` does not allow and close the leases that nothing holds any more.

        `new` is in force already, so that no denied name can get a new hold meanwhile.
        """
        holders = {holder for _, holder, _ in self._leases.export()}
        if new.dns.mode is not old.dns.mode:
            denied = list(holders)
        elif len(holders) > BULK or UNKNOWN in holders:
            denied = await asyncio.to_thread(_denied, old, new, holders)
        else:
            denied = _denied(old, new, holders)
        for start in range(0, len(denied), CHUNK):
            self._drop(frozenset(denied[start : start + CHUNK]))
            await asyncio.sleep(0)

    def _drop(self, denied: frozenset[str]) -> None:
        slot = self.row.slot
        shortened: list[tuple[bytes, float]] = []
        free = self._leases.drop_names(lambda holder: holder not in denied, lambda *lease: shortened.append(lease))
        self._kernel.close_leases(slot, free)
        for address, expiry in shortened:  # another name holds it still, but not for so long
            self._kernel.close_leases(slot, [address])
            self._kernel.open_leases(slot, [address], expiry)

    async def _maintain(self, now: float) -> None:
        live = replace(self._policy, cidrs=self._policy.cidrs.live(now))
        if live.cidrs is not self._policy.cidrs:
            generation = self._generation
            await self._switch(live)
            self._generation = generation  # nothing that was in force changed
        removed = await self._kernel.sweep(self.row.slot)
        for address in self._leases.expired(now):  # one opened again meanwhile is not among them
            if address in removed:
                self._leases.forget(address)

    def _holder(self, name: str) -> str | None:
        """Return who holds the leases of this answer, None when it opens nothing."""
        policy = self._policy
        if self._closed:
            raise NotFoundError(f"open addresses of {name} for {self.row.name}: it was detached")
        if policy.dns.mode is DnsMode.DISABLED:
            return None
        if _keeps(policy, PROXY):
            return PROXY
        verdict = policy.judge_name(name)
        if verdict.allowed:
            return name
        if policy.audit:
            return None
        raise PreconditionError(f"open addresses of {name} for {self.row.name}: denied meanwhile ({verdict.why})")

    def _make_room(self, addresses: Sequence[bytes], now: float) -> None:
        book, limit = self._leases, self._limits.max_leases
        excess = len(book) + book.would_add(addresses) - limit
        if excess <= 0:
            return
        wanted = set(addresses)
        gone = [address for address in book.expired(now) if address not in wanted][: max(excess, CHUNK)]
        self._kernel.close_leases(self.row.slot, gone)
        for address in gone:
            book.forget(address)
        if len(book) + book.would_add(addresses) > limit:
            raise ExhaustedError(
                f"open {len(addresses)} addresses for {self.row.name}: it has {len(book)} live leases of"
                f" dns.max_leases={limit}; raise dns.max_leases, or lower dns.max_lease"
            )

    def _complain(self, name: str, error: NetfenceError, now: float) -> None:
        if now >= self._complaint:
            self._complaint = now + COMPLAIN_S
            self.log.warning("lease_refused", name=name, error=str(error), since_start=self.refused_leases)


def dns_address(row: Row) -> str:
    """Return ``host:port``, IPv6 in brackets."""
    return f"[{row.dns_host}]:{row.dns_port}" if ":" in row.dns_host else f"{row.dns_host}:{row.dns_port}"


def _compute(old: Policy, command: Command, now: float) -> tuple[Policy, str]:
    new = apply(old, command, now)
    return new, new.hash()


def _rules(command: Command) -> int:
    """Count the rules a command brings."""
    if not isinstance(command, BulkUpdate):
        return 1
    names = len(command.dns.allow) + len(command.dns.deny) if command.dns is not None else 0
    return len(command.allow_cidrs) + len(command.deny_cidrs) + names


def _keeps(new: Policy, holder: str) -> bool:
    """Tell whether the policy lets this holder keep its leases."""
    if holder == PROXY:
        return new.dns.mode is DnsMode.PROXY and (new.mode is not Mode.BLOCK_ALL or new.audit)
    return new.judge_name(holder).allowed


def _denied(old: Policy, new: Policy, holders: Iterable[str]) -> list[str]:
    """Return the holders that `new` denies. Of those we do not know we know only that `old` allowed them."""
    return [holder for holder in holders if (_tighter(old, new) if holder == UNKNOWN else not _keeps(new, holder))]


def _tighter(old: Policy, new: Policy) -> bool:
    """Tell whether `new` may deny a name that `old` allowed; both have the same DNS mode."""
    if new.mode is Mode.BLOCK_ALL and not new.audit:
        return True
    before, after = set(old.dns.domains.rules()), set(new.dns.domains.rules())
    return any(rule.allow for rule in before - after) or any(not rule.allow for rule in after - before)
