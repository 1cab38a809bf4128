"""How a control plane looks: a JSON document of everything, and a page for a terminal with what is wrong at its top.

Makes documents and rich tables of snapshots and shows nothing itself. JSON keys and their meaning are an interface:
add, never rename. Texts that come from daemons are shown with what cannot be printed escaped, and never read as markup.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from netfence.api.render import age_text, table
from netfence.controlplane.views import AttachmentStatus, Counters, DaemonStatus, State
from netfence.text import printable

if TYPE_CHECKING:  # rich takes 60 ms to import, which a pipe need not wait for
    from rich.console import RenderableType

DAEMON_HEAD: Final = ("host", "daemon", "version", "state", "since", "attachments", "awaited")
ATTACHMENT_HEAD: Final = ("state", "host", "target", "id", "policy", "packets", "queries", "metadata", "why")

WORST_FIRST: Final = (
    State.REFUSED, State.UNDECIDED, State.PENDING, State.DECIDING, State.DISCONNECTED, State.UNCONFIRMED, State.IN_SYNC,
)  # fmt: skip

ROOM: Final = 14
"""Lines of the page that are not rows of its two tables or of its log."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything at one moment; `at` is seconds since the epoch, `errors` are those of the policy file."""

    at: float
    address: str
    policy_file: str
    rules: int
    errors: tuple[str, ...]
    daemons: tuple[DaemonStatus, ...]
    attachments: tuple[AttachmentStatus, ...]


def line(snapshot: Snapshot) -> str:
    """Return the snapshot as one JSON document on one line, ASCII only, with its newline."""
    return json.dumps(document(snapshot)) + "\n"


def document(snapshot: Snapshot) -> dict[str, Any]:
    """Return the snapshot as plain values; times are RFC 3339 in UTC, counters null before the first heartbeat."""
    return {
        "time": _time(snapshot.at),
        "address": snapshot.address,
        "policy_file": {
            "path": snapshot.policy_file,
            "ok": not snapshot.errors,
            "rules": snapshot.rules,
            "errors": list(snapshot.errors),
        },
        "daemons": [_daemon(status) for status in snapshot.daemons],
        "attachments": [_attachment(status) for status in snapshot.attachments],
    }


def _daemon(status: DaemonStatus) -> dict[str, Any]:
    daemon = status.daemon
    return {
        "daemon_id": daemon.id,
        "hostname": daemon.hostname,
        "version": daemon.version,
        "metadata": dict(sorted(daemon.metadata.items())),
        "capabilities": sorted(daemon.capabilities),
        "address": daemon.address,
        "connected": status.connected,
        "since": _time(status.since),
        "last_seen": _time(status.last_seen),
        "attachments": status.attachments,
        "awaited_results": status.awaited_results,
    }


def _attachment(status: AttachmentStatus) -> dict[str, Any]:
    attachment = status.attachment
    return {
        "id": attachment.id,
        "daemon_id": attachment.daemon.id,
        "target": attachment.target,
        "hook": attachment.hook,
        "dns_address": attachment.dns_address,
        "metadata": dict(sorted(attachment.metadata.items())),
        "state": status.state.value,
        "policy_version": status.version,
        "policy_hash": status.policy_hash,
        "wanted_version": status.wanted_version,
        "errors": list(status.errors),
        "counters": None if status.counters is None else _counters(status.counters),
    }


def _counters(counters: Counters) -> dict[str, Any]:
    return {
        "at": _time(counters.at),
        "packets_allowed": counters.packets_allowed,
        "packets_blocked": counters.packets_blocked,
        "packets_would_block": counters.packets_would_block,
        "bytes_allowed": counters.bytes_allowed,
        "bytes_blocked": counters.bytes_blocked,
        "dns_queries_allowed": counters.dns_queries_allowed,
        "dns_queries_blocked": counters.dns_queries_blocked,
    }


def page(snapshot: Snapshot, log_lines: Sequence[str], height: int) -> RenderableType:
    """Return the page for a terminal of that many lines: heads, daemons, attachments, the last lines of the log."""
    from rich.console import Group  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    room = max(4, height - ROOM - len(log_lines))
    daemons = sorted(snapshot.daemons, key=lambda status: (status.connected, status.daemon.hostname, status.daemon.id))
    shown_daemons = daemons[: room // 3]
    rank = {state: number for number, state in enumerate(WORST_FIRST)}
    attachments = sorted(snapshot.attachments, key=lambda status: rank[status.state])
    shown = attachments[: room - len(shown_daemons)]
    return Group(
        *(Text(text) for text in _heads(snapshot)),
        table([_daemon_row(status, snapshot.at) for status in shown_daemons], DAEMON_HEAD),
        Text(_left_out(len(daemons) - len(shown_daemons), "daemons"), style="dim"),
        table([_attachment_row(status) for status in shown], ATTACHMENT_HEAD),
        Text(_left_out(len(attachments) - len(shown), "attachments"), style="dim"),
        *(Text(printable(text), style="dim", no_wrap=True, overflow="ellipsis") for text in log_lines),
    )


def _heads(snapshot: Snapshot) -> Iterable[str]:
    connected = sum(status.connected for status in snapshot.daemons)
    states = Counter(status.state for status in snapshot.attachments)
    counts = ", ".join(f"{states[state]} {state.value}" for state in WORST_FIRST if states[state])
    yield f"netfenced controlplane at {snapshot.address}, {_time(snapshot.at)}"
    if snapshot.errors:
        yield (
            f"policy file REFUSED with {len(snapshot.errors)} errors, the one before stays in force:"
            f" {printable(snapshot.errors[0])}"
        )
    else:
        yield f"policy file {printable(snapshot.policy_file)}: {snapshot.rules} rules"
    away = len(snapshot.daemons) - connected
    yield f"daemons: {connected} connected, {away} away; attachments: {counts or 'none'}"


def _left_out(count: int, what: str) -> str:
    return f"… and {count} more {what}" if count else ""


def _daemon_row(status: DaemonStatus, now: float) -> Sequence[str]:
    row = (
        status.daemon.hostname,
        status.daemon.id,
        status.daemon.version or "original",
        "connected" if status.connected else "away",
        age_text(now - status.since),
        str(status.attachments),
        str(status.awaited_results),
    )
    return [printable(cell) for cell in row]


def _attachment_row(status: AttachmentStatus) -> Sequence[str]:
    attachment, counters = status.attachment, status.counters
    version = status.version or "-"
    moving = status.wanted_version is not None and status.wanted_version != status.version
    row = (
        status.state.value,
        attachment.daemon.hostname,
        attachment.target,
        attachment.id,
        f"{version} → {status.wanted_version}" if moving else version,
        "-" if counters is None else f"{counters.packets_allowed}/{counters.packets_blocked}",
        "-" if counters is None else f"{counters.dns_queries_allowed}/{counters.dns_queries_blocked}",
        ",".join(f"{key}={value}" for key, value in sorted(attachment.metadata.items())),
        "; ".join(status.errors),
    )
    return [printable(cell) for cell in row]


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
