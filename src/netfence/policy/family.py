"""The CIDR entries of one address family: immutable, indexed so that lookup, expiry and nesting are cheap.

Owns what an entry is, when it is live (semantics.md 4) and how deep entries with a TTL may nest. `cidr` puts the two
families together; nobody else needs this module but for `Entry`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from netfence.policy.limits import MAX_TTL_NESTING
from netfence.policy.ordering import sort_in_pieces
from netfence.policy.pmap import Builder, PersistentMap, empty_map
from netfence.policy.prefix import Key, bits_of, cidr_text, key_of, last_key

NEVER: Final = math.inf
"""The expiry of an entry without a TTL."""


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


def _soonest(values: Iterable[Entry]) -> float:
    """Return the earliest finite expiry; NEVER when there is none."""
    return min((expiry for value in values for expiry in value if expiry), default=NEVER)


class Family:
    """The entries of one address family. Immutable.

    `timed` holds those with a TTL once more, so that expiry and nesting cost nothing where no rule has a TTL. `counts`
    are entries per prefix length, `timed_counts` likewise; `lengths` the used ones, longest first. `soonest` is no
    later than the first expiry.
    """

    __slots__ = ("counts", "entries", "lengths", "size", "soonest", "timed", "timed_counts")

    def __init__(
        self,
        size: int,
        entries: PersistentMap[Key, Entry],
        timed: PersistentMap[Key, Entry],
        counts: tuple[int, ...],
        timed_counts: tuple[int, ...],
        soonest: float,
    ) -> None:
        self.size = size
        self.entries = entries
        self.timed = timed
        self.counts = counts
        self.timed_counts = timed_counts
        self.lengths = tuple(length for length in range(len(counts) - 1, -1, -1) if counts[length])
        self.soonest = soonest

    @classmethod
    def empty(cls, size: int) -> Family:
        """Return the family of that address size without entries."""
        none = (0,) * (bits_of(size) + 1)
        return cls(size, empty_map(), empty_map(), none, none, NEVER)

    @classmethod
    def of(cls, size: int, entries: PersistentMap[Key, Entry]) -> Family:
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

    def changed(self, changes: Mapping[Key, Entry | None]) -> Family:
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
        return Family(
            self.size,
            self.entries.changed(changes),
            self.timed.changed(timed) if timed else self.timed,
            tuple(counts),
            tuple(timed_counts),
            soonest,
        )

    def live(self, now: float) -> Family:
        """Return the family without what is expired at `now`; itself when nothing is."""
        if now < self.soonest:
            return self
        changes = {key: left for key, value in self.timed.pairs() if (left := value.live(now)) is not value}
        family = self.changed(changes) if changes else self
        family.soonest = _soonest(value for _, value in family.timed.pairs())  # exact now; the content is the same
        return family

    def lookup(self, address: bytes, now: float) -> tuple[Key, bool] | None:
        """Return the longest live prefix around the packed address (of this family) and whether it allows."""
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
    """Raise ValueError, one argument for every entry that is nested too deep."""
    faults = [_too_deep(key) for key, depth in _depths(timed) if depth > MAX_TTL_NESTING]
    if faults:
        raise ValueError(*faults)
