"""Asks `policy_for`: a few workers for all attachments, each daemon in its turn, failures again with back-off.

Owns the order of the questions and nothing of what is done with the answers. A daemon's attachments wait in its own
line and the daemons in another, so that ten thousand questions about one do not stand before the first about the next.
"""

from __future__ import annotations

import asyncio
import random
import weakref
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from netfence.controlplane.entry import Entry, Record
from netfence.controlplane.hush import Hush
from netfence.controlplane.limits import RETRY_FIRST_S, RETRY_MOST_S, Limits
from netfence.controlplane.policy import Policy
from netfence.controlplane.views import Attachment

PolicyFor = Callable[[Attachment], Awaitable[Policy]]

_MOST_DOUBLINGS: Final = 10

hush = Hush(structlog.get_logger(__name__))


class Deciders:
    """The workers; `run` them. `decided` is called with every entry that has an answer, or has failed to get one."""

    def __init__(self, policy_for: PolicyFor, decided: Callable[[Entry], None], limits: Limits) -> None:
        self._policy_for = policy_for
        self._decided = decided
        self._limits = limits
        self._turns: asyncio.Queue[Record] = asyncio.Queue()  # bounded: a record stands in it once
        self._in_line: set[Record] = set()
        # Equal policies as one object, also where `policy_for` makes them anew each time: encoded and kept once. By
        # name, because a policy as the key would be kept by its own entry.
        self._shared: weakref.WeakValueDictionary[tuple[str, str], Policy] = weakref.WeakValueDictionary()

    def ask(self, entry: Entry) -> None:
        """Ask about an attachment, anew if it is being decided at this moment."""
        entry.asked += 1
        self._queue(entry)

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._limits.decisions):
                group.create_task(self._work(), name=f"policy_for {number}")

    def _queue(self, entry: Entry) -> None:
        entry.stop_retry()
        if entry.queued or entry.deciding or entry.gone:
            return
        entry.queued = True
        line = entry.record.asking
        if entry.fresh:
            line.appendleft(entry)  # somebody waits for this attach
        else:
            line.append(entry)
        self._take_turn(entry.record)

    def _take_turn(self, record: Record) -> None:
        """Put the daemon into the line of daemons, unless it stands there, or has its share of workers."""
        if record.asking and record not in self._in_line and record.deciding < self._limits.decisions_per_daemon:
            self._in_line.add(record)
            self._turns.put_nowait(record)

    async def _work(self) -> None:
        while True:
            record = await self._turns.get()
            self._in_line.discard(record)
            if not record.asking:
                continue
            entry = record.asking.popleft()
            entry.queued = False
            if entry.gone:
                self._take_turn(record)
                continue
            entry.deciding = True
            record.deciding += 1
            self._take_turn(record)
            try:
                await self._decide(entry)
                if not entry.gone:
                    self._decided(entry)
            except Exception as error:  # noqa: BLE001 - a defect of ours, which must not stop all other decisions
                hush.error("deciding_failed", attachment=entry.attachment.id, exc_info=error)
                self._retry(entry, RETRY_MOST_S)
            finally:
                entry.deciding = False
                record.deciding -= 1
            if entry.asked > entry.decided and entry.retry is None and record.link is not None:
                self._queue(entry)  # asked again meanwhile
            self._take_turn(record)
            await asyncio.sleep(0)  # `policy_for` may answer without waiting for anything; the streams want a turn too

    async def _decide(self, entry: Entry) -> None:
        """Ask once; the entry has the answer or the failure afterwards."""
        question = entry.asked
        try:
            async with asyncio.timeout(self._limits.policy_timeout_s):
                policy = _policy(await self._policy_for(entry.attachment))
            policy = self._shared.setdefault(policy.key, policy)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self._fail(entry, question, error)  # something that `policy_for` waited for was cancelled, not we
        except Exception as error:  # noqa: BLE001 - the user's code; one attachment's failure must not stop the others
            self._fail(entry, question, error)
        else:
            entry.decide(policy, question)

    def _fail(self, entry: Entry, question: int, error: BaseException) -> None:
        said = _said(error)
        if not said and isinstance(error, TimeoutError):
            said = f"no answer within {self._limits.policy_timeout_s:g} s"
        text = f"policy_for: {type(error).__name__}{': ' if said else ''}{said}"
        delay = min(RETRY_MOST_S, RETRY_FIRST_S * 2 ** min(entry.failures, _MOST_DOUBLINGS)) * random.uniform(0.5, 1)  # noqa: S311
        entry.fail(question, text)
        hush.warning(
            "policy_for_failed",
            attachment=entry.attachment.id,
            target=entry.attachment.target,
            daemon=entry.attachment.daemon.id,
            error=text,
            retry_s=round(delay, 1),
            exc_info=error,
        )
        if entry.asked == question:
            self._retry(entry, delay)

    def _retry(self, entry: Entry, delay_s: float) -> None:
        """Ask again later, if anybody will be there."""
        if not entry.gone and entry.record.link is not None:
            entry.stop_retry()
            entry.retry = asyncio.get_running_loop().call_later(delay_s, self._queue, entry)


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - the user's code
        return "it has no text: its __str__ raises"


def _policy(answer: object) -> Policy:
    if not isinstance(answer, Policy):
        raise TypeError(f"it returned {type(answer).__name__}, not a netfence.controlplane.Policy")
    return answer
