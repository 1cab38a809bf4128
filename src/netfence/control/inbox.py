"""Commands that came and wait to be applied: one queue per attachment, bounded together.

Commands for one attachment are applied in the order they came in; those of different attachments do not wait for each
other. What waits together is handed over together. A peer that sends faster than we apply is not read any further
(`put` waits), so that it is HTTP/2's flow control that slows it. Knows nothing of what a command is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

import structlog

MAX_TOGETHER: Final = 256
"""Commands applied as one: their results wait for the last of them."""

MAX_TOGETHER_BYTES: Final = 1 << 20
"""Bytes of commands applied as one, but for a larger first one: what their refusals may say is bounded with them."""

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Inbox(Generic[T]):
    """Queues of `work`: called with an attachment's id and what waits for it, never twice at once for one id."""

    def __init__(self, work: Callable[[str, Sequence[T]], Awaitable[None]], max_bytes: int) -> None:
        self._work = work
        self._max_bytes = max_bytes
        self._bytes = 0
        self._queues: dict[str, deque[tuple[T, int]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Condition()

    async def put(self, attachment_id: str, item: T, size: int) -> None:
        """Queue an item of `size` bytes; waits while there is no room, but takes anything while nothing waits."""
        async with self._room:
            await self._room.wait_for(lambda: not self._bytes or self._bytes + size <= self._max_bytes)
            self._bytes += size
        queue = self._queues.get(attachment_id)
        if queue is not None:
            queue.append((item, size))
            return
        self._queues[attachment_id] = deque([(item, size)])
        task = asyncio.create_task(self._serve(attachment_id), name=f"commands {attachment_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drained(self) -> None:
        """Wait until all that was put has been handed over and done."""
        async with self._room:
            await self._room.wait_for(lambda: not self._queues)

    async def close(self) -> None:
        """Stop; what waits is left, what is being done goes on to its end where it must."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._queues.clear()
        self._bytes = 0

    async def _serve(self, attachment_id: str) -> None:
        queue = self._queues[attachment_id]
        while queue:
            taken = [queue.popleft()]
            size = taken[0][1]
            while queue and len(taken) < MAX_TOGETHER and size + queue[0][1] <= MAX_TOGETHER_BYTES:
                taken.append(queue.popleft())
                size += taken[-1][1]
            try:
                await self._work(attachment_id, [item for item, _ in taken])
            except Exception as error:  # a defect; the next command may fare better
                log.exception("commands_failed", attachment=attachment_id, error=str(error), count=len(taken))
            async with self._room:
                self._bytes -= size
                if not queue:
                    del self._queues[attachment_id]
                self._room.notify_all()
