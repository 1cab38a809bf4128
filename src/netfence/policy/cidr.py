"""The CIDR rules of a policy: both lists and both families in one immutable table, most specific live entry wins.

Owns semantics.md 3 and 4 in their pure part: which entry decides about an address, when an entry stops counting, how
deep entries with a TTL may nest. Refuses to know modes, leases and the kernel's layouts: the data plane gets the table
as `compiled` (everything, in address order) or as `changes_since` (what differs from the table it replaces).

How the kernel finds what an expired entry hides: its trie answers with the longest entry, live or not. On an expired
one it looks again with `retry_length(key)`, one bit shorter than that entry, and so gets the next shorter one. No entry
thereby depends on another: adding or removing a rule stays one atomic update of one key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from netfence.errors import ExhaustedError
from netfence.policy.family import ALLOW, BOTH, DENY, NEVER, Entry, Family, entry
from netfence.policy.limits import MAX_CIDR_RULES
from netfence.policy.ordering import sort_in_pieces
from netfence.policy.pmap import Builder
from netfence.policy.prefix import Key, cidr_text, normal, parse_cidr

__all__ = ["NEVER", "CidrTable", "Entry", "Key", "Rule", "cidr_text", "parse_cidr", "retry_length"]

IPV4: Final = 4
"""Address size of a family, in bytes: how `compiled` and the counts name it."""
IPV6: Final = 16


class Rule(NamedTuple):
    """One entry of the table in the words of an API: for `why`, storage and tests."""

    cidr: str
    allow: bool
    expiry: float


def retry_length(key: Key) -> int | None:
    """Return the prefix length to look up next when this entry is expired; None for a prefix that nothing covers."""
    return key[-1] - 1 if key[-1] else None


class _Entries(Mapping[Key, Entry]):
    """Both families as one mapping."""

    __slots__ = ("_families",)

    def __init__(self, families: dict[int, Family]) -> None:
        self._families = families

    def __getitem__(self, key: Key) -> Entry:
        family = self._families.get(len(key) - 1)
        if family is None:
            raise KeyError(key)
        return family.entries[key]

    def __iter__(self) -> Iterator[Key]:
        for family in self._families.values():
            yield from family.entries

    def __len__(self) -> int:
        return sum(len(family.entries) for family in self._families.values())


class CidrTable:
    """An immutable table of CIDR entries.

    `CidrTable()` is empty; `build` makes a big one, `allow` and the like change one rule and return the new table.
    """

    __slots__ = ("_families",)

    def __init__(self, families: dict[int, Family] | None = None) -> None:
        """Take over the families, by address size; nobody may change them afterwards."""
        self._families = _NO_ENTRIES if families is None else families

    @classmethod
    def build(
        cls,
        allow: Iterable[tuple[Key, float]],
        deny: Iterable[tuple[Key, float]] = (),
        *,
        expected: int = 0,
    ) -> CidrTable:
        """Make a table from (key, expiry) of both lists; the last of equal keys counts, as re-adding replaces.

        `expected` is about how many there are (only for speed). Raises ValueError when entries with a TTL nest too deep
        (`args` are all the faults), ExhaustedError on more than MAX_CIDR_RULES entries.
        """
        builders: dict[int, Builder[Key, Entry]] = {IPV4: Builder(expected), IPV6: Builder(expected)}
        shard4, shard6 = builders[IPV4].shard, builders[IPV6].shard
        known: dict[tuple[float, float], Entry] = {}  # a bulk update has few different expiries: share their entries
        for key, expiry in allow:
            value = ALLOW if expiry == NEVER else known.setdefault((expiry, 0.0), Entry(expiry, 0.0))
            (shard4 if len(key) == 5 else shard6)(key)[key] = value
        for key, expiry in deny:
            shard = (shard4 if len(key) == 5 else shard6)(key)
            old = shard.get(key)
            pair = (0.0 if old is None else old.allow, expiry)
            shard[key] = DENY if old is None and expiry == NEVER else known.setdefault(pair, entry(*pair))
        families = {size: Family.of(size, builder.build()) for size, builder in builders.items()}
        table = cls(families)
        if len(table) > MAX_CIDR_RULES:
            raise ExhaustedError(f"{len(table)} CIDR entries, and an attachment may have {MAX_CIDR_RULES}")
        return table

    @classmethod
    def of(cls, entries: Iterable[tuple[Key, Entry]]) -> CidrTable:
        """Make a table from stored entries. Raises as `build` does."""
        pairs = list(entries)
        return cls.build(
            ((key, value.allow) for key, value in pairs if value.allow),
            ((key, value.deny) for key, value in pairs if value.deny),
            expected=len(pairs),
        )

    @property
    def entries(self) -> Mapping[Key, Entry]:
        """The entries of both families; order not defined, expired ones included until `live` removes them."""
        return _Entries(self._families)

    def __len__(self) -> int:
        return sum(len(family.entries) for family in self._families.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CidrTable):
            return NotImplemented
        return all(family.entries == other.family(size).entries for size, family in self._families.items())

    __hash__ = None  # type: ignore[assignment]  # compared by content, too big to be a key

    def __repr__(self) -> str:
        return f"<CidrTable of {len(self)} entries>"

    def family(self, size: int) -> Family:
        """Return the entries of the family with that address size (4 or 16)."""
        return self._families[size]

    def size_of(self, size: int) -> int:
        """Return the number of entries of the family with that address size (4 or 16)."""
        return len(self._families[size].entries)

    def lookup(self, address: bytes, now: float) -> tuple[Key, bool] | None:
        """Return the longest live prefix that matches the packed address and whether it allows; None: no rule says.

        Allow and deny at the same prefix: deny. ValueError for anything but 4 or 16 bytes.
        """
        address = normal(address)
        return self._families[len(address)].lookup(address, now)

    def allow(self, key: Key, expiry: float = NEVER) -> CidrTable:
        """Return the table with this prefix in the allow list until `expiry`, replacing an earlier expiry there.

        Raises ValueError when entries with a TTL would nest too deep, ExhaustedError when the table is full.
        """
        old = self.entries.get(key)
        return self._with(key, entry(expiry, old.deny if old else 0.0))

    def deny(self, key: Key, expiry: float = NEVER) -> CidrTable:
        """Return the table with this prefix in the deny list until `expiry`; otherwise as `allow`."""
        old = self.entries.get(key)
        return self._with(key, entry(old.allow if old else 0.0, expiry))

    def _with(self, key: Key, value: Entry) -> CidrTable:
        family = self._families[len(key) - 1]
        if key not in family.entries and len(self) >= MAX_CIDR_RULES:
            raise ExhaustedError(f"{cidr_text(key)}: the attachment has {MAX_CIDR_RULES} CIDR entries already")
        if value.has_ttl() and key not in family.timed:
            family.check_nesting(key)
        return self._changed(family, {key: value})

    def without(self, key: Key) -> CidrTable:
        """Return the table without exactly this prefix, in both lists; itself when it is in neither."""
        family = self._families[len(key) - 1]
        return self._changed(family, {key: None}) if key in family.entries else self

    def _changed(self, family: Family, changes: Mapping[Key, Entry | None]) -> CidrTable:
        return CidrTable({**self._families, family.size: family.changed(changes)})

    def live(self, now: float) -> CidrTable:
        """Return the table without what is expired at `now`; itself when nothing is (then it costs nothing)."""
        families = {size: family.live(now) for size, family in self._families.items()}
        if all(families[size] is family for size, family in self._families.items()):
            return self
        return CidrTable(families)

    def next_expiry(self) -> float:
        """Return a time no later than the first expiry (NEVER without any): when `live` is worth calling again."""
        return min(family.soonest for family in self._families.values())

    def compiled(self, size: int, now: float) -> Iterator[tuple[Key, float, float, int | None]]:
        """Yield the live entries of a family in address order: (key, allow expiry, deny expiry, retry length).

        The retry length is None for an entry that never expires as a whole (or has length 0): see the module.
        """
        entries = self._families[size].entries
        for key in sort_in_pieces(list(entries)):
            value = entries[key]
            if value is ALLOW or value is DENY or value is BOTH:
                yield key, value.allow, value.deny, None
            elif (left := value.live(now)) is not None:
                yield key, left.allow, left.deny, None if NEVER in left else retry_length(key)

    def changes_since(self, older: CidrTable) -> Iterator[tuple[Key, Entry | None]]:
        """Yield every key whose entry is not what it was in `older`, with the entry now (None: removed).

        Costs microseconds between tables that came from one another by single commands, whatever their size.
        """
        for size, family in self._families.items():
            yield from family.entries.differences(older.family(size).entries)

    def rules(self) -> Iterator[Rule]:
        """Yield every entry of each list, in address order, IPv4 first."""
        for size in self._families:
            for key, allow, deny, _ in self.compiled(size, 0.0):
                text = cidr_text(key)
                if allow:
                    yield Rule(text, allow=True, expiry=allow)
                if deny:
                    yield Rule(text, allow=False, expiry=deny)


_NO_ENTRIES: Final = {IPV4: Family.empty(IPV4), IPV6: Family.empty(IPV6)}
