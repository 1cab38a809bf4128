"""Ready-made replies: the per-attachment fast path, keyed by everything of a query but its id.

A hit costs two dictionary look-ups and one concatenation: no parsing, no policy, no map write. An entry is good while
the policy's generation is the one it was made under, and until the earliest of: its answer's expiry, the moment its
lease has less than `dns.min_lease` left (the query then takes the long way once, which renews the lease), the end of
what the verdict stood on. Its body is rebuilt once per second of age, with TTLs counted down.
"""

from __future__ import annotations

from netfence.dns.answer import Answer
from netfence.dns.limits import MAX_HOT_ANSWER, MAX_HOT_ENTRIES, MAX_HOT_KEY
from netfence.dns.message import Ede, relay
from netfence.dns.wire import Query


class HotReply:
    """A reply without its id. `fresh_until` ends the body, `valid_until` the entry (monotonic seconds)."""

    __slots__ = (
        "_answer",
        "_cap_s",
        "_ede",
        "_query",
        "allowed",
        "body",
        "fresh_until",
        "generation",
        "rcode",
        "valid_until",
    )

    def __init__(self, body: bytes, generation: int, valid_until: float, *, allowed: bool) -> None:
        self.body = body
        self.generation = generation
        self.allowed = allowed
        self.rcode = body[1] & 15
        self.fresh_until = self.valid_until = valid_until
        self._answer: Answer | None = None
        self._query: Query | None = None
        self._cap_s = 0
        self._ede: Ede | None = None

    @property
    def answer_size(self) -> int:
        """Return the octets of the answer that it is made of, 0 for none."""
        return 0 if self._answer is None else len(self._answer.raw)

    def counting(self, query: Query, answer: Answer, cap_s: int, ede: Ede | None, now: float) -> None:
        """Make it a reply whose TTLs count down; its body is that of the answer's age at `now`."""
        self._query, self._answer, self._cap_s, self._ede = query, answer, cap_s, ede
        self.fresh_until = min(answer.received + int(now - answer.received) + 1, self.valid_until)

    def current(self, now: float) -> bool:
        """Bring the body up to date; False when the entry is over."""
        if now >= self.valid_until:
            return False
        if now >= self.fresh_until and self._answer is not None and self._query is not None:
            age_s = int(now - self._answer.received)
            self.body = relay(self._query, self._answer, age_s, self._cap_s, self._ede)[2:]
            self.fresh_until = min(self._answer.received + age_s + 1, self.valid_until)
        return True


class HotReplies(dict[bytes, HotReply]):
    """At most `MAX_HOT_ENTRIES` ready replies; a new one replaces the oldest."""

    def __init__(self) -> None:
        super().__init__()
        self._passed = self._denied = True

    def keep(self, *, passed: bool, denied: bool) -> None:
        """Keep these from now on; the other queries take the long way, which can be watched. What is here goes."""
        self._passed, self._denied = passed, denied
        self.clear()

    def store(self, key: bytes, entry: HotReply) -> None:
        """Keep an entry, unless query or answer are larger than what anybody's are (an entry holds both)."""
        self.pop(key, None)
        if not (self._passed if entry.allowed else self._denied):
            return
        if len(key) > MAX_HOT_KEY or entry.answer_size > MAX_HOT_ANSWER:
            return
        if len(self) >= MAX_HOT_ENTRIES:
            del self[next(iter(self))]
        self[key] = entry
