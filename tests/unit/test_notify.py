"""sd_notify on real sockets."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from netfence.notify import extend, notify, watchdog_s


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_the_service_manager_hears_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, abstract: bool) -> None:
    name = f"\0{tmp_path}/notify" if abstract else f"{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        monkeypatch.setenv("NOTIFY_SOCKET", name.replace("\0", "@"))
        notify("READY=1", "STATUS=2 attachments")
        assert manager.recv(100) == b"READY=1\nSTATUS=2 attachments"
        extend(0.25)
        assert manager.recv(100) == b"EXTEND_TIMEOUT_USEC=250000"


@pytest.mark.parametrize("value", [None, "", "/nowhere/at/all", "relative"], ids=str)
def test_without_a_service_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if value is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", value)
    notify("READY=1")


@pytest.mark.parametrize(
    ("usec", "pid", "wanted"),
    [
        ("3000000", None, 3.0),
        ("3000000", "ours", 3.0),
        ("3000000", "1", None),
        (None, "ours", None),
        ("0", None, None),
        ("-5", None, None),
        ("²", None, None),
        ("soon", None, None),
    ],
)
def test_the_watchdog_that_is_meant(
    monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str | None, wanted: float | None
) -> None:
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", str(os.getpid()) if pid == "ours" else pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert watchdog_s() == wanted
