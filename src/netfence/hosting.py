"""The daemon as its control plane sees it: the `ControlHost` over all attachments.

Owns nothing but the way from an attachment's id to the attachment, and what is told of it; what a command does is
`attachment`'s, who sends it `control`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from netfence.control.port import AttachmentView, StatsView
from netfence.errors import NetfenceError, NotFoundError
from netfence.lifecycle import Lifecycle, Live
from netfence.policy.commands import Command
from netfence.policy_codec import Clock, contact_text

STATS_PIECE = 100  # attachments whose counters are read in one go, 1 ms


class Host:
    """A `ControlHost`. Use it only on the event loop."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle

    def attachments(self) -> Sequence[AttachmentView]:
        """Return every attachment whose first policy is in force."""
        return [live.attachment.view() for live in self._lifecycle.all()]

    def view(self, attachment_id: str) -> AttachmentView | None:
        """Return one attachment, also one being attached."""
        live = self._lifecycle.get(attachment_id)
        return live.attachment.view() if live is not None else None

    async def apply(self, attachment_id: str, command: Command, version: str = "") -> None:
        """Apply a command."""
        await self._live(attachment_id).attachment.apply(command, version)

    async def apply_all(
        self, attachment_id: str, commands: Sequence[tuple[Command, str]]
    ) -> Sequence[NetfenceError | None]:
        """Apply commands in order; return for each why it was refused, or None."""
        return await self._live(attachment_id).attachment.apply_all(commands)

    async def stats(self) -> Sequence[StatsView]:
        """Read every attachment's counters; gives others a turn now and then."""
        found = []
        for count, live in enumerate(self._lifecycle.all()):
            if not live.ended:  # meanwhile: its slot may be another's
                found.append(self._stats(live))
            if count % STATS_PIECE == STATS_PIECE - 1:
                await asyncio.sleep(0)
        return found

    async def follow_staleness(self) -> None:
        """Bring every attachment in line with `ControlPort.stale`; one that fails does not keep the others from it."""
        failures = []
        for live in self._lifecycle.every():
            try:
                await live.attachment.follow_staleness()
            except Exception as error:
                live.attachment.log.exception("staleness_not_followed", error=str(error))
                failures.append(error)
        if failures:
            raise NetfenceError(f"follow staleness: {len(failures)} attachments could not be switched: {failures[0]}")

    async def save_contact(self) -> None:
        """Store that the control plane is here at this moment."""
        await self._lifecycle.parts.store.save_contact(contact_text(Clock.now()))

    def _live(self, attachment_id: str) -> Live:
        live = self._lifecycle.get(attachment_id)
        if live is None:
            raise NotFoundError(f"apply a command: no attachment {attachment_id}")
        return live

    def _stats(self, live: Live) -> StatsView:
        attachment = live.attachment
        counters = self._lifecycle.parts.plane.counters(live.row.slot)
        return StatsView(
            id=live.row.id,
            allowed=counters.allowed,
            blocked=counters.blocked,
            would_block=sum(counters.would_packets),
            queries_allowed=attachment.queries_allowed,
            queries_blocked=attachment.queries_blocked,
            policy_hash=attachment.policy_hash,
        )
