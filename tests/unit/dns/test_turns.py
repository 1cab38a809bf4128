"""Turns: nobody's backlog keeps the others waiting (semantics.md 26)."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from structlog.testing import capture_logs
from tests.unit.dns.world import Clock, run, until

from netfence.dns import turns as turns_module
from netfence.dns.turns import (
    ASKING_S,
    BURST_S,
    DEBT_S,
    LANE_SHARE,
    LONG_SLICE_S,
    MAX_IN_LANE,
    MOST_DEBT_S,
    NORM_S,
    REST_S,
    SHARE,
    SLICE_S,
    STARVED_S,
    Reader,
    Turns,
)

MINE, THEIRS = "mine", "theirs"


class Bench:
    """Turns on clocks that the test moves."""

    def __init__(self) -> None:
        self.clock, self.busy = Clock(), Clock()
        self.turns = Turns(self.clock, self.busy)
        self.turns._norm_s = NORM_S  # whatever machine this is
        self.done: list[str] = []

    def work(self, name: str, slices: int, cost_s: float = 0.0) -> Callable[[], bool]:
        """Return work of so many slices, each of which takes so much of the loop's time."""
        left = iter(range(slices - 1, -1, -1))

        def work() -> bool:
            self.done.append(name)
            self.clock.now += cost_s
            self.busy.now += cost_s
            return next(left) > 0

        return work

    def rests(self, owner: object = MINE) -> bool:
        return self.turns._has_to_rest(owner)


def test_who_waits_gets_one_slice_a_turn_in_order_and_others_are_served_between() -> None:
    async def go() -> None:
        bench = Bench()
        bench.turns.join(MINE, bench.work("a", 3))
        bench.turns.join(THEIRS, bench.work("b", 2))
        for count in range(1, 6):
            await asyncio.sleep(0)
            assert len(bench.done) == count
        assert bench.done == ["a", "b", "a", "b", "a"]
        assert len(bench.turns) == 0
        bench.turns.join(MINE, bench.work("again", 1))
        await asyncio.sleep(0)
        assert bench.done[-1] == "again"

    run(go())


def test_work_that_fails_is_dropped_and_the_others_go_on() -> None:
    async def go() -> None:
        bench = Bench()
        told: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))

        def fail() -> bool:
            raise ValueError("a bug")

        bench.turns.join(MINE, fail)
        bench.turns.join(THEIRS, bench.work("b", 2))
        await until(lambda: bench.done == ["b", "b"])
        assert [str(error) for error in told] == ["a bug"]

    run(go())


def test_alone_the_queue_has_all_of_the_loop() -> None:
    bench = Bench()
    for _ in range(100):
        bench.turns.note(MINE, bench.clock.now)
        assert not bench.rests()
        bench.clock.now += SLICE_S
        bench.busy.now += SLICE_S


@pytest.mark.parametrize("asks_first", [MINE, THEIRS])
def test_while_others_ask_the_queue_has_its_share(asks_first: str) -> None:
    bench = Bench()
    assert not bench.rests()
    worked_s = 0.0
    began = bench.clock.now
    while bench.clock.now < began + 1:
        for owner in (asks_first, THEIRS, MINE):
            bench.turns.note(owner, bench.clock.now)
        if bench.rests():
            bench.clock.now += REST_S
        else:
            bench.clock.now += SLICE_S
            bench.busy.now += SLICE_S
            worked_s += SLICE_S
    assert worked_s == pytest.approx(SHARE, abs=0.02)


def test_what_others_had_served_is_not_the_queue_s_time() -> None:
    bench = Bench()
    bench.rests()
    worked_s = 0.0
    began = bench.clock.now
    while bench.clock.now < began + 1:
        served_since = bench.clock.now
        bench.clock.now += 2 * SLICE_S
        bench.busy.now += 2 * SLICE_S
        bench.turns.note(THEIRS, served_since)
        if not bench.rests():
            bench.clock.now += SLICE_S
            bench.busy.now += SLICE_S
            worked_s += SLICE_S
    assert worked_s == pytest.approx(SHARE, abs=0.02)


def test_the_queue_starves_for_no_longer_than_told_however_busy_the_loop_is() -> None:
    bench = Bench()
    bench.turns.note(THEIRS, bench.clock.now)
    assert not bench.rests()
    bench.busy.now += 1
    rested_s = 0.0
    while bench.rests():
        bench.clock.now += REST_S
        bench.busy.now += REST_S
        rested_s += REST_S
    assert rested_s == pytest.approx(STARVED_S, abs=REST_S)


def test_neither_credit_nor_debt_grow_without_bound() -> None:
    bench = Bench()
    bench.turns.note(THEIRS, bench.clock.now)
    bench.rests()
    bench.clock.now += 100
    bench.turns.note(THEIRS, bench.clock.now)
    bench.rests()
    assert bench.turns._credit == BURST_S
    bench.busy.now += 100
    bench.rests()
    assert bench.turns._credit == -DEBT_S


def test_a_slice_is_long_while_nobody_else_asks() -> None:
    bench = Bench()
    turns, clock = bench.turns, bench.clock

    def slice_of(owner: str) -> float:
        return turns.until(owner, clock.now) - clock.now

    turns.note(MINE, clock.now)
    turns.note(MINE, clock.now)
    assert slice_of(MINE) == pytest.approx(LONG_SLICE_S)
    assert slice_of(THEIRS) == pytest.approx(SLICE_S)
    clock.now += ASKING_S / 2
    turns.note(THEIRS, clock.now)
    assert slice_of(MINE) == pytest.approx(SLICE_S)
    clock.now += ASKING_S / 2
    turns.note(THEIRS, clock.now)  # who asks again and again does not forget that others do
    assert slice_of(MINE) == pytest.approx(SLICE_S)
    assert slice_of(THEIRS) == pytest.approx(LONG_SLICE_S)  # we have not asked for as long
    clock.now += ASKING_S
    assert slice_of(MINE) == pytest.approx(LONG_SLICE_S)


def test_many_sockets_of_one_have_no_long_slice_each() -> None:
    async def go() -> None:
        bench = Bench()
        turns, clock = bench.turns, bench.clock

        def slice_() -> float:
            now = clock.now
            clock.now = turns.until(MINE, now)
            return clock.now - now

        assert sum(slice_() for _ in range(32)) == pytest.approx(LONG_SLICE_S + 31 * SLICE_S)
        queued: list[float] = []

        def work() -> bool:
            queued.append(slice_())
            return len(queued) < 3

        turns.join(MINE, work)
        await until(lambda: len(queued) == 3)
        assert queued == pytest.approx([LONG_SLICE_S] * 3)  # one in each turn of the loop
        assert slice_() == pytest.approx(SLICE_S)

    run(go())


def test_time_spent_alone_is_held_against_the_queue_as_far_as_its_debt_goes() -> None:
    bench = Bench()
    assert not bench.rests()
    bench.clock.now += 10
    bench.busy.now += 10
    assert not bench.rests()
    bench.turns.note(THEIRS, bench.clock.now)
    assert bench.rests()
    assert bench.turns._credit == -DEBT_S


def test_who_asked_long_ago_is_waited_for_no_more() -> None:
    bench = Bench()
    bench.turns.note(THEIRS, bench.clock.now)
    bench.turns.note(MINE, bench.clock.now)
    bench.rests()
    bench.busy.now += 1
    assert bench.rests()
    bench.clock.now += ASKING_S
    assert not bench.rests()


# ------------------------------------------------------------------------------------------------ the lane

LONG_S = NORM_S + 0.003


def piece(bench: Bench, name: str, cost_s: float) -> Callable[[], None]:
    """Return a piece of work that takes so much of the loop's time."""

    def work() -> None:
        bench.done.append(name)
        bench.clock.now += cost_s
        bench.busy.now += cost_s

    return work


def asked_by_others(bench: Bench) -> None:
    bench.turns.note("others", bench.clock.now)


async def lane(bench: Bench, *, forward_s: float = 0.0) -> None:
    """Let time pass for the lane, on the clock that the test moves and on the loop's."""
    bench.clock.now += forward_s
    asked_by_others(bench)
    await asyncio.sleep(0.02)


def test_usual_work_is_done_at_once_however_much_there_is() -> None:
    bench = Bench()
    asked_by_others(bench)
    for _ in range(10 * MAX_IN_LANE):
        assert bench.turns.run(MINE, piece(bench, "a", 0.9 * NORM_S))
        asked_by_others(bench)
    assert len(bench.done) == 10 * MAX_IN_LANE


def test_who_takes_long_while_others_ask_waits_until_it_is_paid_for() -> None:
    async def go() -> None:
        bench = Bench()
        asked_by_others(bench)
        for name in ("first", "second", "third"):
            assert bench.turns.run(MINE, piece(bench, name, LONG_S))
        assert bench.done == ["first"]
        assert bench.turns.run(THEIRS, piece(bench, "theirs", NORM_S))
        assert bench.done == ["first", "theirs"]  # whom it is not about does not wait
        await lane(bench, forward_s=0.9 * 0.003 / LANE_SHARE - NORM_S)
        assert bench.done == ["first", "theirs"]
        await lane(bench, forward_s=0.2 * 0.003 / LANE_SHARE)
        assert bench.done == ["first", "theirs", "second"]
        await lane(bench, forward_s=0.9 * 0.003 / LANE_SHARE)
        assert bench.done[-1] == "second"
        await lane(bench, forward_s=0.2 * 0.003 / LANE_SHARE)
        assert bench.done[-1] == "third"

    run(go())


def test_time_that_other_processes_take_costs_nobody() -> None:
    bench = Bench()

    def preempted() -> None:
        bench.done.append(MINE)
        bench.clock.now += 1.0

    for _ in range(3):
        asked_by_others(bench)
        assert bench.turns.run(MINE, preempted)
    assert len(bench.done) == 3


def test_a_slow_machine_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= turns_module.pace() < 100
    monkeypatch.setattr(turns_module, "pace", lambda: 3.0)
    assert Turns()._norm_s == pytest.approx(3 * NORM_S)


def test_alone_nobody_waits() -> None:
    async def go() -> None:
        bench = Bench()
        asked_by_others(bench)
        for _ in range(2):
            assert bench.turns.run(MINE, piece(bench, "a", LONG_S))
        assert bench.done == ["a"]
        bench.clock.now += ASKING_S  # the others ask no more
        await asyncio.sleep(0.1)
        assert bench.done == ["a", "a"]
        for _ in range(5):
            assert bench.turns.run(MINE, piece(bench, "a", LONG_S))
        assert len(bench.done) == 7

    run(go())


def test_those_in_the_lane_have_their_turns_and_share_its_time() -> None:
    async def go() -> None:
        bench = Bench()
        asked_by_others(bench)
        for name in (MINE, THEIRS):
            bench.turns.run(name, piece(bench, name, LONG_S))
        for name in (MINE, MINE, THEIRS, THEIRS):
            bench.turns.run(name, piece(bench, name, LONG_S))
        assert bench.done == [MINE, THEIRS]
        began = bench.clock.now
        while len(bench.done) < 6:
            await lane(bench, forward_s=0.001)
        assert bench.done[2:] == [MINE, THEIRS, MINE, THEIRS]
        assert 4 * 0.003 / (bench.clock.now - began) < 1.4 * LANE_SHARE

    run(go())


def test_what_waits_in_the_lane_is_bounded_and_so_is_how_long() -> None:
    async def go() -> None:
        bench = Bench()
        asked_by_others(bench)
        bench.turns.run(MINE, piece(bench, "huge", 10.0))
        asked_by_others(bench)
        assert all(bench.turns.run(MINE, piece(bench, "a", 0.0)) for _ in range(MAX_IN_LANE))
        assert not bench.turns.run(MINE, piece(bench, "too many", 0.0))
        asked_by_others(bench)
        assert bench.turns.run(THEIRS, piece(bench, "theirs", 0.0))
        assert bench.done == ["huge", "theirs"]
        bench.clock.now += MOST_DEBT_S
        asked_by_others(bench)
        await asyncio.sleep(MOST_DEBT_S + 0.3)
        assert bench.done[2:] == ["a"] * MAX_IN_LANE

    run(go())


def test_what_is_done_within_a_piece_of_work_is_reckoned_to_whose_it_is() -> None:
    async def go() -> None:
        bench = Bench()
        asked_by_others(bench)
        bench.turns.run(MINE, lambda: (bench.turns.run(THEIRS, piece(bench, "theirs", LONG_S)), None)[1])
        bench.turns.run(MINE, piece(bench, "mine", 0.0))
        bench.turns.run(THEIRS, piece(bench, "late", 0.0))
        assert bench.done == ["theirs", "mine"]
        bench.turns.forget(THEIRS)
        await lane(bench)
        assert bench.done == ["theirs", "mine", "late"]

    run(go())


# ------------------------------------------------------------------------------------------------ readers


@pytest.mark.parametrize(("others", "slice_s"), [(False, LONG_SLICE_S), (True, SLICE_S)], ids=["alone", "not alone"])
def test_a_reader_takes_for_a_slice(others: bool, slice_s: float) -> None:
    async def go() -> None:
        clock, ends = Clock(), []
        turns = Turns(clock, Clock())
        if others:
            turns.note(THEIRS, clock.now)
        with pair() as (ours, theirs):

            def take(until: float) -> bool:
                ours.recv(1)
                ends.append(until - clock.now)
                return len(ends) == 1

            reader = Reader(MINE, ours, take, turns)
            theirs.send(b"a")
            theirs.send(b"b")
            await until(lambda: len(ends) == 2)  # as it comes, and from the queue
            assert ends == pytest.approx([slice_s, slice_s])
            reader.close()

    run(go())


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def test_a_reader_with_a_backlog_waits_for_its_turns_and_watches_again() -> None:
    async def go() -> None:
        turns, got = Turns(), []
        with pair() as (ours, theirs):

            def take(_until: float) -> bool:  # one datagram a slice
                try:
                    got.append(ours.recv(1))
                except BlockingIOError:
                    return False
                return True

            reader = Reader(MINE, ours, take, turns)
            for count in (3, 6):
                for octet in b"abc":
                    theirs.send(bytes([octet]))
                await until(lambda count=count: len(got) == count and not len(turns))  # type: ignore[misc]
            assert b"".join(got) == b"abcabc"
            reader.close()
            reader.close()
            assert ours.fileno() == -1

    run(go())


def test_a_socket_that_gives_errors_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "PAUSE_S", 0.05)

    async def go() -> None:
        tries: list[float] = []
        with pair() as (ours, theirs):

            def take(_until: float) -> bool:
                tries.append(asyncio.get_running_loop().time())
                if len(tries) < 3:
                    raise OSError(24, "Too many open files")
                ours.recv(1)
                return False

            reader = Reader(MINE, ours, take, Turns())
            theirs.send(b"x")
            await until(lambda: len(tries) == 3)
            assert min(after - before for before, after in itertools.pairwise(tries)) > 0.03
            reader.close()

    run(go())


def test_a_bug_does_not_end_a_reader() -> None:
    async def go() -> None:
        got = []
        with pair() as (ours, theirs), capture_logs() as logs:

            def take(_until: float) -> bool:
                got.append(ours.recv(1))
                raise ValueError("a bug")

            reader = Reader(MINE, ours, take, Turns())
            for octet in (b"a", b"b"):
                theirs.send(octet)
                await until(lambda octet=octet: got[-1:] == [octet])  # type: ignore[misc]
            assert [entry["event"] for entry in logs] == ["dns_socket_failed"]  # once, for both
            reader.close()

    run(go())


def test_a_reader_that_is_closed_while_it_waits_is_over() -> None:
    async def go() -> None:
        turns, slices = Turns(), []
        with pair() as (ours, theirs):

            def take(_until: float) -> bool:
                slices.append(1)
                return True

            reader = Reader(MINE, ours, take, turns)
            theirs.send(b"x")
            await until(lambda: len(slices) > 1)
            reader.close()
            count = len(slices)
            await until(lambda: not len(turns))
            assert len(slices) == count

    run(go())
