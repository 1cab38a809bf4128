"""Bounds of a control plane, each with its reason; the user may set them, one by one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from netfence.errors import InvalidError


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds and times of a `ControlPlane`: ``ControlPlane(policy_for, limits=Limits(policy_timeout_s=2))``."""

    policy_timeout_s: float = 10.0
    """How long `policy_for` may take; then it counts as failed. A daemon waits 5 s for the policy of a new attach."""
    decisions: int = 64
    """Calls of `policy_for` under way at once: what a data base behind it will bear."""
    decisions_per_daemon: int = 8
    """Of those for one daemon: one whose calls hang must leave room for the others."""
    in_flight_per_daemon: int = 32
    """Commands sent to one daemon whose results are awaited: enough to hide the way there and back."""
    result_timeout_s: float = 60.0
    """How long a daemon may give no result, or read nothing, while some is awaited; then its stream is ended, and the
    next one settles what is in force. Applying a million rules takes a daemon some seconds."""
    max_attachments: int = 4096
    """Attachments of one daemon: twice what a daemon of ours can have."""
    max_daemons: int = 20_000
    """Daemons remembered, the connected ones included; one more is turned away."""
    forget_after_s: float = 3600.0
    """How long a daemon that is away is shown and its refused policies remembered."""
    max_away_bytes: int = 256 << 20
    """Memory for all daemons that are away, reckoned by what they sent and 2 kB an attachment: 100,000 attachments with
    little metadata. The daemon that is away longest is forgotten first."""
    max_message_bytes: int = 16 << 20
    """One message of a daemon: a SyncRequest of 4096 attachments with a kilobyte of metadata each is 5 MB."""
    events_per_s: float = 1000.0
    """Events of one daemon that are read in the long run, a large one counting for several; one that sends more is read
    later, not disconnected."""
    max_calls_per_connection: int = 2048
    """Calls at once on one connection: its stream and its DNS queries, of which a daemon of ours has at most 1024. At
    the very bound gRPC refuses some instead of letting them wait."""

    def __post_init__(self) -> None:
        """Raise InvalidError for bounds that would let nothing happen."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        faults = [
            f"{name}: {value} is not allowed; it must be more than 0"
            for name, value in given.items()
            if not value > 0 and (name, value) != ("forget_after_s", 0)
        ]
        if faults:
            raise InvalidError(faults)


BURST_S: Final = 10.0
"""Seconds of `events_per_s` that may come at once: a daemon of 2000 attachments gives 2000 results to an update."""

EVENT_BYTES: Final = 4096
"""An event counts once more for each of these: a result has some 200, a heartbeat of 30 attachments 4 kB."""

OLDEST_RESULT: Final = 3
"""Times `result_timeout_s` that a single result may take while others come: long for a queue, short for one lost."""

FIRST_EVENT_S: Final = 10.0
"""How long a stream may stay without its SyncRequest."""

LAST_WRITE_S: Final = 1.0
"""How long a write that is under way may take before its stream is ended all the same."""

SWEEP_S: Final = 1.0
"""How often stuck and forgotten daemons are looked for: times above are kept to this."""

RETRY_FIRST_S: Final = 0.5
"""Until `policy_for` is asked again after its first failure; a daemon waits 5 s for a new attach's policy."""

RETRY_MOST_S: Final = 30.0
"""Longest time between two such attempts."""

ARRIVAL_S: Final = 0.5
"""How long a DNS query for an unknown attachment waits for it: query and Subscribed come on streams of their own."""

MAX_AWAITED_QUERIES: Final = 1000
"""DNS queries that wait so at once; more are refused at once."""

REFUSAL_S: Final = 0.1
"""How long a call with a wrong token waits for its status: gRPC's aio client forgets the status of a stream that ends
while it writes, as a daemon does at first. It slows down guessing, too."""

LARGE_BYTES: Final = 256 << 10
"""From this size a message is large: sent to a thousand daemons at once its copies would fill the memory."""

MAX_LARGE_WRITES: Final = 32
"""Large messages on their way at once; the others wait for one of them to leave."""

LARGE_HOLD_S: Final = 1.0
"""How long one of them counts: daemons that do not read must not keep a new attach, which waits 5 s, from its ack."""

ENTRY_BYTES: Final = 2048
"""What an attachment costs besides what its daemon says of it."""

MAX_ID_BYTES: Final = 128
"""Bytes of a daemon's or attachment's id in UTF-8: ours have 36, and to a longer one a daemon gives no result."""
