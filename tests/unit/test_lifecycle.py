"""Attach and detach over a data plane that is a record: whoever comes in between, everything ends exactly once.

`Bench` is also what `test_restore` and `test_targets` stand on: the real life cycle, store and DNS servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from netfence import lifecycle as module
from netfence.api.views import AttachSpec, HookWish
from netfence.config import Config
from netfence.control.applying import Commands
from netfence.control.local import NoControl
from netfence.control.outbox import Outbox, Result
from netfence.control.peek import head_of
from netfence.control.port import AttachmentView, FirstPolicy, UnsubscribeReason
from netfence.dataplane.config import Static
from netfence.dataplane.target import Direction, InterfaceTarget, LinkLayer
from netfence.dns.cache import SharedCache
from netfence.dns.settings import DnsSettings
from netfence.dns.upstream import Resolver
from netfence.endpoints import PortEndpoints
from netfence.errors import InvalidError, NetfenceError, NotFoundError
from netfence.hosting import Host
from netfence.lifecycle import TIMES_AHEAD, Lifecycle, Live, Parts, Target, key_of
from netfence.policy.commands import BulkUpdate, SetMode
from netfence.policy.modes import Mode
from netfence.policy.policy import Policy
from netfence.store import Store
from netfence.targets import TargetKeeper, Watchers
from netfence.v1 import control_pb2, types_pb2

FIRST = 20_000 + os.getpid() % 1000 * 8  # below the ephemeral ports, and for each worker its own
PORTS = (FIRST, FIRST + 3)
ADDRESS = bytes((192, 0, 2, 1))
DISABLED, DENYLIST = types_pb2.POLICY_MODE_DISABLED, types_pb2.POLICY_MODE_DENYLIST


def interface(name: str, ifindex: int) -> InterfaceTarget:
    return InterfaceTarget(name, ifindex, "veth", 1, LinkLayer.L2, 0, 0, False, False, ())


class FakePlane:
    """Slots, hooks and policies as sets and dictionaries; `fail` makes every call of that name raise."""

    def __init__(self) -> None:
        self.free = set(range(1, 10))
        self.freed: list[int] = []
        self.hooked: dict[str, int] = {}  # attachment → ifindex
        self.policies: dict[int, Policy] = {}
        self.calls: list[str] = []
        self.fail: dict[str, Exception] = {}
        self.forgotten: list[tuple[int, int]] = []
        self.unsure: set[int] = set()  # slots whose policy is not stored
        self.xdp: set[str] = set()  # attachments that have XDP too
        self.cleared: list[int] = []
        self.unclaimed: set[int] = set()  # slots that were nobody's once all was restored
        self.known: dict[str, Policy] = {}  # what the kernel remembers of attachments
        self.before_ours = ["somebody"]

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail:
            raise self.fail[name]

    def allocate_slot(self) -> int:
        slot = min(self.free)
        self.free.discard(slot)
        return slot

    def claim_slot(self, slot: int) -> None:
        self.free.discard(slot)

    def free_slot(self, slot: int) -> None:
        self.freed.append(slot)
        self.free.add(slot)

    async def attach(self, slot: int, target: Target, static: Static, direction: Direction | None, name: str) -> str:
        del slot, direction
        await asyncio.sleep(0)
        self._called("attach xdp" if static.xdp else "attach")
        self.hooked[name] = key_of(target)[1]
        return "xdp-native" if static.xdp else "tcx"

    tc_mechanism = "tcx"

    async def mechanism(self, target: Target, name: str) -> str:
        assert self.hooked[name] == key_of(target)[1]
        return "xdp-native" if name in self.xdp else self.tc_mechanism

    def front(self, target: Target, direction: Direction | None, name: str) -> list[str]:
        del target, direction, name
        self._called("front")
        return self.before_ours

    async def move_ahead(self, target: Target, direction: Direction | None, name: str) -> list[str]:
        del target, direction, name
        await asyncio.sleep(0)
        self._called("move_ahead")
        self.before_ours = [one for one in self.before_ours if one == "somebody"]  # whom it cannot pass
        return self.before_ours

    async def clear_unclaimed(self, others: Iterable[int]) -> list[int]:
        self._called("clear_unclaimed")
        self.unclaimed = self.free & set(others)
        return sorted(self.unclaimed)

    async def finish_upgrade(self) -> set[str]:
        return set()

    async def restore(self, slot: int, target: Target, static: Static, direction: Direction | None, name: str) -> bool:
        del slot, direction
        await asyncio.sleep(0)
        self._called("restore")
        whole = name in self.hooked
        self.hooked[name] = key_of(target)[1]
        self.xdp.discard(name)
        if static.xdp:
            self._called("restore xdp")
            self.xdp.add(name)
        return whole

    async def put_back(self, slot: int, target: Target, direction: Direction | None, name: str) -> bool:
        del slot, direction, name
        await asyncio.sleep(0)
        self._called(f"put_back {key_of(target)[1]}")
        return True

    async def detach(self, slot: int, target: Target, name: str) -> None:
        await self.unhook(slot, target, name)
        await self.clear(slot)

    async def unhook(self, slot: int, target: Target, name: str) -> None:
        await asyncio.sleep(0)
        self._called(f"detach {key_of(target)[1]}")
        self._called("detach")
        self.hooked.pop(name, None)
        self.policies.pop(slot, None)

    async def clear(self, slot: int) -> None:
        assert slot not in self.policies  # its hooks are off
        self.cleared.append(slot)

    def forget_interface(self, slot: int, ifindex: int) -> None:
        self.forgotten.append((slot, ifindex))

    async def apply(self, slot: int, policy: Policy, old: Policy | None, *, start: bool = False) -> None:
        del start
        assert old is None or old == self.policies[slot]
        await asyncio.sleep(0)
        self._called("apply")
        self.policies[slot] = policy

    def note_unstored(self, slot: int, unstored: bool) -> None:
        (self.unsure.add if unstored else self.unsure.discard)(slot)

    def unstored(self, slot: int) -> bool:
        return slot in self.unsure

    def pinned(self) -> set[str]:
        return set(self.hooked)

    async def remembered(self) -> dict[str, Any]:
        self._called("remembered")
        return {name: SimpleNamespace(policy=policy) for name, policy in self.known.items()}

    async def leases(self) -> dict[int, dict[bytes, float]]:
        return {slot: {ADDRESS: 1e12} for slot in range(1, 10)}

    def open_leases(self, slot: int, addresses: Sequence[bytes], expiry: float) -> None:
        """Open."""

    def close_leases(self, slot: int, addresses: Iterable[bytes]) -> None:
        if list(addresses):
            self.calls.append(f"close {slot}")

    def set_own_addresses(self, slot: int, addresses: Sequence[bytes]) -> None:
        del addresses
        self._called(f"own {slot}")

    def set_host_addresses(self, addresses: Iterable[bytes]) -> None:
        del addresses
        self._called("host")


class Control(NoControl):
    """Gives everybody the same first policy."""

    def __init__(self) -> None:
        self.unsubscribed: list[UnsubscribeReason] = []
        self.unsubscribing: Callable[[], Awaitable[None]] | None = None

    def check(self, target: str) -> None:
        """Accept."""

    async def subscribe(self, view: AttachmentView) -> FirstPolicy:
        del view
        return FirstPolicy(BulkUpdate(mode=Mode.BLOCK_ALL), "v1")

    async def unsubscribe(self, attachment_id: str, reason: UnsubscribeReason, error: str = "") -> None:
        del attachment_id, error
        if self.unsubscribing is not None:
            await self.unsubscribing()
        self.unsubscribed.append(reason)


class Watch:
    """Remembers what is watched."""

    def __init__(self) -> None:
        self.targets: set[tuple[str, int]] = set()

    def watch(self, target: Target) -> None:
        self.targets.add(key_of(target))

    def unwatch(self, target: Target) -> None:
        self.targets.discard(key_of(target))


class Bench:
    """A daemon's life cycle without a kernel."""

    def __init__(self, directory: Path, plane: FakePlane | None = None) -> None:
        self.plane = plane or FakePlane()
        self.control, self.watch = Control(), Watch()
        self.store = Store.open(directory)
        self.endpoints = PortEndpoints("127.0.0.1", *PORTS)
        dns = DnsSettings(upstreams=())
        parts: dict[str, Any] = {"plane": self.plane, "control": self.control, "watch": self.watch}
        self.lifecycle = Lifecycle(
            Parts(
                config=Config(),
                store=self.store,
                endpoints=self.endpoints,
                dns=dns,
                cache=SharedCache(3600),
                resolver=Resolver(dns),
                boot_id="boot",
                **parts,
            )
        )
        self.keeper = TargetKeeper(self.lifecycle, Watchers())
        self.background: list[asyncio.Task[None]] = []

    def start(self, work: Any, name: str) -> None:
        self.background.append(asyncio.get_running_loop().create_task(work, name=name))

    async def attach(self, name: str = "veth7") -> Live:
        return await self.lifecycle.attach(AttachSpec(name, None, {}, "auto", "auto"))

    def only(self) -> Live:
        (live,) = self.lifecycle.every()
        return live

    async def nothing_is_left(self) -> None:
        assert self.lifecycle.every() == []
        assert self.plane.hooked == {}
        assert len(self.plane.freed) == len(set(self.plane.freed)) == 1
        assert self.watch.targets == set()
        assert await self.store.load() == []
        assert self.endpoints._taken == set()
        assert self.lifecycle._targets == {}

    async def close(self) -> None:
        for task in self.background:
            task.cancel()
        await asyncio.gather(*self.background, return_exceptions=True)
        for live in self.lifecycle.every():
            await live.server.close()
        await self.store.close()


def on_bench(directory: Path, work: Callable[[Bench], Awaitable[None]], plane: FakePlane | None = None) -> None:
    async def test() -> None:
        bench = Bench(directory, plane)
        try:
            await work(bench)
        finally:
            await bench.close()

    asyncio.run(asyncio.wait_for(test(), 20))


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition, at most two seconds."""
    async with asyncio.timeout(2):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def _targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make vethN the interface with index N."""
    monkeypatch.setattr(module, "resolve_interface", lambda name: interface(name, int(name.removeprefix("veth"))))


@pytest.mark.parametrize("hook", ["tc", "xdp"])
def test_the_hook_is_stored_told_and_asked_for(tmp_path: Path, hook: HookWish) -> None:
    async def work(bench: Bench) -> None:
        live = await bench.lifecycle.attach(AttachSpec("veth7", None, {}, hook, "auto"))
        (row,) = await bench.store.load()
        assert row.hook == live.row.hook == hook
        assert bench.lifecycle.static(live).xdp == live.attachment.view().xdp == (hook == "xdp")

    on_bench(tmp_path, work)


def test_attach_and_detach(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        live = await bench.attach()
        assert [one.row.id for one in bench.lifecycle.all()] == [live.row.id]
        await bench.lifecycle.detach(live.row.id)
        await bench.nothing_is_left()
        assert bench.control.unsubscribed == [UnsubscribeReason.DETACHED]

    on_bench(tmp_path, work)


def test_an_attach_is_stored_before_anything_of_it_is_hooked(tmp_path: Path) -> None:
    """Whatever it is cut short by, the next start finds a row for what it finds in the kernel."""

    async def work(bench: Bench) -> None:
        attach = bench.plane.attach
        stored: list[tuple[str, str | None]] = []

        async def look(slot: int, target: Target, static: Static, direction: Direction | None, name: str) -> str:
            stored.extend((row.id, row.policy) for row in await bench.store.load())
            return await attach(slot, target, static, direction, name)

        bench.plane.attach = look  # type: ignore[method-assign]
        live = await bench.attach()
        assert stored == [(live.row.id, None)]

    on_bench(tmp_path, work)


@pytest.mark.parametrize("how", ["hung-up", "gone", "command-failed"])
def test_an_attach_that_rolls_back_is_ended_by_nobody_else(tmp_path: Path, how: str) -> None:
    """Its first policy is in force already; the end of the same target comes while it is being rolled back."""

    async def work(bench: Bench) -> None:
        said = asyncio.Event()
        rolling_back = asyncio.Event()

        async def unsubscribing() -> None:
            rolling_back.set()
            await said.wait()

        bench.control.unsubscribing = unsubscribing
        save = bench.store.save

        async def slow_save(*arguments: Any) -> None:
            await save(*arguments)
            if how == "gone":
                await bench.keeper._gone(key_of(bench.only().target))
            elif how == "command-failed":
                raise NetfenceError("disk full")
            else:
                task.cancel()

        bench.store.save = slow_save  # type: ignore[method-assign,assignment]
        task = asyncio.ensure_future(bench.attach())
        await rolling_back.wait()
        live = bench.only()
        with pytest.raises(NotFoundError):
            await bench.lifecycle.detach(live.row.id)
        await bench.keeper._gone(key_of(live.target))
        await bench.lifecycle.end(live, UnsubscribeReason.REMOVED)
        with pytest.raises(NotFoundError) if how != "gone" else contextlib.nullcontext():
            await Host(bench.lifecycle).apply(live.row.id, SetMode(Mode.DISABLED))
        assert bench.lifecycle.all() == []
        said.set()
        with pytest.raises((NetfenceError, asyncio.CancelledError)):
            await task
        await bench.nothing_is_left()

    on_bench(tmp_path, work)


def test_a_caller_that_hangs_up_while_the_port_is_bound_costs_no_port(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        reserve = bench.endpoints.reserve

        async def slow_reserve(bind: Any) -> Any:
            task.cancel()
            await asyncio.sleep(0.01)
            return await reserve(bind)

        bench.endpoints.reserve = slow_reserve  # type: ignore[method-assign]
        task = asyncio.ensure_future(bench.attach())
        with pytest.raises(asyncio.CancelledError):
            await task
        await bench.nothing_is_left()

    on_bench(tmp_path, work)


def test_hooks_that_cannot_be_taken_off_in_a_roll_back_keep_their_row(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.plane.fail = {"apply": NetfenceError("no"), "detach": NetfenceError("device busy")}
        with capture_logs() as logs, pytest.raises(NetfenceError, match="no"):
            await bench.attach()
        (row,) = await bench.store.load()
        assert row.policy is None  # so the next start takes it off
        assert "row_kept" in [entry["event"] for entry in logs]
        assert set(bench.plane.hooked) == {row.id}  # pins that the store does not know would keep us from starting

    on_bench(tmp_path, work)


def test_a_hook_lost_while_attaching_is_put_back_before_it_is_attached(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        save = bench.store.save

        async def save_and_lose(*arguments: Any) -> None:
            await save(*arguments)
            await bench.keeper._put_back(bench.only())

        bench.store.save = save_and_lose  # type: ignore[method-assign,assignment]
        await bench.attach()
        assert bench.plane.calls[-1] == "put_back 7"

    on_bench(tmp_path, work)


def test_a_detach_that_fails_half_way_puts_hooks_and_policy_back(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        live = await bench.attach()
        policy = live.attachment.policy
        unhook = bench.plane.unhook

        async def half(*arguments: Any) -> None:
            await unhook(*arguments)
            raise NetfenceError("device busy")

        bench.plane.unhook = half  # type: ignore[method-assign,assignment]
        with pytest.raises(NetfenceError, match="device busy"):
            await bench.lifecycle.detach(live.row.id)
        assert set(bench.plane.hooked) == {live.row.id}
        assert bench.plane.policies == {live.row.slot: policy}
        assert bench.watch.targets == {key_of(live.target)}
        assert bench.lifecycle.all() == [live]
        assert bench.plane.freed == []
        bench.plane.unhook = unhook  # type: ignore[method-assign]
        assert bench.plane.cleared == []  # leases and counts go on
        await bench.lifecycle.detach(live.row.id)
        assert bench.plane.cleared == [live.row.slot]
        await bench.nothing_is_left()

    on_bench(tmp_path, work)


def test_a_detach_that_the_store_refuses_leaves_the_fence_alone(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        live = await bench.attach()
        policy = live.attachment.policy
        store = bench.lifecycle.parts.store

        async def refuse(*_: object) -> None:
            raise NetfenceError("disk full")

        for method in ("save_counters", "remove"):  # before the hooks are off, and after
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(store, method, refuse)
                with pytest.raises(NetfenceError, match="disk full"):
                    await bench.lifecycle.detach(live.row.id)
            assert set(bench.plane.hooked) == {live.row.id}
            assert bench.plane.policies == {live.row.slot: policy}
            assert bench.watch.targets == {key_of(live.target)}
            assert bench.lifecycle.all() == [live]
            assert bench.plane.cleared == []
        await bench.lifecycle.detach(live.row.id)
        await bench.nothing_is_left()

    on_bench(tmp_path, work)


class Commanded(NoControl):
    """Real `Commands`, without a stream: an attach waits for what `take` brings."""

    def __init__(self, bench: Bench) -> None:
        self.outbox = Outbox()
        self.outbox.begin(())
        self.commands = Commands(self.outbox, 1 << 20)
        self.commands.serve(Host(bench.lifecycle))
        self.id = ""

    def check(self, target: str) -> None:
        """Accept."""

    async def subscribe(self, view: AttachmentView) -> FirstPolicy:
        self.id = view.id
        return await self.commands.wait_for(view).policy

    async def unsubscribe(self, attachment_id: str, reason: UnsubscribeReason, error: str = "") -> None:
        del reason, error
        self.commands.forget(attachment_id)

    async def take(self, *messages: control_pb2.ControlCommand) -> None:
        """Take commands for the attachment in one breath."""
        for message in messages:
            message.id = self.id
            data = message.SerializeToString()
            await self.commands.take(head_of(data), data)

    async def results(self) -> list[Result]:
        """Wait until all is done and return the results."""
        await self.commands.drained()
        await self.commands.close()
        found = [await self.outbox.take() for _ in range(len(self.outbox))]
        return [one for one in found if isinstance(one, Result)]


@pytest.mark.parametrize("behind", ["command", "ack"])
def test_what_comes_behind_a_bad_ack_brings_nothing_to_life(tmp_path: Path, behind: str) -> None:
    async def work(bench: Bench) -> None:
        control = Commanded(bench)
        object.__setattr__(bench.lifecycle.parts, "control", control)
        attaching = asyncio.ensure_future(bench.attach())
        await until(lambda: control.id)
        bad = control_pb2.ControlCommand(nonce="bad", subscribed_ack=control_pb2.SubscribedAck(mode=DENYLIST))
        bad.subscribed_ack.allow_cidrs.add(cidr="10.0.0.0/8").ttl.seconds = -1  # refused before it is applied
        opening = control_pb2.ControlCommand(nonce="late")
        if behind == "ack":
            opening.subscribed_ack.mode = DISABLED
        else:
            opening.set_mode.mode = DISABLED
        await control.take(bad, opening)
        with pytest.raises(InvalidError, match="SubscribedAck is refused"):
            await attaching
        results = await control.results()
        assert [(one.nonce, one.ok) for one in results] == [("bad", False), ("late", False)]
        assert "no attachment" in results[1].errors[0]
        assert "apply" not in bench.plane.calls
        await bench.nothing_is_left()

    on_bench(tmp_path, work)


@pytest.mark.parametrize("how", ["refused", "failed", "hung-up"])
def test_an_attach_that_was_given_no_policy_is_shut_before_the_roll_back_begins(tmp_path: Path, how: str) -> None:
    async def work(bench: Bench) -> None:
        closed: list[bool] = []

        async def unsubscribing() -> None:
            closed.append(bench.only().attachment.closed)

        async def subscribe(view: AttachmentView) -> FirstPolicy:
            del view
            if how == "hung-up":
                task.cancel()
                await asyncio.Event().wait()
            raise InvalidError(["mode: 0"]) if how == "refused" else NetfenceError("no control plane")

        bench.control.subscribe = subscribe  # type: ignore[method-assign]
        bench.control.unsubscribing = unsubscribing
        task = asyncio.ensure_future(bench.attach())
        with pytest.raises((NetfenceError, asyncio.CancelledError)):
            await task
        assert closed == [True]
        await bench.nothing_is_left()

    on_bench(tmp_path, work)


def test_looking_for_programs_in_front_of_a_target_that_went_is_no_failure(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        live = await bench.attach()
        bench.plane.fail["front"] = NotFoundError("no such device")
        with capture_logs() as logs:
            await bench.lifecycle.warn(live)
        assert live.in_front == []
        assert "programs_in_front" not in {entry["event"] for entry in logs}
        del bench.plane.fail["front"]
        with capture_logs() as logs:
            await bench.lifecycle.warn(live)
            await bench.lifecycle.look_in_front(live)
        assert live.in_front == ["somebody"]
        levels = [entry["log_level"] for entry in logs if entry["event"] == "programs_in_front"]
        assert levels == ["error"]  # one word, whoever sees it first: the attach or the look that goes round

    on_bench(tmp_path, work)


def _moves(logs: Sequence[Any]) -> list[str]:
    return [entry["event"] for entry in logs if "_ahead" in entry["event"]]


def test_ours_goes_ahead_of_what_comes_in_front_a_few_times_and_then_only_tells(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        live = await bench.attach()
        for time in range(TIMES_AHEAD + 2):
            there = ["somebody", f"newcomer {time}"]
            bench.plane.before_ours = there
            with capture_logs() as logs:
                await bench.lifecycle.look_in_front(live)
                await bench.lifecycle.look_in_front(live)  # finds nothing new
            insists = time >= TIMES_AHEAD
            assert _moves(logs) == ["hook_not_moved_ahead" if insists else "hook_moved_ahead"]
            assert live.in_front == (there if insists else ["somebody"])
        assert bench.plane.calls.count("move_ahead") == TIMES_AHEAD

    on_bench(tmp_path, work)


@pytest.mark.parametrize("error", [NetfenceError("no memory"), NotFoundError("no such device")])
def test_one_that_cannot_go_ahead_is_told_of_and_stays(tmp_path: Path, error: NetfenceError) -> None:
    async def work(bench: Bench) -> None:
        live = await bench.attach()
        bench.plane.fail["move_ahead"] = error
        with capture_logs() as logs:
            await bench.lifecycle.look_in_front(live)
        assert _moves(logs) == ([] if isinstance(error, NotFoundError) else ["hook_not_moved_ahead"])
        assert live.in_front == ["somebody"]

    on_bench(tmp_path, work)


def test_ours_does_not_move_beside_its_end(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        live = await bench.attach()
        await bench.lifecycle.detach(live.row.id)
        await bench.lifecycle.look_in_front(live)
        assert "move_ahead" not in bench.plane.calls

    on_bench(tmp_path, work)
