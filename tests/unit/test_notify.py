"""sd_notify on real sockets."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from netfence.notify import notify


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_the_service_manager_hears_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, abstract: bool) -> None:
    name = f"\0{tmp_path}/notify" if abstract else f"{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        monkeypatch.setenv("NOTIFY_SOCKET", name.replace("\0", "@"))
        notify("READY=1", "STATUS=2 attachments")
        assert manager.recv(100) == b"READY=1\nSTATUS=2 attachments"


@pytest.mark.parametrize("value", [None, "", "/nowhere/at/all", "relative"], ids=str)
def test_without_a_service_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if value is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", value)
    notify("READY=1")
