"""The kernel's clock of expiries: jiffies, learnt by running a tiny program with BPF_PROG_TEST_RUN.

Owns the conversion of time.monotonic() seconds to jiffies and back. Both clocks stand still in suspend.
"""

from __future__ import annotations

import time
from collections.abc import Callable

NEVER_JIFFIES = 2**64 - 1
RESAMPLE_S = 1.0


class Clock:
    """Converts monotonic seconds to jiffies; `read` returns the kernel's jiffies now (a system call)."""

    def __init__(self, read: Callable[[], int], hz: int) -> None:
        self._read, self.hz = read, hz
        self._jiffies, self._seconds = read(), time.monotonic()

    def now(self) -> int:
        """Return the kernel's jiffies now."""
        self._jiffies, self._seconds = self._read(), time.monotonic()
        return self._jiffies

    def jiffies(self, at: float) -> int:
        """Convert a monotonic time in seconds (infinity: for ever) to jiffies, rounded down: nothing lives longer."""
        if at == float("inf"):
            return NEVER_JIFFIES
        now = time.monotonic()
        if now - self._seconds > RESAMPLE_S:
            self.now()
        return max(1, self._jiffies + int((at - self._seconds) * self.hz // 1))

    def span(self, seconds: float) -> int:
        """Convert a duration to jiffies, at least one."""
        return max(1, int(seconds * self.hz))

    def seconds(self, jiffies: int) -> float:
        """Convert jiffies to a monotonic time in seconds."""
        return float("inf") if jiffies == NEVER_JIFFIES else self._seconds + (jiffies - self._jiffies) / self.hz
