"""The shared cache: upstream answers, used by every attachment that asks the same upstreams the same question.

Owns only storage and its bounds; judging a name comes before looking here, and learning after (`handler`). Only answers
that matched id, question, address and port reach it (`upstream`). TTL 0 is never stored.

**Fair when full.** Each entry is charged to the attachment whose question brought it in. One attachment holds at most
`MAX_CACHE_SHARE` entries: beyond it, it replaces its own oldest. When the whole cache is full, the attachment that
stores evicts its own oldest if it holds as much as an equal share, else the oldest of the attachment with the most
entries. So a workload that asks for ever new names pushes out its own answers, not those of its neighbours.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from netfence.dns.answer import Answer
from netfence.dns.limits import MAX_CACHE_ENTRIES, MAX_CACHE_SHARE, MAX_CACHED_ANSWER


class CacheKey(NamedTuple):
    """What makes two upstream questions equal: whom is asked, what (name in lower case, type, class), DO and CD."""

    upstreams: tuple[str, ...]
    question: bytes
    do: bool
    cd: bool


class _Entry(NamedTuple):
    answer: Answer
    expiry: float
    owner: object


class SharedCache:
    """Bounded store of `Answer` by `CacheKey`. Times are monotonic seconds, given by the caller."""

    def __init__(
        self, max_ttl_s: float = 86_400.0, *, entries: int = MAX_CACHE_ENTRIES, share: int = MAX_CACHE_SHARE
    ) -> None:
        self._max_ttl_s: Final = max_ttl_s
        self._max_entries: Final = entries
        self._max_share: Final = share
        self._entries: dict[CacheKey, _Entry] = {}
        self._owned: dict[object, dict[CacheKey, None]] = {}  # per owner, oldest first

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: CacheKey, now: float) -> Answer | None:
        """Return the live answer to the question, or None."""
        entry = self._entries.get(key)
        if entry is None or entry.expiry <= now:
            if entry is not None:
                self._remove(key)
            return None
        return entry.answer

    def peek(self, key: CacheKey, now: float) -> Answer | None:
        """Return the live answer as `get` does, and change nothing: nobody is answered with it."""
        entry = self._entries.get(key)
        return entry.answer if entry is not None and entry.expiry > now else None

    def put(self, key: CacheKey, answer: Answer, owner: object) -> None:
        """Store an answer that `owner`'s question brought in, if it may be cached at all."""
        life_s = min(answer.life_s, self._max_ttl_s)
        known = self._entries.get(key)
        if life_s <= 0 or len(answer.raw) > MAX_CACHED_ANSWER or (known is not None and known.answer is answer):
            return
        if known is not None:
            self._remove(key)
        own = self._owned.get(owner, {})
        if len(own) >= self._max_share:
            self._remove(next(iter(own)))
        elif len(self._entries) >= self._max_entries:
            fair = self._max_entries // (len(self._owned) + (not own))
            victim = own if own and len(own) >= fair else max(self._owned.values(), key=len)
            self._remove(next(iter(victim)))
        self._entries[key] = _Entry(answer, answer.received + life_s, owner)
        self._owned.setdefault(owner, {})[key] = None

    def forget_owner(self, owner: object) -> None:
        """Drop what a closed attachment brought in, so that its share is free again."""
        for key in list(self._owned.get(owner, ())):
            self._remove(key)

    def _remove(self, key: CacheKey) -> None:
        entry = self._entries.pop(key)
        own = self._owned[entry.owner]
        del own[key]
        if not own:
            del self._owned[entry.owner]
