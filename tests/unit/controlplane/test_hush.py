"""The log that cannot be filled."""

from __future__ import annotations

import pytest
import structlog

from netfence.controlplane import hush
from netfence.controlplane.hush import Hush


def test_event_is_logged_a_few_times_and_then_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    quiet = Hush(structlog.get_logger("test"))
    with structlog.testing.capture_logs() as logs:
        for number in range(hush.PER_WINDOW + 30):
            quiet.warning("bad_daemon", number=number)
        quiet.info("other")
        now += hush.WINDOW_S
        quiet.warning("bad_daemon", number=-1)
        quiet.warning("bad_daemon", number=-2)
    bad = [entry for entry in logs if entry["event"] == "bad_daemon"]
    assert [entry["number"] for entry in bad] == [*range(hush.PER_WINDOW), -1, -2]
    assert "left_out" not in bad[0]
    assert bad[-2]["left_out"] == 30
    assert "left_out" not in bad[-1]
    assert [entry["log_level"] for entry in logs if entry["event"] == "other"] == ["info"]


def broken(*_: object) -> dict[str, object]:
    raise BrokenPipeError


def test_line_that_cannot_be_written_is_lost() -> None:
    quiet = Hush(structlog.wrap_logger(structlog.PrintLogger(), processors=[broken]))
    quiet.info("event")
    quiet.warning("event")
    quiet.error("event")


def _fail(password: str) -> None:
    raise ValueError(f"of {len(password)} letters")


def test_traceback_is_text_without_locals() -> None:
    with structlog.testing.capture_logs() as logs:
        try:
            _fail("hunter" + str(2))
        except ValueError as error:
            Hush(structlog.get_logger("test")).warning("failed", exc_info=error)
    assert "exc_info" not in logs[0]
    assert "ValueError: of 7 letters" in logs[0]["exception"]
    assert "hunter2" not in logs[0]["exception"]
