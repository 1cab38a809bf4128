"""What became of one query, told to whoever watches: the words for it, and how a type of records is called.

Owns the fixed set of reasons (`Reason`), which FlowEvent of daemon.proto documents: a new one is new there too. Nothing
here costs a query anything while nobody watches (`handler`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

from dnslib import QTYPE

from netfence.policy.domain import DomainRule

Word = Literal["pass", "drop", "would_drop"]

Reason = Literal[
    "allow_rule",  # a rule allows the name
    "deny_rule",  # a rule denies the name
    "default_pass",  # DNS mode denylist, and no rule denies it
    "default_drop",  # DNS mode allowlist, and no rule allows it
    "block_all",  # packet mode block_all
    "mode_disabled",  # DNS mode disabled: everything is forwarded
    "control_plane",  # DNS mode proxy: so it decided
    "undecided",  # DNS mode proxy: it gave no decision
    "chain",  # a rule denies a name that the answer leads to
    "rebinding",  # special-purpose addresses alone were in the answer
    "no_lease",  # the addresses could not be opened
    "upstream",  # passed, but no upstream gave an answer that can be used
    "rate",  # beyond dns.max_qps
    "overload",  # too many queries wait for an answer
    "policy_changes",  # faster than the query can be answered
    "refused",  # a class or type that is not resolved, such as ANY
]

Peer: TypeAlias = tuple[Any, ...] | None
"""Where a query came from, as the socket gave it: address, port, and more for IPv6."""


class Decision(NamedTuple):
    """One query and what became of it. `name` is as asked for, `rule` the one that decided, if one did."""

    word: Word
    reason: Reason
    name: str
    qtype: int
    tcp: bool
    peer: Peer
    rule: DomainRule | None


Sink: TypeAlias = Callable[[Decision], None]
"""Who watches. Called in the middle of answering: takes a microsecond and never raises."""


def type_text(qtype: int) -> str:
    """Return the name of a type of records, such as ``AAAA``; ``TYPE65280`` for one without (RFC 3597)."""
    name = QTYPE.forward.get(qtype)
    return name if isinstance(name, str) else f"TYPE{qtype}"
