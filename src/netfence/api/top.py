"""What `netfenced top` shows: rates of attachments, and where most of what is dropped wants to go.

Owns the arithmetic and how it looks; asks nobody and prints nothing (`cli_top` does). Rates come from the counters of
List, which know every packet; destinations and names from Watch, which tells only so many (`Snapshot.lost`). JSON keys
and their meaning are an interface: add, never rename.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from netfence.api.flow_render import SHORT_ID, Who
from netfence.api.render import attachment_document, table
from netfence.text import printable
from netfence.v1 import daemon_pb2

if TYPE_CHECKING:  # rich takes 60 ms to import, which a pipe need not wait for
    from rich.console import RenderableType

MAX_KEYS: Final = 4096
"""Destinations and names counted: workloads choose both, and can make as many as they like."""

LISTED: Final = 10
"""Destinations and names that are shown."""

ROOM: Final = 14
"""Lines of the page that are not rows of its tables."""

RATE_HEAD: Final = (
    "id", "target", "mode", "passed/s", "dropped/s", "audited/s", "queries/s", "denied/s", "metadata"
)  # fmt: skip
DESTINATION_HEAD: Final = ("dropped", "to", "protocol", "name", "reason", "id", "target")
NAME_HEAD: Final = ("denied", "name", "reason", "id", "target")


class Dropped(NamedTuple):
    """What is counted: who wanted to go where (or to know which name), and why not. `would`: audit let it pass."""

    id: str
    protocol: str
    destination: str
    name: str
    reason: str
    would: bool


class Rates(NamedTuple):
    """One attachment's rates, each a second: packets passed and dropped, queries answered and denied.

    `would_drop`: of the packets passed, those that audit alone let pass.
    """

    info: daemon_pb2.AttachmentInfo
    passed: float
    dropped: float
    would_drop: float
    queries: float
    denied: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything at one moment; `at` is seconds since the epoch, `lost` counts events that were not told."""

    at: float
    interval_s: float
    rates: Sequence[Rates]
    destinations: Sequence[tuple[Dropped, int]]
    names: Sequence[tuple[Dropped, int]]
    lost: int


class Tally:
    """Counts drops by where they wanted to go, since it was made. Threads may share it."""

    def __init__(self) -> None:
        self._packets: Counter[Dropped] = Counter()
        self._queries: Counter[Dropped] = Counter()
        self._lost = 0
        self._lock = threading.Lock()

    def add(self, event: daemon_pb2.FlowEvent) -> None:
        """Count an event."""
        would = event.verdict == "would_drop"
        with self._lock:
            self._lost += event.lost
            if event.kind == "lost":
                return
            if event.kind == "dns":
                counts = self._queries
                key = Dropped(event.id, event.protocol, "", event.domain, event.reason, would)
            else:
                counts = self._packets
                key = Dropped(event.id, event.protocol, event.destination, event.domain, event.reason, would)
            counts[key] += 1
            if len(counts) > MAX_KEYS:  # the rarest go: what is frequent comes again
                kept = counts.most_common(MAX_KEYS // 2)
                counts.clear()
                counts.update(dict(kept))

    def most(self, count: int) -> tuple[list[tuple[Dropped, int]], list[tuple[Dropped, int]], int]:
        """Return the most frequent destinations and names, and how many events were lost."""
        with self._lock:
            return self._packets.most_common(count), self._queries.most_common(count), self._lost


class Meter:
    """Makes rates of counters that were read twice."""

    def __init__(self) -> None:
        self._before: Mapping[str, tuple[int, ...]] = {}
        self._at = 0.0

    def read(self, infos: Iterable[daemon_pb2.AttachmentInfo], at: float) -> list[Rates]:
        """Return the rates since the last call, the most dropping first; `at` is monotonic seconds.

        Attachments that were not there the last time have rates of 0.
        """
        passed_s, found, counts = max(at - self._at, 0.001), [], {}
        for info in infos:
            now = (
                info.packets_allowed,
                info.packets_blocked,
                info.packets_would_block,
                info.dns_queries_allowed,
                info.dns_queries_blocked,
            )
            before = self._before.get(info.id, now)
            counts[info.id] = now
            # Counters never go back, but an attachment's may be those of another daemon's life.
            rates = (max(new - old, 0) / passed_s for new, old in zip(now, before, strict=True))
            found.append(Rates(info, *rates))
        self._before, self._at = counts, at
        return sorted(found, key=_order)


def _order(one: Rates) -> tuple[float | str, ...]:
    """Put first what is dropped most, or would be."""
    return -one.dropped - one.would_drop, -one.denied, -one.passed, -one.queries, one.info.id


def document(snapshot: Snapshot) -> dict[str, Any]:
    """Return a snapshot as plain values; times are RFC 3339 in UTC, counts since `top` began."""
    who = {one.info.id: Who.of(one.info) for one in snapshot.rates}
    return {
        "time": datetime.fromtimestamp(snapshot.at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "interval_s": round(snapshot.interval_s, 3),
        "lost": snapshot.lost,
        "attachments": [_rates_document(one) for one in snapshot.rates],
        "destinations": [
            {
                "count": count,
                "id": one.id,
                "target": who.get(one.id, Who()).target,
                "protocol": one.protocol,
                "destination": one.destination,
                "domain": one.name,
                "reason": one.reason,
                "verdict": "would_drop" if one.would else "drop",
            }
            for one, count in snapshot.destinations
        ],
        "names": [
            {
                "count": count,
                "id": one.id,
                "target": who.get(one.id, Who()).target,
                "domain": one.name,
                "reason": one.reason,
                "verdict": "would_drop" if one.would else "drop",
            }
            for one, count in snapshot.names
        ],
    }


def _rates_document(one: Rates) -> dict[str, Any]:
    whole = attachment_document(one.info)
    return {
        **{key: whole[key] for key in ("id", "target", "metadata", "mode", "dns_mode")},
        "packets_allowed_per_s": round(one.passed, 3),
        "packets_blocked_per_s": round(one.dropped, 3),
        "packets_would_block_per_s": round(one.would_drop, 3),
        "dns_queries_allowed_per_s": round(one.queries, 3),
        "dns_queries_blocked_per_s": round(one.denied, 3),
    }


def tables(snapshot: Snapshot) -> list[tuple[Sequence[str], list[Sequence[str]]]]:
    """Return the three tables, each its head and rows, all printable."""
    who = {one.info.id: Who.of(one.info) for one in snapshot.rates}

    def whose(attachment_id: str) -> tuple[str, str]:
        return attachment_id[:SHORT_ID], who.get(attachment_id, Who()).target

    def word(one: Dropped) -> str:
        return f"{one.reason} (audit)" if one.would else one.reason

    rates = [
        (
            *whose(one.info.id),
            attachment_document(one.info)["mode"],
            *(rate_text(rate) for rate in (one.passed, one.dropped, one.would_drop, one.queries, one.denied)),
            Who.of(one.info).metadata_text,
        )
        for one in snapshot.rates
    ]
    destinations = [
        (str(count), one.destination or "?", one.protocol or "?", one.name, word(one), *whose(one.id))
        for one, count in snapshot.destinations
    ]
    names = [(str(count), one.name or ".", word(one), *whose(one.id)) for one, count in snapshot.names]
    bodies: list[tuple[Sequence[str], Iterable[Sequence[str]]]] = [
        (RATE_HEAD, rates),
        (DESTINATION_HEAD, destinations),
        (NAME_HEAD, names),
    ]
    return [(head, [[printable(cell) for cell in row] for row in rows]) for head, rows in bodies]


def headline(snapshot: Snapshot) -> str:
    """Return what stands above the tables."""
    at = datetime.fromtimestamp(snapshot.at).astimezone()
    count = len(snapshot.rates)
    attachments = "1 attachment" if count == 1 else f"{count} attachments"
    lost = f"; {snapshot.lost} drops more than could be told are in the rates alone" if snapshot.lost else ""
    return f"netfenced top {at:%H:%M:%S}: {attachments}, rates of the last {snapshot.interval_s:.1f} s{lost}"


def page(snapshot: Snapshot, height: int) -> RenderableType:
    """Return the page for a terminal of that many lines."""
    from rich.console import Group  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    room = max(3, height - ROOM)
    (rate_head, rates), (destination_head, destinations), (name_head, names) = tables(snapshot)
    names, destinations = names[: room // 4], destinations[: room // 3]
    shown = rates[: max(1, room - len(names) - len(destinations))]
    left = len(rates) - len(shown)
    return Group(
        Text(headline(snapshot), style="bold", no_wrap=True, overflow="ellipsis"),
        table(shown, rate_head),
        Text(f"… and {left} more attachments" if left else "", style="dim"),
        table(destinations, destination_head),
        table(names, name_head),
    )


def rate_text(rate: float) -> str:
    """Return a rate, with a decimal where it is small."""
    return f"{rate:.0f}" if rate >= 10 or rate == 0 else f"{rate:.1f}"
