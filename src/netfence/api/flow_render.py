"""How decisions look: one JSON document, or one line in pieces that a terminal may colour.

Returns texts and prints nothing; `cli_watch` does. JSON keys and their meaning are an interface: add, never rename.
Everything in a line is printable, whatever a workload asked for or an operator called something.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from netfence.text import printable
from netfence.v1 import daemon_pb2

SHORT_ID: Final = 8
"""Characters of an id that are shown where there is little room: as many as git shows of its own."""

MAX_METADATA: Final = 60
"""Characters of metadata in a line; JSON has all of it."""

Pieces = list[tuple[str, str]]
"""Texts, each with what it is: "time", "pass", "drop", "would_drop", "who", "what", "why"."""


@dataclass(frozen=True, slots=True)
class Who:
    """What is known of an attachment, as List tells it; nothing of one that has left."""

    target: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, info: daemon_pb2.AttachmentInfo) -> Who:
        """Take it from a List."""
        return cls(info.target, dict(sorted(info.metadata.items())))

    @property
    def metadata_text(self) -> str:
        """Return the metadata on one line, cut."""
        return cut(",".join(f"{key}={value}" for key, value in self.metadata.items()), MAX_METADATA)


def cut(text: str, most: int) -> str:
    """Return text of at most that many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def flow_document(event: daemon_pb2.FlowEvent, who: Who) -> dict[str, Any]:
    """Return a decision as plain values; `time` is RFC 3339 in UTC, `qtype` a query's type."""
    dns = event.kind == "dns"
    return {
        "time": event.time.ToJsonString(),
        "id": event.id,
        "target": who.target,
        "metadata": dict(who.metadata),
        "kind": event.kind,
        "verdict": event.verdict,
        "reason": event.reason,
        "protocol": event.protocol,
        "source": event.source,
        "destination": "" if dns else event.destination,
        "domain": event.domain,
        "qtype": event.destination if dns else "",
        "rule": event.rule,
        "lost": event.lost,
    }


def flow_line(event: daemon_pb2.FlowEvent, who: Who) -> Pieces:
    """Return a decision as pieces of a line, times in the local time zone."""
    at = datetime.fromtimestamp(event.time.ToMilliseconds() / 1000).astimezone()
    whose = " ".join(filter(None, (event.id[:SHORT_ID], who.target, who.metadata_text)))
    why = f"{event.reason} ({event.rule})" if event.rule else event.reason
    what = _query(event) if event.kind == "dns" else _packet(event)
    pieces = [
        (f"{at:%H:%M:%S}.{at.microsecond // 10_000:02}", "time"),
        (f"{event.verdict:<10}", event.verdict),
        (whose, "who"),
        (what, "what"),
        (why, "why"),
    ]
    return [(printable(text), kind) for text, kind in pieces]


def _packet(event: daemon_pb2.FlowEvent) -> str:
    protocol = event.protocol or "?"
    named = f" ({event.domain})" if event.domain else ""
    if not event.destination:
        return f"{protocol} packet"
    return f"{protocol} {event.source or '?'} -> {event.destination}{named}"


def _query(event: daemon_pb2.FlowEvent) -> str:
    asker = f" from {event.source}" if event.source else ""
    return f"dns {event.destination} {event.domain or '.'}{asker}/{event.protocol}"
