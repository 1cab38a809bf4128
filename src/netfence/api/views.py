"""What crosses the port between the local API and the daemon: requests in, snapshots out.

Frozen values without behaviour, so that the daemon needs no protobuf and the API no daemon. `convert` turns them into
messages and back; a field that is new in daemon.proto is new here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from netfence.policy.modes import DnsMode, Mode

HookWish = Literal["auto", "tc", "xdp"]
DirectionWish = Literal["auto", "workload", "host"]
HookKind = Literal["tc", "xdp", "cgroup"]
Direction = Literal["workload", "host"]
FlowVerdict = Literal["pass", "drop", "would_drop"]

ANSWERED: Final = "netfence-version"
"""Key of the trailing metadata that every error made by a daemon carries. Tells it from one that a client's own gRPC
library made up, such as UNAVAILABLE when nobody listens."""


@dataclass(frozen=True, slots=True)
class AttachSpec:
    """What a caller wants fenced: exactly one of `interface` and `cgroup` is set; checked before it is made."""

    interface: str | None = None
    cgroup: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    hook: HookWish = "auto"
    direction: DirectionWish = "auto"


@dataclass(frozen=True, slots=True)
class AttachmentInfoView:
    """One attachment at one moment.

    `target` is the interface's present name or the cgroup's absolute path; `dns_address` is ``host:port``
    (``[host]:port`` for IPv6); `attached_at` is seconds since the epoch; `direction` of a cgroup is ``workload``.
    Counters are totals since the attach.
    """

    id: str
    target: str
    hook: HookKind
    direction: Direction
    attach_mechanism: str
    mode: Mode
    dns_mode: DnsMode
    dns_address: str
    attached_at: float
    metadata: Mapping[str, str] = field(default_factory=dict)
    packets_allowed: int = 0
    packets_blocked: int = 0
    dns_queries_allowed: int = 0
    dns_queries_blocked: int = 0
    policy_version: str = ""
    policy_hash: str = ""
    packets_would_block: int = 0
    audit: bool = False


@dataclass(frozen=True, slots=True)
class StatusView:
    """The daemon and its surroundings at one moment.

    `control_plane_state` is a number of proto ConnectionState (an IntEnum of `control.port` will do); `uptime_s` counts
    from when the daemon was ready; `features` maps a feature to ``yes`` or ``no: why``; `config` maps a dotted key to
    its plain value and where that came from.
    """

    version: str
    daemon_id: str
    hostname: str
    control_plane_state: int
    control_plane_address: str
    attachment_count: int
    uptime_s: float
    kernel_release: str
    features: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, tuple[object, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FlowView:
    """One decision about a packet or a DNS query, or ("lost") a number of them that nobody is told of.

    FlowEvent of daemon.proto, `time` in seconds since the epoch.
    """

    time: float
    id: str
    kind: Literal["packet", "dns", "lost"]
    verdict: FlowVerdict | Literal[""]
    reason: str
    protocol: str = ""
    source: str = ""
    destination: str = ""
    domain: str = ""
    rule: str = ""
    lost: int = 0


@dataclass(frozen=True, slots=True)
class ExplainedAddress:
    """The verdict on one address; `lease_s` is how long its lease lives on, None without one."""

    address: str
    verdict: FlowVerdict
    reason: str
    rule: str = ""
    lease_s: float | None = None


@dataclass(frozen=True, slots=True)
class ExplanationView:
    """What would happen to a name or an address, and why; `steps` are (kind, subject, text), as ExplainStep."""

    subject: str
    name_verdict: FlowVerdict | Literal[""] = ""
    steps: Sequence[tuple[str, str, str]] = ()
    addresses: Sequence[ExplainedAddress] = ()
    remedies: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class SuggestionView:
    """A policy file made of what was seen, and how many packets it does not cover because they were not recorded."""

    policy: str
    missed: int
