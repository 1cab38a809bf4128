"""What waits to be told: its order, what a lost stream does to each kind, and how much it can become."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from tests.unit.control.peer import view_of

from netfence.control import outbox as module
from netfence.control.outbox import UNSURE_S, Event, Heartbeat, Outbox, Result, Subscribed, Unsubscribed
from netfence.control.port import UnsubscribeReason

A, B = view_of("a"), view_of("b")
GONE = UnsubscribeReason.DETACHED


def result(nonce: str, attachment_id: str = "a", *, version: str = "") -> Result:
    return Result(nonce, attachment_id, version, ok=True, policy_hash="h")


class Bench:
    """An outbox with a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.outbox = Outbox(lambda: self.now)
        self.outbox.begin(())

    async def write(self, count: int = 1) -> list[Event]:
        """Take events and write them."""
        found = []
        for _ in range(count):
            found.append(await asyncio.wait_for(self.outbox.take(), 1))
            self.outbox.written()
        return found

    async def rest(self) -> list[Event]:
        """Write all that waits."""
        return await self.write(len(self.outbox))


def on_bench(work: Callable[[Bench], Awaitable[None]]) -> None:
    async def test() -> None:
        await work(Bench())

    asyncio.run(asyncio.wait_for(test(), 10))


async def waits(work: Awaitable[object]) -> asyncio.Future[object]:
    """Begin work and see that it is not done at once."""
    task = asyncio.ensure_future(work)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()
    return task


def test_state_events_keep_their_order() -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.subscribed(A)
        bench.outbox.result(result("n1"))
        bench.outbox.unsubscribed("b", GONE, "")
        bench.outbox.result(result("n2"))
        assert len(bench.outbox) == 4
        expected = [Subscribed(A), result("n1"), Unsubscribed("b", GONE), result("n2")]
        assert await bench.rest() == expected
        assert len(bench.outbox) == 0

    on_bench(work)


def test_whoever_waits_for_an_event_gets_it() -> None:
    async def work(bench: Bench) -> None:
        taking = await waits(bench.outbox.take())
        bench.outbox.subscribed(A)
        assert await asyncio.wait_for(taking, 1) == Subscribed(A)
        bench.outbox.written()
        taking = await waits(bench.outbox.take())
        bench.outbox.heartbeat(Heartbeat(()))
        assert await asyncio.wait_for(taking, 1) == Heartbeat(())

    on_bench(work)


def test_only_the_newest_heartbeat_waits_and_it_waits_behind_the_state() -> None:
    async def work(bench: Bench) -> None:
        old, new = Heartbeat(()), Heartbeat((None,))  # type: ignore[arg-type]
        bench.outbox.heartbeat(old)
        bench.outbox.heartbeat(new)
        bench.outbox.subscribed(A)
        assert len(bench.outbox) == 2
        assert await bench.rest() == [Subscribed(A), new]

    on_bench(work)


def test_what_nobody_heard_of_is_not_told_to_be_gone() -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.subscribed(A)
        assert bench.outbox.waits("a")
        bench.outbox.unsubscribed("a", GONE, "")
        assert not bench.outbox.waits("a")
        assert len(bench.outbox) == 0
        bench.outbox.subscribed(A)
        await bench.write()
        assert not bench.outbox.waits("a")
        bench.outbox.unsubscribed("a", GONE, "why")
        assert await bench.rest() == [Unsubscribed("a", GONE, "why")]

    on_bench(work)


@pytest.mark.parametrize("writing", [False, True], ids=["written", "being-written"])
def test_an_end_that_may_be_lost_with_its_stream_is_told_again_and_first(writing: bool) -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.unsubscribed("a", GONE, "why")
        if writing:
            await bench.outbox.take()
        else:
            await bench.write()
        bench.outbox.unsubscribed("b", GONE, "")
        bench.now += UNSURE_S
        bench.outbox.lost()
        assert await bench.rest() == [Unsubscribed("a", GONE, "why"), Unsubscribed("b", GONE)]

    on_bench(work)


def test_an_end_that_was_told_long_ago_is_not() -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.unsubscribed("a", GONE, "")
        await bench.write()
        bench.now += UNSURE_S + 1
        bench.outbox.lost()
        assert len(bench.outbox) == 0

    on_bench(work)


def test_ends_that_are_sure_are_forgotten() -> None:
    async def work(bench: Bench) -> None:
        for number in range(50):
            bench.outbox.unsubscribed(str(number), GONE, "")
            await bench.write()
            bench.now += UNSURE_S / 2
        assert len(bench.outbox._unsure) <= 3

    on_bench(work)


def test_an_end_told_again_is_told_again_until_it_is_sure() -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.unsubscribed("a", GONE, "")
        for _ in range(3):
            assert await bench.rest() == [Unsubscribed("a", GONE)]
            bench.outbox.lost()

    on_bench(work)


def test_results_over_a_lost_stream_are_the_newest_per_attachment_without_nonce() -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.result(result("n0", version="v0"))
        await bench.write()
        for number in (1, 2, 3):
            bench.outbox.result(result(f"n{number}", version=f"v{number}"))
        bench.outbox.result(result("m1", "b", version="w1"))
        bench.outbox.lost()
        bench.outbox.begin(())
        bench.outbox.result(result("n4", version="v4"))
        assert await bench.rest() == [
            result("", version="v3"),
            result("", "b", version="w1"),
            result("n4", version="v4"),
        ]

    on_bench(work)


@pytest.mark.parametrize("newer", [False, True], ids=["alone", "with-a-newer-one"])
def test_a_result_being_written_is_told_again_unless_there_is_a_newer_one(newer: bool) -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.result(result("n1", version="v1"))
        if newer:
            bench.outbox.result(result("n2", version="v2"))
        await bench.outbox.take()
        bench.outbox.lost()
        assert await bench.rest() == [result("", version="v2" if newer else "v1")]
        bench.outbox.lost()
        assert len(bench.outbox) == 0  # written since: it is not told a third time

    on_bench(work)


def test_without_a_stream_a_result_is_told_as_over_a_lost_one() -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.result(result("n1", version="v1"))
        bench.outbox.result(result("m1", "b", version="w1"))
        bench.outbox.lost()
        for number in range(2, 5):  # what was under way when it was lost
            bench.outbox.result(result(f"n{number}", version=f"v{number}"))
        await asyncio.wait_for(bench.outbox.room(), 1)
        assert len(bench.outbox) == 2
        bench.outbox.begin(())
        assert await bench.rest() == [result("", "b", version="w1"), result("", version="v4")]

    on_bench(work)


def test_of_the_faults_of_a_late_result_some_are_told_and_all_counted() -> None:
    async def work(bench: Bench) -> None:
        errors = tuple(map(str, range(module.MAX_LATE_ERRORS + 5)))
        bench.outbox.result(Result("n", "a", "", ok=False, errors=errors, policy_hash="h"))
        bench.outbox.result(Result("n", "b", "", ok=False, errors=errors[:20], policy_hash="h"))
        bench.outbox.lost()
        assert await bench.rest() == [
            Result("", "a", "", ok=False, errors=(*errors[:20], "and 5 more faults"), policy_hash="h"),
            Result("", "b", "", ok=False, errors=errors[:20], policy_hash="h"),
        ]

    on_bench(work)


def test_results_of_several_lost_streams_do_not_add_up() -> None:
    async def work(bench: Bench) -> None:
        for stream in range(5):
            for number in range(10):
                bench.outbox.result(result(f"n{number}", version=f"v{stream}.{number}"))
            bench.outbox.lost()
            bench.outbox.begin(())
        assert await bench.rest() == [result("", version="v4.9")]

    on_bench(work)


def test_an_announcement_lost_with_its_stream_is_the_next_ones_to_make() -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.subscribed(A)
        bench.outbox.subscribed(B)
        await bench.outbox.take()
        bench.outbox.lost()
        assert not bench.outbox.waits("a")
        assert bench.outbox.waits("b")
        bench.outbox.begin([A])
        assert await bench.rest() == [Subscribed(B), Subscribed(A)]

    on_bench(work)


def test_who_waits_already_is_announced_once() -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.subscribed(view_of("a", mode=1))
        bench.outbox.begin([A])
        assert await bench.rest() == [Subscribed(A)]  # as it is now

    on_bench(work)


def test_a_heartbeat_outlives_its_stream_only_if_it_was_not_taken() -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.heartbeat(Heartbeat(()))
        bench.outbox.lost()
        assert len(bench.outbox) == 1
        await bench.outbox.take()
        bench.outbox.lost()
        assert len(bench.outbox) == 0

    on_bench(work)


def test_results_that_nobody_reads_leave_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RESULTS", 3)

    async def work(bench: Bench) -> None:
        for number in range(2):
            bench.outbox.result(result(str(number)))
        await asyncio.wait_for(bench.outbox.room(), 1)
        bench.outbox.result(result("2"))
        bench.outbox.result(result("3"))
        room = await waits(bench.outbox.room())
        await bench.write()
        assert not room.done()
        await bench.write()
        await asyncio.wait_for(room, 1)

    on_bench(work)


def test_few_results_with_much_to_say_leave_no_room_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RESULT_BYTES", 3000)

    async def work(bench: Bench) -> None:
        for number in range(3):
            await asyncio.wait_for(bench.outbox.room(), 1)
            bench.outbox.result(Result(str(number), "a", "", ok=False, errors=("x" * 1000,)))
        room = await waits(bench.outbox.room())
        await bench.write()
        await asyncio.wait_for(room, 1)
        bench.outbox.result(Result("3", "a", "", ok=False, errors=("x" * 1000,)))
        room = await waits(bench.outbox.room())
        bench.outbox.lost()  # the newest is left
        await asyncio.wait_for(room, 1)
        await bench.rest()
        assert bench.outbox._result_bytes == bench.outbox._results == 0

    on_bench(work)


def test_a_lost_stream_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RESULTS", 3)

    async def work(bench: Bench) -> None:
        for number in range(3):
            bench.outbox.result(result(str(number)))
        room = await waits(bench.outbox.room())
        bench.outbox.lost()
        await asyncio.wait_for(room, 1)
        bench.outbox.begin(())
        for number in range(3):  # the one left over costs none of it
            await asyncio.wait_for(bench.outbox.room(), 1)
            bench.outbox.result(result(str(number)))
        room = await waits(bench.outbox.room())
        assert len(bench.outbox) == 4
        await bench.write()
        assert not room.done()
        await bench.write()
        await asyncio.wait_for(room, 1)

    on_bench(work)


def test_it_is_emptied_when_the_last_event_has_been_written() -> None:
    async def work(bench: Bench) -> None:
        await asyncio.wait_for(bench.outbox.emptied(), 1)
        bench.outbox.subscribed(A)
        (await waits(bench.outbox.emptied())).cancel()
        await bench.write()
        await asyncio.wait_for(bench.outbox.emptied(), 1)
        bench.outbox.subscribed(A)
        bench.outbox.heartbeat(Heartbeat(()))
        emptied = await waits(bench.outbox.emptied())
        await bench.write()
        assert not emptied.done()
        await bench.outbox.take()
        await asyncio.sleep(0)
        assert not emptied.done()
        bench.outbox.written()
        await asyncio.wait_for(emptied, 1)

    on_bench(work)


def test_a_taker_that_goes_away_takes_nothing_along() -> None:
    async def work(bench: Bench) -> None:
        taking = await waits(bench.outbox.take())
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        bench.outbox.subscribed(A)
        assert await bench.rest() == [Subscribed(A)]

    on_bench(work)


# -- when all has been told --------------------------------------------------------------------------------------------


def test_it_is_emptied_when_what_waited_need_not_be_told() -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.subscribed(A)
        bench.outbox.unsubscribed("a", GONE, "")
        assert len(bench.outbox) == 0
        await asyncio.wait_for(bench.outbox.emptied(), 1)

    on_bench(work)


def test_it_is_emptied_when_the_last_heartbeat_was_lost() -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.heartbeat(Heartbeat(()))
        await bench.outbox.take()
        bench.outbox.lost()
        assert len(bench.outbox) == 0
        await asyncio.wait_for(bench.outbox.emptied(), 1)

    on_bench(work)


def test_it_is_not_emptied_while_an_end_waits_to_be_told_again() -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.unsubscribed("a", GONE, "")
        await bench.write()
        await asyncio.wait_for(bench.outbox.emptied(), 1)
        bench.outbox.lost()
        assert len(bench.outbox) == 1
        (await waits(bench.outbox.emptied())).cancel()

    on_bench(work)


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("during", [True, False], ids=["with-its-stream", "without-a-stream"])
def test_a_late_result_for_nobody_is_not_kept(during: bool) -> None:
    """A peer names ids that do not exist, reads nothing and reconnects: "bounded by the attachments" (wire.md 4)."""

    async def work(bench: Bench) -> None:
        bench.outbox.lost()
        for number in range(20):
            if during:
                bench.outbox.begin(())
            bench.outbox.result(Result("n", f"x{number}", "", ok=False, errors=("no attachment",)))
            bench.outbox.result(result("n"))
            if during:
                bench.outbox.lost()
        assert await bench.rest() == [result("")]

    on_bench(work)


def test_a_late_result_is_forgotten_with_its_attachment() -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.result(result("n1"))
        bench.outbox.result(result("m1", "b"))
        bench.outbox.lost()
        bench.outbox.unsubscribed("a", GONE, "")
        assert await bench.rest() == [result("", "b"), Unsubscribed("a", GONE)]

    on_bench(work)


def test_a_result_that_can_still_be_told_outlives_its_attachment() -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.result(result("n1"))
        bench.outbox.unsubscribed("a", GONE, "")
        assert await bench.rest() == [result("n1"), Unsubscribed("a", GONE)]

    on_bench(work)


@pytest.mark.parametrize(
    "large",
    [
        Result("n" * 1000, "a", "v", ok=True),
        Result("n", "i" * 1000, "v", ok=True),
        Result("n", "a", "v" * 1000, ok=True),
        Result("n", "a", "v", ok=False, errors=("e" * 500, "e" * 500)),
    ],
    ids=["nonce", "id", "version", "errors"],
)
def test_the_size_of_a_result_is_all_its_text(large: Result) -> None:
    assert large.size >= 1000 + Result("n", "a", "v", ok=True).size - 3


def test_a_late_result_for_an_attachment_that_left_on_the_same_stream_is_not_kept() -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.result(result("n1"))
        bench.outbox.unsubscribed("a", GONE, "")
        bench.outbox.lost()
        assert await bench.rest() == [Unsubscribed("a", GONE)]

    on_bench(work)


def test_held_announcements_are_the_next_streams_and_nothing_else_waits_for_it() -> None:
    async def work(bench: Bench) -> None:
        bench.outbox.subscribed(A)
        bench.outbox.hold()
        bench.outbox.subscribed(B)
        taking = await waits(bench.outbox.take())
        bench.outbox.result(result("n"))
        assert await asyncio.wait_for(taking, 1) == result("n")
        bench.outbox.written()
        bench.outbox.unsubscribed("c", GONE, "")
        bench.outbox.heartbeat(Heartbeat(()))
        assert await bench.write(2) == [Unsubscribed("c", GONE), Heartbeat(())]
        assert bench.outbox.waits("a")
        assert bench.outbox.waits("b")
        bench.outbox.lost()
        bench.outbox.begin(())
        assert await bench.rest() == [Unsubscribed("c", GONE), Subscribed(A), Subscribed(B)]

    on_bench(work)
