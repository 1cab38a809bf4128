"""Policies as text for the store: one JSON object, equal for equal policies at the same clock.

Expiries are kept as monotonic seconds with the clock they belong to, so that they survive a restart exactly and a
reboot by the wall clock. Encoding works in pieces: no single call holds the interpreter lock for long, whatever the
size (the event loop runs beside it). Pure but for `Clock.now`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from netfence.errors import PreconditionError
from netfence.policy.cidr import CidrTable, Entry, Key, cidr_text, parse_cidr
from netfence.policy.domain import DomainRule, DomainTable, RuleKind
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.ordering import sort_in_pieces
from netfence.policy.policy import DnsPolicy, Policy

VERSION = 1
PIECE = 2000  # rules per call of json.dumps: well under a millisecond

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Clock:
    """One moment on both clocks, and the boot the monotonic one counts from. Seconds."""

    boot_id: str
    mono: float
    wall: float

    @classmethod
    def now(cls) -> Clock:
        """Read the clocks."""
        return cls(_BOOT_ID.read_text(encoding="ascii").strip(), time.monotonic(), time.time())

    def shift_from(self, other: Clock) -> float:
        """Return what to add to a monotonic time of `other` to have it on this clock; 0 within one boot."""
        if self.boot_id == other.boot_id:
            return 0.0
        return (self.mono - self.wall) - (other.mono - other.wall)


def contact_text(clock: Clock) -> str:
    """Return a moment as text for the store."""
    return json.dumps(asdict(clock))


def seconds_since(text: str | None, now: Clock) -> float | None:
    """Return how long ago the moment was that the store has; None when there is none, or none that can be read.

    After a reboot that is the wall clock's word; should that have been set back, 0.
    """
    if text is None:
        return None
    try:
        then = Clock(**json.loads(text))
        return max(now.mono - then.mono - now.shift_from(then), 0.0)
    except (ValueError, TypeError):
        return None


def encode(policy: Policy, clock: Clock) -> str:
    """Return the policy as text; `clock` is the present moment."""
    head = {
        "v": VERSION,
        "boot_id": clock.boot_id,
        "mono": clock.mono,
        "wall": clock.wall,
        "mode": policy.mode.name,
        "audit": policy.audit,
        "dns_mode": policy.dns.mode.name,
        "upstreams": list(policy.dns.upstreams),
    }
    pieces = [json.dumps(head)[:-1], ', "cidrs": [', *_pieces(_cidrs(policy.cidrs))]
    pieces += ['], "domains": [', *_pieces(_domains(policy.dns.domains)), "]}"]
    return "".join(pieces)


def decode(text: str, clock: Clock) -> Policy:
    """Return the stored policy with its expiries on the present clock. Raises PreconditionError when damaged."""
    try:
        data = json.loads(text)
        if data["v"] != VERSION:
            raise PreconditionError(f"read stored policy: format {data['v']}, this netfenced reads {VERSION}")
        shift = clock.shift_from(Clock(data["boot_id"], data["mono"], data["wall"]))
        stored = data["cidrs"]
        entries = ((parse_cidr(one), Entry(_expiry(yes, shift), _expiry(no, shift))) for one, yes, no in stored)
        rules = (DomainRule(name, RuleKind(kind), allow=allow) for name, kind, allow in data["domains"])
        domains = DomainTable.build(rules, expected=len(data["domains"]))
        dns = DnsPolicy(mode=DnsMode[data["dns_mode"]], domains=domains, upstreams=tuple(data["upstreams"]))
        return Policy(mode=Mode[data["mode"]], audit=bool(data["audit"]), cidrs=CidrTable.of(entries), dns=dns)
    except (ValueError, KeyError, TypeError) as error:
        raise PreconditionError(f"read stored policy: damaged: {error!r}") from error


def _cidrs(table: CidrTable) -> Iterator[list[Any]]:
    entries = table.entries
    keys: list[Key] = sort_in_pieces(list(entries))
    for key in keys:
        found = entries[key]
        yield [cidr_text(key), _stored(found.allow), _stored(found.deny)]


def _domains(table: DomainTable) -> Iterator[list[Any]]:
    for rule in sorted(table.rules()) if len(table) <= PIECE else table.rules():
        yield [rule.name, int(rule.kind), rule.allow]


def _pieces(items: Iterable[list[Any]]) -> Iterator[str]:
    piece: list[list[Any]] = []
    separator = ""
    for item in items:
        piece.append(item)
        if len(piece) == PIECE:
            yield separator + json.dumps(piece, separators=(",", ":"))[1:-1]
            piece, separator = [], ","
    if piece:
        yield separator + json.dumps(piece, separators=(",", ":"))[1:-1]


def _stored(expiry: float) -> float | bool | None:
    """Return None for "not in that list", True for ever, else the time."""
    if expiry == math.inf:
        return True
    return expiry or None


def _expiry(stored: float | bool | None, shift: float) -> float:
    if stored is None:
        return 0.0
    if stored is True:
        return math.inf
    return float(stored) + shift
