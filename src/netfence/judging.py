"""What commands make of a policy before anything of it is in force: judged in order, each alone refused or taken.

Owns the sharing of policies between attachments that are given the same update, and what the steps between old and new
mean for names. Knows no kernel, store or lock: those are `attachment`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from weakref import WeakValueDictionary

from netfence.errors import NetfenceError
from netfence.policy.cidr import NEVER
from netfence.policy.commands import BulkUpdate, Command, apply
from netfence.policy.modes import Mode
from netfence.policy.policy import Policy

BULK = 500  # rules from which work on a policy is worth a thread: below, the thread costs more than the work

Versioned = tuple[Command, str]  # a command and the version it brings
Refusals = list[NetfenceError | None]


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Given:
    """A bulk update and the policy it made, as one: whoever is given the same update gets the same policy."""

    update: BulkUpdate
    policy: Policy


# By id of the update, as long as some attachment has its policy: the policy file gives one update to many attachments.
_given: WeakValueDictionary[int, Given] = WeakValueDictionary()


def judge(policy: Policy, commands: Sequence[Versioned], now: float) -> tuple[list[Policy], Refusals]:
    """Return the policies that the good ones among the commands make, the old one first, and the others' refusals."""
    steps = [policy]
    refusals: Refusals = []
    for command, _ in commands:
        try:
            steps.append(_shared(command) or apply(steps[-1], command, now))
        except NetfenceError as error:
            refusals.append(error)
        else:
            refusals.append(None)
    return steps, refusals


def given(command: Command, policy: Policy) -> Given | None:
    """Note what made a policy, if it makes the same for everybody: a TTL begins when it is applied.

    Others are given that policy too as long as somebody holds what is returned.
    """
    if not isinstance(command, BulkUpdate) or policy.cidrs.next_expiry() != NEVER:
        return None
    known = _given.get(id(command))
    if known is None or known.update is not command:
        known = _given[id(command)] = Given(command, policy)
    return known


def is_large(policy: Policy, commands: Sequence[Versioned] = ()) -> bool:
    """Tell whether work on a policy, and on commands to it, is worth a thread."""
    return sum(_rules(command) for command, _ in commands) + len(policy.cidrs) + len(policy.dns.domains) > BULK


def told_apart(steps: Sequence[Policy]) -> list[Policy]:
    """Return the policies without those that differ from the one before in nothing that names are judged by.

    Each is worth a look at the leases: what one command denies is revoked, also when the next allows it again.
    """

    def differs(old: Policy, new: Policy) -> bool:
        same = (new.mode, new.audit, new.dns.mode) == (old.mode, old.audit, old.dns.mode)
        return not same or new.dns.domains is not old.dns.domains

    return [steps[0], *(new for old, new in pairwise(steps) if differs(old, new))]


def blocked(policy: Policy) -> Policy:
    """Return the policy with nothing let out; its rules stay, so that putting them back is one write."""
    return replace(policy, mode=Mode.BLOCK_ALL, audit=False)


def raise_first(refusals: Refusals) -> None:
    """Raise the first refusal, if there is one."""
    for refusal in refusals:
        if refusal is not None:
            raise refusal


def _shared(command: Command) -> Policy | None:
    """Return the policy that another attachment was given by this very update: it is immutable, so one will do."""
    known = _given.get(id(command))
    return known.policy if known is not None and known.update is command else None


def _rules(command: Command) -> int:
    """Count the rules a command brings."""
    if not isinstance(command, BulkUpdate):
        return 1
    names = len(command.dns.allow) + len(command.dns.deny) if command.dns is not None else 0
    return len(command.allow_cidrs) + len(command.deny_cidrs) + names
