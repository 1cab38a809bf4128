"""Taking over, after a restart, what an earlier daemon left in the kernel and in the store (semantics.md 24, 27).

For each stored attachment one of four things happens: taken over (hooks in place or put back, same id, slot, DNS port
and policy); hooked anew with its last policy (an interface of the same name and kind, after a reboot); dropped because
its target is gone or its attach never succeeded; or left alone, loudly, because something of it cannot be read or done.
Left alone means that the kernel goes on enforcing what it has: a failure here never opens a fence.
"""

from __future__ import annotations

import asyncio
import enum
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import structlog

from netfence import policy_codec
from netfence.control.port import UnsubscribeReason
from netfence.dataplane.cgroups import CgroupTarget, resolve_cgroup
from netfence.dataplane.target import Direction, InterfaceTarget, LinkLayer, resolve_interface
from netfence.endpoints import Endpoint
from netfence.errors import InvalidError, NetfenceError, NotFoundError, PreconditionError
from netfence.lifecycle import Lifecycle, Live, Target, key_of
from netfence.store import Row

REBIND_S = 1.0  # how often a DNS port lost to another process is tried again
COMPLAIN_EVERY = 30  # tries between two complaints about it

log = structlog.get_logger(__name__)


class Outcome(enum.Enum):
    """What became of a stored attachment."""

    TAKEN_OVER = "taken over"
    HOOKED_ANEW = "hooked anew"
    DROPPED = "dropped"
    LEFT_ALONE = "left alone"


async def restore(lifecycle: Lifecycle, rebind: asyncio.TaskGroup) -> Counter[Outcome]:
    """Bring every stored attachment back, before anybody can ask; return how many became what.

    DNS ports that are taken are waited for in tasks of `rebind`.
    """
    parts = lifecycle.parts
    rows = await parts.store.load()
    if strangers := parts.plane.pinned() - {row.id for row in rows}:
        pins, state = parts.config.bpffs_dir, parts.config.data_dir
        raise PreconditionError(
            f"take over {pins}: it holds {len(strangers)} fences that data_dir {state} does not know ({min(strangers)}"
            f" is one), and they stay in force; bring the state back, or remove {pins} to take them off"
        )
    leases = await parts.plane.leases()
    outcomes: Counter[Outcome] = Counter()
    for row in rows:
        say = log.bind(attachment=row.id, target=row.name)
        try:
            outcome = await _restore_one(lifecycle, row, leases.get(row.slot, {}), rebind)
        except NetfenceError as error:
            outcome = Outcome.LEFT_ALONE
            say.error("not_taken_over", error=str(error), effect="the kernel goes on enforcing what it has")
        else:
            say.info(outcome.value.replace(" ", "_"))
        outcomes[outcome] += 1
    return outcomes


async def _restore_one(
    lifecycle: Lifecycle, row: Row, leases: Mapping[bytes, float], rebind: asyncio.TaskGroup
) -> Outcome:
    parts = lifecycle.parts
    rebooted = row.boot_id != parts.boot_id
    target = await asyncio.to_thread(_find, row, rebooted)
    parts.plane.claim_slot(row.slot)
    if target is None or row.policy is None:
        await _drop(lifecycle, row, target)
        return Outcome.DROPPED
    policy = await asyncio.to_thread(policy_codec.decode, row.policy, policy_codec.Clock.now())
    direction = _direction(row)
    if isinstance(target, InterfaceTarget) and target.name != row.name:  # renamed meanwhile
        row = replace(row, name=target.name)
        await parts.store.move(row.id, row.name)
    live = lifecycle.make(row, target, direction, policy)
    lifecycle.register(live)
    try:
        await parts.endpoints.claim(live.endpoint)
        static = lifecycle.static(live)
        if rebooted:
            mechanism = await parts.plane.attach(row.slot, target, static, direction, row.id)
            _, identity = key_of(target)
            live.attachment.row = replace(row, identity=str(identity), mechanism=mechanism, boot_id=parts.boot_id)
            await parts.store.replace(live.row)
        elif not await parts.plane.restore(row.slot, target, static, direction, row.id):
            live.attachment.log.warning("hook_put_back", effect="it was open while the hook was missing")
        await live.attachment.take_over(leases)
    finally:
        # Whatever failed: its DNS server is up, and the next detach or command finds it.
        await _bind(live, rebind)
    return Outcome.HOOKED_ANEW if rebooted else Outcome.TAKEN_OVER


def _find(row: Row, rebooted: bool) -> Target | None:
    """Look for the very target of a row; None when it is gone. Blocks."""
    try:
        if row.kind == "cgroup":
            found = resolve_cgroup(row.name)
            if rebooted or str(found.cgroup_id) != row.identity:
                found.close()
                return None
            return found
        name = row.name if rebooted else socket.if_indextoname(int(row.identity))
        interface = resolve_interface(name)
    except (NotFoundError, InvalidError, OSError):
        return None
    same = interface.kind == row.link_kind and (rebooted or str(interface.ifindex) == row.identity)
    return interface if same else None


async def _drop(lifecycle: Lifecycle, row: Row, target: Target | None) -> None:
    """Remove what is left of an attachment whose target is gone or whose attach was never finished."""
    parts = lifecycle.parts
    await parts.plane.detach(row.slot, target or _ghost(row), row.id)
    parts.plane.free_slot(row.slot)
    await parts.endpoints.release(Endpoint(row.dns_host, row.dns_port))
    await parts.store.remove(row.id)
    if isinstance(target, CgroupTarget):
        target.close()
    if row.policy is not None:
        await parts.control.unsubscribe(row.id, UnsubscribeReason.REMOVED, "")


def _ghost(row: Row) -> Target:
    """Return a stand-in for a target that is gone, by which its pins and map entries are found."""
    if row.kind == "cgroup":
        return CgroupTarget(row.name, int(row.identity), -1)
    return InterfaceTarget(
        name=row.name,
        ifindex=int(row.identity),
        kind=row.link_kind,
        arphrd=0,
        layer=LinkLayer.L2,
        master=0,
        bridge=0,
        is_bond_member=False,
        has_default_route=False,
        own_addresses=(),
    )


def _direction(row: Row) -> Direction | None:
    if row.kind == "cgroup":
        return None
    return Direction.HOST if row.direction == "host" else Direction.WORKLOAD


async def _bind(live: Live, rebind: asyncio.TaskGroup) -> None:
    """Bind the DNS server to its old endpoint, or go on trying: the fence stays, never a detach (semantics.md 27)."""
    try:
        await live.server.start(live.endpoint.host, live.endpoint.port)
    except OSError as error:
        effect = "the fence stays, its workload cannot resolve names"
        live.attachment.log.error("dns_port_lost", dns=str(live.endpoint), error=str(error), effect=effect)  # noqa: TRY400
        rebind.create_task(_rebind(live), name=f"rebind {live.row.id}")


async def _rebind(live: Live) -> None:
    tries = 0
    while not live.attachment.closed:
        await asyncio.sleep(REBIND_S)
        try:
            await live.server.start(live.endpoint.host, live.endpoint.port)
        except OSError as error:
            tries += 1
            if tries % COMPLAIN_EVERY == 0:
                live.attachment.log.error("dns_port_still_lost", dns=str(live.endpoint), error=str(error))  # noqa: TRY400
        else:
            live.attachment.log.info("dns_port_back", dns=str(live.endpoint))
            return
