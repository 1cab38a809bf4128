"""When to try the control plane again: exponential back-off with full jitter (wire.md behaviour 5). Pure.

A control plane that restarts has a thousand daemons at its door: each comes at a moment of its own within `FIRST_S`.
One that keeps failing is asked ever more rarely, `CAP_S` at most.
"""

from __future__ import annotations

import random
from typing import Final

FIRST_S: Final = 3.0
"""The first try comes within so many seconds."""

CAP_S: Final = 30.0
"""No try comes later than this."""


class Backoff:
    """Gives the seconds to wait before the next try."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.SystemRandom()
        self._window = FIRST_S

    @property
    def window_s(self) -> float:
        """The longest that `next` may say. A stream that stood for longer has proved its control plane."""
        return self._window

    def next(self) -> float:
        """Return how long to wait: any moment of a window that doubles each time."""
        window = self._window
        self._window = min(2 * window, CAP_S)
        return self._rng.uniform(0.0, window)

    def longest(self) -> float:
        """Return a long wait, for what trying again soon cannot mend; with jitter all the same."""
        self._window = CAP_S
        return self._rng.uniform(CAP_S / 2, CAP_S)

    def reset(self) -> None:
        """Begin anew."""
        self._window = FIRST_S
