"""A page is made once for all who ask at once, and handed out again for a while: asking costs the daemon little."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from netfence import metrics_collector
from netfence.metrics_collector import KEEP, Collector

MADE_S = 0.02


class Made(Collector):
    """Makes pages of a number that take `MADE_S`."""

    def __init__(self) -> None:
        super().__init__(None, None)  # type: ignore[arg-type]
        self.pages = 0
        self.failing = False

    async def _make(self) -> bytes:
        await asyncio.sleep(MADE_S)
        if self.failing:
            raise LookupError("slot 5 has no counters")
        self.pages += 1
        return str(self.pages).encode()


def run(work: Callable[[Made], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work(Made()), 10)

    asyncio.run(main())


def test_who_asks_at_once_gets_one_page() -> None:
    async def work(made: Made) -> None:
        assert await asyncio.gather(*[made.text() for _ in range(50)]) == [b"1"] * 50

    run(work)


def test_a_page_is_kept_for_a_multiple_of_its_time() -> None:
    async def work(made: Made) -> None:
        await made.text()
        ended = time.monotonic()
        while await made.text() == b"1":  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(MADE_S / 10)
        # Not before that time, and its own making once more.
        assert time.monotonic() - ended >= KEEP * MADE_S

    run(work)


def test_who_goes_away_does_not_make_it_dearer() -> None:
    """Else clients that hang up early would have page after page made."""

    async def work(made: Made) -> None:
        asking = asyncio.create_task(made.text())
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert made.pages == 1
        assert (await made.text(), made.pages) == (b"1", 1)

    run(work)


def test_a_failure_is_told_and_not_kept() -> None:
    async def work(made: Made) -> None:
        made.failing = True
        with pytest.raises(LookupError):
            await made.text()
        made.failing = False
        assert await made.text() == b"1"

    run(work)


def test_every_reason_has_a_verdict() -> None:
    verdicts = {word: verdict for _, verdict, word in metrics_collector._REASONS}
    assert verdicts["allow_rule"] == "pass"
    assert verdicts["default_drop"] == verdicts["truncated"] == "drop"
