"""One attachment as the control plane knows it: what it should have, what it has, and what is to be sent for that.

A state machine: events in (decided, answered, lost), the next command out. It waits for nothing. A stream is a `Link`
to it, and what is the same for all attachments of a daemon is in its `Record`. Only the newest wanted policy is kept,
and one command at a time is under way, so an attachment costs the same however often it changes and however slow its
daemon is.

What counts as "in force": a policy that this daemon confirmed by a result, or that it reported on connecting by version
*and* hash. The hash alone does not do: it leaves out entries with a TTL, so a policy whose only change was to lose an
opening for an hour would not be sent. Where only the version differs and both policies are known, a command that
changes nothing carries the new version; where they are not (after a restart), the whole policy goes.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Final, Protocol

from netfence.controlplane.diff import single_command
from netfence.controlplane.policy import Policy, framed
from netfence.controlplane.push import Push
from netfence.controlplane.views import (
    Attachment,
    AttachmentStatus,
    Counters,
    Daemon,
    DaemonStatus,
    Outcome,
    Result,
    State,
)
from netfence.v1 import control_pb2, types_pb2

UNSAID: Final = ("refused, and the daemon did not say why",)


class Link(Protocol):
    """What the book needs of a stream."""

    def offer(self, entry: Entry) -> None:
        """Send what is due to an attachment, when its turn comes."""
        ...

    def end(self, code: str, why: str) -> None:
        """End the stream with a gRPC status code of that name."""
        ...

    def check(self, now: float) -> None:
        """End the stream if it is stuck; `now` is monotonic."""
        ...

    @property
    def awaited(self) -> int:
        """Number of commands whose results are awaited."""
        ...


class Record:
    """A daemon; `link` is None while it is away."""

    __slots__ = ("asking", "confirms", "daemon", "deciding", "entries", "last_seen", "link", "since", "size")

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.link: Link | None = None
        self.entries: dict[str, Entry] = {}
        self.confirms = False
        self.size = 0  # bytes that it costs, by reckoning
        self.since = self.last_seen = time.time()
        # Of `deciding`: the attachments to ask about, how many are being asked about.
        self.asking: deque[Entry] = deque()
        self.deciding = 0

    def status(self) -> DaemonStatus:
        """Return a snapshot."""
        return DaemonStatus(
            self.daemon,
            self.link is not None,
            self.since,
            self.last_seen,
            len(self.entries),
            0 if self.link is None else self.link.awaited,
        )


class Entry:
    """An attachment; `fresh` until its first policy was sent, which answers its Subscribed."""

    __slots__ = (
        "_errors",
        "_in_force",
        "_pushes",
        "_refused",
        "_sent",
        "_sent_for",
        "_sent_single",
        "_wanted",
        "asked",
        "attachment",
        "counters",
        "decided",
        "deciding",
        "failures",
        "fault",
        "fresh",
        "gone",
        "policy_hash",
        "queued",
        "record",
        "retry",
        "version",
    )

    def __init__(self, attachment: Attachment, record: Record, *, fresh: bool) -> None:
        self.attachment = attachment
        self.record = record
        self.fresh = fresh
        self.gone = False
        # The question: numbered, so that an answer to an older one is known as such.
        self.asked = 0
        self.decided = 0
        self.queued = False
        self.deciding = False
        self.failures = 0
        self.fault = ""
        self.retry: asyncio.TimerHandle | None = None
        # The answer and its way to the daemon.
        self._wanted: Policy | None = None
        self._in_force: Policy | None = None
        self._sent: Policy | None = None
        self._sent_for = 0
        self._sent_single = False
        self._refused: Policy | None = None
        self._errors: tuple[str, ...] = ()  # why `_refused` was, which is the wanted policy or none
        # What the daemon said last.
        self.version = ""
        self.policy_hash = ""
        self.counters: Counters | None = None
        self._pushes: list[tuple[int, Push]] = []

    # -- events --------------------------------------------------------------------------------------------------------

    def resume(self, attachment: Attachment, message: control_pb2.Attachment) -> None:
        """Take what a SyncRequest says of it.

        Block-all may be what the daemon has laid over its policy for the time without us, and then neither that policy
        nor its hash is told: what lies below counts as unknown.
        """
        before, now = self.attachment.daemon, attachment.daemon
        if (before.version, before.capabilities) != (now.version, now.capabilities):
            self.forget_refusal()  # another program may take what that one did not
        self.attachment = attachment
        self.fresh = False
        self.version = message.policy_version
        self.policy_hash = "" if message.mode == types_pb2.POLICY_MODE_BLOCK_ALL else message.policy_hash
        if self._in_force is not None and not self._reported(self._in_force):
            self._in_force = None

    def decide(self, policy: Policy, question: int) -> None:
        """Take the answer of `policy_for` to that question."""
        self._wanted = policy
        self.decided = question
        self.failures = 0
        self.fault = ""
        if policy != self._refused:
            self.forget_refusal()

    def forget_refusal(self) -> None:
        """Send again what the daemon has refused, if that is still wanted."""
        self._refused = None
        self._errors = ()

    def fail(self, question: int, fault: str) -> None:
        """Note that `policy_for` failed on that question."""
        self.failures += 1
        self.fault = fault
        self._settle(Outcome.UNDECIDED, question, (fault,))

    def command(self, nonce: str) -> bytes | None:
        """Return the command to send now and count it as sent; None for none, and then whoever waits is told.

        Without a nonce there will be no result: the command counts as unconfirmed at once.
        """
        policy = self._due()
        if policy is None:
            return None
        body = None
        if self.fresh:
            body = policy.ack_body
        elif self._in_force is not None:
            body = single_command(self._in_force, policy)
        self._sent_single = body is not None and not self.fresh
        self._sent_for = self.decided
        self.fresh = False
        if nonce:
            self._sent = policy
        else:
            self._in_force = None
            self._settle(Outcome.UNCONFIRMED, self.decided)
        return framed(policy.bulk_body if body is None else body, self.attachment.id, nonce)

    def due(self) -> bool:
        """Tell whether there is something to send now; if not, whoever waits for the newest answer is told."""
        return self._due() is not None

    def answered(self, *, ok: bool, version: str, policy_hash: str, errors: Sequence[str]) -> str:
        """Take the result of the command under way; return what is bad or odd about it, empty if nothing is."""
        sent, self._sent = self._sent, None
        self.version, self.policy_hash = version, policy_hash
        if sent is None:
            return "a result for no command"
        if not ok:
            why = tuple(errors) or UNSAID
            if sent == self._wanted:  # else another one has been decided, and it may be this one's turn again later
                self._refused, self._errors = sent, why
            self._settle(Outcome.REFUSED, self._sent_for, why)
            return "; ".join(why)
        self._in_force = sent
        if policy_hash and policy_hash != sent.hash:
            if self._sent_single:
                self._in_force = None  # we were wrong about what it had: send all of it
                return "another policy than expected after a single command; the whole policy follows"
            self._settle(Outcome.APPLIED, self._sent_for)
            return "another hash than ours for a policy that it applied"
        self._settle(Outcome.APPLIED, self._sent_for)
        return ""

    def lose(self) -> None:
        """Note that the stream is lost: results of this stream will not come."""
        if self._sent is not None:
            self._sent = self._in_force = None  # it may have been applied
        self.stop_retry()
        self._settle(Outcome.DISCONNECTED, self.asked)

    def leave(self) -> None:
        """Note that the attachment is gone."""
        self.gone = True
        self.stop_retry()
        self._settle(Outcome.GONE, self.asked)

    def stop_retry(self) -> None:
        """Do not ask again by a timer."""
        if self.retry is not None:
            self.retry.cancel()
            self.retry = None

    # -- questions -----------------------------------------------------------------------------------------------------

    def join(self, push: Push) -> None:
        """Tell `push` what becomes of the question asked last."""
        self._pushes.append((self.asked, push))

    def leave_push(self, push: Push) -> None:
        """Tell it no more."""
        self._pushes = [pair for pair in self._pushes if pair[1] is not push]

    def result(self, outcome: Outcome, errors: tuple[str, ...] = ()) -> Result:
        """Return a result about the newest wanted policy."""
        return Result(self.attachment, outcome, self._wanted.version if self._wanted else "", errors)

    def status(self) -> AttachmentStatus:
        """Return a snapshot."""
        state = self._state()
        errors = {State.UNDECIDED: (self.fault,), State.REFUSED: self._errors}
        return AttachmentStatus(
            self.attachment,
            state,
            self.version,
            self.policy_hash,
            self._wanted.version if self._wanted else None,
            errors.get(state, ()),
            self.counters,
        )

    def _state(self) -> State:
        if self.record.link is None:
            return State.DISCONNECTED
        if self.fault:
            return State.UNDECIDED
        if self._wanted is None or self.decided < self.asked:
            return State.DECIDING
        if self._wanted == self._refused:
            return State.REFUSED
        if self._wanted == self._in_force:
            return State.IN_SYNC
        if self._sent is None and self._sent_for == self.decided and not self.record.confirms:
            return State.UNCONFIRMED
        return State.PENDING

    # -- leaves --------------------------------------------------------------------------------------------------------

    def _due(self) -> Policy | None:
        """Return the policy to send now."""
        wanted = self._wanted
        if wanted is None or self._sent is not None or self.gone or self.record.link is None:
            return None
        if self.fresh:
            return wanted
        if wanted == self._refused:
            self._settle(Outcome.REFUSED, self.decided, self._errors)
            return None
        if not self.record.confirms:
            return None if self._sent_for == self.decided else wanted
        if self._in_force is None and self._reported(wanted):
            self._in_force = wanted
        if wanted == self._in_force:
            self._settle(Outcome.UNCHANGED, self.decided)
            return None
        return wanted

    def _reported(self, policy: Policy) -> bool:
        """Tell whether the daemon last said that this policy is in force."""
        return bool(self.policy_hash) and self.policy_hash == policy.hash and self.version == policy.version

    def _settle(self, outcome: Outcome, question: int, errors: tuple[str, ...] = ()) -> None:
        """Tell all who wait for that question or an older one."""
        if not self._pushes:
            return
        waiting, self._pushes = self._pushes, []
        for asked, push in waiting:
            if asked <= question:
                push.settle(self, self.result(outcome, errors))
            else:
                self._pushes.append((asked, push))
