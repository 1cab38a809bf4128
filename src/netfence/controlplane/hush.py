"""A log that a misbehaving daemon cannot fill, and that stops nothing.

Each event a few times in a while, then how often it was left out. A line that cannot be written is lost. Tracebacks are
text before they reach structlog, whose default prints the locals of every frame: tokens and policies.
"""

from __future__ import annotations

import contextlib
import time
import traceback
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
        self._write("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:  # noqa: ANN401
        """Log at level warning."""
        self._write("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:  # noqa: ANN401
        """Log at level error."""
        self._write("error", event, fields)

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        with contextlib.suppress(Exception):  # the user's processors, and a stderr that may be gone
            if (left_out := self._due(event)) is None:
                return
            if (error := fields.pop("exc_info", None)) is not None:
                fields["exception"] = "".join(traceback.format_exception(error))
            getattr(self._log, level)(event, **fields, **left_out)

    def _due(self, event: str) -> dict[str, int] | None:
        """Return the fields to add, or None when it is not to be logged now."""
        now = time.monotonic()
        begun, count = self._windows.get(event, (-WINDOW_S, 0))
        if now - begun >= WINDOW_S:
            self._windows[event] = now, 1
            return {"left_out": count - PER_WINDOW} if count > PER_WINDOW else {}
        self._windows[event] = begun, count + 1
        return {} if count < PER_WINDOW else None
