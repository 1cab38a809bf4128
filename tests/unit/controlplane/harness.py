"""What the tests of the kit share: running one, a scripted `policy_for`, a plane on a free port."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from netfence.controlplane import Attachment, ControlPlane, Limits, Policy, State

OPEN = Policy("denylist")
SHUT = Policy("block_all")
WEB = Policy("allowlist", allow=["10.0.0.0/8"])
WEB_AND_ONE = Policy("allowlist", allow=["10.0.0.0/8", "192.0.2.7"])


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run one test on a loop of its own."""
    asyncio.run(asyncio.wait_for(test, 40))


class Policies:
    """A `policy_for`: answers by attachment id, else `default`; an exception there is raised.

    While `gate` is shut, questions about the ids in `held` (all if empty) wait.
    """

    def __init__(self, default: Policy | Exception = WEB) -> None:
        self.default = default
        self.by_id: dict[str, Policy | Exception] = {}
        self.asked: list[str] = []
        self.held: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0
        self.most_waiting = 0

    async def __call__(self, attachment: Attachment) -> Policy:
        self.asked.append(attachment.id)
        if not self.gate.is_set() and (not self.held or attachment.id in self.held):
            self.waiting += 1
            self.most_waiting = max(self.waiting, self.most_waiting)
            try:
                await self.gate.wait()
            finally:
                self.waiting -= 1
        answer = self.by_id.get(attachment.id, self.default)
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextlib.asynccontextmanager
async def serving(policies: Any, *, limits: Limits | None = None, **more: Any) -> AsyncIterator[ControlPlane]:
    """Serve on a free port of loopback; keywords are the plane's and `serving`'s."""
    inside = {key: more.pop(key) for key in ("tls", "tokens", "insecure") if key in more}
    plane = ControlPlane(policies, limits=limits, **more)
    async with plane.serving("127.0.0.1:0", **inside):
        yield plane


def states(plane: ControlPlane) -> dict[str, State]:
    """Return every attachment's state by its id."""
    return {status.attachment.id: status.state for status in plane.attachments}


def all_are(plane: ControlPlane, state: State, count: int) -> bool:
    """Tell whether there are so many attachments, and all in that state."""
    return [status.state for status in plane.attachments] == [state] * count
