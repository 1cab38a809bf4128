"""What the DNS servers count for the daemon's metrics.

The fast path (`server`, `Handler.ready`) increments one number of a list, nothing else: how long a ready-made reply
takes is not measured (microseconds), it is counted as having taken next to nothing. Queries that come to no reply at
all (garbage) are not counted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, Literal

from netfence.dns.settings import Upstream
from netfence.tally import Durations

Send = Callable[[bytes], None]

RCODES: Final[Mapping[int, str]] = {0: "noerror", 1: "formerr", 2: "servfail", 3: "nxdomain", 4: "notimp", 5: "refused"}
"""Rcodes with a name of their own; every other one counts as `OTHER`."""

OTHER: Final = "other"
OTHER_RCODE: Final = 15

BOUNDS_S: Final = (0.0005, 0.002, 0.01, 0.05, 0.25, 1.0, 5.0)
"""Upper bounds of answer times: ready-made and cached, an upstream near by, one far away, time-outs."""

Failure = Literal["timeout", "socket", "rcode", "unusable"]
FAILURES: Final[tuple[Failure, ...]] = ("timeout", "socket", "rcode", "unusable")


class Totals:
    """Of all servers of the daemon."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.durations = Durations(BOUNDS_S)
        self._servers: set[Counts] = set()
        self._ready = 0  # of servers that are closed
        self.over_rate = 0
        self.over_waiting = 0
        self.over_connections = 0

    @property
    def ready(self) -> int:
        """Return how many replies were ready-made; some 0.3 ms for a thousand servers."""
        return self._ready + sum(sum(server.ready) for server in self._servers)

    def join(self, server: Counts) -> None:
        """Count this server's too."""
        self._servers.add(server)

    def leave(self, server: Counts) -> None:
        """Keep what a server counted that is closed now. Idempotent."""
        if server in self._servers:
            self._servers.remove(server)
            self._ready += sum(server.ready)


class Counts:
    """Of one server: replies by rcode, those that were ready-made apart, and what the cache was good for."""

    __slots__ = ("_replies", "hits", "misses", "ready", "totals")

    def __init__(self, totals: Totals) -> None:
        self.totals = totals
        self.ready = [0] * (OTHER_RCODE + 1)  # the fast path counts here
        self._replies = [0] * (OTHER_RCODE + 1)
        self.hits = self.misses = 0  # look-ups in the shared cache
        totals.join(self)

    def note(self, rcode: int) -> None:
        """Count a reply that nobody timed."""
        self._replies[min(rcode, OTHER_RCODE)] += 1

    def timed(self, send: Send) -> Send:
        """Return what sends the one reply to a query that came just now, and counts it."""
        totals = self.totals
        began = totals.clock()

        def counted(reply: bytes) -> None:
            self._replies[reply[3] & 15] += 1
            totals.durations.note(totals.clock() - began)
            send(reply)

        return counted

    def lookups(self) -> dict[str, int]:
        """Return how many queries were met by a ready-made reply, by the cache, or by neither."""
        return {"ready": sum(self.ready), "hit": self.hits, "miss": self.misses}

    def replies(self) -> dict[str, int]:
        """Return how many replies had which rcode; those that none had are left out."""
        found: Counter[str] = Counter()
        for rcode, (one, other) in enumerate(zip(self._replies, self.ready, strict=True)):
            if count := one + other:
                found[RCODES.get(rcode, OTHER)] += count
        return dict(found)

    def close(self) -> None:
        """Note that the server is closed."""
        self.totals.leave(self)


class UpstreamCounts:
    """Questions sent to each of the daemon's own upstreams, and what failed; those of policies count as `OTHER`.

    A control plane may name ever new ones: they get no series of their own.
    """

    def __init__(self, own: tuple[str, ...]) -> None:
        self.asked: dict[str, int] = dict.fromkeys((*own, OTHER), 0)
        self.failed: dict[tuple[str, Failure], int] = {(name, why): 0 for name in self.asked for why in FAILURES}
        self.refused = 0  # questions never asked: too many were in the air

    def note_asked(self, upstream: Upstream) -> None:
        """Count a question that was sent."""
        self.asked[upstream.text if upstream.text in self.asked else OTHER] += 1

    def note_failed(self, upstream: Upstream, why: Failure) -> None:
        """Count one that brought no useful answer."""
        self.failed[upstream.text if upstream.text in self.asked else OTHER, why] += 1
