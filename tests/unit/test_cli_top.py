"""`netfenced top` against a real server on a real socket, with a daemon that has no kernel."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
from tests.unit.api.fake import VIEW, Background, FakeDaemon, background
from tests.unit.test_cli import NETFENCED, run, said
from tests.unit.test_cli_watch import PACKET, QUERY, telling

DENIED = replace(QUERY, verdict="drop", reason="default_drop", domain="evil.test")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Background]:
    # Its log would go to the stdout that the runner captures from this same process.
    with structlog.testing.capture_logs(), background(FakeDaemon([VIEW]), tmp_path / "nf.sock") as made:
        yield made


def test_once_prints_plain_tables(daemon: Background) -> None:
    with telling(daemon, PACKET, replace(PACKET, lost=7), QUERY, DENIED, end=False):
        result = run(daemon.path, "top", "--once", "--interval", "2")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    head, rates, destinations, names = result.stdout.rstrip().split("\n\n")
    assert re.search(r": 1 attachment, rates of the last 2\.\d s; 7 drops more than could be told are in", head)
    assert [line.split() for line in rates.splitlines()] == [
        ["ID", "TARGET", "MODE", "PASSED/S", "DROPPED/S", "AUDITED/S", "QUERIES/S", "DENIED/S", "METADATA"],
        ["id-0", "veth0", "allowlist", "0", "0", "0", "0", "0", "tenant=acme"],
    ]
    assert destinations.splitlines()[1].split() == [
        *("2", "203.0.113.9:53", "udp", "x.test", "deny_rule", "id-0", "veth0")
    ]
    assert names.splitlines()[1].split() == ["1", "evil.test", "default_drop", "id-0", "veth0"]


def test_once_as_json_is_one_document(daemon: Background) -> None:
    with telling(daemon, PACKET, end=False):
        result = run(daemon.path, "top", "--once", "--json", "--interval", "0.5")
    document = json.loads(result.stdout)
    assert document["interval_s"] == pytest.approx(0.5, abs=0.4)
    assert document["destinations"][0]["destination"] == "203.0.113.9:53"
    assert document["attachments"][0]["metadata"] == {"tenant": "acme"}


def test_with_nothing_attached_it_says_so(daemon: Background) -> None:
    daemon.port.views = []
    result = run(daemon.path, "top", "--once", "--interval", "0.2")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1
    assert "0 attachments" in result.stdout


def test_rates_come_from_the_counters(daemon: Background) -> None:
    command = subprocess.Popen(
        [NETFENCED, "-s", daemon.path, "top", "--json", "--interval", "0.3"], stdout=subprocess.PIPE, text=True
    )
    try:
        daemon.run(daemon.port.tell())
        assert command.stdout is not None
        json.loads(command.stdout.readline())
        daemon.port.views = [replace(VIEW, packets_blocked=VIEW.packets_blocked + 3000)]
        rate = 0.0
        for line in command.stdout:
            if (rate := json.loads(line)["attachments"][0]["packets_blocked_per_s"]) > 0:
                break
        command.send_signal(signal.SIGINT)
        assert command.wait(20) == 0
        command.stdout.close()
    finally:
        command.kill()
        command.wait()
    assert 500 < rate <= 10_500  # 3000 in 0.3 s, or more on a slow machine


BAD_USAGE = {
    "no-terminal": ([], "standard output is no terminal; use --once or --json"),
    "interval": (["--once", "--interval", "0"], "0.2<=x<=3600"),
    "interval-nan": (["--once", "--interval", "nan"], "nan is not a number in the range"),
    "interval-word": (["--once", "--interval", "soon"], "not a valid float"),
    "argument": (["--once", "veth0"], "unexpected extra argument"),
}


@pytest.mark.parametrize("name", BAD_USAGE)
def test_bad_usage_is_2(name: str, tmp_path: Path) -> None:
    args, words = BAD_USAGE[name]
    text = said(run(tmp_path / "no.sock", "top", *args), 2)
    assert words in text
    assert text.count("\n") == 1


def test_no_daemon_is_3(tmp_path: Path) -> None:
    assert "netfenced start" in said(run(tmp_path / "no.sock", "top", "--once"), 3)


class Terminal:
    """A terminal with `top` in it; a thread reads what it shows."""

    def __init__(self, daemon: Background) -> None:
        self._ours, theirs = pty.openpty()
        self.command = subprocess.Popen(
            [NETFENCED, "-s", daemon.path, "top", "--interval", "0.2"],
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "150", "LINES": "40"},
        )
        os.close(theirs)
        self.shown = ""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other side is closed
            while data := os.read(self._ours, 65536):
                self.shown += data.decode(errors="replace")

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 30
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            assert self.command.poll() is None, self.shown
            select.select([], [], [], 0.02)

    def end(self) -> str:
        """Wait for its end and return what it said on stderr."""
        try:
            _, stderr = self.command.communicate(timeout=20)
        finally:
            self.command.kill()
            self.command.wait()
            self._thread.join(20)
            os.close(self._ours)
        return str(stderr)


OTHER_SCREEN, BACK, CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda how: how.name)
def test_the_terminal_is_given_back(daemon: Background, how: signal.Signals) -> None:
    terminal = Terminal(daemon)
    daemon.run(daemon.port.tell(PACKET, DENIED))
    terminal.wait_for("203.0.113.9:53")
    terminal.wait_for("evil.test")
    terminal.command.send_signal(how)
    assert terminal.end() == ""
    assert terminal.command.returncode == 0
    assert OTHER_SCREEN in terminal.shown
    assert terminal.shown.rindex(BACK) > terminal.shown.rindex("evil.test")
    assert terminal.shown.rindex(CURSOR) > terminal.shown.rindex("evil.test")


def test_a_daemon_that_goes_is_3_and_the_terminal_is_given_back(daemon: Background) -> None:
    terminal = Terminal(daemon)
    daemon.run(daemon.port.tell(PACKET))
    terminal.wait_for("203.0.113.9:53")
    daemon.run(daemon.server.close(0))
    stderr = terminal.end()
    assert terminal.command.returncode == 3
    assert stderr.startswith(f"netfenced: call the daemon on {daemon.path}: ")
    assert stderr.count("\n") == 1
    assert terminal.shown.rindex(BACK) > terminal.shown.rindex(OTHER_SCREEN)
