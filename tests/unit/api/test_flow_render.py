"""How decisions look: documents, and lines that nobody can forge."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from tests.unit.api.fake import VIEW
from tests.unit.api.test_watch import FLOW

from netfence.api.flow_render import MAX_METADATA, Who, flow_document, flow_line
from netfence.api.messages import attachment_message, flow_message

WHO = Who("veth0", {"tenant": "acme", "vm": "7"})
PACKET = flow_message(FLOW)
QUERY = flow_message(
    replace(FLOW, kind="dns", verdict="pass", reason="default_pass", destination="AAAA", rule="", lost=0)
)


def text(pieces: list[tuple[str, str]]) -> str:
    return "  ".join(piece for piece, _ in pieces)


def test_the_document_of_a_packet() -> None:
    assert flow_document(PACKET, WHO) == {
        "time": "2023-11-14T22:13:20.250Z",
        "id": "id-0",
        "target": "veth0",
        "metadata": {"tenant": "acme", "vm": "7"},
        "kind": "packet",
        "verdict": "drop",
        "reason": "deny_rule",
        "protocol": "udp",
        "source": "10.0.0.2:4000",
        "destination": "203.0.113.9:53",
        "domain": "x.test",
        "qtype": "",
        "rule": "deny 203.0.113.0/24",
        "lost": 3,
    }


def test_the_document_of_a_query_has_its_type() -> None:
    document = flow_document(QUERY, Who())
    assert (document["qtype"], document["destination"], document["domain"]) == ("AAAA", "", "x.test")
    assert (document["target"], document["metadata"]) == ("", {})
    assert list(document) == list(flow_document(PACKET, WHO))


def test_the_line_of_a_packet() -> None:
    line = text(flow_line(PACKET, WHO))
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d\.25  drop        id-0 veth0 tenant=acme,vm=7"
        r"  udp 10\.0\.0\.2:4000 -> 203\.0\.113\.9:53 \(x\.test\)  deny_rule \(deny 203\.0\.113\.0/24\)",
        line,
    )


def test_the_line_of_a_query() -> None:
    line = text(flow_line(QUERY, Who()))
    assert line.endswith("  pass        id-0  dns AAAA x.test from 10.0.0.2:4000/udp  default_pass")


def test_the_line_of_what_could_not_be_read() -> None:
    unread = flow_message(replace(FLOW, protocol="", source="", destination="", domain="", rule="", reason="not_ip"))
    assert text(flow_line(unread, Who())).endswith("id-0  ? packet  not_ip")


@pytest.mark.parametrize("name", ["a\x1b[2J.test", "a\nb.test", "\u202eevil.test", "a\x9bx.test"], ids=ascii)
def test_nothing_in_a_line_steers_the_terminal(name: str) -> None:
    event = flow_message(replace(FLOW, domain=name, rule=name, source=name))
    pieces = flow_line(event, Who(name, {"key": name}))
    assert all(piece.isprintable() for piece, _ in pieces)
    assert json.dumps(flow_document(event, Who(name))).isascii()


def test_much_metadata_is_cut_in_a_line_and_whole_in_a_document() -> None:
    who = Who("veth0", {f"key{n}": "v" * 100 for n in range(10)})
    assert len(who.metadata_text) == MAX_METADATA
    assert flow_document(PACKET, who)["metadata"] == who.metadata


def test_who_is_taken_from_list() -> None:
    info = attachment_message(replace(VIEW, metadata={"b": "2", "a": "1"}))
    assert Who.of(info) == Who("veth0", {"a": "1", "b": "2"})
    assert Who.of(info).metadata_text == "a=1,b=2"
