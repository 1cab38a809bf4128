"""The page and the document of many: what is wrong is at the top, and it fits the terminal."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from netfence.controlplane import Attachment, AttachmentStatus, Counters, Daemon, DaemonStatus, State
from netfence.controlplane.status import Snapshot, line, page

HOST = Daemon("daemon-1", "box", version="1.0")


def attachment(number: int, state: State, *errors: str) -> AttachmentStatus:
    return AttachmentStatus(
        Attachment(f"id-{number}", f"veth{number}", HOST, {"tenant": "acme"}, "tc"),
        state,
        "v1",
        "0" * 64,
        "v2" if state is State.REFUSED else "v1",
        errors,
        Counters(1000.0, packets_allowed=7),
    )


def snapshot(attachments: int, daemons: int = 1) -> Snapshot:
    statuses = [attachment(number, State.IN_SYNC) for number in range(attachments)]
    statuses.append(attachment(attachments, State.REFUSED, "the kernel does not"))
    hosts = [
        DaemonStatus(Daemon(f"daemon-{number}", f"box-{number}"), number != 1, 1000.0, 1000.0, 3)
        for number in range(daemons)
    ]
    return Snapshot(1060.0, "127.0.0.1:7443", "policy.yaml", 2, (), tuple(hosts), tuple(statuses))


def shown(snapshot: Snapshot, height: int, log: tuple[str, ...] = ()) -> list[str]:
    console = Console(file=io.StringIO(), width=200, height=height, force_terminal=False)
    with console.capture() as capture:
        console.print(page(snapshot, log, height))
    return capture.get().splitlines()


@pytest.mark.parametrize("height", [24, 40, 100])
def test_page_fits_and_has_the_worst_first(height: int) -> None:
    lines = shown(snapshot(5000, daemons=300), height, ("log line 1", "log line 2"))
    assert len(lines) <= height
    text = "\n".join(lines)
    assert "the kernel does not" in text
    assert "v1 → v2" in text
    assert "299 connected, 1 away" in text
    assert "5000 in sync" in text
    assert "1 refused" in text
    assert "more attachments" in text
    assert "log line 2" in lines[-1]
    first_host = next(number for number, one in enumerate(lines) if "box-" in one)
    assert "away" in lines[first_host]


def test_page_of_few_has_all() -> None:
    lines = shown(snapshot(3), 40)
    assert sum("veth" in one for one in lines) == 4
    assert not any("more" in one for one in lines)


def test_document_is_one_line() -> None:
    text = line(snapshot(2))
    assert text.count("\n") == 1
    document = json.loads(text)
    assert document["time"] == "1970-01-01T00:17:40.000Z"
    assert [one["state"] for one in document["attachments"]] == ["in sync", "in sync", "refused"]
    assert document["attachments"][2]["errors"] == ["the kernel does not"]
    assert document["attachments"][0]["counters"]["packets_allowed"] == 7
