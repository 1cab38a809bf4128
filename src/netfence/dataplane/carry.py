"""Carries over what one build's maps hold into the maps of another, by the names of fields, not by their places.

Owns what an upgrade has to know of every map: slots' words and settings, rules, leases, inbound connections, counters,
and where interfaces and DNS servers belong. What a build has no more is left behind, what it has anew is zero. Both
builds' programs may run meanwhile; those of the new one see nothing yet. Everything here blocks.
"""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

import structlog

from netfence.dataplane.layout import Layout
from netfence.dataplane.maps import Map, MapType, possible_cpus, u32
from netfence.dataplane.slotword import SlotWord

AT_ONCE = 256
"""Rule tables put in place together: an update waits for RCU, and each table is an open file until then."""

FAMILIES = {"rules4": "rule_key4", "rules6": "rule_key6"}
"""Outer map → struct of its tables' keys."""

COUNT_BYTES = 16
"""`struct count`: packets, bytes."""

Recode = Callable[[bytes], bytes]

log = structlog.get_logger(__name__)


def carry_over(old: Mapping[str, Map], was: Layout, new: Mapping[str, Map], layout: Layout) -> dict[str, int]:
    """Fill maps that nothing uses yet; return how many slots, rules and leases there were. Raises OSError."""
    recode = functools.partial(_recoder, was, layout)
    words = _settings(old["config"], was, new["config"], layout)
    slots = sorted(words)
    rules = sum(
        _tables(
            old[outer], new[outer], sorted({word.index for word in words.values()} - {0}), recode(key), recode("rule")
        )
        for outer, key in FAMILIES.items()
    )
    as_is: Recode = bytes
    leases = _opened(old["leases"], new["leases"], recode("lease_key"), recode("lease"))
    _opened(old["inbound"], new["inbound"], recode("inbound_key"), recode("inbound"))
    if "seen" in old:  # since 0.2
        _opened(old["seen"], new["seen"], recode("seen_key"), recode("seen"))
        _by_slot(old["seen_count"], new["seen_count"], slots, recode("seen_count"))
    _entries(old["dns_endpoints"], new["dns_endpoints"], recode("endpoint"), as_is)
    _entries(old["host_addresses"], new["host_addresses"], recode("address"), as_is)
    _entries(old["if_slot_far"], new["if_slot_far"], as_is, as_is)
    _interfaces(old["if_slot"], [new["if_slot"], new["if_slot_far"]])
    _by_slot(old["inbound_count"], new["inbound_count"], slots, recode("inbound_count"))
    _by_slot(old["counters"], new["counters"], slots, _counters(was, layout))
    return {"slots": len(slots), "rules": rules, "leases": leases}


def _recoder(was: Layout, layout: Layout, name: str) -> Recode:
    """Make what turns a struct of one layout into that of another."""
    pieces = [
        (old.offset, old.size, new.offset, new.size, old.integer and new.integer)
        for member, new in layout.fields[name].items()
        if (old := was.fields[name].get(member)) is not None
    ]
    size = layout.sizes[name]

    def recode(value: bytes) -> bytes:
        made = bytearray(size)
        for from_, from_size, to, to_size, integer in pieces:
            piece = value[from_ : from_ + from_size]
            if integer:
                piece = int.from_bytes(piece, sys.byteorder).to_bytes(to_size, sys.byteorder)
            piece = piece[:to_size]
            made[to : to + len(piece)] = piece
        return bytes(made)

    return recode


def _settings(old: Map, was: Layout, new: Map, layout: Layout) -> dict[int, SlotWord]:
    """Carry over each slot's `struct config`; return the words of those in use."""
    recode = _recoder(was, layout, "config")
    at = layout.fields["config"]["active"]
    found: dict[int, SlotWord] = {}
    for slot in range(min(old.spec.max_entries, new.spec.max_entries)):
        value = old.lookup(u32(slot))
        if value is None or not any(value):
            continue
        word = value[was.fields["config"]["active"].offset :][:8]
        found[slot] = SlotWord.decode(int.from_bytes(word, sys.byteorder), was)
        made = bytearray(recode(value))
        made[at.offset : at.offset + 8] = found[slot].encode(layout).to_bytes(8, sys.byteorder)
        new.update(u32(slot), bytes(made))
    return found


def _tables(old: Map, new: Map, indices: list[int], key: Recode, value: Recode) -> int:
    """Carry over the tables of rules under these policy indices; return how many rules there were."""
    count, inner = 0, new.spec.inner
    if inner is None:
        message = f"{new.spec.name} is no map of maps"
        raise TypeError(message)
    for start in range(0, len(indices), AT_ONCE):
        some = indices[start : start + AT_ONCE]
        made: list[tuple[int, Map]] = []
        for index in some:
            table = old.inner(u32(index))
            if table is None:
                continue
            fresh = Map.create(inner)
            count += _entries(table, fresh, key, value)
            table.close()
            new.pin_inner(u32(index), fresh)
            made.append((index, fresh))
        keys, descriptors = (b"".join(u32(one) for one in each) for each in _columns(made))
        new.update_batch(keys, descriptors)
        for _, fresh in made:
            fresh.close()
    return count


def _columns(made: list[tuple[int, Map]]) -> tuple[list[int], list[int]]:
    return [index for index, _ in made], [table.fd for _, table in made]


def _entries(old: Map, new: Map, key: Recode, value: Recode) -> int:
    """Carry over all entries of a hash or a trie; return how many."""
    count = 0
    for one, found in _items(old):
        new.update(key(one), value(found))
        count += 1
    return count


def _opened(old: Map, new: Map, key: Recode, value: Recode) -> int:
    """Carry over entries that only let packets pass; return how many. Those for which there is no room are left out."""
    count = left_out = 0
    for one, found in _items(old):
        try:
            new.update(key(one), value(found))
            count += 1
        except OSError as error:
            if error.errno not in (errno.E2BIG, errno.ENOSPC):
                raise
            left_out += 1
    if left_out:
        log.error("no_room", map=new.spec.name, left_out=left_out, effect="what they let pass is dropped")
    return count


def _items(table: Map) -> Iterator[tuple[bytes, bytes]]:
    for key in table.keys():  # noqa: SIM118 - a Map is no dict
        found = table.lookup(key)
        if found is not None:
            yield key, found[: table.spec.value_size]


def _interfaces(old: Map, new: list[Map]) -> None:
    """Carry over which slots interfaces with small indices have; the small may be others now."""
    small, far = new
    for ifindex in range(old.spec.max_entries):
        slot = old.lookup(u32(ifindex))
        if slot is not None and any(slot):
            (small if ifindex < small.spec.max_entries else far).update(u32(ifindex), slot[:4])


def _by_slot(old: Map, new: Map, slots: Iterable[int], recode: Recode) -> None:
    """Carry over array elements, each CPU's for itself where it has one."""
    for slot in slots:
        value = old.lookup(u32(slot))
        if value is None or slot >= new.spec.max_entries:
            continue
        cpus = possible_cpus() if new.spec.type == old.spec.type == MapType.PERCPU_ARRAY else 1
        each = len(value) // cpus
        new.update(u32(slot), b"".join(recode(value[cpu * each :][:each]) for cpu in range(cpus)))


def _counters(was: Layout, layout: Layout) -> Recode:
    """Make what carries counters over by the names of their reasons."""
    reasons = [
        (was.constants[name], number)
        for name, number in layout.constants.items()
        if name.startswith("REASON_") and name != "REASON_COUNT" and name in was.constants
    ]
    columns = [
        (was.fields["counters"][name].offset, layout.fields["counters"][name].offset) for name in ("real", "would")
    ]

    def recode(value: bytes) -> bytes:
        made = bytearray(layout.sizes["counters"])
        for from_, to in columns:
            for old, new in reasons:
                at = to + new * COUNT_BYTES
                made[at : at + COUNT_BYTES] = value[from_ + old * COUNT_BYTES :][:COUNT_BYTES]
        return bytes(made)

    return recode
