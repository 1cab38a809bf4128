"""How long the control plane has been away, and what that means for every attachment (semantics.md 25, decision 0010).

Owns `max_stale` and `stale_action`, and that the time of the last contact outlives the daemon. Knows no stream: it is
told when the control plane came and went. What blocking does is the attachments' business; they are made to follow, and
tried again until they do.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

import structlog

from netfence.control.port import ControlHost

STORE_S: Final = 30.0
"""How often it is stored that the control plane is here; so much older it may seem after a crash."""

STORE_LEAST_S: Final = 0.25
"""Not more often than this, however small `max_stale` is."""

FOLLOW_AGAIN_S: Final = 1.0
"""Before attachments that could not be blocked or unblocked are tried again."""

log = structlog.get_logger(__name__)


class Contact:
    """See the module; `max_stale_s` 0: a policy never gets stale. Use it on one event loop."""

    def __init__(self, max_stale_s: float, action: str) -> None:
        self._max_stale_s, self._action = max_stale_s, action
        self._here = False
        self._last = time.monotonic()
        self._stale = self._followed = False  # what it has to be, and what all attachments have been told
        self._changed = asyncio.Event()  # it came or went
        self._came = asyncio.Event()

    @property
    def stale(self) -> bool:
        """Tell whether every attachment has to be blocked."""
        return self._stale

    def begin(self, away_s: float) -> None:
        """Note for how long the control plane has been away when the daemon begins.

        What is restored asks for itself whether it is stale, and is blocked from its first moment then.
        """
        self._last = time.monotonic() - away_s
        self._stale = self._followed = self._overdue() and self._action == "block_all"

    def came(self) -> None:
        """Note that the control plane is here."""
        self._here = True
        self._last = time.monotonic()
        self._changed.set()
        self._came.set()

    def went(self) -> None:
        """Note that it is not here any more."""
        self._here = False
        self._last = time.monotonic()
        self._changed.set()

    async def keep(self, host: ControlHost) -> None:
        """Store contacts, and have the attachments follow, until cancelled; ends at once where nothing gets stale."""
        if self._max_stale_s:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep_stored(host))
                group.create_task(self._keep_followed(host))

    async def store(self, host: ControlHost) -> None:
        """Store that the control plane is here now, if it is."""
        if not self._here or not self._max_stale_s:
            return
        self._last = time.monotonic()
        try:
            await host.save_contact()
        except Exception as error:  # noqa: BLE001 - it seems older after a restart, that is all
            log.warning("contact_not_stored", error=str(error))

    async def _keep_stored(self, host: ControlHost) -> None:
        while True:
            self._came.clear()
            await self.store(host)
            await _wait(self._came, max(min(STORE_S, self._max_stale_s / 4), STORE_LEAST_S))

    async def _keep_followed(self, host: ControlHost) -> None:
        told = False
        while True:
            self._changed.clear()
            overdue = self._overdue()
            if overdue is not told:
                told = overdue
                log.warning("control_plane_stale" if overdue else "control_plane_back", action=self._action)
            self._stale = overdue and self._action == "block_all"
            pause_s = self._max_stale_s
            if not overdue and not self._here:
                pause_s = max(self._last + self._max_stale_s - time.monotonic(), 0.001)
            if not await self._follow(host):
                pause_s = min(pause_s, FOLLOW_AGAIN_S)
            await _wait(self._changed, pause_s)

    async def _follow(self, host: ControlHost) -> bool:
        """Have the attachments follow `stale`; False when some could not."""
        wanted = self._stale
        if wanted is self._followed:
            return True
        try:
            await host.follow_staleness()
        except Exception as error:  # noqa: BLE001 - tried again
            log.error("staleness_not_followed", error=str(error), next_try_s=FOLLOW_AGAIN_S)  # noqa: TRY400
            return False
        self._followed = wanted
        return True

    def _overdue(self) -> bool:
        """Tell whether the control plane is away for too long."""
        if self._here or not self._max_stale_s:
            return False
        return time.monotonic() - self._last >= self._max_stale_s


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, so long at most."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
