"""Keeping up with targets while they live: gone, renamed, other addresses, hooks taken away (semantics.md 23).

Owns the watchers and what is done about their events; it changes attachments through `lifecycle`. Events come on the
event loop and are handled in order by one task; removals run beside each other, so that a thousand interfaces deleted
at once do not wait for one another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

from netfence.control.port import UnsubscribeReason
from netfence.dataplane.cgroup_watch import CgroupWatcher
from netfence.dataplane.cgroups import CgroupTarget
from netfence.dataplane.events import (
    AddressesChanged,
    CgroupGone,
    Event,
    HookGone,
    HostAddressesChanged,
    LinkGone,
    LinkNew,
    LinkRenamed,
    Resync,
)
from netfence.dataplane.target import host_addresses, own_addresses
from netfence.dataplane.watch import LinkWatcher
from netfence.errors import NetfenceError, NotFoundError
from netfence.lifecycle import Key, Lifecycle, Live, Target, key_of
from netfence.tasks import finish

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # between tries to clean up after a target that is gone; doubled each time

LOOK_S = 10.0  # how long it takes to look at all hooks once; a twentieth of a core for 1,000 attachments

log = structlog.get_logger(__name__)


class Watchers:
    """Both watchers behind one pair of methods; what they tell waits in a queue."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        self._links = LinkWatcher(self.queue.put_nowait)
        self._cgroups = CgroupWatcher(self.queue.put_nowait)

    def open(self) -> None:
        """Start on the running loop. Raises NetfenceError."""
        self._links.open()
        self._cgroups.open()

    def close(self) -> None:
        """Stop; idempotent."""
        self._links.close()
        self._cgroups.close()

    def watch(self, target: Target) -> None:
        """Tell from now on what happens to a target, also what happened since it was resolved. Raises NetfenceError."""
        if isinstance(target, CgroupTarget):
            self._cgroups.watch(target.cgroup_id, target.path)
        else:
            self._links.watch(target.ifindex, target.name)

    def unwatch(self, target: Target) -> None:
        """Forget a target; before it is detached, so that our own removals are not told."""
        if isinstance(target, CgroupTarget):
            self._cgroups.unwatch(target.cgroup_id)
        else:
            self._links.unwatch(target.ifindex)


class TargetKeeper:
    """Does what events ask for."""

    def __init__(self, lifecycle: Lifecycle, watchers: Watchers) -> None:
        self._lifecycle = lifecycle
        self._plane = lifecycle.parts.plane
        self._watchers = watchers

    async def run(self) -> None:
        """Handle events until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                event = await self._watchers.queue.get()
                await self._try(self._handle(event, group), type(event).__name__)

    async def look_round(self) -> None:
        """See again and again that hooks are in place and first, until cancelled: nobody tells of links taken away."""
        while True:
            every = self._lifecycle.all()
            for live in every:
                await asyncio.sleep(LOOK_S / len(every))
                await self._try(self._put_back(live), "hooks", live)
                if live.hooked and not live.attachment.closed:
                    await self._try(self._lifecycle.look_in_front(live), "hooks", live)
            if not every:
                await asyncio.sleep(LOOK_S)

    async def _try(self, work: Coroutine[Any, Any, None], what: str, live: Live | None = None) -> None:
        """Do one thing; its failure is logged and keeps no other from being done."""
        say = live.attachment.log if live is not None else log
        try:
            await work
        except NotFoundError as error:  # it went before it was told to be gone
            say.info("target_not_there", event_kind=what, error=str(error))
        except NetfenceError as error:
            say.warning("target_event_failed", event_kind=what, error=str(error))
        except Exception as error:  # noqa: BLE001 - one event must not stop the rest
            say.exception("target_event_failed", event_kind=what, error=str(error))

    async def read_host_addresses(self) -> None:
        """Tell the kernel which addresses this host has."""
        self._plane.set_host_addresses(await asyncio.to_thread(host_addresses))

    async def _handle(self, event: Event, group: asyncio.TaskGroup) -> None:
        match event:
            case LinkGone(ifindex):
                group.create_task(self._gone(("interface", ifindex)))
            case CgroupGone(cgroup_id):
                group.create_task(self._gone(("cgroup", cgroup_id)))
            case LinkRenamed(ifindex, name):
                await self._renamed(ifindex, name)
            case AddressesChanged(ifindex):
                if live := self._lifecycle.by_target(("interface", ifindex)):
                    await self._read_own_addresses(live)
            case HookGone(ifindex):
                if live := self._lifecycle.by_target(("interface", ifindex)):
                    await self._put_back(live)
            case HostAddressesChanged():
                await self.read_host_addresses()
            case Resync():
                await self._resync()
            case LinkNew():
                pass

    async def _gone(self, key: Key) -> None:
        live = self._lifecycle.by_target(key)
        if live is None:
            return
        if live.gone:
            return  # its roll-back, or the loop below, is about it
        live.gone = True
        if not live.attached:
            return  # its attach is under way and rolls itself back
        live.attachment.log.info("target_gone")
        pause_s = FIRST_PAUSE_S
        while not live.ended:
            try:
                await finish(self._lifecycle.end(live, UnsubscribeReason.REMOVED), f"end {live.row.name}")
            except Exception as error:  # noqa: BLE001 - whatever it is: tried again
                live.attachment.log.warning("target_not_cleaned_up", error=str(error), next_try_s=pause_s)
            if not live.ended:  # refused, or being detached by somebody else, who may fail
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _renamed(self, ifindex: int, name: str) -> None:
        live = self._lifecycle.by_target(("interface", ifindex))
        if live is None:
            return
        live.attachment.log.info("target_renamed", name=name)
        live.attachment.rename(name)
        await self._lifecycle.parts.store.move(live.row.id, name)

    async def _read_own_addresses(self, live: Live) -> None:
        kind, ifindex = key_of(live.target)
        if kind == "interface":
            addresses = await asyncio.to_thread(own_addresses, ifindex)
            if not live.attachment.closed:
                self._plane.set_own_addresses(live.row.slot, addresses)

    async def _put_back(self, live: Live) -> None:
        if not live.attached:
            live.hook_lost = True  # its attach looks before it is done
        elif live.hooked:
            await live.attachment.while_open(lambda: self._lifecycle.put_back(live))

    async def _resync(self) -> None:
        """Look at everything again: events were lost. Some of it may be gone: what it is told of comes after this."""
        log.warning("target_events_lost", effect="every target is looked at again")
        await self._try(self.read_host_addresses(), "Resync")
        for live in self._lifecycle.every():
            await self._try(self._read_own_addresses(live), "Resync", live)
            await self._try(self._put_back(live), "Resync", live)
