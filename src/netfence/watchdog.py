"""Feeding systemd's watchdog from the event loop, only while what the daemon works with answers.

Knows nothing of what it asks: each question is a name and something to await, and any answer will do, an error too. One
that stays without an answer for too long is told in the log and keeps the pings back until the answer comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import structlog

from netfence.notify import notify

PATIENCE = 5
"""Limits of the watchdog for which a question may wait: work stands in line before it, with large policies minutes."""

Question = Callable[[], Awaitable[object]]

log = structlog.get_logger(__name__)


async def feed(questions: Mapping[str, Question], limit_s: float, status: Callable[[], str]) -> None:
    """Ask and ping every half of `limit_s` until cancelled; `status` is told along."""
    loop = asyncio.get_running_loop()
    asked: dict[str, asyncio.Task[None]] = {}
    since: dict[str, float] = {}
    told: list[str] = []
    async with asyncio.TaskGroup() as group:
        while True:
            now = loop.time()
            for name, question in questions.items():
                if name not in asked or asked[name].done():
                    asked[name], since[name] = group.create_task(_answer(question), name=name), now
            silent = sorted(name for name, began in since.items() if now - began > PATIENCE * limit_s)
            if not silent:
                notify("WATCHDOG=1", f"STATUS={status()}")
            elif silent != told:
                log.error("watchdog_not_fed", silent=silent, effect="the service manager restarts netfenced")
            told = silent
            await asyncio.sleep(now + limit_s / 2 - loop.time())


async def _answer(question: Question) -> None:
    try:
        await question()
    except Exception as error:  # noqa: BLE001 - an answer all the same; whoever works with it reports the failure
        log.debug("watchdog_answer", error=str(error))
