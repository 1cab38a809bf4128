"""Who watches what: the kernel and the DNS servers report for those who watch, and for nobody else."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.unit.test_flow_views import Judging, flow

from netfence import flow_watcher
from netfence import flows as subject
from netfence.api.views import FlowView
from netfence.dataplane.plane import Flow
from netfence.dns.decision import Decision, Sink
from netfence.errors import ExhaustedError, NotFoundError, UnavailableError
from netfence.flow_watcher import QUEUE, Watcher
from netfence.flows import MAX_WATCHERS, QUERIES, TICK_S, Flows

DENIED = Decision("drop", "default_drop", "x.test", 1, False, None, None)
PASSED = Decision("pass", "allow_rule", "y.test", 1, False, None, None)


@dataclass
class Plane:
    """A data plane: what it is told to watch, and what it reports next."""

    watched: set[int] = field(default_factory=set)
    reports: list[Flow] = field(default_factory=list)
    read: int = 0
    kept: Counter[int] = field(default_factory=Counter)

    def watch_slots(self, slots: Collection[int]) -> None:
        self.watched = set(slots)

    def read_flows(self) -> list[Flow]:
        self.read += 1
        reports, self.reports = self.reports, []
        return reports

    def kept_back(self, slot: int) -> int:
        return self.kept[slot]


@dataclass
class Server:
    sink: Sink | None = None
    passes: bool = False

    def watch(self, sink: Sink | None, *, passes: bool = True) -> None:
        self.sink, self.passes = sink, passes

    def decide(self, decision: Decision) -> None:
        assert self.sink is not None
        self.sink(decision)


@dataclass(frozen=True)
class Row:
    id: str
    slot: int
    name: str = "veth0"


@dataclass(eq=False)
class Live:
    row: Row
    attachment: Judging = field(default_factory=Judging)
    server: Server = field(default_factory=Server)


class World:
    """A hub with two attachments, "a" in slot 1 and "b" in slot 2."""

    def __init__(self) -> None:
        self.plane = Plane()
        self.there = [Live(Row("a", 1)), Live(Row("b", 2))]
        self.flows = Flows(self.plane, lambda: list(self.there))

    def report(self, slot: int, **changes: object) -> None:
        self.plane.reports.append(flow(slot=slot, **({"at": time.monotonic()} | changes)))

    async def tick(self) -> None:
        await self.flows._tick()


def within(work: Callable[[World], Awaitable[None]]) -> None:
    async def test() -> None:
        await asyncio.wait_for(work(World()), 10)

    asyncio.run(test())


def seen(watcher: Watcher) -> list[FlowView]:
    """Take what waits."""
    views = list(watcher._queue)
    watcher._queue.clear()
    return views


def ids(watcher: Watcher) -> list[str]:
    return [view.id for view in seen(watcher)]


def test_nobody_pays_while_nobody_watches() -> None:
    async def test(world: World) -> None:
        assert (world.plane.watched, world.there[0].server.sink) == (set(), None)
        with world.flows.watch("a", ()):
            assert world.plane.watched == {1}
            assert world.there[0].server.sink is not None
            assert world.there[1].server.sink is None
            with world.flows.watch("", ["drop"]):
                assert world.plane.watched == {1, 2}
                assert [live.server.passes for live in world.there] == [True, False]
            assert world.plane.watched == {1}
            assert world.there[1].server.sink is None
        assert world.plane.watched == set()
        assert [live.server.sink for live in world.there] == [None, None]

    within(test)


def test_passes_are_told_while_somebody_wants_them() -> None:
    async def test(world: World) -> None:
        server = world.there[0].server
        with world.flows.watch("", ["drop"]):
            assert not server.passes
            with world.flows.watch("a", ()):
                assert server.passes
            assert not server.passes
            assert server.sink is not None

    within(test)


def test_who_wants_passes_alone_has_no_packets_reported() -> None:
    async def test(world: World) -> None:
        with world.flows.watch("", ["pass"]) as watcher:
            assert world.plane.watched == set()
            world.there[0].server.decide(PASSED)
            await world.tick()
            assert [view.domain for view in seen(watcher)] == ["y.test"]
            assert world.plane.read == 0
            with world.flows.watch("b", ()):
                assert world.there[1].server.passes
                assert world.plane.watched == {2}

    within(test)


def test_each_gets_what_it_asked_for() -> None:
    async def test(world: World) -> None:
        with (
            world.flows.watch("", ()) as everything,
            world.flows.watch("a", ()) as one,
            world.flows.watch("", ["would_drop"]) as audit,
        ):
            world.report(1)
            world.report(2)
            world.report(2, would=True)
            world.there[0].server.decide(DENIED)
            world.there[1].server.decide(PASSED)
            await world.tick()
            assert ids(everything) == ["a", "b", "b", "a", "b"]
            assert ids(one) == ["a", "a"]
            assert [(view.id, view.verdict) for view in seen(audit)] == [("b", "would_drop")]

    within(test)


def test_what_the_kernel_lost_is_lost_to_those_who_wanted_it() -> None:
    async def test(world: World) -> None:
        with world.flows.watch("a", ()) as one, world.flows.watch("b", ()) as other:
            world.report(1, lost=40)
            world.report(2)
            await world.tick()
            assert [view.lost for view in seen(one)] == [40]
            assert [view.lost for view in seen(other)] == [0]

    within(test)


def test_what_the_kernel_keeps_back_is_told_though_nothing_more_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_watcher, "QUIET_S", 0.0)

    async def test(world: World) -> None:
        world.plane.kept[1] = 7  # of an earlier watch
        with (
            world.flows.watch("", ()) as everything,
            world.flows.watch("b", ()) as other,
            world.flows.watch("", ["pass", "would_drop"]) as audit,
        ):

            async def looked() -> list[tuple[str, str, int]]:
                for _ in world.there:
                    await world.tick()
                return [(view.kind, view.id, view.lost) for view in seen(everything)]

            assert await looked() == []
            world.plane.kept[1] = 47
            assert await looked() == [("lost", "", 40)]
            assert await looked() == []
            world.plane.kept[1] = 50  # another CPU's count goes on
            assert await looked() == [("lost", "", 3)]
            world.plane.kept[1] = 1  # begun anew behind this report, which has been told but for five
            world.report(1, lost=55)
            assert await looked() == [("packet", "a", 5)]
            assert await looked() == [("lost", "", 1)]
            assert seen(other) == seen(audit) == []

    within(test)


def test_a_loss_waits_for_an_event_to_be_told_with() -> None:
    async def test(world: World) -> None:
        with world.flows.watch("", ()) as watcher:
            world.plane.kept[1] = 40
            for _ in world.there:
                await world.tick()
            assert seen(watcher) == []
            world.report(2)
            await world.tick()
            assert [(view.kind, view.lost) for view in seen(watcher)] == [("packet", 40)]

    within(test)


def test_queries_beyond_the_share_of_a_tick_are_told_though_no_more_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_watcher, "QUIET_S", 0.0)

    async def test(world: World) -> None:
        with world.flows.watch("a", ["drop"]) as drops, world.flows.watch("a", ["pass"]) as passes:
            for decision in (DENIED, PASSED):
                for _ in range(QUERIES):
                    world.there[0].server.decide(decision)
            await world.tick()
            await world.tick()
            assert [view.kind for view in seen(drops)] == ["dns"] * QUERIES
            assert [(view.kind, view.id, view.lost) for view in seen(passes)] == [("lost", "a", QUERIES)]

    within(test)


def test_a_slow_reader_loses_events_and_others_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "RATE", 1e9)

    async def test(world: World) -> None:
        with world.flows.watch("", ()) as slow, world.flows.watch("", ()) as fast:
            got = 0
            for _ in range(3):
                for _ in range(QUEUE // 2):
                    world.report(1)
                await world.tick()
                got += len(seen(fast))
            assert got == 3 * (QUEUE // 2)
            assert len(seen(slow)) == QUEUE
            world.report(1)
            await world.tick()
            assert [view.lost for view in seen(slow)] == [QUEUE // 2]
            assert [view.lost for view in seen(fast)] == [0]

    within(test)


def test_more_than_the_rate_is_lost_and_never_made() -> None:
    async def test(world: World) -> None:
        with world.flows.watch("", ()) as watcher:
            for _ in range(QUEUE + 200):
                world.report(1)
            await world.tick()
            assert QUEUE <= len(seen(watcher)) < QUEUE + 100
            assert watcher._lost >= 100

    within(test)


def test_a_second_has_no_more_than_its_events_however_many_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs some 80 µs until it is sent: a tenth of a core, not the whole of it."""
    clock = SimpleNamespace(now=time.monotonic())
    for module in (subject, flow_watcher):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=time.time, monotonic=lambda: clock.now))

    async def test(world: World) -> None:
        with ExitStack() as stack:
            watchers = [stack.enter_context(world.flows.watch("", ())) for _ in range(4)]
            given = []
            for _ in range(int(12 / TICK_S)):
                clock.now += TICK_S
                for _ in range(100):  # 2,000 a second
                    world.report(1, at=clock.now)
                await world.tick()
                given.append(sum(len(seen(watcher)) for watcher in watchers))
            second = int(1 / TICK_S)
            assert 0.9 * 1000 <= sum(given[-second:]) <= 1.1 * 1000  # what a rest had saved up is used up

    within(test)


def test_a_workload_that_floods_its_dns_server_does_not_displace_others() -> None:
    async def test(world: World) -> None:
        greedy, victim = world.there
        with world.flows.watch("", ()) as watcher:
            for _ in range(10 * QUERIES):
                greedy.server.decide(DENIED)
            victim.server.decide(PASSED)
            await world.tick()
            assert sorted(ids(watcher)) == ["a"] * QUERIES + ["b"]
            greedy.server.decide(DENIED)
            await world.tick()
            assert [view.lost for view in seen(watcher)] == [9 * QUERIES]

    within(test)


@pytest.mark.parametrize("floods", ["packets", "queries"])
def test_a_flood_that_leaves_no_room_leaves_it_to_others(floods: str) -> None:
    async def test(world: World) -> None:
        with world.flows.watch("", ()) as watcher:
            watcher._tokens = 4.0
            for _ in range(2 * QUERIES):
                if floods == "packets":
                    world.report(1)
                else:
                    world.there[0].server.decide(DENIED)
            world.report(2)
            world.there[1].server.decide(PASSED)
            await world.tick()
            views = seen(watcher)
            assert len(views) < QUERIES
            assert {(view.id, view.kind) for view in views if view.id == "b"} == {("b", "packet"), ("b", "dns")}

    within(test)


def test_attachments_that_leave_when_nobody_watches_any_more_are_not_kept() -> None:
    async def test(world: World) -> None:
        with world.flows.watch("", ()):
            await world.tick()
            world.there[0].server.decide(DENIED)
        left = [weakref.ref(world.there.pop()), weakref.ref(world.there.pop())]
        gc.collect()
        assert [one() for one in left] == [None, None]

    within(test)


def test_decisions_that_nobody_waited_for_are_not_told_to_the_next() -> None:
    async def test(world: World) -> None:
        with world.flows.watch("", ()):
            world.there[0].server.decide(DENIED)
        with world.flows.watch("", ()) as watcher:
            await world.tick()
            assert seen(watcher) == []

    within(test)


def test_reports_older_than_the_watch_are_not_told() -> None:
    async def test(world: World) -> None:
        with world.flows.watch("", ()) as watcher:
            world.report(1, at=time.monotonic() - 1.0)
            world.report(1)
            await world.tick()
            assert len(seen(watcher)) == 1

    within(test)


def test_a_stream_ends_when_its_attachment_leaves_behind_its_last_events() -> None:
    async def test(world: World) -> None:
        with world.flows.watch("a", ()) as one, world.flows.watch("", ()) as everything:
            world.report(1)
            gone = world.there.pop(0)
            await world.tick()
            assert [view.id async for view in one] == ["a"]
            assert not everything._over
            assert gone.server.sink is None
            assert world.plane.watched == {2}

    within(test)


def test_attachments_that_come_are_watched_from_the_next_tick_on() -> None:
    async def test(world: World) -> None:
        with world.flows.watch("", ()) as watcher:
            new = Live(Row("c", 3))
            world.there.append(new)
            await world.tick()
            assert world.plane.watched == {1, 2, 3}
            world.report(3)
            new.server.decide(DENIED)
            await world.tick()
            assert ids(watcher) == ["c", "c"]

    within(test)


def test_a_report_of_a_slot_that_changed_hands_is_nobodys() -> None:
    async def test(world: World) -> None:
        with world.flows.watch("", ()) as watcher, world.flows.watch("b", ()) as other:
            world.there[0] = Live(Row("new", 1))
            world.report(1, lost=4)
            world.report(9)  # a slot of nobody
            await world.tick()
            assert seen(watcher) == []
            assert watcher._lost == 5
            assert other._lost == 0

    within(test)


def test_a_stream_that_begins_amid_a_tick_goes_on() -> None:
    async def test(world: World) -> None:
        with world.flows.watch("", ()):
            world.there.append(Live(Row("new", 3)))
            for _ in range(2 * subject.SLICE):
                world.report(1)
            ticking = asyncio.create_task(world.tick())
            await asyncio.sleep(0)  # it has looked at who is there, and lets others have their turn
            world.there.append(Live(Row("newest", 4)))
            with world.flows.watch("newest", ()) as watcher:
                await ticking
                assert not watcher._over
                world.report(4)
                await world.tick()
                assert ids(watcher) == ["newest"]

    within(test)


def test_an_unknown_id_is_refused() -> None:
    async def test(world: World) -> None:
        with pytest.raises(NotFoundError, match="watch: no attachment nope"), world.flows.watch("nope", ()):
            pass
        assert world.plane.watched == set()

    within(test)


def test_the_contract_tells_the_limit() -> None:
    contract = (Path(__file__).parents[2] / "proto/netfence/v1/daemon.proto").read_text(encoding="utf-8")
    assert f"RESOURCE_EXHAUSTED for more than {MAX_WATCHERS} streams at once" in contract


def test_streams_are_limited() -> None:
    async def test(world: World) -> None:
        with ExitStack() as stack:
            for _ in range(MAX_WATCHERS):
                stack.enter_context(world.flows.watch("", ()))
            with pytest.raises(ExhaustedError, match=str(MAX_WATCHERS)), world.flows.watch("", ()):
                pass
        with world.flows.watch("", ()):
            pass

    within(test)


def test_a_daemon_that_stops_ends_all_streams_and_takes_no_more() -> None:
    async def test(world: World) -> None:
        with world.flows.watch("", ()) as watcher:
            world.flows.close()
            with pytest.raises(UnavailableError, match="stopping"):
                await anext(aiter(watcher))
        with pytest.raises(UnavailableError), world.flows.watch("", ()):
            pass

    within(test)


def test_it_runs_while_somebody_watches_and_rests_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "TICK_S", 0.001)

    async def test(world: World) -> None:
        running = asyncio.create_task(world.flows.run())
        for _ in range(2):
            with world.flows.watch("", ()) as watcher:
                world.report(1)
                assert (await anext(aiter(watcher))).id == "a"
            while not world.flows._wanted._waiters:  # noqa: ASYNC110 - nothing tells that it rests
                await asyncio.sleep(0.001)
        running.cancel()

    within(test)


def test_who_watches_is_told_again_after_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "TICK_S", 0.001)

    async def test(world: World) -> None:
        with world.flows.watch("", ()) as watcher:
            monkeypatch.setattr(world.plane, "read_flows", None)
            with pytest.raises(TypeError):
                await world.flows.run()
            monkeypatch.undo()
            world.report(1)
            again = asyncio.create_task(world.flows.run())  # as `daemon.Background.keep` does
            assert (await anext(aiter(watcher))).id == "a"
            again.cancel()

    within(test)


def test_a_plane_that_refuses_leaves_no_watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(world.plane, "watch_slots", None)
            with pytest.raises(TypeError), world.flows.watch("", ()):
                pass
        assert world.flows._watchers == []

    within(test)


def test_others_have_their_turn_while_many_events_are_handed_out() -> None:
    async def test(world: World) -> None:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        with world.flows.watch("", ()):
            for _ in range(10 * subject.SLICE):
                world.report(1)
            beside = asyncio.create_task(other())
            await world.tick()
            beside.cancel()
        assert turns >= 9

    within(test)
