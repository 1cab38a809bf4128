"""How often: `dns.max_qps` of one attachment. Pure; times are monotonic seconds given by the caller."""

from __future__ import annotations


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
