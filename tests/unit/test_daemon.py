"""Work beside everything else: whatever becomes of it, the daemon goes on. At a stop all fences go, some at a time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from netfence import daemon
from netfence.control.port import UnsubscribeReason
from netfence.daemon import AT_ONCE, STEP_S, Background, end_all


def test_background_work_that_fails_begins_again_and_ends_with_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "RESTART_S", 0.01)
    begun = 0

    async def loop() -> None:
        nonlocal begun
        begun += 1
        if begun < 3:
            raise KeyError("a defect")
        running.set()
        await asyncio.Event().wait()

    async def once() -> None:
        raise RuntimeError("a defect")

    async def work() -> None:
        async with asyncio.TaskGroup() as group:
            background = Background(group)
            background.keep(loop, "loop")
            background.start(once(), "once")
            background.start(asyncio.Event().wait(), "waits for a port")  # type: ignore[arg-type]
            await running.wait()
            background.cancel()

    running = asyncio.Event()
    with capture_logs() as logs:
        asyncio.run(asyncio.wait_for(work(), 5))
    assert sorted(entry["task"] for entry in logs) == ["loop", "loop", "once"]


class Ending:
    """A lifecycle of `count` attachments whose ends take a while; the fourth's fails."""

    def __init__(self, count: int) -> None:
        log = structlog.get_logger()
        self._all = [SimpleNamespace(number=number, attachment=SimpleNamespace(log=log)) for number in range(count)]
        self.under_way = self.most = 0
        self.ended: list[int] = []

    def all(self) -> list[Any]:
        return [*self._all]

    async def end(self, live: Any, reason: UnsubscribeReason) -> None:
        assert reason is UnsubscribeReason.DETACHED
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0.001)
        self.under_way -= 1
        if live.number == 3:
            raise KeyError("a defect")
        self.ended.append(live.number)


@pytest.mark.parametrize("count", [0, 1, 100])
def test_fences_are_taken_off_some_at_a_time_and_the_service_manager_waits(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    async def nothing(*_: object) -> None: ...

    lifecycle, asked = Ending(count), list[float]()
    monkeypatch.setattr(daemon, "_store_counters", nothing)
    monkeypatch.setattr(daemon, "extend", asked.append)
    with capture_logs() as logs:
        asyncio.run(asyncio.wait_for(end_all(lifecycle, detach=True), 5))  # type: ignore[arg-type]
    assert sorted(lifecycle.ended) == [number for number in range(count) if number != 3]
    assert lifecycle.most == min(count, AT_ONCE)
    assert asked == [STEP_S] * count
    assert [entry["event"] for entry in logs] == ["not_ended"] * (count > 3)
