"""Attachments that the store does not know any more: rows made of what the kernel knows, and of what could be read.

A damaged or lost database takes no fence off. What is pinned is attached again under its id, with the rules that are in
force; names are allowed again when the control plane says so, unless something of the old row could be saved. Of what
is not pinned the saved row is all there is: after a reboot nothing is, and within one boot pins were lost, or it was
detached after the row was written. Which of the two nobody can tell, so it is fenced again, as the row says (`sift`).
Where only the policy of a row cannot be read, that comes from the kernel in the same way (`Recovery.policy`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable, Mapping
from dataclasses import replace

import structlog

from netfence import policy_codec
from netfence.dataplane.cgroups import find_cgroup
from netfence.dataplane.target import resolve_interface
from netfence.errors import NetfenceError, PreconditionError
from netfence.kernel import Kernel, Remembered
from netfence.policy.policy import Policy
from netfence.store import Row

GONE = "(gone)"

log = structlog.get_logger(__name__)


class Recovery:
    """Asks the kernel what it knows of pinned attachments: once, when that is first needed, for it reads all tables."""

    def __init__(self, plane: Kernel, boot_id: str) -> None:
        self._plane, self._boot_id = plane, boot_id
        self._known: Mapping[str, Remembered] | None = None

    async def rows(self, names: Iterable[str], saved: Mapping[str, Row]) -> list[Row]:
        """Make rows for these pinned attachments, with what is `saved` of their old ones.

        Raises PreconditionError when the kernel does not know one of them either: its slot could be given to another.
        """
        known = await self._remembered()
        if unknown := sorted(set(names) - set(known)):
            raise PreconditionError(
                f"recover attachments: of {len(unknown)} that are pinned nothing is known ({unknown[0]} is one); they"
                " stay in force; remove their pins under bpffs_dir to take them off"
            )
        return [await asyncio.to_thread(_row, name, known[name], saved.get(name), self._boot_id) for name in names]

    async def policy(self, name: str) -> Policy | None:
        """Return what is in force for a pinned attachment, which allows no names; None when the kernel has nothing."""
        found = (await self._remembered()).get(name)
        return found.policy if found is not None else None

    async def _remembered(self) -> Mapping[str, Remembered]:
        if self._known is None:
            self._known = await self._plane.remembered()
        return self._known


def sift(saved: Iterable[Row], there: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Tell the `saved` rows that nothing pins and that are to be attached again from those that were taken off.

    Slot, DNS endpoint and target are one attachment's alone as long as it exists. So a row that shares one of them with
    another is of an attachment that was detached before the other was attached: the later one counts, and those that
    are `there` count most.
    """
    taken = {place for row in there for place in _places(row)}
    kept, taken_off = [], []
    for row in sorted(saved, key=lambda row: (row.policy is not None, row.attached_at), reverse=True):
        places = _places(row)
        say = log.bind(attachment=row.id, target=row.name, slot=row.slot)
        if places & taken:
            say.error("not_recovered", why="another has its slot, DNS address or target: it was detached before")
            taken_off.append(row)
            continue
        taken |= places
        say.error("recovered", source="the damaged database", lost="what changed after it was last written")
        kept.append(replace(row, acked=False))
    return kept, taken_off


def _places(row: Row) -> set[tuple[object, ...]]:
    """Return what no two attachments have in common; a recovered row's target may be gone."""
    target = {("target", row.kind, row.name), ("identity", row.kind, row.identity, row.boot_id)}
    return {("slot", row.slot), ("dns", row.dns_host, row.dns_port), *(target if row.name != GONE else ())}


def _row(name: str, found: Remembered, saved: Row | None, boot_id: str) -> Row:
    fixed, identity = found.fixed, found.identity
    link_kind = ""
    if fixed.cgroup:
        target = find_cgroup(identity) or GONE
    else:
        target, link_kind = _interface(identity)
    row = Row(
        id=name,
        slot=found.slot,
        kind="cgroup" if fixed.cgroup else "interface",
        name=target,
        identity=str(identity),
        link_kind=link_kind,
        direction="host" if fixed.host_direction else "workload",
        hook="cgroup" if fixed.cgroup else "xdp" if found.xdp else "tc",
        mechanism=found.mechanism,
        dns_host=str(ipaddress.ip_address(fixed.dns_address)),
        dns_port=fixed.dns_port,
        boot_id=boot_id,
        attached_at=found.since,
        acked=False,
    )
    policy, lost = found.policy, "metadata, names"
    if saved is not None:
        kept = ("metadata", "attached_at", "policy_version", "dns_allowed", "dns_blocked")
        row, lost = replace(row, **{one: getattr(saved, one) for one in kept}), "nothing"
        if (old := _decoded(saved)) is not None:
            policy = replace(policy, dns=old.dns)
        else:  # of no version: whoever gives policies is not to take it for the one it gave
            row, lost = replace(row, policy_version=""), "names"
    text = policy_codec.encode(policy, policy_codec.Clock.now())
    log.error("recovered", attachment=name, target=target, slot=row.slot, rules=len(policy.cidrs), lost=lost)
    return replace(row, policy=text)


def _interface(index: int) -> tuple[str, str]:
    try:
        interface = resolve_interface(socket.if_indextoname(index))
    except (OSError, NetfenceError):
        return GONE, ""
    return interface.name, interface.kind


def _decoded(saved: Row) -> Policy | None:
    try:
        return policy_codec.decode(saved.policy or "", policy_codec.Clock.now())
    except PreconditionError:
        return None
