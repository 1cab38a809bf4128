"""Work beside everything else: whatever becomes of it, the daemon goes on, and nothing keeps it from stopping."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from netfence import daemon
from netfence.daemon import Background


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
