"""What the kit tells its user: daemons, attachments, their state, the outcome of an update; and what the user answers.

Frozen values, snapshots of a moment. Knows how they are read from messages, nothing about streams.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from netfence.errors import InvalidError
from netfence.v1 import control_pb2, types_pb2

Hook = Literal["tc", "xdp", "cgroup", ""]

_HOOKS: Final[Mapping[int, Hook]] = {
    types_pb2.ATTACHMENT_TYPE_TC: "tc",
    types_pb2.ATTACHMENT_TYPE_XDP: "xdp",
    types_pb2.ATTACHMENT_TYPE_CGROUP: "cgroup",
}
_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})

MAX_TTL_S: Final = 2**32 - 1
"""Of a name's answer: the wire has 32 bits."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """A daemon as it presented itself.

    `id` is constant over its restarts; `hostname` and `metadata` are what its configuration says; `version` and
    `capabilities` are empty for the original implementation; `address` is gRPC's name of the peer.
    """

    id: str
    hostname: str = ""
    metadata: Mapping[str, str] = field(default_factory=lambda: _NOTHING, hash=False)
    version: str = ""
    capabilities: frozenset[str] = frozenset()
    address: str = ""


@dataclass(frozen=True, slots=True)
class Attachment:
    """An attachment that wants a policy.

    `target` is the interface's name or the cgroup's absolute path, `metadata` what the caller of Attach gave: how you
    tell whose workload it is. `hook` is ``tc``, ``xdp`` or ``cgroup``, empty for one that this kit does not know.
    """

    id: str
    target: str
    daemon: Daemon
    metadata: Mapping[str, str] = field(default_factory=lambda: _NOTHING, hash=False)
    hook: Hook = ""
    dns_address: str = ""

    @property
    def kind(self) -> Literal["interface", "cgroup"]:
        """What the target is."""
        cgroup = self.hook == "cgroup" or (not self.hook and self.target.startswith("/"))
        return "cgroup" if cgroup else "interface"


class State(enum.Enum):
    """Where an attachment stands; the value is the word for status pages."""

    DECIDING = "deciding"
    """`policy_for` has been asked and has not answered yet."""
    UNDECIDED = "undecided"
    """`policy_for` raised; it is asked again with back-off. What was in force stays in force."""
    PENDING = "pending"
    """The policy waits to be sent, or was sent and the daemon's result is awaited."""
    IN_SYNC = "in sync"
    """The daemon said that it enforces the wanted policy."""
    UNCONFIRMED = "unconfirmed"
    """Sent to a daemon that gives no results (the original implementation)."""
    REFUSED = "refused"
    """The daemon refused the wanted policy and keeps the one before, until `policy_for` answers another."""
    DISCONNECTED = "disconnected"
    """The daemon is away and enforces what it has; it is brought up to date when it comes back."""


@dataclass(frozen=True, slots=True)
class Counters:
    """An attachment's totals since its attach, from its daemon's last heartbeat (`at`: seconds since the epoch)."""

    at: float
    packets_allowed: int = 0
    packets_blocked: int = 0
    packets_would_block: int = 0
    bytes_allowed: int = 0
    bytes_blocked: int = 0
    dns_queries_allowed: int = 0
    dns_queries_blocked: int = 0
    policy_hash: str = ""


@dataclass(frozen=True, slots=True)
class AttachmentStatus:
    """An attachment at one moment.

    `version` and `policy_hash` are what its daemon last said is in force, `wanted_version` is the policy that it should
    have (None: not decided yet). `errors` say why the state is REFUSED or UNDECIDED. `counters` is None before the
    first heartbeat.
    """

    attachment: Attachment
    state: State
    version: str
    policy_hash: str
    wanted_version: str | None
    errors: tuple[str, ...] = ()
    counters: Counters | None = None


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """A daemon at one moment. Times are seconds since the epoch; `since`: of the connection or of its loss."""

    daemon: Daemon
    connected: bool
    since: float
    last_seen: float
    attachments: int
    awaited_results: int = 0


class Outcome(enum.Enum):
    """What became of one attachment in an update; the value is the word for messages."""

    APPLIED = "applied"
    """The daemon says that it is enforced."""
    UNCHANGED = "unchanged"
    """It was in force already; nothing was sent."""
    UNCONFIRMED = "unconfirmed"
    """Sent to a daemon that gives no results."""
    REFUSED = "refused"
    """The daemon refused it, now or before, and said why; what was in force stays."""
    UNDECIDED = "undecided"
    """`policy_for` raised; it is asked again by itself."""
    PENDING = "pending"
    """No result within the time given; it comes later, or the next connection settles it."""
    DISCONNECTED = "disconnected"
    """The daemon is away, or went before its result; it is brought up to date when it comes back."""
    GONE = "gone"
    """The attachment was detached meanwhile."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one attachment in an update; `version` is the one wanted (empty: not decided)."""

    attachment: Attachment
    outcome: Outcome
    version: str = ""
    errors: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the daemon said that the policy is in force; the attachment's end counts as well."""
        return self.outcome in _GOOD


_GOOD: Final = frozenset({Outcome.APPLIED, Outcome.UNCHANGED, Outcome.GONE})


@dataclass(frozen=True, slots=True)
class Results:
    """The outcome of one update, a result for each attachment it was about; iterate over it, or ask `ok`."""

    all: tuple[Result, ...] = ()

    def __iter__(self) -> Iterator[Result]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    @property
    def ok(self) -> bool:
        """Whether every daemon confirmed; true where there was nobody to ask."""
        return all(result.ok for result in self.all)

    @property
    def failed(self) -> tuple[Result, ...]:
        """Return those that are not `ok`."""
        return tuple(result for result in self.all if not result.ok)

    def __str__(self) -> str:
        """Return ``3 applied, 1 refused``."""
        counts = dict.fromkeys(Outcome, 0)
        for result in self.all:
            counts[result.outcome] += 1
        return (
            ", ".join(f"{count} {outcome.value}" for outcome, count in counts.items() if count) or "nothing to update"
        )


@dataclass(frozen=True, slots=True)
class NameAnswer:
    """May this name be resolved, and may its addresses be reached? Answers `answer_dns` (DNS mode ``proxy``).

    ``NameAnswer(allow=False)`` denies. ``NameAnswer(allow=True)`` resolves, but opens nothing.
    ``NameAnswer(allow=True, add_to_filter=True, ttl_s=60)`` opens the addresses and lets the daemon reuse the decision
    for a minute. `ips` are answered instead of asking an upstream, and trusted. Raises InvalidError with every fault.
    """

    allow: bool
    add_to_filter: bool = False
    ips: Sequence[str] = ()
    ttl_s: int = 0

    def __post_init__(self) -> None:
        faults = []
        for index, text in enumerate(self.ips):
            if not isinstance(text, str) or not _is_address(text):
                faults.append(f"ips[{index}]: {text!r} is not the text of an IP address")
        if not isinstance(self.ttl_s, int) or not 0 <= self.ttl_s <= MAX_TTL_S:
            faults.append(f"ttl_s: {self.ttl_s!r} is not a whole number from 0 to {MAX_TTL_S}")
        if faults:
            raise InvalidError(faults)

    def message(self) -> control_pb2.DnsQueryResponse:
        """Return it as the wire has it."""
        return control_pb2.DnsQueryResponse(
            allow=self.allow, add_to_filter=self.add_to_filter, ips=self.ips, ttl_seconds=self.ttl_s
        )


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a connection, for `admit`.

    `address` is gRPC's name of it, `certificate_names` the subject alternative names and common name of the
    certificate that it proved (none without mutual TLS), `token` the accepted bearer token.
    """

    address: str
    certificate_names: tuple[str, ...] = ()
    token: str = field(default="", repr=False)


def daemon_of(sync: control_pb2.SyncRequest, address: str) -> Daemon:
    """Return the daemon that a SyncRequest presents."""
    return Daemon(
        id=sync.daemon_id,
        hostname=sync.hostname,
        metadata=_frozen(sync.metadata),
        version=sync.daemon_version,
        capabilities=frozenset(sync.capabilities),
        address=address,
    )


def attachment_of(message: control_pb2.Attachment | control_pb2.Subscribed, daemon: Daemon) -> Attachment:
    """Return the attachment that a SyncRequest lists or a Subscribed announces."""
    return Attachment(
        id=message.id,
        target=message.target,
        daemon=daemon,
        metadata=_frozen(message.metadata),
        hook=_HOOKS.get(message.type, ""),
        dns_address=message.dns_address,
    )


def counters_of(stats: control_pb2.AttachmentStats, at: float) -> Counters:
    """Return the counters of one attachment."""
    return Counters(
        at,
        stats.packets_allowed,
        stats.packets_blocked,
        stats.packets_would_block,
        stats.bytes_allowed,
        stats.bytes_blocked,
        stats.dns_queries_allowed,
        stats.dns_queries_blocked,
        stats.policy_hash,
    )


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text  # a scope means nothing on another host


def _frozen(metadata: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType(dict(metadata)) if metadata else _NOTHING
