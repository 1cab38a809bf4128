"""How answers look, where `test_cli` does not see it: odd values and an odd peer."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from netfence.api.render import (
    ATTACHMENT_HEAD,
    age_text,
    attachment_document,
    attachment_row,
    columns,
    json_text,
    table,
)
from netfence.v1 import daemon_pb2


@pytest.mark.parametrize(
    ("age_s", "text"),
    [(-5, "0s"), (0, "0s"), (59.9, "59s"), (60, "1m"), (3599, "59m"), (3600, "1h"), (86399, "23h"), (86400, "1d"),
     (864_000, "10d")],
)  # fmt: skip
def test_age(age_s: float, text: str) -> None:
    assert age_text(age_s) == text


def test_a_newer_daemons_numbers_are_shown_as_numbers() -> None:
    info = daemon_pb2.AttachmentInfo(type=55, mode=66, dns_mode=77, hook=88, direction=99)  # type: ignore[arg-type]
    document = attachment_document(info)
    assert [document[key] for key in ("type", "mode", "dns_mode", "hook", "direction")] == [
        "55",
        "66",
        "77",
        "88",
        "99",
    ]


def test_an_older_daemons_gaps_are_no_error() -> None:
    document = attachment_document(daemon_pb2.AttachmentInfo(id="x"))
    assert (document["hook"], document["direction"], document["mode"]) == ("cgroup", None, "unspecified")
    assert json.loads(json_text(document)) == document
    assert len(attachment_row(daemon_pb2.AttachmentInfo(id="x"), 0.0)) == len(ATTACHMENT_HEAD)


def test_a_row_is_printable_whatever_the_metadata_says() -> None:
    row = attachment_row(daemon_pb2.AttachmentInfo(id="x", metadata={"a": "\x1b[2J\n"}), 0.0)
    assert row[-1] == "a=\\x1b[2J\\n"


def test_columns_are_aligned_and_never_cut() -> None:
    assert columns([["a", "bbb", ""], ["aaaa", "b", "c" * 200]], ["x", "y", "z"]) == "\n".join(
        ["X     Y    Z", "a     bbb", f"aaaa  b    {'c' * 200}"]
    )
    assert columns([]) == ""


def test_a_table_folds_and_keeps_every_character() -> None:
    shown = io.StringIO()
    Console(width=40, file=shown).print(table([["x" * 100, "[bold]y"]], ["one", "two"]))
    assert shown.getvalue().count("x") == 100
    assert "[bold]y" in shown.getvalue()


@pytest.mark.parametrize("head", [None, ("a", "b")], ids=["plain", "head"])
def test_a_table_of_nothing(head: tuple[str, str] | None) -> None:
    shown = io.StringIO()
    Console(width=40, file=shown).print(table([], head))
    assert shown.getvalue().replace("─", "").split() == list(head or ())
