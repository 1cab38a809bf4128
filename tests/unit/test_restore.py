"""Taking over what a store tells of, over a data plane that is a record: what fails is told truly and tried again."""

from __future__ import annotations

import asyncio
import math
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from tests.unit.test_lifecycle import PORTS, Bench, FakePlane, _targets, interface, until
from tests.unit.test_store import damage_daemon_table

from netfence import restore as module
from netfence.control.port import UnsubscribeReason
from netfence.errors import ExistsError, NetfenceError, PreconditionError
from netfence.hosting import Host
from netfence.lifecycle import key_of
from netfence.policy.cidr import CidrTable, Entry, parse_cidr
from netfence.policy.commands import DenyDomain, SetMode
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import EMPTY, DnsPolicy, Policy
from netfence.restore import Outcome, restore
from netfence.store import DATABASE, Row, Store

__all__ = ["_targets"]

GONE = 99  # an index that is no interface (any more)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.01)

    def find(row: Row, _rebooted: bool) -> Any:
        return None if row.identity == str(GONE) else interface(row.name, int(row.name.removeprefix("veth")))

    monkeypatch.setattr(module, "_find", find)


def after_restart(
    directory: Path,
    work: Callable[[Bench], Awaitable[None]],
    *,
    rows: tuple[str, ...] = ("veth7",),
    **changes: object,
) -> None:
    """Attach `rows`, end that daemon, change what it stored, and do `work` in the next one."""

    async def test() -> None:
        before = Bench(directory)
        for name in rows:
            await before.attach(name)
        stored = await before.store.load()
        await before.close()
        plane = FakePlane()
        plane.hooked, plane.policies = before.plane.hooked, before.plane.policies
        bench = Bench(directory, plane)
        last = replace(stored[-1], **changes)  # type: ignore[arg-type]
        await bench.store.remove(last.id)
        await bench.store.reserve(last)
        try:
            await work(bench)
        finally:
            await bench.close()

    asyncio.run(asyncio.wait_for(test(), 20))


def after_damage(
    directory: Path,
    work: Callable[[Bench], Awaitable[None]],
    *,
    rows: tuple[str, ...] = ("veth7",),
    starts_that_failed: int = 0,
    **changes: object,
) -> None:
    """Attach `rows`, change what is stored, damage the database, lose every pin, and do `work` in the next daemon."""

    async def test() -> None:
        before = Bench(directory)
        for name in rows:
            await before.attach(name)
        for row in await before.store.load():
            await before.store.remove(row.id)
            await before.store.reserve(replace(row, **changes))  # type: ignore[arg-type]
        await before.close()
        damage_daemon_table(directory / DATABASE)
        for _ in range(starts_that_failed):
            await Store.open(directory).close()
        bench = Bench(directory)
        try:
            await work(bench)
        finally:
            await bench.close()

    asyncio.run(asyncio.wait_for(test(), 20))


async def restored(bench: Bench) -> Counter[Outcome]:
    return await restore(bench.lifecycle, bench.start)


def test_what_was_attached_is_taken_over_with_its_leases(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        assert await restored(bench) == Counter({Outcome.TAKEN_OVER: 1})
        live = bench.only()
        assert (live.attached, live.hooked) == (True, True)
        assert bench.watch.targets == {key_of(live.target)}
        await Host(bench.lifecycle).apply(live.row.id, DenyDomain("x.test"))
        assert f"close {live.row.slot}" in bench.plane.calls

    after_restart(tmp_path, work)


def test_what_is_left_of_endpoints_is_tidied_when_all_have_theirs(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        taken: list[set[int]] = []

        async def tidy() -> None:
            taken.append(set(bench.endpoints._taken))

        bench.endpoints.tidy = tidy  # type: ignore[method-assign]
        await restored(bench)
        assert taken == [{PORTS[0], PORTS[0] + 1}]

    after_restart(tmp_path, work, rows=("veth7", "veth8"), policy="{damaged")


def test_slots_are_cleared_that_nobody_has_claimed_and_no_others(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        with capture_logs() as logs:
            await restored(bench)
        assert bench.plane.unclaimed == set(range(2, 10))  # the one that was dropped has its slot cleared already
        assert [one["slots"] for one in logs if one["event"] == "slots_cleared"] == [list(range(2, 10))]

    after_restart(tmp_path, work, rows=("veth7", "veth8"), identity=str(GONE))


def test_a_target_that_is_gone_is_not_looked_for_by_its_old_index(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        claimed: list[str] = []
        claim, release = bench.endpoints.claim, bench.endpoints.release

        async def note_claim(endpoint: Any) -> None:
            claimed.append(f"claim {endpoint.port}")
            await claim(endpoint)

        async def note_release(endpoint: Any) -> None:
            claimed.append(f"release {endpoint.port}")
            await release(endpoint)

        bench.endpoints.claim, bench.endpoints.release = note_claim, note_release  # type: ignore[method-assign]
        assert await restored(bench) == Counter({Outcome.TAKEN_OVER: 1, Outcome.DROPPED: 1})
        assert "detach 0" in bench.plane.calls
        assert f"detach {GONE}" not in bench.plane.calls
        assert bench.plane.forgotten == [(2, GONE)]  # which looks whose it is
        gone = [each for each in claimed if each.endswith(str(PORTS[0] + 1))]
        assert gone == [f"claim {PORTS[0] + 1}", f"release {PORTS[0] + 1}"]

    after_restart(tmp_path, work, rows=("veth7", "veth8"), identity=str(GONE))


@pytest.mark.parametrize("hooks", [True, False, NetfenceError("no memory")], ids=["carried", "not-there", "not-read"])
def test_another_name_at_the_same_index_is_a_rename_only_with_our_hooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hooks: bool | Exception
) -> None:
    asked: list[tuple[Any, ...]] = []

    def carries(*what: Any) -> bool:
        asked.append(what)
        if isinstance(hooks, Exception):
            raise hooks
        return hooks

    async def work(bench: Bench) -> None:
        monkeypatch.setattr(module, "carries", carries)
        monkeypatch.setattr(
            module, "_find", lambda row, _: interface({"veth8": "other"}.get(row.name, row.name), int(row.identity))
        )
        _, row = await bench.store.load()
        with capture_logs() as logs:
            outcomes = await restored(bench)
        assert asked == [(bench.lifecycle.parts.config.bpffs_dir / "links", row.id, 8, "tcx")]
        told = [one["event"] for one in logs if one["log_level"] == "warning" and one.get("attachment") == row.id]
        if hooks:
            assert outcomes == Counter({Outcome.TAKEN_OVER: 2})
            assert {live.row.name for live in bench.lifecycle.all()} == {"veth7", "other"}
            assert told == ([] if hooks is True else ["hooks_not_read"])
            return
        assert outcomes == Counter({Outcome.TAKEN_OVER: 1, Outcome.DROPPED: 1})
        assert told == ["target_replaced"]
        assert bench.control.unsubscribed == [UnsubscribeReason.REMOVED]
        assert "detach 8" not in bench.plane.calls  # the other one is not touched
        assert bench.plane.forgotten == [(2, 8)]
        assert [one.id for one in await bench.store.load()] == [bench.only().row.id]

    after_restart(tmp_path, work, rows=("veth7", "veth8"))


def test_after_a_reboot_an_attach_that_never_ended_touches_no_interface(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        assert await restored(bench) == Counter({Outcome.DROPPED: 1})
        assert [call for call in bench.plane.calls if call.startswith("detach ")] == ["detach 0"]

    after_restart(tmp_path, work, boot_id="the boot before", policy=None)


@pytest.mark.parametrize("what", ["static", "restore", "apply", "defect", "watch"])
def test_what_cannot_be_taken_over_takes_commands_and_is_tried_again(tmp_path: Path, what: str) -> None:
    async def work(bench: Bench) -> None:
        static, watch = bench.lifecycle.static, bench.watch.watch

        def refuse(_: object) -> Any:
            raise PreconditionError("no")

        if what == "static":
            bench.lifecycle.static = refuse  # type: ignore[method-assign,assignment]
        elif what == "watch":
            bench.watch.watch = refuse  # type: ignore[method-assign,assignment]
        else:
            bench.plane.fail = {what.replace("defect", "restore"): KeyError("slot") if what == "defect" else OSError(5)}
        with capture_logs() as logs:
            assert await restored(bench) == Counter({Outcome.LEFT_ALONE: 1})
        (told,) = [entry for entry in logs if entry["event"] == "not_taken_over"]
        assert told["effect"].startswith("the kernel goes on enforcing what it has")
        live = bench.only()
        bench.plane.fail = {}
        await Host(bench.lifecycle).apply(live.row.id, DenyDomain("x.test"))
        assert f"close {live.row.slot}" in bench.plane.calls  # its leases are known, so they are revoked
        bench.lifecycle.static, bench.watch.watch = static, watch  # type: ignore[method-assign]
        await until(lambda: live.hooked and not any(task for task in bench.background if not task.done()))
        assert bench.plane.policies[live.row.slot] is live.attachment.policy

    after_restart(tmp_path, work)


def test_after_a_reboot_tc_fences_alone_where_xdp_is_refused(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.plane.hooked.clear()
        bench.plane.fail["attach xdp"] = PreconditionError("the MTU is too large")
        with capture_logs() as logs:
            assert await restored(bench) == Counter({Outcome.HOOKED_ANEW: 1})
        assert [one["effect"] for one in logs if one["event"] == "xdp_not_attached"] == ["TC alone fences it"]
        live = bench.only()
        assert live.hooked
        assert bench.plane.hooked == {live.row.id: 7}
        (row,) = await bench.store.load()
        assert (row.hook, row.mechanism) == ("xdp", "tcx")  # what was asked for, and what is

    after_restart(tmp_path, work, boot_id="earlier", hook="xdp")


def test_tc_fences_alone_where_xdp_was_taken_off_and_is_refused(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.plane.fail["restore xdp"] = PreconditionError("the MTU is too large")
        with capture_logs() as logs:
            assert await restored(bench) == Counter({Outcome.TAKEN_OVER: 1})
        assert [one["effect"] for one in logs if one["event"] == "xdp_not_attached"] == ["TC alone fences it"]
        live = bench.only()
        assert live.hooked
        assert live.row.mechanism == "tcx"

    after_restart(tmp_path, work, hook="xdp")


def test_xdp_that_was_refused_once_is_told_when_it_is_back(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        assert await restored(bench) == Counter({Outcome.TAKEN_OVER: 1})
        assert bench.only().row.mechanism == "xdp-native"

    after_restart(tmp_path, work, hook="xdp", mechanism="tcx")


def test_after_a_reboot_a_failed_attach_is_told_as_what_it_is_and_tried_again(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.plane.hooked.clear()
        bench.plane.policies.clear()
        bench.plane.fail = {"attach": NetfenceError("no memory")}
        with capture_logs() as logs:
            assert await restored(bench) == Counter({Outcome.LEFT_ALONE: 1})
        (told,) = [entry for entry in logs if entry["event"] == "not_taken_over"]
        assert told["effect"].startswith("it is NOT fenced")
        live = bench.only()
        await Host(bench.lifecycle).apply(live.row.id, SetMode(Mode.DENYLIST))
        bench.plane.fail = {}
        await until(lambda: live.hooked)
        await until(lambda: bench.plane.policies[live.row.slot].mode is Mode.DENYLIST)
        await until(lambda: live.row.boot_id == "boot")
        await until(bench.background[0].done)
        (row,) = await bench.store.load()
        assert row.boot_id == "boot"

    after_restart(tmp_path, work, boot_id="the boot before")


@pytest.mark.parametrize("starts_that_failed", [0, 2])
@pytest.mark.parametrize("boot", ["boot", "the boot before"])
def test_what_is_read_of_a_damaged_database_is_fenced_again(tmp_path: Path, boot: str, starts_that_failed: int) -> None:
    """After a reboot nothing is pinned; within one boot pins were lost. Neither may open anything."""

    async def work(bench: Bench) -> None:
        outcome = Outcome.TAKEN_OVER if boot == "boot" else Outcome.HOOKED_ANEW
        assert await restored(bench) == Counter({outcome: 2})
        assert set(bench.plane.hooked.values()) == {7, 8}
        assert {policy.mode for policy in bench.plane.policies.values()} == {Mode.BLOCK_ALL}
        for live in bench.lifecycle.every():
            assert not live.row.acked  # the control plane is asked whether there is something newer
            assert live.row.boot_id == "boot"
        assert {live.row.dns_port for live in bench.lifecycle.every()} == {PORTS[0], PORTS[0] + 1}
        assert {row.id for row in await bench.store.load()} == set(bench.plane.hooked)
        assert bench.store.saved == {}
        assert bench.control.unsubscribed == []

    after_damage(tmp_path, work, rows=("veth7", "veth8"), starts_that_failed=starts_that_failed, boot_id=boot)


def test_nothing_is_hooked_before_all_that_was_saved_is_stored(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        attach = bench.plane.attach

        async def look(*arguments: Any) -> str:
            assert len(await bench.store.load()) == 2
            return await attach(*arguments)

        bench.plane.attach = look  # type: ignore[method-assign,assignment]
        assert await restored(bench) == Counter({Outcome.HOOKED_ANEW: 2})

    after_damage(tmp_path, work, rows=("veth7", "veth8"), boot_id="the boot before")


def test_of_what_is_saved_an_unfinished_attach_and_a_target_that_is_gone_are_dropped(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [{"policy": None}, {"identity": str(GONE)}]
    for number, changes in enumerate(cases):

        async def work(bench: Bench, told: int = number) -> None:
            assert await restored(bench) == Counter({Outcome.DROPPED: 1})
            assert bench.control.unsubscribed == [UnsubscribeReason.REMOVED] * told
            assert await bench.store.load() == []

        after_damage(tmp_path / str(number), work, boot_id="the boot before", **changes)


def test_a_saved_attachment_whose_place_is_anothers_is_told_to_be_removed(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        assert await restored(bench) == Counter({Outcome.HOOKED_ANEW: 1})
        assert bench.plane.hooked == {bench.only().row.id: 8}  # the later one
        assert bench.control.unsubscribed == [UnsubscribeReason.REMOVED]

    after_damage(tmp_path, work, rows=("veth7", "veth8"), boot_id="the boot before", dns_port=PORTS[0])


def test_after_a_reboot_a_policy_that_cannot_be_read_is_block_all(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.plane.hooked.clear()
        bench.plane.policies.clear()
        with capture_logs() as logs:
            assert await restored(bench) == Counter({Outcome.HOOKED_ANEW: 1})
        assert [one["attachment"] for one in logs if one["event"] == "policy_not_read"] == [bench.only().row.id]
        live = bench.only()
        assert bench.plane.policies == {live.row.slot: EMPTY}
        assert not live.attachment.view().acked
        assert live.attachment.view().policy_version == ""  # or a policy file that is as it was would not be applied

    after_restart(tmp_path, work, policy="{damaged", boot_id="the boot before")


def test_trying_again_ends_with_the_attachment(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        bench.plane.fail = {"restore": NetfenceError("no")}
        await restored(bench)
        await bench.lifecycle.detach(bench.only().row.id)
        await until(bench.background[0].done)
        assert bench.plane.hooked == {}

    after_restart(tmp_path, work)


@pytest.mark.parametrize(
    "damage", ["{damaged", "[" * 100_000, '{"v": 0}', "[]"], ids=["cut", "deep", "version", "other"]
)
def test_a_policy_that_cannot_be_read_comes_from_the_kernel_without_names(tmp_path: Path, damage: str) -> None:
    """It is listed, watched, detachable and nobody's policy: so it is given one anew, whatever version it had."""

    async def work(bench: Bench) -> None:
        last = (await bench.store.load())[-1]
        assert last.policy_version == "v1"
        rules = CidrTable.of([(parse_cidr("192.0.2.0/24"), Entry(math.inf, 0.0))])
        names = DnsPolicy(mode=DnsMode.ALLOWLIST)
        bench.plane.known = {last.id: Policy(mode=Mode.DENYLIST, cidrs=rules, dns=names)}
        with capture_logs() as logs:
            assert await restored(bench) == Counter({Outcome.TAKEN_OVER: 2})
        (told,) = [one for one in logs if one["event"] == "policy_not_read"]
        assert (told["attachment"], told["log_level"]) == (last.id, "error")
        assert told["effect"].startswith("its rules are what the kernel has, names are refused")
        first, second = bench.lifecycle.all()
        assert bench.plane.policies[second.row.slot] == bench.plane.known[last.id]
        assert (second.attachment.view().acked, second.attachment.view().policy_version) == (False, "")
        assert (first.attachment.view().acked, first.attachment.view().policy_version) == (True, "v1")
        assert bench.plane.policies[first.row.slot].mode is Mode.BLOCK_ALL
        assert bench.watch.targets == {key_of(live.target) for live in (first, second)}
        with pytest.raises(ExistsError, match="attached already"):
            await bench.attach("veth8")
        third = await bench.attach("veth9")  # which gets neither its slot nor its port
        assert (third.row.slot, third.row.dns_port) == (3, PORTS[0] + 2)
        await bench.lifecycle.detach(second.row.id)
        assert set(bench.plane.hooked) == {first.row.id, third.row.id}

    after_restart(tmp_path, work, rows=("veth7", "veth8"), policy=damage)


@pytest.mark.parametrize("why", ["unknown", "unreadable"])
def test_a_policy_that_neither_store_nor_kernel_can_tell_is_block_all(tmp_path: Path, why: str) -> None:
    async def work(bench: Bench) -> None:
        if why == "unreadable":
            bench.plane.fail = {"remembered": OSError(24, "Too many open files")}
        with capture_logs() as logs:
            assert await restored(bench) == Counter({Outcome.TAKEN_OVER: 1})
        assert len([one for one in logs if one["event"] == "rules_not_read"]) == (why == "unreadable")
        assert bench.plane.policies == {bench.only().row.slot: EMPTY}
        assert not bench.only().attachment.view().acked

    after_restart(tmp_path, work, policy="{damaged")


def test_the_kernel_is_asked_once_for_all_policies_that_cannot_be_read(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        for row in await bench.store.load():
            await bench.store.remove(row.id)
            await bench.store.reserve(replace(row, policy="{damaged"))
        await restored(bench)
        assert bench.plane.calls.count("remembered") == 1

    after_restart(tmp_path, work, rows=("veth7", "veth8", "veth9"))


def test_a_lost_port_is_bound_again_but_not_for_what_was_detached(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as thief:
            thief.bind(("127.0.0.1", PORTS[0]))
            await restored(bench)
            assert {task.get_name()[:6] for task in bench.background} == {"rebind"}
            live = bench.only()
            started = asyncio.Event()
            start = live.server.start

            async def slow_start(host: str, port: int) -> None:
                started.set()
                await asyncio.sleep(0.05)  # the detach comes while it binds
                await start(host, port)

            live.server.start = slow_start  # type: ignore[method-assign,assignment]
        await started.wait()
        await bench.lifecycle.detach(live.row.id)
        await until(bench.background[0].done)
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as free:
            free.bind(("127.0.0.1", PORTS[0]))
        await bench.nothing_is_left()

    after_restart(tmp_path, work)
