"""Log lines: JSON for machines, one readable line for people, and nothing from outside that forges either."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from netfence import log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.reset_defaults()
    root.handlers[:], root.level = handlers, level


def test_json_lines_off_a_terminal() -> None:
    out = io.StringIO()
    log.set_up("info", "auto", out)
    structlog.get_logger().bind(attachment="a1").info("attached", target="veth0")
    structlog.get_logger().debug("not shown")
    line = json.loads(out.getvalue())
    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert (line["level"], line["event"], line["attachment"], line["target"]) == ("info", "attached", "a1", "veth0")


def test_a_readable_line_on_a_terminal() -> None:
    out = Terminal()
    log.set_up("debug", "auto", out)
    structlog.get_logger().warning("slow", target="veth 0", count=3)
    assert out.getvalue().count("\n") == 1
    assert 'target="veth 0" count=3' in out.getvalue()
    assert "\x1b[33mwarning" in out.getvalue()


def test_console_without_a_terminal_has_no_colour() -> None:
    out = io.StringIO()
    log.set_up("info", "console", out)
    structlog.get_logger().error("failed", error="")
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().rstrip().endswith('error   failed  error=""')


@pytest.mark.parametrize("fmt", ["console", "json"])
def test_what_comes_from_outside_cannot_begin_a_line_or_move_the_cursor(fmt: str) -> None:
    out = io.StringIO()
    log.set_up("info", fmt, out)
    structlog.get_logger().info("query", name="evil\n00:00:00 error forged\x1b[2J\u202e")
    assert out.getvalue().count("\n") == 1
    assert "\x1b" not in out.getvalue()


def test_libraries_log_the_same_way() -> None:
    out = io.StringIO()
    log.set_up("info", "json", out)
    logging.getLogger("grpc").warning("channel %s", "gone")
    logging.getLogger("grpc").info("chatter")
    line = json.loads(out.getvalue())
    assert (line["event"], line["logger"], line["message"], line["level"]) == (
        "library",
        "grpc",
        "channel gone",
        "warning",
    )


@pytest.mark.parametrize("fmt", ["console", "json"])
def test_a_traceback_is_shown(fmt: str) -> None:
    out = io.StringIO()
    log.set_up("info", fmt, out)
    structlog.get_logger().error("failed", exc_info=ValueError("the cause"))
    assert "ValueError: the cause" in out.getvalue()


def test_a_line_at_once_then_rarely_and_all_are_counted() -> None:
    limit = log.LogLimit()
    assert [limit.due(5.0 + n * log.LOG_EVERY_S / 2) for n in range(5)] == [True, False, True, False, True]
    assert limit.count == 5


class Gone(io.StringIO):
    """A stream whose reader went away, or whose disk is full."""

    def write(self, text: str, /) -> int:  # noqa: ARG002 - the stream's signature
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("out", [Gone(), "closed"], ids=["pipe", "closed"])
def test_a_line_that_cannot_be_written_stops_nothing(out: io.StringIO | str) -> None:
    stream = io.StringIO() if isinstance(out, str) else out
    log.set_up("info", "json", stream)
    if isinstance(out, str):
        stream.close()
    structlog.get_logger().warning("lost", why="nobody reads")
    structlog.get_logger().exception("lost")
    logging.getLogger("library").error("lost")
