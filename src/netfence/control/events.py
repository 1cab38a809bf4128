"""What we tell a control plane, as messages: values of `outbox` and `port` → proto DaemonEvent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from netfence import __version__
from netfence.control.outbox import Event, Heartbeat, Result, Subscribed, Unsubscribed
from netfence.control.port import AttachmentView, StatsView
from netfence.v1 import control_pb2, types_pb2

CAPABILITIES: Final = ("audit", "nonce", "policy_hash", "ttl", "version")
"""Additions to the first implementation's protocol that this daemon understands (SyncRequest.capabilities), sorted."""

MAX_ERROR_BYTES: Final = 1 << 20
"""Bytes of the errors in one CommandResult: every fault of a hundred thousand bad entries would be a message that peers
refuse (gRPC's default is 4 MB), and the stream with it."""

TYPES: Final[Mapping[str, types_pb2.AttachmentType]] = {
    "interface": types_pb2.ATTACHMENT_TYPE_TC,
    "cgroup": types_pb2.ATTACHMENT_TYPE_CGROUP,
}


def sync_event(
    daemon_id: str, hostname: str, metadata: Mapping[str, str], views: Iterable[AttachmentView]
) -> control_pb2.DaemonEvent:
    """Return the first event of a stream, which lists `views`."""
    sync = control_pb2.SyncRequest(
        daemon_id=daemon_id,
        hostname=_text(hostname),
        metadata=metadata,
        capabilities=CAPABILITIES,
        daemon_version=__version__,
        attachments=map(_attachment, views),
    )
    return control_pb2.DaemonEvent(sync=sync)


def event_message(event: Event) -> control_pb2.DaemonEvent:
    """Return the message of a state event or heartbeat."""
    match event:
        case Subscribed(view):
            return control_pb2.DaemonEvent(subscribed=_subscribed(view))
        case Unsubscribed(attachment_id, reason, error):
            gone = control_pb2.Unsubscribed(id=attachment_id, reason=int(reason), error=_text(error))  # type: ignore[arg-type]
            return control_pb2.DaemonEvent(unsubscribed=gone)
        case Result(nonce, attachment_id, version, ok, errors, policy_hash):
            result = control_pb2.CommandResult(
                nonce=nonce, id=attachment_id, version=version, ok=ok, errors=errors, policy_hash=policy_hash
            )
            return control_pb2.DaemonEvent(command_result=result)
        case Heartbeat(stats):
            return control_pb2.DaemonEvent(heartbeat=control_pb2.Heartbeat(stats=map(_stats, stats)))
    raise TypeError(f"not an event: {event!r}")


def fitting(errors: Iterable[str]) -> tuple[str, ...]:
    """Return the errors, fit for a message, as far as `MAX_ERROR_BYTES` go, then how many more there are."""
    kept: list[str] = []
    room = MAX_ERROR_BYTES
    left = 0
    for error in errors:
        room -= len(error.encode(errors="replace")) + 4
        if room < 0:
            left += 1
        else:
            kept.append(_text(error))
    return (*kept, f"and {left} more faults") if left else tuple(kept)


def _text(text: str) -> str:
    """Return what a proto string can hold: the kernel lets interfaces have names that are not UTF-8."""
    return text.encode(errors="replace").decode()


def _type(view: AttachmentView) -> types_pb2.AttachmentType:
    return types_pb2.ATTACHMENT_TYPE_XDP if view.xdp else TYPES[view.kind]


def _attachment(view: AttachmentView) -> control_pb2.Attachment:
    return control_pb2.Attachment(
        id=view.id,
        target=_text(view.target),
        type=_type(view),
        mode=view.mode,  # type: ignore[arg-type]
        dns_mode=view.dns_mode,  # type: ignore[arg-type]
        metadata=view.metadata,
        dns_address=view.dns_address,
        policy_version=view.policy_version,
        policy_hash=view.policy_hash,
    )


def _subscribed(view: AttachmentView) -> control_pb2.Subscribed:
    return control_pb2.Subscribed(
        id=view.id,
        target=_text(view.target),
        type=_type(view),
        mode=view.mode,  # type: ignore[arg-type]
        dns_mode=view.dns_mode,  # type: ignore[arg-type]
        dns_address=view.dns_address,
        metadata=view.metadata,
    )


def _stats(stats: StatsView) -> control_pb2.AttachmentStats:
    return control_pb2.AttachmentStats(
        id=stats.id,
        packets_allowed=stats.allowed[0],
        packets_blocked=stats.blocked[0],
        dns_queries_allowed=stats.queries_allowed,
        dns_queries_blocked=stats.queries_blocked,
        bytes_allowed=stats.allowed[1],
        bytes_blocked=stats.blocked[1],
        policy_hash=stats.policy_hash,
        packets_would_block=stats.would_block,
    )
