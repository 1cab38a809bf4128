"""Audited names over restarts of the daemon: stored now and then, recalled at its start.

A crash loses what came since the last time. Nothing here may fail anything else: without these names `suggest` writes
addresses where it could have written names.
"""

from __future__ import annotations

import asyncio

import structlog

from netfence.audited import AuditMemory
from netfence.errors import NetfenceError
from netfence.lifecycle import Lifecycle

log = structlog.get_logger(__name__)


class Remembering:
    """Keeps the store near what attachments remember. Use it only on the event loop."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._stored: dict[str, int] = {}  # by attachment: what its memory's `changes` were

    async def recall(self) -> None:
        """Give every attachment the names that were stored of it."""
        try:
            stored = await self._lifecycle.parts.store.load_audited()
        except NetfenceError as error:
            log.warning("audited_names_not_recalled", error=str(error))
            return
        for live in self._lifecycle.all():
            text = stored.get(live.row.id)
            if text is None or len(live.attachment.audited):
                continue
            try:
                memory = await asyncio.to_thread(AuditMemory.load, text)  # 30 ms of a full one: DNS is served already
            except ValueError as error:
                live.attachment.log.warning("audited_names_not_recalled", error=str(error))
                continue
            if not (live.ended or len(live.attachment.audited)):  # else what came meanwhile is newer
                live.attachment.audited = memory

    async def save(self) -> None:
        """Store the names of every attachment that heard of any since the last time."""
        stored: dict[str, int] = {}
        for live in self._lifecycle.all():
            memory, name = live.attachment.audited, live.row.id
            stored[name] = self._stored.get(name, 0)
            if memory.changes == stored[name]:
                continue
            changes, copy = memory.changes, memory.copy()
            try:
                await self._lifecycle.parts.store.save_audited(name, copy.dump)
            except NetfenceError as error:
                log.warning("audited_names_not_stored", attachment=name, error=str(error))
            else:
                stored[name] = changes
        self._stored = stored
