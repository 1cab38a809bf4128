"""How answers of the daemon look: JSON documents, tables for a terminal, plain columns for a pipe.

Returns texts and rich tables and prints nothing; `cli` does. JSON keys and their meaning are an interface: add, never
rename. Texts that come from outside (metadata, names) are shown with what cannot be printed escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from netfence.text import printable
from netfence.v1 import daemon_pb2, types_pb2

if TYPE_CHECKING:  # rich takes 60 ms to import, which a pipe need not wait for
    from rich.table import Table

Row = Sequence[str]

ATTACHMENT_HEAD: Final = (
    "id", "target", "hook", "mode", "dns mode", "dns address", "packets", "queries", "age", "metadata",
)  # fmt: skip


def json_text(document: object) -> str:
    """Return one JSON document, indented, ASCII only, keys in the order given."""
    return json.dumps(document, indent=2)


def attachment_document(info: daemon_pb2.AttachmentInfo) -> dict[str, Any]:
    """Return an attachment as plain values; counters are integers, `attached_at` is RFC 3339 in UTC."""
    return {
        "id": info.id,
        "target": info.target,
        "type": _word(types_pb2.AttachmentType, info.type, "ATTACHMENT_TYPE_"),
        "hook": _hook(info),
        "direction": _word(daemon_pb2.Direction, info.direction, "DIRECTION_") if info.direction else None,
        "attach_mechanism": info.attach_mechanism,
        "mode": _word(types_pb2.PolicyMode, info.mode, "POLICY_MODE_"),
        "dns_mode": _word(types_pb2.DnsMode, info.dns_mode, "DNS_MODE_"),
        "dns_address": info.dns_address,
        "metadata": dict(sorted(info.metadata.items())),
        "packets_allowed": info.packets_allowed,
        "packets_blocked": info.packets_blocked,
        "dns_queries_allowed": info.dns_queries_allowed,
        "dns_queries_blocked": info.dns_queries_blocked,
        "attached_at": info.attached_at.ToJsonString(),
        "policy_version": info.policy_version,
        "policy_hash": info.policy_hash,
        "audit": info.audit,
        "packets_would_block": info.packets_would_block,
    }


def status_document(status: daemon_pb2.DaemonStatus) -> dict[str, Any]:
    """Return the daemon's status as plain values."""
    return {
        "version": status.version,
        "daemon_id": status.daemon_id,
        "hostname": status.hostname,
        "control_plane_state": _word(types_pb2.ConnectionState, status.control_plane_state, "CONNECTION_STATE_"),
        "control_plane_address": status.control_plane_address,
        "attachment_count": status.attachment_count,
        "uptime_s": status.uptime.ToMilliseconds() / 1000,
        "kernel_release": status.kernel_release,
        "features": dict(sorted(status.features.items())),
    }


def attachment_row(info: daemon_pb2.AttachmentInfo, now: float) -> Row:
    """Return an attachment as the columns of `ATTACHMENT_HEAD`; `now` is seconds since the epoch."""
    document = attachment_document(info)
    metadata = ",".join(f"{key}={value}" for key, value in document["metadata"].items())
    hook = " ".join(filter(None, (document["hook"], document["direction"])))
    would = f" ({info.packets_would_block} would drop)" if info.packets_would_block else ""
    row = (
        info.id,
        info.target,
        f"{hook} ({info.attach_mechanism})",
        f"{document['mode']} (audit)" if info.audit else document["mode"],
        document["dns_mode"],
        info.dns_address,
        f"{info.packets_allowed}/{info.packets_blocked}{would}",
        f"{info.dns_queries_allowed}/{info.dns_queries_blocked}",
        age_text(now - info.attached_at.ToMilliseconds() / 1000),
        metadata,
    )
    return [printable(cell) for cell in row]


def status_rows(status: daemon_pb2.DaemonStatus) -> list[Row]:
    """Return the daemon's status as (name, value) rows, features last."""
    document = status_document(status)
    control_plane = " ".join(filter(None, (document["control_plane_state"], status.control_plane_address)))
    rows = [
        ("version", status.version),
        ("daemon id", status.daemon_id),
        ("hostname", status.hostname),
        ("control plane", control_plane),
        ("attachments", str(status.attachment_count)),
        ("uptime", age_text(document["uptime_s"])),
        ("kernel", status.kernel_release),
    ]
    rows += [(f"feature {name}", value) for name, value in document["features"].items()]
    return [[printable(cell) for cell in row] for row in rows]


def columns(rows: Iterable[Row], head: Row | None = None) -> str:
    """Return rows as aligned columns with two spaces between, no line cut or wrapped."""
    lines = [[cell.upper() for cell in head], *rows] if head else list(rows)
    if not lines:
        return ""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def table(rows: Iterable[Row], head: Row | None = None) -> Table:
    """Return rows as a table for a terminal; cells fold rather than lose text."""
    from rich import box  # noqa: PLC0415 - see TYPE_CHECKING above
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    body = list(rows)
    result = Table(box=box.SIMPLE_HEAD if head else None, show_header=head is not None, pad_edge=False)
    for index in range(len(head or next(iter(body), ()))):
        style = "bold" if head is None and index == 0 else None
        result.add_column(head[index] if head else "", overflow="fold", style=style)
    for row in body:
        result.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))  # Text: no markup from outside
    return result


_STYLES: Final[Mapping[str, str]] = {
    "allowlist": "green", "denylist": "yellow", "block_all": "red", "disabled": "dim", "yes": "green",
}  # fmt: skip


def age_text(age_s: float) -> str:
    """Return a time span in its largest whole unit: ``42s``, ``5m``, ``3h``, ``12d``."""
    whole = max(0, int(age_s))
    for unit, size_s in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if whole >= size_s:
            return f"{whole // size_s}{unit}"
    return f"{whole}s"


def _hook(info: daemon_pb2.AttachmentInfo) -> str:
    if info.hook:
        return _word(daemon_pb2.Hook, info.hook, "HOOK_")
    return "cgroup"


def _word(enum: Any, number: int, prefix: str) -> str:  # noqa: ANN401 - protobuf's enum wrappers have no common type
    """Return the short name of an enum's value, its number if a newer daemon sent one that we do not know."""
    value = enum.DESCRIPTOR.values_by_number.get(number)
    return value.name.removeprefix(prefix).lower() if value else str(number)
