"""How often: `dns.max_qps` of one attachment, and log lines. Pure; times are monotonic seconds given by the caller."""

from __future__ import annotations

import math
from typing import Final

LOG_EVERY_S: Final = 10.0
"""Seconds between two lines about the same: who sends queries or answers must not fill the log."""


class TokenBucket:
    """Lets `rate` queries a second pass, and as many at once after a quiet second."""

    __slots__ = ("_last", "_rate", "_tokens")

    def __init__(self, rate: int, now: float) -> None:
        self._rate = float(rate)
        self._tokens = float(rate)
        self._last = now

    def take(self, now: float) -> bool:
        """Take one token; False when there is none."""
        self._tokens = min(self._rate, self._tokens + (now - self._last) * self._rate)
        self._last = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


class LogLimit:
    """Lets a line through once in `LOG_EVERY_S`, and counts all."""

    __slots__ = ("_next", "count")

    def __init__(self) -> None:
        self._next = -math.inf
        self.count = 0

    def due(self, now: float) -> bool:
        """Count one occurrence; tell whether it is to be logged."""
        self.count += 1
        if now < self._next:
            return False
        self._next = now + LOG_EVERY_S
        return True
