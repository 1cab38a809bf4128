"""Policy indices while the kernel has no memory: none is lost, none is given twice, none shows another's rules."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import struct
from types import SimpleNamespace
from typing import Any, Self

import pytest

from netfence.dataplane import rules
from netfence.dataplane.maps import MapSpec, MapType, u32
from netfence.dataplane.plane import DataPlane
from netfence.dataplane.rules import FENCE_INDEX, READY, RuleTables
from netfence.errors import ExhaustedError
from netfence.policy.cidr import CidrTable, Entry, parse_cidr

POLICIES = 600
INNER = MapSpec("rules", MapType.LPM_TRIE, 8, 24, 1000)


class Trie:
    """What stands in for a map; `failures` of the next ones cannot be made."""

    failures = 0

    def __init__(self) -> None:
        self.rules: dict[bytes, bytes] = {}
        self.fd = 0

    @classmethod
    def create(cls, _: MapSpec) -> Self:
        if cls.failures > 0:
            cls.failures -= 1
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return cls()

    def update_batch(self, keys: bytes, values: bytes) -> None:
        value, size = 24, len(values) // 24
        width = len(keys) // size
        for at in range(size):
            self.rules[keys[at * width : (at + 1) * width]] = values[at * value : (at + 1) * value]

    def close(self) -> None:
        """Close."""


class Outer:
    """An array of maps."""

    def __init__(self) -> None:
        self.spec = MapSpec("rules4", MapType.ARRAY_OF_MAPS, 4, 4, POLICIES, 0, INNER)
        self.under: dict[bytes, Any] = {}
        self._waiting: list[Any] = []
        self.fences = 0

    def pin_inner(self, key: bytes, trie: Any) -> None:
        self._waiting.append((key, trie))

    def update_batch(self, keys: bytes, _: bytes) -> None:
        self.fences += u32(FENCE_INDEX) in {keys[at : at + 4] for at in range(0, len(keys), 4)}
        self.under.update(self._waiting)
        self._waiting.clear()

    def inner(self, key: bytes, _: int | None = None) -> Any:
        return self.under.get(key)


class Bench:
    """Rule tables of `POLICIES` indices over maps that are dictionaries."""

    def __init__(self) -> None:
        self.outer = {"rules4": Outer(), "rules6": Outer()}
        layout: Any = SimpleNamespace(packer=lambda *_: struct.Struct("=QQQ"), constants={"POLICIES": POLICIES})
        clock: Any = SimpleNamespace(jiffies=lambda _: 1)
        maps: Any = self.outer
        self.tables = RuleTables(maps, layout, clock)

    def shown(self, index: int) -> int:
        """Count the rules under an index."""
        return sum(len(outer.under[u32(index)].rules) for outer in self.outer.values())

    def rest(self) -> list[int]:
        """Take every index that can be had."""
        found = []
        with contextlib.suppress(ExhaustedError):
            while True:
                found.append(self.tables.place(CidrTable.of([]), 0.0))
        return found


def table(count: int) -> CidrTable:
    return CidrTable.of([(parse_cidr(f"192.0.{one}.0/24"), Entry(float("inf"), 0.0)) for one in range(count)])


@pytest.fixture(autouse=True)
def _tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trie, "failures", 0)
    monkeypatch.setattr(rules, "Map", Trie)


@pytest.mark.parametrize("seed", range(4))
def test_no_index_is_lost_and_none_given_twice_whatever_fails(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """A push to 250 attachments while there is no memory for 300 tries, again and again; then there is."""
    bench, chance = Bench(), random.Random(seed)
    in_force = [bench.tables.place(table(3), 0.0) for _ in range(250)]
    fill = Trie.update_batch

    def refused(trie: Trie, keys: bytes, values: bytes) -> None:
        fill(trie, keys, values)
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    for _ in range(4):
        Trie.failures = 300
        monkeypatch.setattr(Trie, "update_batch", refused)
        for _ in range(250):
            with pytest.raises(OSError, match="memory"):
                bench.tables.place(table(5), 0.0)
        while Trie.failures:
            with contextlib.suppress(OSError):
                bench.tables.refill()
        monkeypatch.setattr(Trie, "update_batch", fill)
        for at in range(250):  # there is memory again, for a moment
            new = bench.tables.place(table(2), 0.0)
            assert new not in in_force
            old, in_force[at] = in_force[at], new
            Trie.failures = chance.choice((0, 0, 1, 2))
            with contextlib.suppress(OSError):
                bench.tables.release([old])
            Trie.failures = 0
    assert {bench.shown(index) for index in in_force} == {2}
    rest = bench.rest()
    assert sorted(rest + in_force) == list(range(1, POLICIES))
    assert {bench.shown(index) for index in rest} == {0}


def test_an_index_given_back_is_handed_out_only_after_packets_are_through_with_it() -> None:
    """Also one that could not be emptied at once: a packet that looks in its old tables must find its old rules."""
    bench = Bench()
    bench.tables.refill()
    used = bench.tables.place(table(3), 0.0)
    Trie.failures = 1
    with pytest.raises(OSError, match="memory"):
        bench.tables.release([used])
    assert bench.shown(used) == 3
    fences = bench.outer["rules4"].fences
    for _ in range(READY - 1):
        assert bench.tables.place(table(1), 0.0) != used
    assert bench.shown(used) == 3
    assert used in [bench.tables.place(CidrTable.of([]), 0.0) for _ in range(READY)]
    assert bench.outer["rules4"].fences == fences + 1
    assert bench.shown(used) == 0


def test_what_comes_back_while_others_could_not_be_emptied_comes_back_too() -> None:
    """The data plane's own queue: a failure must not leave behind it what nobody looks at again."""

    async def test() -> None:
        given: list[list[int]] = []
        plane: Any = SimpleNamespace(_to_release=[], _tasks=set(), _done=lambda _: None)

        class Tables:
            def release(self, indices: list[int]) -> None:
                given.append(indices)
                if len(given) == 1:
                    DataPlane._give_back(plane, 2)  # while the first is on its way
                    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

            def refill(self) -> None:
                """Nothing."""

        async def run(work: Any) -> Any:
            return work()

        plane._rules, plane._run = Tables(), run
        tasks: list[Any] = []
        plane._spawn = lambda work, _name: tasks.append(asyncio.ensure_future(work))
        plane._release = lambda: DataPlane._release(plane)
        for index in (1, 3):
            DataPlane._give_back(plane, index)
            await asyncio.wait(tasks)
        assert given == [[1], [2], [3]]

    asyncio.run(test())
