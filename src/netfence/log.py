"""Set-up of structured logs: readable on a terminal, JSON lines otherwise, always to stderr.

Events are short words (`attached`, `policy_applied`) with fields: `attachment` (id), `target`, `error`. Values that
come from outside (names in queries, metadata, file contents) are only ever fields, so that they cannot forge a line:
JSON escapes them, and the console writer quotes what is not printable.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import MutableMapping
from typing import Any, ClassVar, Final, TextIO

import structlog

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "console", "json")

LOG_EVERY_S: Final = 10.0
"""Seconds between two lines about the same: who sends queries, answers or commands must not fill the log."""


def set_up(level: str, fmt: str, stream: TextIO | None = None) -> None:
    """Configure structlog for this process; `level` is one of `LEVELS`, `fmt` of `FORMATS`; default is stderr."""
    out = stream or sys.stderr
    console = fmt == "console" or (fmt == "auto" and out.isatty())
    number = logging.getLevelNamesMapping()[level.upper()]
    renderer = _Console(colour=out.isatty()) if console else _render_json
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: _Writer(out),
        cache_logger_on_first_use=False,
    )
    # Libraries (grpc, asyncio) log through the standard library: their warnings go the same way.
    root = logging.getLogger()
    root.handlers[:] = [_Bridge()]
    root.setLevel(max(number, logging.WARNING))


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


class _Writer:
    """Writes lines. One that cannot be written is lost: a full disk or a reader that went away must stop nothing."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def msg(self, line: str) -> None:
        try:
            self._out.write(f"{line}\n")
            self._out.flush()
        except (OSError, ValueError):  # ValueError: it was closed
            pass

    debug = info = warning = warn = error = critical = fatal = exception = failure = log = msg


class _Bridge(logging.Handler):
    """Hands standard-library records to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = structlog.get_logger()
        exc = record.exc_info if record.exc_info and record.exc_info[0] else None
        logger.log(record.levelno, "library", logger=record.name, message=record.getMessage(), exc_info=exc)


def _render_json(_logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
    """Render one event as one JSON line, time, level and event first."""
    head = {key: event.pop(key) for key in ("timestamp", "level", "event") if key in event}
    return json.dumps(head | dict(event), default=str, ensure_ascii=False)


class _Console:
    """Renders ``12:00:01 info   attached  target=veth0``.

    Our own, because structlog's ConsoleRenderer imports rich (14 MB in the daemon) and prints control characters raw.
    """

    COLOURS: ClassVar = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "31"}

    def __init__(self, *, colour: bool) -> None:
        self._colour = colour

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
        time = str(event.pop("timestamp", ""))[11:19]
        level = str(event.pop("level", "info"))
        word = printable(str(event.pop("event", "")))
        trace = event.pop("exception", None)
        fields = " ".join(f"{key}={_quoted(value)}" for key, value in event.items())
        if self._colour:
            level_text = f"\x1b[{self.COLOURS.get(level, '0')}m{level:<7}\x1b[0m"
            line = f"{time} {level_text} \x1b[1m{word}\x1b[0m  {fields}"
        else:
            line = f"{time} {level:<7} {word}  {fields}"
        return line.rstrip() + (f"\n{trace}" if trace else "")


def _quoted(value: object) -> str:
    text = printable(value if isinstance(value, str) else str(value))
    return f'"{text}"' if not text or any(char in text for char in ' "=') else text


def printable(text: str) -> str:
    """Escape everything but printable characters, so that a field cannot move the cursor or begin a line."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
