"""A log that a misbehaving daemon cannot fill: each event a few times in a while, then how often it was left out."""

from __future__ import annotations

import time
from typing import Any, Final

import structlog

PER_WINDOW: Final = 20
"""Lines of one event in a window."""

WINDOW_S: Final = 10.0
"""Length of a window, in seconds."""


class Hush:
    """Logs through `log`; the event's name is the key, so that the number of keys is that of our log lines."""

    def __init__(self, log: structlog.stdlib.BoundLogger) -> None:
        self._log = log
        self._windows: dict[str, tuple[float, int]] = {}

    def info(self, event: str, **fields: Any) -> None:  # noqa: ANN401 - structlog's own
        """Log at level info."""
        if (left_out := self._due(event)) is not None:
            self._log.info(event, **fields, **left_out)

    def warning(self, event: str, **fields: Any) -> None:  # noqa: ANN401
        """Log at level warning."""
        if (left_out := self._due(event)) is not None:
            self._log.warning(event, **fields, **left_out)

    def _due(self, event: str) -> dict[str, int] | None:
        """Return the fields to add, or None when it is not to be logged now."""
        now = time.monotonic()
        begun, count = self._windows.get(event, (-WINDOW_S, 0))
        if now - begun >= WINDOW_S:
            self._windows[event] = now, 1
            return {"left_out": count - PER_WINDOW} if count > PER_WINDOW else {}
        self._windows[event] = begun, count + 1
        return {} if count < PER_WINDOW else None
