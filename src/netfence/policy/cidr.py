"""The CIDR rules of a policy: both lists and both families in one immutable table, most specific live entry wins.

Owns semantics.md 3 and 4 in their pure part: which entry decides about an address, when an entry stops counting, how
deep entries with a TTL may nest. Refuses to know modes, leases and the kernel's layouts: the data plane gets the table
as `compiled` (everything, in address order) or as `changes_since` (what differs from the table it replaces).

How the kernel finds what an expired entry hides: its trie answers with the longest entry, live or not. On an expired
one it looks again with `retry_length(key)`, one bit shorter than that entry, and so gets the next shorter one. No entry
thereby depends on another: adding or removing a rule stays one atomic update of one key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from netfence.policy.limits import MAX_CIDR_RULES, MAX_TTL_NESTING
from netfence.policy.ordering import sort_in_pieces
from netfence.policy.pmap import Builder, PersistentMap, empty_map
from netfence.policy.prefix import Key, bits_of, cidr_text, key_of, last_key, normal, parse_cidr

__all__ = ["NEVER", "CidrTable", "Entry", "Key", "Rule", "cidr_text", "parse_cidr", "retry_length"]

NEVER: Final = math.inf
"""The expiry of an entry without a TTL."""

IPV4: Final = 4
"""Address size of a family, in bytes: how `compiled` and the counts name it."""
IPV6: Final = 16


class Entry(NamedTuple):
    """What both lists say about one prefix: expiries in seconds of the monotonic clock; 0.0 is "not in that list"."""

    allow: float
    deny: float

    def verdict(self, now: float) -> bool | None:
        """Tell whether the entry allows (True) or denies (False) at `now`; None when nothing of it is live."""
        if self.deny > now:
            return False
        return True if self.allow > now else None

    def has_ttl(self) -> bool:
        """Tell whether some part of the entry expires."""
        return 0.0 < self.allow < NEVER or 0.0 < self.deny < NEVER

    def live(self, now: float) -> Entry | None:
        """Return the entry without what is expired; None when nothing is left."""
        allow = self.allow if self.allow > now else 0.0
        deny = self.deny if self.deny > now else 0.0
        if allow == self.allow and deny == self.deny:
            return self
        return entry(allow, deny) if allow or deny else None


class Rule(NamedTuple):
    """One entry of the table in the words of an API: for `why`, storage and tests."""

    cidr: str
    allow: bool
    expiry: float


# 100,000 rules without TTL share these three: no container is made per rule, which the garbage collector would visit.
ALLOW: Final = Entry(NEVER, 0.0)
DENY: Final = Entry(0.0, NEVER)
BOTH: Final = Entry(NEVER, NEVER)


def entry(allow: float, deny: float) -> Entry:
    """Return the entry, the shared object where there is one."""
    if allow == NEVER:
        if deny == 0.0:
            return ALLOW
        if deny == NEVER:
            return BOTH
    elif allow == 0.0 and deny == NEVER:
        return DENY
    return Entry(allow, deny)


def retry_length(key: Key) -> int | None:
    """Return the prefix length to look up next when this entry is expired; None for a prefix that nothing covers."""
    return key[-1] - 1 if key[-1] else None


def _soonest(values: Iterable[Entry]) -> float:
    """Return the earliest finite expiry; NEVER when there is none."""
    return min((expiry for value in values for expiry in value if expiry), default=NEVER)


class _Family:
    """The entries of one address family. Immutable.

    `timed` holds those with a TTL once more, so that expiry and nesting cost nothing where no rule has a TTL. `counts`
    are entries per prefix length, `timed_counts` likewise; `lengths` the used ones, longest first. `soonest` is no
    later than the first expiry.
    """

    __slots__ = ("counts", "entries", "lengths", "size", "soonest", "timed", "timed_counts")

    def __init__(
        self, size: int, entries: PersistentMap[Key, Entry], timed: PersistentMap[Key, Entry],
        counts: tuple[int, ...], timed_counts: tuple[int, ...], soonest: float,
    ) -> None:
        self.size = size
        self.entries = entries
        self.timed = timed
        self.counts = counts
        self.timed_counts = timed_counts
        self.lengths = tuple(length for length in range(len(counts) - 1, -1, -1) if counts[length])
        self.soonest = soonest

    @classmethod
    def empty(cls, size: int) -> _Family:
        none = (0,) * (bits_of(size) + 1)
        return cls(size, empty_map(), empty_map(), none, none, NEVER)

    @classmethod
    def of(cls, size: int, entries: PersistentMap[Key, Entry]) -> _Family:
        """Index the entries. Raises ValueError where entries with a TTL nest too deep."""
        counts = [0] * (bits_of(size) + 1)
        timed_counts = counts.copy()
        timed: dict[Key, Entry] = {}
        for key, value in entries.pairs():
            counts[key[-1]] += 1
            if value is not ALLOW and value is not DENY and value.has_ttl():
                timed[key] = value
                timed_counts[key[-1]] += 1
        if sum(map(bool, timed_counts)) > MAX_TTL_NESTING:
            _refuse_deep_nesting(timed)
        store: PersistentMap[Key, Entry] = empty_map()
        if timed:
            builder: Builder[Key, Entry] = Builder(len(timed))
            builder.update(timed.items())
            store = builder.build()
        return cls(size, entries, store, tuple(counts), tuple(timed_counts), _soonest(timed.values()))

    def changed(self, changes: Mapping[Key, Entry | None]) -> _Family:
        """Return the family with these entries set, those that are None removed."""
        counts, timed_counts = list(self.counts), list(self.timed_counts)
        timed: dict[Key, Entry | None] = {}
        soonest = self.soonest
        for key, value in changes.items():
            length = key[-1]
            counts[length] += (value is not None) - (key in self.entries)
            was_timed, is_timed = key in self.timed, value is not None and value.has_ttl()
            timed_counts[length] += is_timed - was_timed
            if is_timed or was_timed:
                timed[key] = value if is_timed else None
            if value is not None and is_timed:
                soonest = min(soonest, _soonest((value,)))
        return _Family(
            self.size, self.entries.changed(changes), self.timed.changed(timed) if timed else self.timed,
            tuple(counts), tuple(timed_counts), soonest,
        )

    def live(self, now: float) -> _Family:
        """Return the family without what is expired at `now`; itself when nothing is."""
        if now < self.soonest:
            return self
        changes = {key: left for key, value in self.timed.pairs() if (left := value.live(now)) is not value}
        family = self.changed(changes) if changes else self
        return _Family(
            family.size, family.entries, family.timed, family.counts, family.timed_counts,
            _soonest(value for _, value in family.timed.pairs()),
        )

    def lookup(self, address: bytes, now: float) -> tuple[Key, bool] | None:
        get = self.entries.get
        for length in self.lengths:
            key = key_of(address, length)
            value = get(key)
            if value is not None:
                verdict = value.verdict(now)
                if verdict is not None:
                    return key, verdict
        return None

    def check_nesting(self, key: Key) -> None:
        """Raise ValueError if an entry with a TTL at this (new) key would make too long a chain."""
        length, address = key[-1], key[:-1]
        above = sum(
            1 for shorter in range(length) if self.timed_counts[shorter] and key_of(address, shorter) in self.timed
        )
        # Chains cannot be longer than the number of lengths in use: nearly always enough to know.
        if above + 1 + sum(map(bool, self.timed_counts[length + 1 :])) <= MAX_TTL_NESTING:
            return
        last = last_key(key)
        inside = [other for other in self.timed if key < other <= last]
        below = max((depth for _, depth in _depths(inside)), default=0)
        if above + 1 + below > MAX_TTL_NESTING:
            raise ValueError(_too_deep(key))


def _depths(keys: Iterable[Key]) -> Iterator[tuple[Key, int]]:
    """Yield each key of one family with the number of given keys that contain it, itself included."""
    enclosing: list[Key] = []
    for key in sort_in_pieces(list(keys)):
        while enclosing and enclosing[-1] < key:
            enclosing.pop()
        enclosing.append(last_key(key))
        yield key, len(enclosing)


def _too_deep(key: Key) -> str:
    return f"{cidr_text(key)}: more than {MAX_TTL_NESTING} prefixes with a TTL contain one another here"


def _refuse_deep_nesting(timed: Iterable[Key]) -> None:
    """Raise ValueError naming every entry that is nested too deep."""
    faults = [_too_deep(key) for key, depth in _depths(timed) if depth > MAX_TTL_NESTING]
    if faults:
        raise ValueError("; ".join(faults))


class _Entries(Mapping[Key, Entry]):
    """Both families as one mapping."""

    __slots__ = ("_families",)

    def __init__(self, families: dict[int, _Family]) -> None:
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
    """An immutable table of CIDR entries. `CidrTable()` is empty; `build` makes a big one, `allow` and the like change
    one rule and return the new table."""

    __slots__ = ("_families",)

    def __init__(self) -> None:
        self._families = _NO_ENTRIES

    @classmethod
    def _of(cls, families: dict[int, _Family]) -> CidrTable:
        table = cls.__new__(cls)
        table._families = families
        return table

    @classmethod
    def build(
        cls, allow: Iterable[tuple[Key, float]], deny: Iterable[tuple[Key, float]] = (), *, expected: int = 0,
    ) -> CidrTable:
        """Make a table from (key, expiry) of both lists; the last of equal keys counts, as re-adding replaces.

        `expected` is about how many there are (only for speed). Raises ValueError on too many entries (before more
        than the limit are kept) or when those with a TTL nest too deep.
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
        families = {size: _Family.of(size, builder.build()) for size, builder in builders.items()}
        table = cls._of(families)
        if len(table) > MAX_CIDR_RULES:
            raise ValueError(f"{len(table)} CIDR entries, and an attachment may have {MAX_CIDR_RULES}")
        return table

    @classmethod
    def of(cls, entries: Iterable[tuple[Key, Entry]]) -> CidrTable:
        """Make a table from stored entries. Raises ValueError as `build` does."""
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
        return all(family.entries == other._families[size].entries for size, family in self._families.items())

    __hash__ = None  # type: ignore[assignment]  # compared by content, too big to be a key

    def __repr__(self) -> str:
        return f"<CidrTable of {len(self)} entries>"

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

        Raises ValueError when the table is full or entries with a TTL would nest too deep.
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
            raise ValueError(f"{cidr_text(key)}: the attachment has {MAX_CIDR_RULES} CIDR entries already")
        if value.has_ttl() and key not in family.timed:
            family.check_nesting(key)
        return self._changed(family, {key: value})

    def without(self, key: Key) -> CidrTable:
        """Return the table without exactly this prefix, in both lists; itself when it is in neither."""
        family = self._families[len(key) - 1]
        return self._changed(family, {key: None}) if key in family.entries else self

    def _changed(self, family: _Family, changes: Mapping[Key, Entry | None]) -> CidrTable:
        return CidrTable._of({**self._families, family.size: family.changed(changes)})

    def live(self, now: float) -> CidrTable:
        """Return the table without what is expired at `now`; itself when nothing is (then it costs nothing)."""
        families = {size: family.live(now) for size, family in self._families.items()}
        if all(families[size].entries is family.entries for size, family in self._families.items()):
            for size, family in families.items():
                self._families[size].soonest = family.soonest  # a better bound, the same value
            return self
        return CidrTable._of(families)

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
            yield from family.entries.differences(older._families[size].entries)

    def rules(self) -> Iterator[Rule]:
        """Yield every entry of each list, in address order, IPv4 first."""
        for size in self._families:
            for key, allow, deny, _ in self.compiled(size, 0.0):
                text = cidr_text(key)
                if allow:
                    yield Rule(text, allow=True, expiry=allow)
                if deny:
                    yield Rule(text, allow=False, expiry=deny)


_NO_ENTRIES: Final = {IPV4: _Family.empty(IPV4), IPV6: _Family.empty(IPV6)}
