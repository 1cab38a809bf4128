"""What the data plane does with slots, over a kernel that is a record."""

from __future__ import annotations

import asyncio
import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from netfence.dataplane.plane import DataPlane
from netfence.dataplane.slotword import UNSTORED, SlotWord
from netfence.policy.modes import Mode

CONSTANTS = {
    "ACTIVE_MODE_SHIFT": 16, "ACTIVE_RULES4": 1 << 24, "ACTIVE_RULES6": 1 << 25, "ACTIVE_LEASES": 1 << 26,
    "ACTIVE_AUDIT": 1 << 27, "ACTIVE_START": 1 << 28,
}  # fmt: skip
LAYOUT: Any = SimpleNamespace(constants=CONSTANTS)


@pytest.mark.parametrize("unstored", [False, True])
def test_a_word_is_read_back_as_it_was_written(unstored: bool) -> None:
    word = SlotWord(7, Mode.DENYLIST, audit=True, start=False, rules4=True, leases=True, unstored=unstored)
    encoded = word.encode(LAYOUT)
    assert SlotWord.decode(encoded, LAYOUT) == word
    assert bool(encoded & UNSTORED) is unstored
    assert encoded & ~UNSTORED < 1 << 29  # what programs look at is the same with it and without
    assert encoded < 1 << 64


def test_of_slots_that_nobody_claimed_those_are_cleared_that_have_anything() -> None:
    """One that cannot be cleared is given to nobody; a policy that was in force there goes back."""

    async def test() -> None:
        words = {slot: SlotWord().encode(LAYOUT) for slot in range(1, 7)}
        words[3] = SlotWord(index=9, mode=Mode.DENYLIST, start=False).encode(LAYOUT)
        config = SimpleNamespace(
            read=lambda slot: "something" if slot in {1, 3, 4} else None,
            word=words.__getitem__,
            switch=words.__setitem__,
        )
        given: list[int] = []
        cleared: list[int] = []

        def clear(slot: int) -> None:
            if slot == 4:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            cleared.append(slot)

        async def run(work: Any) -> Any:
            return work()

        plane: Any = SimpleNamespace(
            _free=set(range(2, 7)), config=config, _loaded=SimpleNamespace(layout=LAYOUT), _start_mode=Mode.BLOCK_ALL
        )
        plane._clear, plane._run, plane._give_back = clear, run, given.append
        plane._write_word = lambda slot, state: config.switch(slot, state.encode(LAYOUT))
        with capture_logs() as logs:
            assert await DataPlane.clear_unclaimed(plane, [1, 6]) == [3, 6]
        assert (cleared, given) == ([3, 6], [9])
        assert plane._free == {2, 3, 5, 6}
        assert SlotWord.decode(words[3], LAYOUT).index == 0
        assert [(one["event"], one["slot"]) for one in logs] == [("slot_not_cleared", 4)]

    asyncio.run(test())
