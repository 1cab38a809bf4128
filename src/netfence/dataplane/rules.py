"""Rule tables in the kernel: one LPM trie per policy and family, switched by policy index.

Owns the free policy indices and what stands in the maps of maps under them. Refuses to know slots and modes: plane.py
writes the index that `place` returns into a slot's word, and gives the old index back to `release`.

An update of a map of maps waits for RCU, 12–16 ms. So that no attach and no switch waits for it, a few indices stand
ready with empty tries in them; `release` refills in the background of whoever calls it (a worker thread). All methods
may run in worker threads.

An index is in force, being filled, or in one of three places, whatever fails (ENOMEM, EMFILE): `_ready`, with empty
tries; `_used`, given back, and packets that read its slot's word before that may be looking things up in it yet;
`_free`, which no packet uses, whatever is in it. Only from `_ready` is one handed out.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections.abc import Iterable, Iterator

from netfence.dataplane.clock import Clock
from netfence.dataplane.layout import Layout
from netfence.dataplane.maps import Map, MapSpec, u32
from netfence.errors import ExhaustedError
from netfence.policy.cidr import CidrTable, Entry, Key

READY = 16
"""Policy indices kept with empty tries: what is attached or replaced at one moment, before the next refill."""

CHUNK = 4096
"""Rules packed between two chances for other threads to run."""

KEPT = 64
"""Tries of policies in force kept open for single changes: opening one anew is half the cost of a change, or more."""

FENCE_INDEX = 0
"""No policy has it: updating it is how we wait until no packet uses an index given back."""

SIZES = {4: "rules4", 16: "rules6"}
"""Address size in bytes → outer map."""


class RuleTables:
    """Every policy's rules in the kernel."""

    def __init__(self, maps: dict[str, Map], layout: Layout, clock: Clock) -> None:
        self._outer = {size: maps[name] for size, name in SIZES.items()}
        self._clock = clock
        self._rule = layout.packer("rule", "allow", "deny", "length")
        self._free = set(range(1, layout.constants["POLICIES"]))
        self._used: list[int] = []
        self._ready: list[int] = []
        self._lock = threading.Lock()
        self._kept: dict[tuple[int, int], tuple[int, Map]] = {}  # (size, index) → id and trie, last used last

    def claim(self, index: int) -> None:
        """Note that a policy in force (found after a restart) has this index."""
        with self._lock:
            self._free.discard(index)

    def place(self, table: CidrTable, now: float) -> int:
        """Put a table into tries of its own and return its policy index; in force only once a slot names it.

        Raises ExhaustedError (no index left) and OSError (ENOMEM, ENOSPC), and then nothing is left behind, or what is
        left goes with the next `release` or `refill`.
        """
        index = self._take()
        try:
            for size in self._outer:
                if table.size_of(size):
                    self._fill(self._inner(size, index), table.compiled(size, now))
        except BaseException:
            with contextlib.suppress(OSError):  # why `place` failed is told; this is tried again
                self.release([index])
            raise
        return index

    def change(self, index: int, changes: Iterable[tuple[Key, Entry | None]]) -> None:
        """Set or remove single rules in the tries of a policy in force; each takes effect by itself.

        Removals first: in between there may be too few expired entries to pass over, never too many.
        """
        for key, entry in sorted(changes, key=lambda change: change[1] is not None):
            inner = self._kept_inner(len(key) - 1, index)
            if entry is None:
                inner.delete(_trie_key(key))
            else:
                inner.update(_trie_key(key), self._pack(entry.allow, entry.deny, key[-1]))

    def read(self, index: int) -> CidrTable:
        """Read a policy's rules back from its tries, expired ones too. Raises OSError, ValueError (too many)."""
        entries: list[tuple[Key, Entry]] = []
        for size in self._outer if index else ():
            inner = self._inner(size, index)
            for key in inner.keys():  # noqa: SIM118 - a Map is no dict
                found = inner.lookup(key)
                if found is not None:
                    allow, deny, _ = self._rule.unpack(found[: self._rule.size])
                    times = [self._clock.seconds(each) if each else 0.0 for each in (allow, deny)]
                    length = int.from_bytes(key[:4], sys.byteorder)
                    entries.append((key[4:] + bytes([length]), Entry(*times)))
        return CidrTable.of(entries)

    def release(self, indices: list[int]) -> None:
        """Give back indices that no slot names any more: waits until no packet uses them, then empties them.

        Raises OSError (ENOMEM, EMFILE); they are given back all the same, and the next `release` or `refill` empties
        them.
        """
        if not indices:
            return
        with self._lock:
            used, self._used = [*self._used, *indices], []
        self._make_ready(used, [])

    def refill(self) -> None:
        """Make indices ready when few are. Raises OSError, and has then lost none."""
        with self._lock:
            wanted = max(READY - len(self._ready), 0)
            used, self._used = self._used[:wanted], self._used[wanted:]
            free = [self._free.pop() for _ in range(min(wanted - len(used), len(self._free)))]
        self._make_ready(used, free)

    def _make_ready(self, used: list[int], free: list[int]) -> None:
        """Put empty tries under these indices, or have them again where they were taken from."""
        try:
            if used:
                self._install([FENCE_INDEX])  # waits for RCU
            if used or free:
                self._install(used + free)
        except BaseException:
            with self._lock:
                self._used += used
                self._free.update(free)
            raise
        with self._lock:
            self._ready += used + free

    def _take(self) -> int:
        with self._lock:
            if self._ready:
                return self._ready.pop()
        self.refill()
        with self._lock:
            if self._ready:
                return self._ready.pop()
        message = "place a policy: every policy index is taken; detach something"
        raise ExhaustedError(message)

    def _install(self, indices: list[int]) -> None:
        """Put empty tries under the indices; waits for RCU once per family."""
        for outer in self._outer.values():
            tries = [Map.create(_trie_spec(outer)) for _ in indices]
            for index, trie in zip(indices, tries, strict=True):
                self._forget(index)
                if index != FENCE_INDEX:
                    outer.pin_inner(u32(index), trie)
            outer.update_batch(b"".join(map(u32, indices)), b"".join(u32(trie.fd) for trie in tries))
            for trie in tries:
                trie.close()

    def _kept_inner(self, size: int, index: int) -> Map:
        """Return the trie that is under the index now, from those kept open where it is the very one."""
        number = self._outer[size].inner_id(u32(index))
        with self._lock:
            kept = self._kept.pop((size, index), None)
        if kept is None or kept[0] != number:
            kept = number, self._inner(size, index, number)
        with self._lock:
            self._kept[size, index] = kept
            while len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
        return kept[1]

    def _forget(self, index: int) -> None:
        """Close the tries of an index: open, what was in them would keep its memory."""
        with self._lock:
            for size in self._outer:
                self._kept.pop((size, index), None)

    def _inner(self, size: int, index: int, number: int | None = None) -> Map:
        inner = self._outer[size].inner(u32(index), number)
        if inner is None:
            message = f"policy index {index} has no rule table"
            raise RuntimeError(message)
        return inner

    def _fill(self, inner: Map, rules: Iterator[tuple[Key, float, float, int | None]]) -> None:
        """Write rules in address order: a trie fills three times as fast that way (measured, 100k rules)."""
        packed: dict[tuple[float, float, int], bytes] = {}
        for chunk in iter(lambda: list(itertools.islice(rules, CHUNK)), []):
            keys, values = [], []
            for key, allow, deny, _ in chunk:
                what = (allow, deny, key[-1])
                value = packed.get(what)
                if value is None:
                    value = packed[what] = self._pack(*what)
                keys.append(_trie_key(key))
                values.append(value)
            inner.update_batch(b"".join(keys), b"".join(values))

    def _pack(self, allow: float, deny: float, length: int) -> bytes:
        jiffies = self._clock.jiffies
        return self._rule.pack(jiffies(allow) if allow else 0, jiffies(deny) if deny else 0, length)


_LENGTHS = [u32(length) for length in range(129)]


def _trie_key(key: Key) -> bytes:
    """Turn a policy's key into `struct bpf_lpm_trie_key`: length (u32, native), then the address in network order."""
    return _LENGTHS[key[-1]] + key[:-1]


def _trie_spec(outer: Map) -> MapSpec:
    if outer.spec.inner is None:
        message = f"{outer.spec.name} is no map of maps"
        raise TypeError(message)
    return outer.spec.inner
