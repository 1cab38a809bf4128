"""The book of daemons and attachments: who is connected, what each has, and what their events change.

Owns the records and the two indices, by daemon and by attachment. Pure bookkeeping on the loop's thread: a stream is a
`Link` to it, and nothing here waits. Daemons that are away stay in it for a while, so that a policy they refused is not
sent to them again when they come back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import structlog

from netfence.controlplane.entry import Entry, Link, Record
from netfence.controlplane.hush import Hush
from netfence.controlplane.limits import ENTRY_BYTES, MAX_AWAITED_QUERIES, MAX_ID_BYTES, Limits
from netfence.controlplane.views import Daemon, attachment_of, counters_of
from netfence.errors import ExhaustedError, InvalidError
from netfence.v1 import control_pb2

hush = Hush(structlog.get_logger(__name__))


class Book:
    """All daemons. `ask` is called for every attachment about which `policy_for` has to be asked."""

    def __init__(self, ask: Callable[[Entry], None], limits: Limits) -> None:
        self._ask = ask
        self._limits = limits
        self.changes = 0  # grows with whatever a snapshot shows
        self._records: dict[str, Record] = {}
        self._by_id: dict[str, list[Entry]] = {}
        self._awaited: dict[str, list[asyncio.Future[None]]] = {}
        self._awaiting = 0

    # -- streams -------------------------------------------------------------------------------------------------------

    def arrive(self, link: Link, daemon: Daemon, sync: control_pb2.SyncRequest) -> Record:
        """Note a daemon that has connected, and what it has; an older stream of it is ended.

        Raises InvalidError for a bad SyncRequest and ExhaustedError for one more than there may be.
        """
        _check_sync(sync, self._limits.max_attachments)
        record = self._records.get(daemon.id)
        if record is None:
            self._make_room()
            record = self._records[daemon.id] = Record(daemon)
        elif (old := record.link) is not None:
            same = record.daemon.hostname == daemon.hostname
            hush.warning(
                "daemon_connected_twice",
                daemon=daemon.id,
                old=f"{record.daemon.hostname} {record.daemon.address}",
                new=f"{daemon.hostname} {daemon.address}",
                remedy="" if same else "two hosts have the same daemon_id: was data_dir copied? give each its own",
            )
            self.leave(daemon.id, old)
            old.end("ABORTED", f"daemon {daemon.id} has connected anew from {daemon.hostname} {daemon.address}")
        record.link, record.daemon = link, daemon
        record.confirms = "nonce" in daemon.capabilities
        record.since = record.last_seen = time.time()
        record.size = sync.ByteSize() + ENTRY_BYTES * len(sync.attachments)
        self.changes += 1
        self._resume(record, sync)
        hush.info(
            "daemon_connected",
            daemon=daemon.id,
            hostname=daemon.hostname,
            address=daemon.address,
            version=daemon.version or "original",
            attachments=len(record.entries),
        )
        return record

    def leave(self, daemon_id: str, link: Link) -> None:
        """Note that a stream has ended; nothing happens if a newer one has taken over, or it never arrived."""
        record = self._records.get(daemon_id)
        if record is None or record.link is not link:
            return
        self.changes += 1
        record.link = None
        record.since = time.time()
        for entry in record.asking:
            entry.queued = False
        record.asking.clear()
        for entry in list(record.entries.values()):
            if entry.fresh:
                self._drop(entry)  # its attach is rolled back
            else:
                entry.lose()
        hush.info("daemon_disconnected", daemon=record.daemon.id, hostname=record.daemon.hostname)

    # -- events --------------------------------------------------------------------------------------------------------

    def subscribe(self, record: Record, message: control_pb2.Subscribed) -> None:
        """Take a new attachment."""
        self.changes += 1
        if _bad_id(message.id) or (
            message.id not in record.entries and len(record.entries) >= self._limits.max_attachments
        ):
            hush.warning("attachment_ignored", daemon=record.daemon.id, attachment=message.id[:MAX_ID_BYTES])
            return
        if (old := record.entries.get(message.id)) is not None:
            self._drop(old)
        record.size += message.ByteSize() + ENTRY_BYTES  # until the next connection, which tells what is left
        self._add(Entry(attachment_of(message, record.daemon), record, fresh=True))

    def unsubscribe(self, record: Record, message: control_pb2.Unsubscribed) -> None:
        """Take an attachment away."""
        self.changes += 1
        if (entry := record.entries.get(message.id)) is not None:
            if message.error:
                hush.warning(
                    "attach_failed", daemon=record.daemon.id, attachment=message.id, error=message.error[:1000]
                )
            self._drop(entry)

    def heartbeat(self, record: Record, message: control_pb2.Heartbeat) -> None:
        """Take counters; those of unknown attachments are of one that left just now."""
        self.changes += 1
        at = time.time()
        for stats in message.stats:
            if (entry := record.entries.get(stats.id)) is not None:
                entry.counters = counters_of(stats, at)

    # -- questions -----------------------------------------------------------------------------------------------------

    def records(self) -> Iterator[Record]:
        """Yield every daemon."""
        yield from self._records.values()

    def entries(self) -> Iterator[Entry]:
        """Yield every attachment of every daemon."""
        for record in self._records.values():
            yield from record.entries.values()

    def with_id(self, attachment_id: str) -> list[Entry]:
        """Return the attachments with that id: one, but for daemons that make up theirs differently than ours.

        Those of daemons that are away only count where no other has it: its daemon may be back under another name.
        """
        every = self._by_id.get(attachment_id, ())
        return [entry for entry in every if entry.record.link is not None] or list(every)

    async def arrival(self, attachment_id: str, timeout_s: float) -> None:
        """Return when an attachment with that id is there, or the time is over."""
        if attachment_id in self._by_id or self._awaiting >= MAX_AWAITED_QUERIES:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._awaited.setdefault(attachment_id, [])
        waiting.append(future)
        self._awaiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            pass
        finally:
            self._awaiting -= 1
            waiting.remove(future)
            if not waiting and self._awaited.get(attachment_id) is waiting:
                del self._awaited[attachment_id]

    def sweep(self) -> None:
        """End stuck streams and forget daemons that are away for too long."""
        now = time.monotonic()
        for record in self._records.values():
            if record.link is not None:
                record.link.check(now)
        since = time.time() - self._limits.forget_after_s
        kept = 0
        away = [record for record in self._records.values() if record.link is None]
        for record in sorted(away, key=lambda record: record.since, reverse=True):
            kept += record.size
            if record.since < since or kept > self._limits.max_away_bytes:
                self._forget(record)

    # -- leaves --------------------------------------------------------------------------------------------------------

    def _resume(self, record: Record, sync: control_pb2.SyncRequest) -> None:
        """Bring the entries in line with what the daemon lists, and ask about each."""
        listed = {message.id: message for message in sync.attachments}
        for entry in [one for one in record.entries.values() if one.attachment.id not in listed]:
            self._drop(entry)
        for message in listed.values():
            attachment = attachment_of(message, record.daemon)
            known = record.entries.get(message.id)
            entry = Entry(attachment, record, fresh=False) if known is None else known
            entry.resume(attachment, message)
            if known is None:
                self._add(entry)
            else:
                self._ask(entry)

    def _add(self, entry: Entry) -> None:
        attachment_id = entry.attachment.id
        entry.record.entries[attachment_id] = entry
        self._by_id.setdefault(attachment_id, []).append(entry)
        for future in self._awaited.get(attachment_id, ()):
            if not future.done():
                future.set_result(None)
        self._ask(entry)

    def _drop(self, entry: Entry) -> None:
        attachment_id = entry.attachment.id
        del entry.record.entries[attachment_id]
        same = self._by_id[attachment_id]
        same.remove(entry)
        if not same:
            del self._by_id[attachment_id]
        entry.leave()

    def _make_room(self) -> None:
        """Forget the daemon that is away longest if the book is full; ExhaustedError if none is away."""
        if len(self._records) < self._limits.max_daemons:
            return
        away = [record for record in self._records.values() if record.link is None]
        if not away:
            raise ExhaustedError(
                f"{len(self._records)} daemons are connected and there may be no more; add a control plane"
            )
        self._forget(min(away, key=lambda record: record.since))

    def _forget(self, record: Record) -> None:
        self.changes += 1
        for entry in list(record.entries.values()):
            self._drop(entry)
        del self._records[record.daemon.id]


def _check_sync(sync: control_pb2.SyncRequest, most: int) -> None:
    if _bad_id(sync.daemon_id):
        raise InvalidError(f"sync: daemon_id is empty or longer than {MAX_ID_BYTES} bytes; set daemon_id")
    if len(sync.attachments) > most:
        raise ExhaustedError(f"sync: {len(sync.attachments)} attachments, and a daemon may have {most}")
    if any(_bad_id(attachment.id) for attachment in sync.attachments):
        raise InvalidError(f"sync: an attachment's id is empty or longer than {MAX_ID_BYTES} bytes")


def _bad_id(text: str) -> bool:
    return not text or len(text.encode()) > MAX_ID_BYTES
