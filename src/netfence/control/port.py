"""The port between the daemon and whoever decides the policies: a remote control plane or the local policy file.

Both are implementations of `ControlPort`; the daemon is their `ControlHost`. This module owns the two protocols and the
values that cross them. It knows no gRPC, no file format and no kernel.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from netfence.errors import NetfenceError
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

    `target` is the interface name or the cgroup path, `kind` is ``interface`` or ``cgroup``, `xdp`: attached with hook
    XDP; `dns_address` is ``host:port``. `mode`, `dns_mode` and `policy_hash` are those of the policy in force,
    `policy_version` that of the last command. Not `acked`: it was attached without waiting, and no control plane has
    given it a policy yet.
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
    acked: bool = True
    xdp: bool = False


@dataclass(frozen=True, slots=True)
class StatsView:
    """Counters of one attachment since its attach, as a heartbeat tells them; pairs are (packets, bytes)."""

    id: str
    allowed: tuple[int, int]
    blocked: tuple[int, int]
    would_block: int
    queries_allowed: int
    queries_blocked: int
    policy_hash: str


def _nobody(_failure: BaseException | None) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class FirstPolicy:
    """The answer to `subscribe`: the whole policy, and the control plane's opaque version of it ("" for none).

    `settled` is called once, when it is in force (None) or could not be applied (why not).
    """

    update: BulkUpdate
    version: str = ""
    settled: Callable[[BaseException | None], None] = _nobody


@dataclass(frozen=True, slots=True)
class NameDecision:
    """What a control plane decided about one name in DNS mode `proxy` (semantics.md 14).

    `ips` are packed addresses to answer with instead of asking upstream; `ttl_s` 0 means not given.
    """

    allow: bool
    add_to_filter: bool = False
    ips: tuple[bytes, ...] = ()
    ttl_s: float = 0.0


class PolicyHost(Protocol):
    """What whoever decides policies needs at least."""

    def attachments(self) -> Sequence[AttachmentView]:
        """Return every attachment whose first policy is in force."""
        ...

    async def apply(self, attachment_id: str, command: Command, version: str = "") -> None:
        """Apply a command as one: it takes effect whole and is stored, or nothing changes.

        Raises NotFoundError for an unknown id, InvalidError with every fault, ExhaustedError when a table is full.
        """
        ...


class ControlHost(PolicyHost, Protocol):
    """What the daemon offers to a control plane."""

    async def apply_all(
        self, attachment_id: str, commands: Sequence[tuple[Command, str]]
    ) -> Sequence[NetfenceError | None]:
        """Apply commands, each with its version, in order; return for each why it was refused, or None.

        Each takes effect whole or not at all, as by `apply`; together they cost one switch and one write to disk.
        Raises NotFoundError for an unknown id.
        """
        ...

    def view(self, attachment_id: str) -> AttachmentView | None:
        """Return one attachment, also one whose first policy is awaited; None for an unknown id."""
        ...

    async def stats(self) -> Sequence[StatsView]:
        """Read the counters of every attachment."""
        ...

    async def follow_staleness(self) -> None:
        """Bring every attachment in line with `ControlPort.stale`, which has changed; raises when one could not be."""
        ...

    async def save_contact(self) -> None:
        """Store that the control plane is here at this moment."""
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

    @property
    def stale(self) -> bool:
        """Tell whether every attachment has to be blocked, because the control plane is away for too long."""
        ...

    def introduce(self, daemon_id: str, away_s: float | None) -> None:
        """Tell who we are, and for how long the control plane has been away (None: it never was here); first of all."""
        ...

    async def run(self, host: ControlHost) -> None:
        """Serve `host` until cancelled: keep the stream, or watch the file. Ends only by cancellation."""
        ...

    async def drain(self) -> None:
        """Give what waits to be told a moment to be told, at the end of the daemon."""
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
