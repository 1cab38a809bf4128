"""Pings on a real socket: they come while everything answers, and do not while a question or the loop hangs."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from netfence import watchdog
from netfence.errors import NetfenceError
from netfence.store import Store

LIMIT_S = 0.2
TOO_LATE_S = 5.0


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[socket.socket]:
    """Give the service manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield manager


@asynccontextmanager
async def feeding(questions: Mapping[str, watchdog.Question]) -> AsyncIterator[None]:
    """Feed the watchdog meanwhile; the status counts the pings."""
    count = itertools.count()
    task = asyncio.create_task(watchdog.feed(questions, LIMIT_S, lambda: f"ping {next(count)}"))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def ping(heard: socket.socket) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(heard, 100), TOO_LATE_S)


def waiting(heard: socket.socket) -> int:
    """Count and take the datagrams that have come."""
    for count in itertools.count():
        try:
            heard.recv(100)
        except BlockingIOError:
            return count
    raise AssertionError


async def nothing() -> None:
    pass


def test_pings_come_at_half_of_the_limit(heard: socket.socket) -> None:
    async def work() -> list[float]:
        times = []
        async with feeding({"it": nothing}):
            for number in range(5):
                assert await ping(heard) == f"WATCHDOG=1\nSTATUS=ping {number}".encode()
                times.append(time.monotonic())
        return times

    times = asyncio.run(work())
    assert times[-1] - times[0] == pytest.approx(4 * LIMIT_S / 2, abs=LIMIT_S)


def test_a_blocked_loop_sends_none_and_makes_up_for_none(heard: socket.socket) -> None:
    async def work() -> None:
        async with feeding({"it": nothing}):
            await ping(heard)
            waiting(heard)
            asyncio.get_running_loop().call_soon(time.sleep, 3 * LIMIT_S)
            await asyncio.sleep(0)
            assert waiting(heard) == 0
            await ping(heard)
            await asyncio.sleep(0)
            assert waiting(heard) == 0

    asyncio.run(work())


def test_a_question_without_an_answer_keeps_pings_back_and_is_told(heard: socket.socket) -> None:
    """Not at once: it may wait in line behind work."""

    async def work() -> None:
        gate = asyncio.Event()
        async with feeding({"quick": nothing, "slow": gate.wait}):
            await asyncio.sleep(watchdog.PATIENCE * LIMIT_S)
            assert waiting(heard) >= watchdog.PATIENCE
            await asyncio.sleep(LIMIT_S)
            waiting(heard)
            await asyncio.sleep(LIMIT_S)
            assert waiting(heard) == 0
            gate.set()
            await ping(heard)

    with capture_logs() as logs:
        asyncio.run(work())
    (told,) = logs
    assert (told["event"], told["silent"], told["log_level"]) == ("watchdog_not_fed", ["slow"], "error")


def test_an_error_is_an_answer(heard: socket.socket) -> None:
    async def fail() -> None:
        raise NetfenceError("the disk is full")

    async def work() -> None:
        async with feeding({"store": fail}):
            await ping(heard)
            await ping(heard)

    asyncio.run(work())


def test_the_store_answers_only_while_its_thread_does(heard: socket.socket, tmp_path: Path) -> None:
    async def work() -> None:
        store = Store.open(tmp_path / "data")
        async with feeding({"store": lambda: store.save_counters({})}):
            await ping(heard)
            store._pool.submit(time.sleep, (watchdog.PATIENCE + 3) * LIMIT_S)
            await asyncio.sleep((watchdog.PATIENCE + 1) * LIMIT_S)
            waiting(heard)
            await asyncio.sleep(LIMIT_S)
            assert waiting(heard) == 0
            await ping(heard)
        await store.close()

    with capture_logs() as logs:
        asyncio.run(work())
    assert [entry["silent"] for entry in logs if entry["event"] == "watchdog_not_fed"] == [["store"]]
