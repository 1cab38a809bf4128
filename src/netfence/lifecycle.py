"""Attachments from attach to detach: targets, hooks, DNS servers and rows come and go together.

Owns the registry of live attachments, the reservation of targets, and the order of the steps with their way back. The
policy of an attachment is its own business (`attachment`), taking over after a restart is `restore`'s.

An attach is a stack of steps, each with its undoing pushed before it begins; whatever fails, or whoever cancels, the
stack is unwound to its bottom, and afterwards nothing is left (semantics.md 22). Every step runs to its end.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import structlog

from netfence.api.views import AttachmentInfoView, AttachSpec, HookKind
from netfence.attachment import Attachment, dns_address, start_policy
from netfence.config import Config
from netfence.control.port import ControlPort, UnsubscribeReason
from netfence.dataplane.cgroups import CgroupTarget, raw_senders, require_own_cgroup, resolve_cgroup
from netfence.dataplane.config import Static
from netfence.dataplane.target import (
    Direction,
    Hook,
    InterfaceTarget,
    LinkLayer,
    arrival_device,
    choose_direction,
    resolve_interface,
)
from netfence.dns.cache import SharedCache
from netfence.dns.server import DnsServer, Totals
from netfence.dns.settings import DnsSettings
from netfence.dns.upstream import Resolver
from netfence.endpoints import Endpoint, Endpoints
from netfence.errors import ExistsError, InvalidError, NetfenceError, NotFoundError, PreconditionError
from netfence.finding import interface_hint, unknown
from netfence.kernel import Kernel
from netfence.leasing import LeaseLimits, LeaseTable
from netfence.policy.modes import Mode
from netfence.policy.policy import Policy
from netfence.policy.search import search_suffixes
from netfence.store import Row, Store
from netfence.tally import Tally, outcome
from netfence.tasks import finish

Target = InterfaceTarget | CgroupTarget
Key = tuple[str, int]  # ("interface", ifindex) or ("cgroup", id): what a target is, whatever it is called

TIMES_AHEAD = 3
"""How often ours goes in front of what came before it, per attachment and daemon: who insists is only told of then.

Without an end two daemons that both want to be first would move for ever, and both filters cost twice meanwhile.
"""

SHOWN_SENDERS = 5  # pids named in the warning about CAP_NET_RAW

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Live:
    """An attachment with what belongs to it, and how far it is.

    `attached` is set in one go with giving up the roll-back: who ends it, the roll-back or `Lifecycle.end`, is never
    in doubt. `ended`: nothing of it is left. `gone`: its target went away. `hooked`: its hooks are in place, or partly;
    `hook_lost`: one of them was taken away while it was being attached.
    """

    attachment: Attachment
    target: Target
    direction: Direction | None
    server: DnsServer
    endpoint: Endpoint
    attached: bool = False
    ended: bool = False
    gone: bool = False
    hooked: bool = False
    hook_lost: bool = False
    in_front: list[str] = field(default_factory=list)  # foreign programs before ours, as last seen
    times_ahead: int = 0  # how often ours has passed such

    @property
    def row(self) -> Row:
        """Return what is stored of it."""
        return self.attachment.row


class Watch(Protocol):
    """What tells us about the fate of targets; see `targets.Watchers`."""

    def watch(self, target: Target) -> None:
        """Begin to tell."""
        ...

    def unwatch(self, target: Target) -> None:
        """Tell no more."""
        ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What attachments are made with."""

    config: Config
    plane: Kernel
    store: Store
    control: ControlPort
    endpoints: Endpoints
    dns: DnsSettings
    cache: SharedCache
    resolver: Resolver
    watch: Watch
    boot_id: str


class Lifecycle:
    """All attachments of the daemon. Use it only on the event loop."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._live: dict[str, Live] = {}
        self._targets: dict[Key, str] = {}
        config = parts.config
        self._limits = LeaseLimits(
            config.dns.min_lease,
            config.dns.lease_grace,
            config.dns.max_lease,
            config.dns.max_leases,
            search_suffixes(config.dns.search_domains),
        )
        self.table = LeaseTable(config.dns.max_leases_total)
        self.tally, self.dns_totals = Tally(), Totals()

    def __len__(self) -> int:
        return sum(live.attached for live in self._live.values())

    def all(self) -> list[Live]:
        """Return every attachment that is attached, its first policy in force, oldest first."""
        return sorted(
            (live for live in self.every() if live.attached), key=lambda live: (live.row.attached_at, live.row.id)
        )

    def every(self) -> list[Live]:
        """Return every attachment, also those being attached."""
        return list(self._live.values())

    def get(self, attachment_id: str) -> Live | None:
        """Return an attachment by its id, also one being attached."""
        return self._live.get(attachment_id)

    def find(self, attachment_id: str, what: str) -> Live:
        """Return an attachment by its id; NotFoundError, with whom `what` may have meant, for an unknown one."""
        live = self._live.get(attachment_id)
        if live is None or not live.attached:
            raise unknown(what, attachment_id, ((one.row.id, one.row.name) for one in self.every() if one.attached))
        return live

    def by_target(self, key: Key) -> Live | None:
        """Return the attachment of a target, also one being attached."""
        return self._live.get(self._targets.get(key, ""))

    # -- attach -------------------------------------------------------------------------------------------------------

    async def attach(self, spec: AttachSpec) -> Live:
        """Fence a target, or leave nothing behind (semantics.md 22)."""
        try:
            live = await self._attach(spec)
        except Exception as error:
            self.tally.attaches[outcome(error)] += 1
            raise
        self.tally.attaches[outcome(None)] += 1
        return live

    async def _attach(self, spec: AttachSpec) -> Live:
        name = spec.interface if spec.interface is not None else str(spec.cgroup)
        self.parts.control.check(name)
        async with AsyncExitStack() as undo:
            target = await self._resolve(undo, spec, name)
            direction = _direction(target, spec)
            attachment_id = str(uuid.uuid4())
            self._reserve(target, attachment_id)
            undo.callback(self._targets.pop, key_of(target), None)
            live = await self._build(undo, attachment_id, target, direction, spec)
            try:
                await self._open(undo, live)
            except asyncio.CancelledError:
                await self._unsubscribe(live, UnsubscribeReason.ERROR, "the caller went away")
                raise
            except Exception as error:
                await self._unsubscribe(live, UnsubscribeReason.ERROR, str(error))
                raise
            # One step, and no suspension since `_open` has looked: from here on `end` is the only way out.
            undo.pop_all()
            live.attached = True
        row = live.row
        live.attachment.log.info(
            "attached", mechanism=row.mechanism, direction=row.direction, dns=dns_address(row), slot=row.slot
        )
        return live

    async def _resolve(self, undo: AsyncExitStack, spec: AttachSpec, name: str) -> Target:
        """Look the target up; a cgroup's descriptor is closed by the roll-back, also when the caller went away."""

        async def work() -> Target:
            target = await asyncio.to_thread(_resolve, spec)
            if isinstance(target, CgroupTarget):
                undo.callback(target.close)
            return target

        return await finish(work(), f"resolve {name}")

    async def _build(
        self, undo: AsyncExitStack, attachment_id: str, target: Target, direction: Direction | None, spec: AttachSpec
    ) -> Live:
        """Reserve slot and DNS endpoint, store the row, put the hook in place with `start_mode`."""
        parts = self.parts
        slot = parts.plane.allocate_slot()
        undo.callback(parts.plane.free_slot, slot)
        row = _row(attachment_id, slot, target, direction, spec, parts.boot_id)
        live = self.make(row, target, direction, start_policy(Mode[parts.config.enforcement.start_mode.upper()]))
        undo.callback(live.attachment.end)
        undo.push_async_callback(_undo, live.server.close, "close the DNS server")
        await finish(self._reserve_dns(undo, live), f"reserve DNS for {row.name}")
        endpoint = live.endpoint
        live.attachment.row = replace(row, dns_host=endpoint.host, dns_port=endpoint.port)
        self._live[attachment_id] = live
        undo.callback(self._live.pop, attachment_id, None)
        undo.callback(parts.watch.unwatch, target)
        parts.watch.watch(target)
        undo.push_async_callback(_undo, lambda: self._remove_row(live), "remove the stored state")
        await finish(parts.store.reserve(live.row), f"store {row.name}")
        undo.push_async_callback(_undo, lambda: self._unhook(live), "take the hooks off")
        live.hooked = True
        attach = parts.plane.attach(slot, target, self.static(live), direction, attachment_id)
        mechanism = await finish(attach, f"attach {row.name}")
        live.attachment.row = replace(live.row, mechanism=mechanism)
        return live

    async def _reserve_dns(self, undo: AsyncExitStack, live: Live) -> None:
        live.endpoint = endpoint = await self.parts.endpoints.reserve(live.server.start)
        undo.push_async_callback(_undo, lambda: self.parts.endpoints.release(endpoint), "release the DNS endpoint")

    async def _unhook(self, live: Live) -> None:
        await self.parts.plane.detach(live.row.slot, live.target, live.row.id)
        live.hooked = False

    async def _remove_row(self, live: Live) -> None:
        """Remove the row in a roll-back; it stays while hooks do, or the next start would not know whose they are."""
        if live.hooked:
            live.attachment.log.error("row_kept", effect="its hooks are still there; the next start takes them off")
            return
        await self.parts.store.remove(live.row.id)

    async def _open(self, undo: AsyncExitStack, live: Live) -> None:
        """Get the first policy and apply it."""
        attachment = live.attachment
        undo.push_async_callback(_undo, attachment.close, "refuse further commands")
        try:
            first = await self.parts.control.subscribe(attachment.view())
            # No suspension between the policy's decision and its place in the attachment's queue: see ControlPort.
            await attachment.begin(first)
        except BaseException as error:
            attachment.shut()  # before anybody hears of it: what comes behind a failed ack is for nobody
            if not isinstance(error, InvalidError):
                raise
            what = f"attach to {live.row.name}: the control plane's SubscribedAck is refused"
            raise InvalidError([f"{what}: {error.errors[0]}", *error.errors[1:]]) from error
        while live.hook_lost:
            live.hook_lost = False
            await finish(attachment.while_open(lambda: self.put_back(live)), f"put back {live.row.name}")
        if live.gone:
            raise NotFoundError(f"attach to {live.row.name}: it was removed meanwhile; attach the new one")

    async def put_back(self, live: Live) -> None:
        """Attach what somebody took away of its hooks; inside `while_open`."""
        if not await self.parts.plane.put_back(live.row.slot, live.target, live.direction, live.row.id):
            self.tally.hooks_put_back += 1
            live.attachment.log.error("hook_put_back", effect=f"somebody removed it; {_meanwhile(live.row)}")
            await self._note_mechanism(live)

    def make(self, row: Row, target: Target, direction: Direction | None, policy: Policy) -> Live:
        """Make the objects of an attachment; nothing happens yet."""
        parts = self.parts
        attachment = Attachment(
            row,
            policy,
            kernel=parts.plane,
            store=parts.store,
            control=parts.control,
            limits=self._limits,
            table=self.table,
            tally=self.tally,
        )
        device = _dns_device(target, direction)
        dns, totals = parts.dns, self.dns_totals
        server = DnsServer(attachment, dns, parts.cache, parts.resolver, device=device, totals=totals)
        return Live(attachment, target, direction, server, Endpoint(row.dns_host, row.dns_port))

    def register(self, live: Live) -> None:
        """Note a restored attachment; what it was stored with is its policy, whatever becomes of taking it over."""
        self._reserve(live.target, live.row.id)
        self._live[live.row.id] = live
        live.attachment.active = live.attached = True

    def static(self, live: Live) -> Static:
        """Return what the kernel has to know beside the policy. Raises PreconditionError in direction host."""
        config, target = self.parts.config, live.target
        host = live.direction is Direction.HOST
        interface = target if isinstance(target, InterfaceTarget) else None
        return Static(
            dns_address=live.endpoint.packed,
            dns_port=live.endpoint.port,
            xdp=live.row.hook == "xdp",
            l3=interface is not None and interface.layer is LinkLayer.L3,
            cgroup=interface is None,
            host_direction=host,
            daemon_cgroup=require_own_cgroup(live.row.name) if host else 0,
            allow_dhcp=config.enforcement.allow_dhcp,
            replies=config.enforcement.allow_replies,
            allow_link_local=config.enforcement.allow_link_local,
            established_idle_s=config.dns.established_idle,
            established_max_s=config.dns.established_max,
            dns_ports=(config.dns.port_min, config.dns.port_max),
            own_addresses=interface.own_addresses if interface is not None else (),
        )

    def _reserve(self, target: Target, attachment_id: str) -> None:
        """Take a target for one attachment: of two that attach it at once one wins here."""
        other = self._targets.setdefault(key_of(target), attachment_id)
        if other != attachment_id:
            live = self._live.get(other)
            state = f"attached already, as {other}" if live and live.attached else "being attached or detached"
            raise ExistsError(f"attach to {_name(target)}: it is {state}; detach it first")

    # -- detach -------------------------------------------------------------------------------------------------------

    async def detach(self, attachment_id: str) -> None:
        """Take a fence off. Raises NotFoundError."""
        live = self.find(attachment_id, "detach")
        await finish(self.end(live, UnsubscribeReason.DETACHED, whole=True), f"detach {live.row.name}")

    async def end(self, live: Live, reason: UnsubscribeReason, *, whole: bool = False) -> None:
        """Take everything of an attachment away, or, `whole`, leave everything in force.

        When the kernel refuses, the attachment stays in force, its hooks are put back; when the store does, it stays
        listed: in force too if `whole`, else without a fence, until it is ended again. Nothing to do for one that is
        not attached (its roll-back ends it) or is being ended.
        """
        row, parts = live.row, self.parts
        if not live.attached or self._live.get(row.id) is not live:
            return
        del self._live[row.id]
        parts.watch.unwatch(live.target)
        try:
            await live.attachment.close()
            if whole:
                # A store that takes nothing is heard of here, while the leases are still in the kernel.
                counts = (live.attachment.queries_allowed, live.attachment.queries_blocked)
                await parts.store.save_counters({row.id: counts})
            await parts.plane.unhook(row.slot, live.target, row.id)
            live.hooked = False
            await parts.store.remove(row.id)
        except BaseException:
            await self._keep(live, reason, whole=whole)
            raise
        # Behind the row: of one that is cut short and undone, leases and counts go on.
        await _undo(lambda: parts.plane.clear(row.slot), "clear the slot")
        await _undo(live.server.close, "close the DNS server")
        await _undo(lambda: parts.endpoints.release(live.endpoint), "release the DNS endpoint")
        parts.plane.free_slot(row.slot)
        self._targets.pop(key_of(live.target), None)
        live.attachment.end()
        live.ended = True
        if isinstance(live.target, CgroupTarget):
            live.target.close()
        await self._unsubscribe(live, reason, "")
        live.attachment.log.info("detached", reason=reason.name.lower())

    async def _keep(self, live: Live, reason: UnsubscribeReason, *, whole: bool) -> None:
        """Go on with an attachment whose end failed; one whose target is gone has nothing to watch and to hook."""
        live.attachment.reopen()
        self._live[live.row.id] = live
        if reason is UnsubscribeReason.REMOVED:
            return

        async def watch() -> None:
            self.parts.watch.watch(live.target)

        await _undo(watch, "watch the target again")
        if live.hooked or whole:  # some of its hooks or all may be off, and its policy may be out of force
            await _undo(lambda: live.attachment.take_over(lambda: self.hook_again(live)), "put the hooks back")

    async def hook_again(self, live: Live) -> None:
        """Put in place what is missing of its hooks and what the kernel has to know of it."""
        plane, row, static = self.parts.plane, live.row, self.static(live)
        try:
            whole = await plane.restore(row.slot, live.target, static, live.direction, row.id)
        except PreconditionError as error:
            if not static.xdp:
                raise
            # Somebody took it off, and it is refused now. TC fences as well, and is not to wait for it.
            live.attachment.log.exception("xdp_not_attached", error=str(error), effect="TC alone fences it")
            whole = await plane.restore(row.slot, live.target, replace(static, xdp=False), live.direction, row.id)
        await self._note_mechanism(live)
        if not whole:
            self.tally.hooks_put_back += 1
            live.attachment.log.warning("hook_put_back", effect=_meanwhile(live.row))
        live.hooked = True

    async def _note_mechanism(self, live: Live) -> None:
        """Note what fences it now: XDP goes where it is refused, and comes again, or in the other mode."""
        if live.row.hook == "xdp" and isinstance(live.target, InterfaceTarget):
            mechanism = await self.parts.plane.mechanism(live.target, live.row.id)
            live.attachment.row = replace(live.row, mechanism=mechanism)

    async def _unsubscribe(self, live: Live, reason: UnsubscribeReason, error: str) -> None:
        await _undo(lambda: self.parts.control.unsubscribe(live.row.id, reason, error), "unsubscribe")

    # -- what is asked ------------------------------------------------------------------------------------------------

    def info(self, live: Live) -> AttachmentInfoView:
        """Return an attachment as `list` shows it."""
        row, attachment = live.row, live.attachment
        counters = self.parts.plane.counters(row.slot)
        return AttachmentInfoView(
            id=row.id,
            target=row.name,
            hook=_hook(row),
            direction="host" if live.direction is Direction.HOST else "workload",
            attach_mechanism=row.mechanism,
            mode=attachment.policy.mode,
            dns_mode=attachment.policy.dns.mode,
            dns_address=dns_address(row),
            attached_at=row.attached_at,
            metadata=row.metadata,
            packets_allowed=counters.allowed[0],
            packets_blocked=counters.blocked[0],
            dns_queries_allowed=attachment.queries_allowed,
            dns_queries_blocked=attachment.queries_blocked,
            policy_version=row.policy_version,
            policy_hash=attachment.policy_hash,
            packets_would_block=sum(counters.would_packets),
            audit=attachment.policy.audit,
        )

    async def look_in_front(self, live: Live) -> None:
        """Tell of foreign programs that came in front of ours, and pass them where that can be done."""
        try:
            front = await asyncio.to_thread(self.parts.plane.front, live.target, live.direction, live.row.id)
        except NotFoundError:  # the target is gone
            front = []
        if set(front) - set(live.in_front):
            effect = "they see packets first and could pass them around us"
            live.attachment.log.error("programs_in_front", programs=front, effect=effect)
            front = await self._move_ahead(live, front)
        live.in_front = front

    async def _move_ahead(self, live: Live, front: list[str]) -> list[str]:
        """Put ours in front of `front`, never beside a detach; return what stays in front."""
        say, left = live.attachment.log, front

        async def move() -> None:
            nonlocal left
            moving = self.parts.plane.move_ahead(live.target, live.direction, live.row.id)
            left = await finish(moving, f"move {live.row.name} ahead")

        if live.times_ahead == TIMES_AHEAD:
            say.warning("hook_not_moved_ahead", why=f"it was moved {TIMES_AHEAD} times and somebody insists")
            return front
        try:
            await live.attachment.while_open(move)
        except NotFoundError:  # the target is gone
            return front
        except NetfenceError as error:
            say.warning("hook_not_moved_ahead", why=str(error))
            return front
        if passed := [one for one in front if one not in left]:
            live.times_ahead += 1
            say.warning("hook_moved_ahead", passed=passed, in_front=left, effect="it decides before them again")
        return left

    async def warn(self, live: Live) -> None:
        """Say at attach what the fence cannot do for this target (semantics.md 8, loopback DNS, programs in front)."""
        target, say = live.target, live.attachment.log.warning
        if isinstance(target, CgroupTarget):
            senders = await asyncio.to_thread(raw_senders, target.path)
            if senders:
                shown = senders[:SHOWN_SENDERS]
                say("raw_senders", pids=shown, count=len(senders), effect="AF_PACKET of CAP_NET_RAW is not fenced")
        elif live.endpoint.loopback:
            remedy = "set dns.listen_addr to an address of this host that the workload reaches"
            say("dns_on_loopback", dns=str(live.endpoint), effect="the workload cannot resolve names", remedy=remedy)
        await self.look_in_front(live)


def _dns_device(target: Target, direction: Direction | None) -> int:
    """Return the index of the interface by which the workload's queries arrive; 0 where that cannot be told."""
    return 0 if isinstance(target, CgroupTarget) else arrival_device(target, direction or Direction.WORKLOAD)


def key_of(target: Target) -> Key:
    """Return what identifies a target on this host while it exists."""
    if isinstance(target, CgroupTarget):
        return "cgroup", target.cgroup_id
    return "interface", target.ifindex


def _name(target: Target) -> str:
    return target.path if isinstance(target, CgroupTarget) else target.name


def _resolve(spec: AttachSpec) -> Target:
    if spec.interface is None:
        return resolve_cgroup(str(spec.cgroup))
    try:
        return resolve_interface(spec.interface)
    except NotFoundError as error:
        raise NotFoundError(f"{error}; {interface_hint(spec.interface)}") from error


def _direction(target: Target, spec: AttachSpec) -> Direction | None:
    """Choose the direction; None for a cgroup. Raises PreconditionError."""
    if isinstance(target, CgroupTarget):
        return None
    wish = {"auto": None, "workload": Direction.WORKLOAD, "host": Direction.HOST}[spec.direction]
    return choose_direction(target, wish, Hook.XDP if spec.hook == "xdp" else Hook.TC)


def _meanwhile(row: Row) -> str:
    """Tell what it means that a hook was missing."""
    return "it was open meanwhile" + (", unless only XDP was missing: TC fenced it then" if row.hook == "xdp" else "")


def _hook(row: Row) -> HookKind:
    if row.kind == "cgroup":
        return "cgroup"
    return "xdp" if row.hook == "xdp" else "tc"


def _row(
    attachment_id: str, slot: int, target: Target, direction: Direction | None, spec: AttachSpec, boot_id: str
) -> Row:
    kind, identity = key_of(target)
    return Row(
        id=attachment_id,
        slot=slot,
        kind=kind,
        name=_name(target),
        identity=str(identity),
        link_kind=target.kind if isinstance(target, InterfaceTarget) else "",
        direction="host" if direction is Direction.HOST else "workload",
        hook="cgroup" if kind == "cgroup" else "xdp" if spec.hook == "xdp" else "tc",
        mechanism="",
        dns_host="",
        dns_port=0,
        boot_id=boot_id,
        attached_at=time.time(),
        metadata=dict(spec.metadata),
        acked=False,
    )


async def _undo(step: Callable[[], Awaitable[Any]], what: str) -> None:
    """Do one step of a roll-back to its end; its failure is logged and does not stop the others."""

    async def work() -> None:
        await step()

    try:
        await finish(work(), what)
    except asyncio.CancelledError:
        pass  # finished all the same; the cancellation that began the roll-back is on its way already
    except Exception as error:
        log.exception("roll_back_step_failed", step=what, error=str(error))
