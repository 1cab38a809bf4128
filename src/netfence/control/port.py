"""The port between the daemon and whoever decides the policies: a remote control plane or the local policy file.

Both are implementations of `ControlPort`; the daemon is their `ControlHost`. This module owns the two protocols and the
values that cross them. It knows no gRPC, no file format and no kernel.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from netfence.policy.commands import BulkUpdate, Command


class ConnectionState(enum.IntEnum):
    """State of the control plane as `status` shows it; numbers are those of proto ConnectionState."""

    DISCONNECTED = 1
    CONNECTING = 2
    CONNECTED = 3


class UnsubscribeReason(enum.IntEnum):
    """Why an attachment went; numbers are those of proto UnsubscribeReason."""

    REMOVED = 1  # the target is gone
    DETACHED = 2  # somebody asked for it
    ERROR = 3  # the attach failed after `subscribe`


@dataclass(frozen=True, slots=True)
class AttachmentView:
    """What a control plane may know of an attachment; a snapshot, not a live object.

    `target` is the interface name or the cgroup path, `kind` is ``interface`` or ``cgroup``, `dns_address` is
    ``host:port``. `mode`, `dns_mode`, `policy_version` and `policy_hash` are those of the policy in force.
    """

    id: str
    target: str
    kind: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    dns_address: str = ""
    mode: int = 0
    dns_mode: int = 0
    policy_version: str = ""
    policy_hash: str = ""


@dataclass(frozen=True, slots=True)
class FirstPolicy:
    """The answer to `subscribe`: the whole policy, and the control plane's opaque version of it ("" for none)."""

    update: BulkUpdate
    version: str = ""


@dataclass(frozen=True, slots=True)
class NameDecision:
    """What a control plane decided about one name in DNS mode `proxy` (semantics.md 14).

    `ips` are packed addresses to answer with instead of asking upstream; `ttl_s` 0 means not given.
    """

    allow: bool
    add_to_filter: bool = False
    ips: tuple[bytes, ...] = ()
    ttl_s: float = 0.0


class ControlHost(Protocol):
    """What the daemon offers to a control plane."""

    def attachments(self) -> Sequence[AttachmentView]:
        """Return every attachment whose first policy is in force."""
        ...

    async def apply(self, attachment_id: str, command: Command, version: str = "") -> None:
        """Apply a command as one: it takes effect whole and is stored, or nothing changes.

        Raises NotFoundError for an unknown id, InvalidError with every fault, ExhaustedError when a table is full.
        """
        ...


class ControlPort(Protocol):
    """What the daemon needs of a control plane."""

    @property
    def state(self) -> ConnectionState:
        """Tell whether policies can be had at this moment."""
        ...

    def check(self, target: str) -> None:
        """Raise PreconditionError when no policy for `target` can ever come; asked before anything is touched."""
        ...

    @property
    def address(self) -> str:
        """Return where the control plane is, for humans: ``host:port`` or ``file:/path``."""
        ...

    async def run(self, host: ControlHost) -> None:
        """Serve `host` until cancelled: keep the stream, or watch the file. Ends only by cancellation."""
        ...

    async def reload(self) -> None:
        """Read again what was configured by files (SIGHUP). Errors are logged and change nothing."""
        ...

    async def subscribe(self, view: AttachmentView) -> FirstPolicy | None:
        """Announce an attachment and return its first policy; None: do not wait, it stays in `start_mode` for now.

        Once the policy is decided this must return without another suspension: the daemon then queues it before any
        later command for the same id. Raises UnavailableError, DeadlineError, PreconditionError or InvalidError.
        """
        ...

    async def unsubscribe(self, attachment_id: str, reason: UnsubscribeReason, error: str = "") -> None:
        """Announce that an attachment is gone; never raises for an unknown id."""
        ...

    async def query_dns(self, attachment_id: str, name: str, qtype: str) -> NameDecision:
        """Ask about one name (no final dot) in DNS mode `proxy`. Raises UnavailableError or DeadlineError."""
        ...
