"""Taking over, after a restart, what an earlier daemon left in the kernel and in the store (semantics.md 24, 27).

For each stored attachment one of four things happens: taken over (hooks in place or put back, same id, slot, DNS port
and policy); hooked anew with its last policy (an interface of the same name and kind, after a reboot); dropped because
its target is gone or its attach never succeeded; or left alone, loudly, because something of it cannot be read or done.
Left alone means that the kernel goes on enforcing what it has: a failure here never opens a fence. After a reboot it
has nothing, and we say so. Whatever can be tried again is, in the background: hooks, DNS ports and addresses.

What a damaged or lost database does not tell any more comes from the kernel and from what could be read (`recover`).
"""

from __future__ import annotations

import asyncio
import enum
import socket
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

import structlog

from netfence import policy_codec
from netfence.control.port import UnsubscribeReason
from netfence.dataplane.cgroups import CgroupTarget, resolve_cgroup
from netfence.dataplane.renamed import carries
from netfence.dataplane.target import Direction, InterfaceTarget, LinkLayer, resolve_interface
from netfence.endpoints import Endpoint
from netfence.errors import InvalidError, NetfenceError, NotFoundError, PreconditionError
from netfence.lifecycle import Lifecycle, Live, Parts, Target, key_of
from netfence.policy.policy import EMPTY, Policy
from netfence.recover import Recovery, sift
from netfence.store import Row

AGAIN_S = 1.0  # how often hooks that could not be put in place, and lost DNS ports, are tried again
COMPLAIN_EVERY = 30  # tries between two complaints about it

ENFORCED = "the kernel goes on enforcing what it has"
OPEN = "it is NOT fenced: after the reboot nothing is hooked"

Background = Callable[[Coroutine[Any, Any, None], str], object]  # runs work, under a name, until the daemon stops

log = structlog.get_logger(__name__)


class Outcome(enum.Enum):
    """What became of a stored attachment."""

    TAKEN_OVER = "taken over"
    HOOKED_ANEW = "hooked anew"
    DROPPED = "dropped"
    LEFT_ALONE = "left alone"


async def restore(lifecycle: Lifecycle, background: Background) -> Counter[Outcome]:
    """Bring every stored attachment back, before anybody can ask; return how many became what.

    What has to be tried again is tried in the `background`.
    """
    parts = lifecycle.parts
    rows = await parts.store.load()
    pinned = parts.plane.pinned()
    recovery = Recovery(parts.plane, parts.boot_id)
    rows += await _known_again(parts, recovery, rows, pinned)
    leases = await parts.plane.leases()
    outcomes: Counter[Outcome] = Counter()
    for row in rows:
        say = log.bind(attachment=row.id, target=row.name)
        try:
            outcome = await _restore_one(lifecycle, recovery, row, leases.get(row.slot, {}), background)
        except Exception as error:  # noqa: BLE001 - one must not stop the others
            outcome = Outcome.LEFT_ALONE
            say.exception("not_taken_over", error=str(error), effect=ENFORCED if row.id in pinned else OPEN)
        else:
            say.info(outcome.value.replace(" ", "_"))
        outcomes[outcome] += 1
    await parts.endpoints.tidy()
    if cleared := await parts.plane.clear_unclaimed(leases):
        effect = "of attachments that are known to nobody any more; the next ones there would have had their leases"
        log.warning("slots_cleared", slots=cleared, effect=effect)
    if behind := await parts.plane.finish_upgrade():
        log.error("upgrade_not_finished", attachments=sorted(behind), effect="another build's programs judge these")
    return outcomes


async def _known_again(parts: Parts, recovery: Recovery, rows: Sequence[Row], pinned: set[str]) -> list[Row]:
    """Store again what the store does not know any more: what is pinned, and what else a damaged database told of.

    Nothing is hooked before all of it is stored: until then the next start finds it where this one did.
    """
    known = {row.id for row in rows}
    saved = {name: row for name, row in parts.store.saved.items() if name not in known}
    found: list[Row] = []
    if strangers := sorted(pinned - known):
        found = await recovery.rows(strangers, saved)
    others = [row for name, row in saved.items() if name not in pinned]
    kept, taken_off = sift(others, [*rows, *found])
    for row in (*found, *kept):
        await parts.store.reserve(row)
    if parts.store.saved:
        await parts.store.settle()
    for row in taken_off:
        await parts.control.unsubscribe(row.id, UnsubscribeReason.REMOVED, "")
    return [*found, *kept]


async def _restore_one(
    lifecycle: Lifecycle, recovery: Recovery, row: Row, leases: Mapping[bytes, float], background: Background
) -> Outcome:
    parts = lifecycle.parts
    # First of all, and whatever becomes of the rest: neither its endpoint nor its slot is given to anybody else.
    await _claim(lifecycle, row)
    parts.plane.claim_slot(row.slot)
    rebooted = row.boot_id != parts.boot_id
    target = await asyncio.to_thread(_find, row, rebooted)
    if not rebooted and target is not None and await _replaced(parts, row, target):
        target = None
    if target is None or row.policy is None:
        await _drop(lifecycle, row, target, rebooted=rebooted)
        return Outcome.DROPPED
    row, policy = await _read(parts, recovery, row, row.policy)
    if isinstance(target, InterfaceTarget) and target.name != row.name:  # renamed meanwhile
        row = replace(row, name=target.name)
        await _noted(parts.store.move(row.id, row.name), row)
    live = lifecycle.make(row, target, _direction(row), policy)
    live.attachment.adopt(leases)
    lifecycle.register(live)
    try:
        await live.attachment.take_over(lambda: _hook(lifecycle, live))
    except Exception as error:
        effect = ENFORCED if row.id in parts.plane.pinned() else OPEN
        live.attachment.log.exception("not_taken_over", error=str(error), effect=f"{effect}; it is tried again")
        background(_hook_later(lifecycle, live), f"hook {row.id}")
        outcome = Outcome.LEFT_ALONE
    else:
        await _hooked(lifecycle, live)
        outcome = Outcome.HOOKED_ANEW if rebooted else Outcome.TAKEN_OVER
    await _bind(lifecycle, live, background)
    return outcome


async def _read(parts: Parts, recovery: Recovery, row: Row, text: str) -> tuple[Row, Policy]:
    """Return the row with its policy; what cannot be read is what the kernel has, without names, else block_all.

    Such a one is nobody's policy: whoever gives policies is told so, and gives it anew.
    """
    clock = policy_codec.Clock.now()
    try:
        return row, await asyncio.to_thread(policy_codec.decode, text, clock)
    except Exception as error:  # noqa: BLE001 - damage takes any form
        damage = str(error)
    say = log.bind(attachment=row.id, target=row.name)
    policy = None
    if row.id in parts.plane.pinned():
        try:
            policy = await recovery.policy(row.id)
        except Exception as error:  # noqa: BLE001 - whatever it is: closed
            say.exception("rules_not_read", error=str(error), effect="what nobody can read is closed")
    effect = "nothing passes" if policy is None else "its rules are what the kernel has, names are refused"
    say.error("policy_not_read", error=damage, effect=f"{effect}, until it is given a policy")
    return replace(row, acked=False, policy_version=""), policy or EMPTY


async def _claim(lifecycle: Lifecycle, row: Row) -> None:
    """Take a stored endpoint again; an address that cannot be put in place is tried again with the binding."""
    try:
        await lifecycle.parts.endpoints.claim(Endpoint(row.dns_host, row.dns_port))
    except Exception as error:
        log.exception("dns_address_lost", attachment=row.id, error=str(error))


async def _hook(lifecycle: Lifecycle, live: Live) -> None:
    """Take the hooks over, or attach them where an earlier boot had them. Raises what that raises; may be repeated."""
    parts, row = lifecycle.parts, live.row
    parts.watch.watch(live.target)
    if row.boot_id == parts.boot_id or row.id in parts.plane.pinned():
        await lifecycle.hook_again(live)
        return
    static = lifecycle.static(live)
    try:
        mechanism = await parts.plane.attach(row.slot, live.target, static, live.direction, row.id)
    except PreconditionError as error:
        if not static.xdp:
            raise
        # The MTU is another, or somebody else has a program there: TC minds neither, and open it must not stay.
        live.attachment.log.exception("xdp_not_attached", error=str(error), effect="TC alone fences it")
        without = replace(static, xdp=False)
        mechanism = await parts.plane.attach(row.slot, live.target, without, live.direction, row.id)
    live.hooked = True
    live.attachment.row = replace(live.row, mechanism=mechanism)


async def _hooked(lifecycle: Lifecycle, live: Live) -> None:
    """Note where it is hooked, after a reboot."""
    if live.row.boot_id != lifecycle.parts.boot_id:
        _, identity = key_of(live.target)
        live.attachment.row = replace(live.row, identity=str(identity), boot_id=lifecycle.parts.boot_id)
        await _noted(lifecycle.parts.store.replace(live.row), live.row)


async def _noted(storing: Coroutine[Any, Any, object], row: Row) -> None:
    """Store what the next start finds out by itself, if it must: a disk that is full keeps no fence from its place."""
    try:
        await storing
    except NetfenceError as error:
        log.warning("not_stored", attachment=row.id, error=str(error))


async def _hook_later(lifecycle: Lifecycle, live: Live) -> None:
    tries = 0
    while not live.ended:
        await asyncio.sleep(AGAIN_S)
        try:
            if not live.attachment.closed:
                await live.attachment.take_over(lambda: _hook(lifecycle, live))
                await _hooked(lifecycle, live)
                live.attachment.log.info("taken_over_at_last")
                return
        except Exception as error:
            tries += 1
            if tries % COMPLAIN_EVERY == 0:
                live.attachment.log.exception("still_not_taken_over", error=str(error))


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


async def _replaced(parts: Parts, row: Row, target: Target) -> bool:
    """Tell whether an interface with the index of the old one, under another name, is another one.

    It is the old one where it carries a hook of ours, and where that cannot be looked up.
    """
    if isinstance(target, CgroupTarget) or target.name == row.name:
        return False
    say = log.bind(attachment=row.id, target=row.name, now=target.name)
    links_dir, mechanism = parts.config.bpffs_dir / "links", parts.plane.tc_mechanism
    try:
        same = await asyncio.to_thread(carries, links_dir, row.id, target.ifindex, mechanism)
    except NetfenceError as error:
        say.warning("hooks_not_read", error=str(error), effect="it counts as renamed and stays fenced")
        return False
    if not same:
        effect = f"{target.name} is not fenced: it is another interface, or somebody took our hooks off and renamed it"
        say.warning("target_replaced", effect=effect)
    return not same


async def _drop(lifecycle: Lifecycle, row: Row, target: Target | None, *, rebooted: bool) -> None:
    """Remove what is left of an attachment whose target is gone or whose attach was never finished.

    Of a target that is gone, and after a reboot, only pins and map entries: its index may be another one's by now.
    """
    parts = lifecycle.parts
    await parts.plane.detach(row.slot, _ghost(row) if target is None or rebooted else target, row.id)
    if row.kind == "interface":
        parts.plane.forget_interface(row.slot, int(row.identity))
    parts.plane.free_slot(row.slot)
    await parts.endpoints.release(Endpoint(row.dns_host, row.dns_port))
    await parts.store.remove(row.id)
    if isinstance(target, CgroupTarget):
        target.close()
    if row.policy is not None:
        await parts.control.unsubscribe(row.id, UnsubscribeReason.REMOVED, "")


def _ghost(row: Row) -> Target:
    """Return a stand-in for a target that is gone, by whose kind its pins are found; nothing has number 0."""
    if row.kind == "cgroup":
        return CgroupTarget(row.name, 0, -1)
    return InterfaceTarget(
        name=row.name,
        ifindex=0,
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


async def _bind(lifecycle: Lifecycle, live: Live, background: Background) -> None:
    """Bind the DNS server to its old endpoint, or go on trying: the fence stays, never a detach (semantics.md 27)."""
    try:
        await live.server.start(live.endpoint.host, live.endpoint.port)
    except OSError as error:
        effect = "the fence stays, its workload cannot resolve names"
        live.attachment.log.error("dns_port_lost", dns=str(live.endpoint), error=str(error), effect=effect)  # noqa: TRY400
        background(_rebind(lifecycle, live), f"rebind {live.row.id}")


async def _rebind(lifecycle: Lifecycle, live: Live) -> None:
    async def bind() -> None:
        await lifecycle.parts.endpoints.claim(live.endpoint)
        await live.server.start(live.endpoint.host, live.endpoint.port)

    tries = 0
    while not live.ended:
        await asyncio.sleep(AGAIN_S)
        try:
            if await live.attachment.while_open(bind):  # never beside its end, which closes the server
                live.attachment.log.info("dns_port_back", dns=str(live.endpoint))
                return
        except (OSError, NetfenceError) as error:
            tries += 1
            if tries % COMPLAIN_EVERY == 0:
                live.attachment.log.error("dns_port_still_lost", dns=str(live.endpoint), error=str(error))  # noqa: TRY400
