"""The data plane: one set of programs and maps, attachments told apart by a small integer, the slot.

Owns slots, the word that switches a slot's policy, and the order in which hooks, maps and pins come and go: whatever
the order is interrupted by, nothing passes that should not. Refuses to know names, DNS, control planes and storage.
Methods are for the event loop; what blocks runs in a few worker threads of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import os
import sys
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import structlog

from netfence.dataplane import links, loader, probe
from netfence.dataplane.cgroups import CgroupTarget
from netfence.dataplane.clock import Clock
from netfence.dataplane.config import ConfigMap, Static, network_port
from netfence.dataplane.counters import CounterMap, Counters
from netfence.dataplane.failure import explain
from netfence.dataplane.flows import Flow, FlowRing, Seen, SeenMap
from netfence.dataplane.hooking import Hooks
from netfence.dataplane.leases import InboundMap, LeaseMap, kernel_address
from netfence.dataplane.loader import Loaded
from netfence.dataplane.maps import u32
from netfence.dataplane.rules import RuleTables
from netfence.dataplane.slotword import SlotWord
from netfence.dataplane.target import Direction, InterfaceTarget
from netfence.errors import ExhaustedError, NetfenceError, PreconditionError
from netfence.policy.cidr import Entry, Key
from netfence.policy.limits import MAX_ATTACHMENTS
from netfence.policy.modes import Mode
from netfence.policy.policy import Policy
from netfence.tasks import finish

__all__ = ["Counters", "DataPlane", "Flow", "Seen", "Static"]

WORKERS = 4
"""Threads for calls that wait for RCU: four attaches at once, and more gain nothing, they share the grace period."""

IN_PLACE = 256
"""Differences between two tables looked at before a new table is made anyway."""

LOCK_S = 2.0
"""How long `open` waits for another daemon's end."""

SCAN_EVERY_S = 5.0
"""How old the walk over the lease map may be that several slots' sweeps share."""

Target = InterfaceTarget | CgroupTarget
T = TypeVar("T")

log = structlog.get_logger(__name__)


class DataPlane:
    """See the module. Make one with `open`; only one per `bpffs_dir` at a time."""

    def __init__(
        self, loaded: Loaded, bpffs_dir: Path, data_dir: Path, lock_fd: int, start_mode: Mode, *, tcx: bool
    ) -> None:
        self._loaded, self._lock_fd, self._start_mode = loaded, lock_fd, start_mode
        self._bpffs_dir, self._data_dir = bpffs_dir, data_dir
        maps, layout = loaded.maps, loaded.layout
        clock_memory = memoryview(maps["clock"].memory()).cast("Q")

        def read_clock() -> int:
            links.prog_test_run(loaded.programs["nf_clock"], bytes(14))
            return clock_memory[0]

        self.clock = Clock(read_clock, probe.hz())
        self.config = ConfigMap(maps["config"], layout, self.clock)
        self._rules = RuleTables(maps, layout, self.clock)
        self._leases = LeaseMap(maps["leases"], layout, self.clock)
        self._inbound = InboundMap(maps["inbound"], maps["inbound_count"], layout, self.clock)
        self._counters = CounterMap(maps["counters"], layout)
        self._flows = FlowRing(maps["flows"], layout, self.clock)
        self._seen = SeenMap(maps["seen"], maps["seen_count"], layout)
        self._endpoint = layout.packer("endpoint", "address", "port")
        self._hooks = Hooks(loaded, bpffs_dir / "links", tcx=tcx)
        self._slots: dict[int, SlotWord] = {}
        self._free = set(range(1, min(layout.constants["SLOTS"], MAX_ATTACHMENTS + 1)))
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="dataplane")
        self._to_release: list[int] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._inbound_hooks: dict[str, asyncio.Task[bool]] = {}
        self._inbound_failures: dict[str, str] = {}  # by attachment, as last told
        self._dead: dict[int, set[bytes]] = {}
        self._scanned = float("-inf")
        self._scan_lock = asyncio.Lock()
        self._longest: dict[int, tuple[float, float]] = {}
        self._endpoints: dict[int, bytes] = {}
        self.features: Mapping[str, str] = probe.features(bpffs_dir)
        self.kernel_release = os.uname().release
        self._dirty: set[int] = set()
        self._xdp: set[int] = set()  # slots whose interface has XDP too
        self._replies: set[int] = set()  # slots that have the inbound hook too
        for slot in range(1, layout.constants["SLOTS"]):
            # Before any index is made ready: what a daemon before us put in force must not be emptied.
            self._rules.claim(SlotWord.decode(self.config.word(slot), layout).index)
        self._write_word(0, SlotWord(mode=start_mode))

    @classmethod
    async def open(
        cls, bpffs_dir: Path, data_dir: Path, start_mode: Mode, *, max_leases_total: int, tcx: bool | None = None
    ) -> Self:
        """Check the host, lock `bpffs_dir`, load or take over programs and maps.

        `tcx` False forces clsact, None chooses by what the kernel has. Raises PreconditionError (kernel, bpffs, a
        second daemon, compile errors), PermissionDeniedError.
        """

        def blocking() -> tuple[Loaded, int]:
            probe.require_capabilities("start the data plane")
            probe.raise_memlock("start the data plane")
            probe.require_bpffs(bpffs_dir)
            lock_fd = _lock(bpffs_dir)
            try:
                return loader.load(bpffs_dir, data_dir, max_leases_total, lock_fd), lock_fd
            except BaseException:
                os.close(lock_fd)
                raise

        loaded, lock_fd = await asyncio.to_thread(blocking)
        has_tcx = probe.kernel_features()["tcx"] == "yes" if tcx is None else tcx
        plane = cls(loaded, bpffs_dir, data_dir, lock_fd, start_mode, tcx=has_tcx)
        await plane._run(plane._rules.refill)
        return plane

    # -- slots ------------------------------------------------------------------------------------------------------

    def allocate_slot(self) -> int:
        """Reserve a slot; raises ExhaustedError when all are taken."""
        if not self._free:
            message = f"attach: {MAX_ATTACHMENTS} attachments are the limit of one daemon; detach something"
            raise ExhaustedError(message)
        slot = min(self._free)
        # Not at the detach: one that is cut short is undone, and then counts go on.
        self._counters.clear(slot)
        self._free.discard(slot)
        return slot

    def claim_slot(self, slot: int) -> None:
        """Reserve the slot of an attachment that outlived the last daemon; PreconditionError when it is taken."""
        if slot not in self._free:
            message = f"take over slot {slot}: it belongs to another attachment; the stored state is damaged"
            raise PreconditionError(message)
        self._free.discard(slot)
        self._slots[slot] = SlotWord.decode(self.config.word(slot), self._loaded.layout)

    def free_slot(self, slot: int) -> None:
        """Give a slot back whose attachment is detached (or never was attached).

        One that could not be cleared stays taken: the next attachment would inherit its leases.
        """
        if slot in self._free:  # somebody else may have it next: freed once more it would belong to two
            log.error("slot_freed_twice", slot=slot)
            return
        self._slots.pop(slot, None)
        if slot in self._dirty:
            log.error("slot_not_cleared", slot=slot, effect="it stays taken until the daemon starts again")
        else:
            self._free.add(slot)

    async def clear_unclaimed(self, others: Iterable[int]) -> list[int]:
        """Clear what a detach that was cut short left in slots that nobody has claimed; return those that were cleared.

        `config` goes last in a detach, so who has none has nothing; `others` are looked at all the same. Call it when
        every attachment of the last daemon has its slot: the next ones would inherit its leases and connections.
        """
        asked = set(others)
        left = [slot for slot in sorted(self._free) if slot in asked or self.config.read(slot) is not None]
        cleared = []
        for slot in left:
            index = SlotWord.decode(self.config.word(slot), self._loaded.layout).index
            self._write_word(slot, SlotWord(mode=self._start_mode))
            try:
                await self._run(functools.partial(self._clear, slot))
            except OSError as error:
                self._free.discard(slot)
                effect = "it stays taken until the daemon starts again"
                log.error("slot_not_cleared", slot=slot, error=str(error), effect=effect)  # noqa: TRY400
                continue
            cleared.append(slot)
            if index:
                self._give_back(index)
        return cleared

    @property
    def tc_mechanism(self) -> str:
        """Return how TC filters hang on interfaces here: ``tcx`` or ``clsact``."""
        return self._hooks.tc_mechanism

    # -- attach and detach ------------------------------------------------------------------------------------------

    async def attach(self, slot: int, target: Target, static: Static, direction: Direction | None, name: str) -> str:
        """Put the hooks in place with `start_mode`; return the mechanism. On failure nothing of it is left.

        `direction` is None for a cgroup; `name` names the pins. Raises what the hooks raise (`netfence.errors`).
        """
        before = self._slots.get(slot)
        self._slots[slot] = SlotWord(mode=self._start_mode)
        try:
            self._write_maps(slot, static, name)
            if before is not None and before.index:  # of a policy that came while the hooks could not be attached
                self._give_back(before.index)
            if isinstance(target, CgroupTarget):
                await self._run(lambda: self._attach_cgroup(slot, target, name))
                mechanism = self._hooks.CGROUP
            else:
                self._set_interface(target.ifindex, slot)
                side = direction or Direction.WORKLOAD
                mechanism = await self._run(
                    lambda: self._hooks.attach_interface(target, side, name, with_xdp=static.xdp)
                )
        except BaseException:
            await self._undo(slot, target, name)
            raise
        self._begin_inbound(slot, target, direction, name)
        return mechanism

    async def restore(self, slot: int, target: Target, static: Static, direction: Direction | None, name: str) -> bool:
        """Take over what a daemon before us attached; False when a hook was gone and had to be put back.

        Raises what the hooks raise; where XDP is refused (PreconditionError), TC is in place by then.
        """
        self._slots[slot] = SlotWord.decode(self.config.word(slot), self._loaded.layout)
        self._write_maps(slot, static, name, word=False)
        if not isinstance(target, CgroupTarget):
            self._set_interface(target.ifindex, slot)
        whole = await self._put_back(slot, target, direction, name)
        self._begin_inbound(slot, target, direction, name)
        return whole

    async def put_back(self, slot: int, target: Target, direction: Direction | None, name: str) -> bool:
        """Attach what somebody took away of an attachment's hooks; False when the target was open without it.

        That it was not without the inbound hook; whether that comes back is told here.
        """
        whole = await self._put_back(slot, target, direction, name)
        if slot in self._replies:
            if (pending := self._inbound_hooks.get(name)) is not None:
                await asyncio.wait([pending])
            if not await self._attach_inbound(target, direction, name) and name not in self._inbound_failures:
                effect = "answers on new connections from outside were dropped meanwhile"
                log.warning("inbound_hook_put_back", attachment=name, effect=effect)
        return whole

    async def _put_back(self, slot: int, target: Target, direction: Direction | None, name: str) -> bool:
        if isinstance(target, CgroupTarget):
            return await self._run(lambda: self._put_back_cgroup(slot, target, name))
        side = direction or Direction.WORKLOAD
        with_xdp = slot in self._xdp
        return await self._run(lambda: self._hooks.put_back_interface(target, side, name, with_xdp=with_xdp))

    async def detach(self, slot: int, target: Target, name: str) -> None:
        """Take the hooks off and clear all of the slot's map entries; idempotent, also where the target is gone."""
        await self.unhook(slot, target, name)
        await self.clear(slot)

    async def unhook(self, slot: int, target: Target, name: str) -> None:
        """Take the hooks off, and leave what the slot has: who dies now goes on with it. `clear` has to follow."""
        pending = self._inbound_hooks.pop(name, None)
        if pending is not None:
            await asyncio.wait([pending])
        await self._run(lambda: self._hooks.require_changeable(name))
        word = SlotWord.decode(self.config.word(slot), self._loaded.layout)
        if isinstance(target, CgroupTarget):
            # Storage outlives the links and would come back with the next attach: back to start_mode first.
            await self._run(lambda: self._set_cgroup(target, 0))
            await self._run(lambda: self._hooks.detach_cgroup(name))
        else:
            await self._run(lambda: self._hooks.detach_interface(target, name))
            self.forget_interface(slot, target.ifindex)
        self._slots[slot] = SlotWord(mode=self._start_mode, leases=word.leases)
        self._write_word(slot, self._slots[slot])
        self._inbound_failures.pop(name, None)
        if word.index:
            self._give_back(word.index)

    async def clear(self, slot: int) -> None:
        """Clear all of the map entries of a slot that has no hooks any more; idempotent."""
        await self._run(lambda: self._clear(slot))

    async def finish_upgrade(self) -> set[str]:
        """Remove the pins of other builds, unless a hook runs a program of theirs: return the names of such."""
        build = self._loaded.build
        if not loader.others(self._bpffs_dir, build):
            return set()
        for pending in list(self._inbound_hooks.values()):
            await asyncio.wait([pending])

        def work() -> set[str]:
            left = self._hooks.of_others()
            if not left:
                loader.forget(self._bpffs_dir, self._data_dir, loader.others(self._bpffs_dir, build))
            return left

        return await self._run(work)

    def forget_interface(self, slot: int, ifindex: int) -> None:
        """Take an interface from a slot, unless the index is another slot's by now."""
        if self._interface_slot(ifindex) == slot:
            self._set_interface(ifindex, 0)

    async def answer(self) -> None:
        """Return when a worker thread has taken a piece of work, and changed nothing: that they take any."""
        await self._run(lambda: None)

    async def close(self, *, detach: bool) -> None:
        """Let go; with `detach` remove every pin and map, else everything stays in force in the kernel."""
        for task in list(self._tasks):
            await asyncio.wait([task])
        self._pool.shutdown(wait=True)
        if detach:
            loader.unload(self._bpffs_dir)
        self._hooks.close()
        os.close(self._lock_fd)

    def front(self, target: Target, direction: Direction | None, name: str) -> list[str]:
        """Describe foreign programs that see packets before ours and could pass them around us. Blocks."""
        return self._hooks.in_front(target, direction, name)

    async def move_ahead(self, target: Target, direction: Direction | None, name: str) -> list[str]:
        """Put ours in front of foreign programs, where it can be; return what is in front of it still.

        Our program judges every packet meanwhile, and may count one twice. Raises NetfenceError, with all as it was.
        """

        def work() -> list[str]:
            self._hooks.move_ahead(target, direction, name)
            return self._hooks.in_front(target, direction, name)

        return await self._run(work)

    # -- policy -----------------------------------------------------------------------------------------------------

    async def apply(self, slot: int, policy: Policy, old: Policy | None, *, start: bool = False) -> None:
        """Switch a slot to `policy` between two packets; `old` is what it has now (None: not known).

        `start`: it is what holds until somebody gives a policy, and is counted as that.
        Raises ExhaustedError and OSError-born errors with the old policy in force, untouched.
        """
        state = self._slots[slot]
        now = self.clock.seconds(self.clock.now())
        changes = self._small_change(state, policy, old, now)
        try:
            if changes is not None:
                self._rules.change(state.index, changes)
                index = state.index
            else:
                index = await self._run(lambda: self._rules.place(policy.cidrs, now)) if len(policy.cidrs) else 0
        except OSError as error:
            raise explain(f"write {len(policy.cidrs)} rules to the kernel", error) from error
        before = state.index
        state.index, state.mode, state.audit, state.start = index, policy.mode, policy.audit, start
        state.rules4, state.rules6 = policy.cidrs.size_of(4) > 0, policy.cidrs.size_of(16) > 0
        self._write_word(slot, state)  # the switch
        if before not in (0, index):
            self._give_back(before)

    def note_unstored(self, slot: int, unstored: bool) -> None:
        """Note, for the next daemon, that the slot is switched to what is not stored yet, or that it is stored."""
        state = self._slots[slot]
        if state.unstored is not unstored:
            state.unstored = unstored
            self._write_word(slot, state)

    def unstored(self, slot: int) -> bool:
        """Tell what was noted last, by a daemon before us too."""
        return self._slots[slot].unstored

    def _small_change(
        self, state: SlotWord, policy: Policy, old: Policy | None, now: float
    ) -> list[tuple[Key, Entry | None]] | None:
        """List the changes to make in the tables in force, if that is as atomic as a switch; None: make new tables."""
        if old is None or state.start:
            return None
        changes: list[tuple[Key, Entry | None]] = []
        felt = 0
        for key, entry in policy.cidrs.changes_since(old.cidrs):
            was = old.cidrs.entries.get(key)
            felt += (was.live(now) if was else None) != (entry.live(now) if entry else None)
            changes.append((key, entry))
            if felt > 1 or len(changes) > IN_PLACE:
                return None
        if not changes:
            return changes
        same_word = (policy.mode, policy.audit) == (state.mode, state.audit)
        return changes if state.index and (same_word or not felt) else None

    # -- leases -----------------------------------------------------------------------------------------------------

    def open_leases(self, slot: int, addresses: Sequence[bytes], expiry: float) -> None:
        """Let packets to these packed addresses pass until `expiry` (monotonic seconds); microseconds each.

        Raises ExhaustedError when the table is full; then none of the new ones is open.
        """
        state = self._slots[slot]
        self._leases.open(slot, addresses, expiry)
        if not state.leases:
            state.leases = True
            self._write_word(slot, state)

    def shorten_lease(self, slot: int, address: bytes, expiry: float) -> None:
        """Let a lease end earlier than it was promised, at `expiry` (monotonic seconds)."""
        self._leases.shorten(slot, address, expiry)

    def close_leases(self, slot: int, addresses: Iterable[bytes]) -> None:
        """Stop passing packets to these packed addresses."""
        self._leases.close(slot, addresses)

    async def sweep(self, slot: int) -> set[bytes]:
        """Remove the slot's leases that pass nothing any more, return their addresses; and idle inbound connections."""
        async with self._scan_lock:
            loop = asyncio.get_running_loop()
            if loop.time() - self._scanned > SCAN_EVERY_S:
                idle, longest = self._longest_times()
                now = self.clock.now()
                self._dead = await self._run(lambda: self._leases.scan(idle, longest, now))
                handshake = self.config.handshake_idle
                await self._run(lambda: self._inbound.sweep(idle, handshake, now))
                self._scanned = loop.time()
        idle, longest = self._longest_times()
        return self._leases.remove_dead(slot, self._dead.pop(slot, set()), idle, longest, self.clock.now())

    def _longest_times(self) -> tuple[int, int]:
        times = list(self._longest.values()) or [(0.0, 0.0)]
        return self.clock.span(max(idle for idle, _ in times)), self.clock.span(max(longest for _, longest in times))

    # -- the rest ---------------------------------------------------------------------------------------------------

    def counters(self, slot: int) -> Counters:
        """Read the slot's packets and bytes by reason."""
        return self._counters.read(slot)

    def watch_slots(self, slots: Collection[int]) -> None:
        """Have the kernel report the drops of these slots, and of no other; microseconds where nothing changes."""
        self.config.watch(slots)

    def read_flows(self) -> list[Flow]:
        """Return the drops reported since the last call, oldest first; at most `flows.AT_ONCE`. Never waits."""
        return self._flows.read()

    def kept_back(self, slot: int) -> int:
        """Return how many drops of the slot were not reported since the last one that was."""
        return self._counters.kept_back(slot)

    def seen(self, slot: int) -> tuple[list[Seen], int]:
        """Return where audit mode let packets through, and how many packets are missing there. Walks a map: blocks."""
        return self._seen.read(slot)

    def inbound_missed(self, slot: int) -> int:
        """Return how many connections begun from outside were not noted for want of room, SYN by SYN."""
        return self._inbound.shares.missed(slot)

    def seen_missed(self, slot: int) -> int:
        """Return how many packets are missing from what `seen` returns."""
        return self._seen.missed(slot)

    def set_own_addresses(self, slot: int, addresses: Sequence[bytes]) -> None:
        """Replace the addresses that neighbour discovery may ask of this interface."""
        self.config.write_own(slot, addresses)

    def set_host_addresses(self, addresses: Iterable[bytes]) -> None:
        """Replace the addresses of this host that `allow_replies: host` knows (packed)."""
        table = self._loaded.maps["host_addresses"]
        wanted = {kernel_address(address) for address in addresses}
        there = set(table.keys())
        for gone in there - wanted:
            table.delete(gone)
        for new in wanted - there:
            table.update(new, bytes(4))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _write_maps(self, slot: int, static: Static, name: str, *, word: bool = True) -> None:
        self._dirty.add(slot)
        if word:
            self._write_word(slot, self._slots[slot])
        self.config.write(slot, static, name)
        (self._xdp.add if static.xdp else self._xdp.discard)(slot)
        (self._replies.discard if static.replies == "off" else self._replies.add)(slot)
        self._longest[slot] = (static.established_idle_s, static.established_max_s)
        key = self._endpoint.pack(kernel_address(static.dns_address), network_port(static.dns_port))
        self._loaded.maps["dns_endpoints"].update(key, u32(slot))
        self._endpoints[slot] = key

    def _clear(self, slot: int) -> None:
        table = self._loaded.maps["dns_endpoints"]
        endpoint = self._endpoints.pop(slot, None)
        # None: a daemon before us wrote it, and we never did.
        for key in [endpoint] if endpoint is not None else list(table.keys()):
            owner = table.lookup(key)
            if owner is not None and owner[:4] == u32(slot):
                table.delete(key)
        self._leases.clear(slot)
        self._inbound.sweep(0, 0, 0, slot=slot)
        self._seen.clear(slot)
        self.config.clear(slot)
        self._xdp.discard(slot)
        self._replies.discard(slot)
        self._longest.pop(slot, None)
        self._dirty.discard(slot)

    def _interface_map(self, ifindex: int) -> str:
        return "if_slot" if ifindex < self._loaded.layout.constants["DIRECT_IFINDEX"] else "if_slot_far"

    def _interface_slot(self, ifindex: int) -> int:
        found = self._loaded.maps[self._interface_map(ifindex)].lookup(u32(ifindex))
        return int.from_bytes(found[:4], sys.byteorder) if found else 0

    def _set_interface(self, ifindex: int, slot: int) -> None:
        table = self._loaded.maps[self._interface_map(ifindex)]
        if slot or self._interface_map(ifindex) == "if_slot":
            table.update(u32(ifindex), u32(slot))
        else:
            table.delete(u32(ifindex))

    def _attach_cgroup(self, slot: int, target: CgroupTarget, name: str) -> None:
        with self._hooks.cgroup_storage(target):
            self._set_cgroup(target, slot)  # it may have an old value, of an attachment before
            self._hooks.attach_cgroup(target, name)

    def _put_back_cgroup(self, slot: int, target: CgroupTarget, name: str) -> bool:
        there, ours = self._hooks.cgroup_state(target, name)
        if ours:
            self._set_cgroup(target, slot)  # a detach that was cut short has set it back
        else:
            self._attach_cgroup(slot, target, name)
        return there

    def _set_cgroup(self, target: CgroupTarget, slot: int) -> None:
        try:
            self._loaded.maps["cgroup_slot"].update(target.cgroup_id.to_bytes(8, sys.byteorder), u32(slot))
        except FileNotFoundError:
            if slot:
                raise

    async def _undo(self, slot: int, target: Target, name: str) -> None:
        try:
            await finish(self.detach(slot, target, name), f"undo attach {name}")
        except (NetfenceError, OSError) as error:
            # What is left judges by start_mode; the slot stays taken as long as the daemon runs.
            log.exception("attach_not_undone", attachment=name, error=str(error))

    def _begin_inbound(self, slot: int, target: Target, direction: Direction | None, name: str) -> None:
        """Attach the inbound program behind the caller's back, where replies are not off: the fence holds without."""
        pending = self._inbound_hooks.get(name)
        if slot in self._replies and (pending is None or pending.done()):
            self._inbound_hooks[name] = self._spawn(self._attach_inbound(target, direction, name), f"inbound {name}")

    async def _attach_inbound(self, target: Target, direction: Direction | None, name: str) -> bool:
        """Have the inbound program in place; False when it was not. The same failure is told once, however often."""
        try:
            there = await self._run(lambda: self._hooks.attach_inbound(target, direction, name))
        except Exception as error:  # noqa: BLE001 - the fence holds without it; replies do not pass
            if self._inbound_failures.get(name) != str(error):
                log.warning("inbound_hook_failed", attachment=name, error=str(error), effect="replies are dropped")
            self._inbound_failures[name] = str(error)
            return False
        self._inbound_failures.pop(name, None)
        return there

    def _write_word(self, slot: int, state: SlotWord) -> None:
        self.config.switch(slot, state.encode(self._loaded.layout))

    def _give_back(self, index: int) -> None:
        self._to_release.append(index)
        if len(self._to_release) == 1:
            self._spawn(self._release(), "release policies")

    async def _release(self) -> None:
        while self._to_release:
            batch = list(self._to_release)
            with contextlib.suppress(Exception):  # the tables have them all the same; `refill` tries again, and tells
                await self._run(functools.partial(self._rules.release, batch))
            del self._to_release[: len(batch)]
        await self._run(self._rules.refill)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background_work_failed", task=task.get_name(), error=str(error))


def _lock(bpffs_dir: Path) -> int:
    """Hold `bpffs_dir` for ourselves while the descriptor is open; raises PreconditionError when another has it.

    A compile child may outlive a daemon that was killed by the moment that its own end takes.
    """
    bpffs_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock_fd = os.open(bpffs_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    until = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > until:
                os.close(lock_fd)
                message = f"lock {bpffs_dir}: another netfenced uses it; stop that one or set bpffs_dir"
                raise PreconditionError(message) from error
            time.sleep(LOCK_S / 50)
        else:
            return lock_fd
