"""Work that is finished whatever happens to the caller."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from netfence.tasks import finish


def test_the_result_and_the_failure_are_the_works_own() -> None:
    async def work(fail: bool) -> int:
        await asyncio.sleep(0)
        if fail:
            raise ValueError("broken")
        return 7

    async def test() -> None:
        assert await finish(work(fail=False), "seven") == 7
        with pytest.raises(ValueError, match="broken"):
            await finish(work(fail=True), "broken")

    asyncio.run(test())


@pytest.mark.parametrize("cancels", [1, 3], ids=str)
def test_a_cancelled_caller_waits_for_the_end_of_the_work_and_is_cancelled_then(cancels: int) -> None:
    async def test() -> None:
        go, done = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            await go.wait()
            done.set()

        caller = asyncio.ensure_future(finish(work(), "work"))
        for _ in range(cancels):
            await asyncio.sleep(0)
            caller.cancel()
        await asyncio.sleep(0)
        assert not caller.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert done.is_set()

    asyncio.run(test())


def test_a_failure_that_no_caller_waits_for_is_logged() -> None:
    async def test() -> None:
        go = asyncio.Event()

        async def work() -> None:
            await go.wait()
            raise ValueError("unseen")

        caller = asyncio.ensure_future(finish(work(), "sad work"))
        await asyncio.sleep(0)
        caller.cancel()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await caller

    with capture_logs() as logs:
        asyncio.run(test())
    assert [(entry["event"], entry["task"], entry["error"]) for entry in logs] == [
        ("work_failed_after_cancel", "sad work", "unseen")
    ]
