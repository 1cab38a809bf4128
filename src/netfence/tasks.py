"""Running asyncio work that must not stop half way.

A cancelled request (a client that hung up, a shutdown) may not leave a switch, a write or a roll-back half done. This
module owns that one idea and knows nothing of what is run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

T = TypeVar("T")

log = structlog.get_logger(__name__)


async def finish(work: Coroutine[Any, Any, T], name: str) -> T:
    """Run `work` to its end even when the caller is cancelled; the cancellation is raised after it has ended.

    The work runs as a task called `name`. Its failure is raised to the caller, or logged when the caller was cancelled.
    """
    task = asyncio.create_task(work, name=name)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled() and (failure := task.exception()) is not None:
        log.error("work_failed_after_cancel", task=name, error=str(failure), kind=type(failure).__name__)
    raise cancelled
