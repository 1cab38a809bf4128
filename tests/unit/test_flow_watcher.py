"""One stream of decisions: what it wants, what it loses, and how it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from netfence.api.views import FlowView
from netfence.errors import UnavailableError
from netfence.flow_watcher import QUEUE, Watcher

FAST = 1e9  # events a second: no limit


def view(number: int = 0) -> FlowView:
    return FlowView(time=float(number), id="a", kind="packet", verdict="drop", reason="default_drop")


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


async def rest(watcher: Watcher) -> list[FlowView]:
    return [one async for one in watcher]


def test_it_wants_what_it_asked_for() -> None:
    everything, one, drops = Watcher("", ()), Watcher("a", ()), Watcher("", ["drop"])
    assert everything.wants("b", "pass")
    assert one.wants("a", "would_drop")
    assert not one.wants("b", "drop")
    assert drops.wants("b", "drop")
    assert not drops.wants("b", "would_drop")
    assert [watcher.wants_packets for watcher in (everything, drops, Watcher("", ["pass"]))] == [True, True, False]
    assert [watcher.wants_passes for watcher in (everything, drops, Watcher("", ["pass"]))] == [True, False, True]


def test_events_come_in_order_and_the_iteration_waits_for_more() -> None:
    async def test() -> None:
        watcher = Watcher("", ())
        reading = asyncio.create_task(rest(watcher))
        for number in range(3):
            await asyncio.sleep(0)
            watcher.put(view(number))
        watcher.end()
        assert await reading == [view(0), view(1), view(2)]

    run(test())


def test_what_is_lost_is_told_with_the_next_event_and_once() -> None:
    async def test() -> None:
        watcher = Watcher("", ())
        watcher.put(view(0))
        watcher.lose(2)
        watcher.lose(5)
        watcher.put(view(1))
        watcher.put(view(2))
        watcher.end()
        assert [one.lost for one in await rest(watcher)] == [0, 7, 0]

    run(test())


def test_who_does_not_read_has_no_more_than_a_full_queue() -> None:
    async def test() -> None:
        watcher = Watcher("", ())
        now = time.monotonic()
        taken = 0
        for second in range(3):
            for _ in range(QUEUE):
                if watcher.has_room(FAST, now + second):
                    watcher.put(view())
                    taken += 1
        assert taken == QUEUE

    run(test())


def test_nobody_gets_more_than_its_share() -> None:
    async def test() -> None:
        watcher = Watcher("", ())
        now = time.monotonic()
        assert sum(watcher.has_room(100.0, now) for _ in range(2 * QUEUE)) == QUEUE  # what a rest saves up
        assert sum(watcher.has_room(100.0, now + 0.5) for _ in range(QUEUE)) in (49, 50)

    run(test())


def test_it_ends_behind_what_waits() -> None:
    async def test() -> None:
        watcher = Watcher("", ())
        watcher.put(view())
        watcher.end(UnavailableError("the daemon is stopping"))
        watcher.end()  # the first word counts
        assert not watcher.has_room(FAST, time.monotonic())
        stream = aiter(watcher)
        assert await anext(stream) == view()
        with pytest.raises(UnavailableError, match="stopping"):
            await anext(stream)

    run(test())
