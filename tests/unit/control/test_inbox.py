"""Commands in their queues: in order for each attachment, together where they wait together, bounded over all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
from structlog.testing import capture_logs
from tests.unit.control.peer import until

from netfence.control import inbox as module
from netfence.control.inbox import Inbox

SIZE = 10
MAX_BYTES = 3 * SIZE


class Bench:
    """An inbox whose work is done when `gate` is open."""

    def __init__(self) -> None:
        self.done: list[tuple[str, list[int]]] = []
        self.begun: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.at_once: dict[str, int] = {}
        self.failure: Exception | None = None
        self.inbox: Inbox[int] = Inbox(self.work, MAX_BYTES)

    async def work(self, attachment_id: str, items: Sequence[int]) -> None:
        self.begun.append(attachment_id)
        self.at_once[attachment_id] = self.at_once.get(attachment_id, 0) + 1
        assert self.at_once[attachment_id] == 1
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
            failure, self.failure = self.failure, None
            if failure is not None:
                raise failure
            self.done.append((attachment_id, list(items)))
        finally:
            self.at_once[attachment_id] -= 1

    async def put(self, attachment_id: str, *items: int, size: int = 1) -> None:
        for item in items:
            await self.inbox.put(attachment_id, item, size)

    async def drained(self) -> None:
        await asyncio.wait_for(self.inbox.drained(), 2)

    def items(self, attachment_id: str) -> list[int]:
        return [item for one, items in self.done for item in items if one == attachment_id]


def on_bench(work: Callable[[Bench], Awaitable[None]]) -> None:
    async def test() -> None:
        bench = Bench()
        await work(bench)
        await bench.inbox.close()

    asyncio.run(asyncio.wait_for(test(), 10))


def test_what_waits_together_is_handed_over_together_and_in_order() -> None:
    async def work(bench: Bench) -> None:
        bench.gate.clear()
        await bench.put("a", 1)
        await until(lambda: bench.begun)
        await bench.put("a", 2, 3, 4)
        bench.gate.set()
        await bench.drained()
        assert bench.done == [("a", [1]), ("a", [2, 3, 4])]

    on_bench(work)


def test_attachments_do_not_wait_for_each_other() -> None:
    async def work(bench: Bench) -> None:
        bench.gate.clear()
        await bench.put("a", 1)
        await bench.put("b", 2)
        await until(lambda: sorted(bench.begun) == ["a", "b"])
        bench.gate.set()
        await bench.drained()

    on_bench(work)


def test_no_more_are_handed_over_at_once_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TOGETHER", 2)

    async def work(bench: Bench) -> None:
        await bench.put("a", 1, 2, 3, 4, 5)
        await bench.drained()
        assert [items for _, items in bench.done] == [[1, 2], [3, 4], [5]]

    on_bench(work)


def test_no_more_bytes_are_handed_over_at_once_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TOGETHER_BYTES", 5)

    async def work(bench: Bench) -> None:
        for number, size in enumerate((9, 2, 3, 1, 4)):
            await bench.put("a", number, size=size)
        await bench.drained()
        assert [items for _, items in bench.done] == [[0], [1, 2], [3, 4]]
        assert bench.inbox._bytes == 0

    on_bench(work)


def test_no_command_is_lost_whenever_it_comes() -> None:
    async def work(bench: Bench) -> None:
        for number in range(200):
            await bench.put("a", number)
            for _ in range(number % 7):
                await asyncio.sleep(0)
        await bench.drained()
        assert bench.items("a") == list(range(200))

    on_bench(work)


def test_who_finds_no_room_waits_for_it() -> None:
    async def work(bench: Bench) -> None:
        bench.gate.clear()
        await bench.put("a", 1, 2, size=SIZE)
        await bench.put("b", 3, size=SIZE)
        waiting = asyncio.ensure_future(bench.put("c", 4, size=1))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        assert "c" not in bench.begun
        bench.gate.set()
        await asyncio.wait_for(waiting, 1)
        await bench.drained()
        assert bench.inbox._bytes == 0
        await bench.put("c", 5, size=MAX_BYTES)  # all of the room is there again

    on_bench(work)


def test_what_is_larger_than_all_room_comes_in_alone() -> None:
    async def work(bench: Bench) -> None:
        bench.gate.clear()
        await asyncio.wait_for(bench.put("a", 1, size=100 * MAX_BYTES), 1)
        behind = asyncio.ensure_future(bench.put("b", 2, size=0))
        await asyncio.sleep(0.01)
        assert not behind.done()
        bench.gate.set()
        await asyncio.wait_for(behind, 1)
        await bench.drained()

    on_bench(work)


def test_a_defect_costs_its_own_commands_alone() -> None:
    async def work(bench: Bench) -> None:
        bench.gate.clear()
        bench.failure = RuntimeError("a defect")
        await bench.put("a", 1, size=MAX_BYTES)
        behind = asyncio.ensure_future(bench.put("a", 2, size=MAX_BYTES))
        with capture_logs() as logs:
            bench.gate.set()
            await asyncio.wait_for(behind, 1)
            await bench.drained()
        assert [(entry["event"], entry["error"]) for entry in logs] == [("commands_failed", "a defect")]
        assert bench.items("a") == [2]

    on_bench(work)


def test_it_is_drained_when_the_last_work_is_done() -> None:
    async def work(bench: Bench) -> None:
        await bench.drained()
        bench.gate.clear()
        await bench.put("a", 1)
        await bench.put("b", 1)
        draining = asyncio.ensure_future(bench.inbox.drained())
        await until(lambda: len(bench.begun) == 2)
        assert not draining.done()
        bench.gate.set()
        await asyncio.wait_for(draining, 1)
        assert len(bench.done) == 2

    on_bench(work)


def test_closing_leaves_what_waits_and_takes_commands_again_afterwards() -> None:
    async def work(bench: Bench) -> None:
        bench.gate.clear()
        await bench.put("a", 1, size=SIZE)
        await until(lambda: bench.begun)
        await bench.put("a", 2, size=SIZE)
        await asyncio.wait_for(bench.inbox.close(), 1)
        assert bench.done == []
        bench.gate.set()
        await bench.drained()
        await bench.put("a", 3, size=MAX_BYTES)
        await bench.drained()
        assert bench.done == [("a", [3])]

    on_bench(work)
