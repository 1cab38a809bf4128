"""Events about targets: one that fails keeps no other from being handled, and what is gone is cleaned up at last."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.unit.test_lifecycle import Bench as Bench  # noqa: PLC0414 - for the annotations
from tests.unit.test_lifecycle import _targets, on_bench, until

from netfence import targets
from netfence.control.port import UnsubscribeReason
from netfence.dataplane.events import HookGone, LinkGone, Resync
from netfence.errors import NetfenceError, NotFoundError
from netfence.lifecycle import key_of

__all__ = ["_targets"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(targets, "own_addresses", lambda _ifindex: ())
    monkeypatch.setattr(targets, "host_addresses", lambda: ())


async def handle(bench: Bench, *events: Any) -> asyncio.Task[None]:
    for event in events:
        bench.keeper._watchers.queue.put_nowait(event)
    bench.start(bench.keeper.run(), "targets")
    return bench.background[-1]


@pytest.mark.parametrize("kind", [NotFoundError, OSError, KeyError], ids=["gone", "os", "defect"])
@pytest.mark.parametrize("broken", ["own 1", "put_back 7", "host"])
def test_after_lost_events_every_hook_is_looked_at_whatever_became_of_others(
    tmp_path: Path, broken: str, kind: type[Exception]
) -> None:
    async def work(bench: Bench) -> None:
        for name in ("veth7", "veth8", "veth9"):
            await bench.attach(name)
        bench.plane.fail = {broken: kind("gone")}
        bench.plane.calls.clear()
        task = await handle(bench, Resync())
        await until(lambda: "put_back 9" in bench.plane.calls)
        assert {"own 1", "own 2", "own 3", "put_back 7", "put_back 8", "host"} <= set(bench.plane.calls)
        assert not task.done()

    on_bench(tmp_path, work)


def test_an_event_that_meets_a_defect_does_not_end_the_daemon(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        await bench.attach("veth7")
        await bench.attach("veth8")
        bench.plane.fail = {"put_back 7": KeyError("a defect")}
        task = await handle(bench, HookGone(7), HookGone(8))
        await until(lambda: "put_back 8" in bench.plane.calls)
        assert not task.done()

    on_bench(tmp_path, work)


def test_a_target_that_is_gone_is_cleaned_up_with_patience(tmp_path: Path) -> None:
    """The disk is full: neither a busy loop nor a row that stays when there is room again."""

    async def work(bench: Bench) -> None:
        live = await bench.attach()
        tries: list[float] = []
        remove = bench.store.remove

        async def full(_attachment_id: str) -> None:
            tries.append(asyncio.get_running_loop().time())
            raise NetfenceError("disk full")

        bench.store.remove = full  # type: ignore[method-assign,assignment]
        watched: list[object] = []
        bench.watch.watch = watched.append  # type: ignore[method-assign,assignment]
        task = await handle(bench, LinkGone(7), LinkGone(7))
        await until(lambda: len(tries) == 3)
        assert tries[1] - tries[0] >= 0.02
        assert tries[2] - tries[1] >= 0.04
        assert watched == []  # it would tell of the missing target at once, and again, and again
        bench.store.remove = remove  # type: ignore[method-assign]
        await until(lambda: live.ended)
        await bench.nothing_is_left()
        assert bench.control.unsubscribed == [UnsubscribeReason.REMOVED]
        assert not task.done()

    on_bench(tmp_path, work)


def test_a_target_gone_beside_a_detach_is_ended_once(tmp_path: Path) -> None:
    async def work(bench: Bench) -> None:
        live = await bench.attach()
        await asyncio.gather(bench.lifecycle.detach(live.row.id), bench.keeper._gone(key_of(live.target)))
        await bench.nothing_is_left()

    on_bench(tmp_path, work)
