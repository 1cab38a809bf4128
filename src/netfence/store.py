"""What survives the daemon: attachments with their policies, and the daemon's id, in SQLite.

Owns `data_dir`: its permissions, the lock that keeps a second daemon out, the database and what becomes of a damaged
one; the tables are `schema`'s. All work on the database happens in one thread, away from the event loop, in small
transactions. It knows nothing of kernel or network; policies are text to it (see `policy_codec`).

Durability: a row is written before anything of an attachment is in the kernel (`reserve`), so that whatever an
interrupted attach left there is found again; without fsync, because pins do not survive a power cut either. It is made
durable with the first policy (`save`, fsync before it returns). After that every policy change is durable before it is
acknowledged.

A damaged database is read as far as it can be, and takes the name of a new one that holds what was read in its table
`saved`: however often the daemon dies before all of that is done, the next start finds it there.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import structlog

from netfence.errors import NetfenceError, PreconditionError
from netfence.schema import SCHEMA_VERSION, Known, Row, connect, insert, require_known, select

__all__ = ["DATABASE", "SCHEMA_VERSION", "Claim", "Row", "Store"]

DATABASE = "state.db"
LOCK = "state.lock"
SUFFIXES = ("", "-shm", "-wal")  # of the files that SQLite keeps for a database

_SAVE = (
    "UPDATE attachments SET policy=?, policy_version=?, mechanism=?, dns_allowed=?, dns_blocked=?, acked=? WHERE id=?"
)
_KNOWN = "SELECT id, contact FROM daemon WHERE typeof(id) = 'text' AND typeof(contact) IN ('text', 'null')"
_SAVE_AUDITED = (
    "INSERT INTO audited SELECT id, ? FROM attachments WHERE id=? ON CONFLICT(id) DO UPDATE SET names=excluded.names"
)

DISK = "free disk space, or check the disk"
_OF_THE_DISK = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Claim:
    """`data_dir` as ours alone, until `close`. Nothing in it is changed."""

    def __init__(self, data_dir: Path) -> None:
        """Blocks. Raises PreconditionError when the directory is not ours alone, or of another version or daemon."""
        _own_directory(data_dir)
        self._fd = _lock(data_dir)
        try:
            require_known(data_dir / DATABASE)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the directory. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class Store:
    """The state of one daemon. Open it with `Store.open`; every method may raise NetfenceError naming the file."""

    def __init__(
        self,
        path: Path,
        connection: sqlite3.Connection,
        known: Known,
        saved: dict[str, Row],
        claim: Claim | None,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._path = path
        self._connection = connection
        self._claim = claim  # of our own
        self._pool = pool
        self._closed = False
        self.daemon_id, self.contact = known
        self.saved = saved  # what could be read of a damaged database, by id, until `settle`

    @classmethod
    def open(cls, data_dir: Path, claim: Claim | None = None) -> Store:
        """Create or open the state in `data_dir`, and bring it to this version: older ones cannot read it any more.

        `claim`: of that directory, if it is claimed already, and stays so longer than this. Blocks. Raises as `Claim`
        does.
        """
        own = Claim(data_dir) if claim is None else None
        path = data_dir / DATABASE
        pool = ThreadPoolExecutor(1, thread_name_prefix="netfence-store")
        try:
            return cls(path, *pool.submit(_open, path).result(), own, pool)
        except BaseException as error:
            pool.shutdown()
            if own is not None:
                own.close()
            if not isinstance(error, sqlite3.Error):
                raise
            remedy = (
                DISK if error.sqlite_errorcode & 0xFF in _OF_THE_DISK else "move the file away to start without state"
            )
            raise PreconditionError(f"open state {path}: {error}; {remedy}") from error

    async def load(self) -> list[Row]:
        """Return every stored attachment, oldest first; none if the database is damaged, which is set aside then."""
        try:
            return await self._run("load", lambda db: list(select(db)))
        except (NetfenceError, ValueError) as error:
            cause = error.__cause__ if isinstance(error, NetfenceError) else error
            if cause is None or not _is_damage(cause):
                raise
            damage = cause

        def replace_it() -> dict[str, Row]:
            self._connection.close()
            self._connection, _, saved = _renew(self._path, damage, (self.daemon_id, self.contact))
            return saved

        try:
            self.saved = await asyncio.get_running_loop().run_in_executor(self._pool, replace_it)
        except sqlite3.Error as error:
            raise NetfenceError(f"replace damaged state {self._path}: {error}; {DISK}") from error
        return []

    async def settle(self) -> None:
        """Forget what was read of a damaged database: each row of it is stored again, or never will be. Durable."""
        await self._run("settle", lambda db: db.execute("DELETE FROM saved"))
        self.saved = {}

    async def reserve(self, row: Row) -> None:
        """Insert an attachment that is about to be hooked; survives our death, not a power cut (see the module)."""
        await self._run("reserve", lambda db: insert(db, row), durable=False)

    async def save(self, row: Row, encode: Callable[[], str]) -> None:
        """Store a policy, with the row's version of it, mechanism and query counters; durable when it returns.

        `encode` makes the text and runs in the store's thread, because a large policy takes a tenth of a second.
        """
        text = await asyncio.get_running_loop().run_in_executor(self._pool, encode)
        values = (text, row.policy_version, row.mechanism, row.dns_allowed, row.dns_blocked, row.acked, row.id)

        def work(connection: sqlite3.Connection) -> None:
            if connection.execute(_SAVE, values).rowcount != 1:
                raise NetfenceError(f"store policy of {row.id}: no such attachment in {self._path}")

        await self._run("save", work)

    async def save_counters(self, counters: Mapping[str, tuple[int, int]]) -> None:
        """Store query counters (allowed, blocked) by attachment id; no fsync."""
        rows = [(allowed, blocked, name) for name, (allowed, blocked) in counters.items()]

        def work(connection: sqlite3.Connection) -> None:
            connection.executemany("UPDATE attachments SET dns_allowed=?, dns_blocked=? WHERE id=?", rows)

        await self._run("save_counters", work, durable=False)

    async def save_audited(self, attachment_id: str, encode: Callable[[], str]) -> None:
        """Store the audited names of an attachment, unless it is gone; no fsync. For `encode` see `save`."""
        text = await asyncio.get_running_loop().run_in_executor(self._pool, encode)
        await self._run("save_audited", lambda db: db.execute(_SAVE_AUDITED, (text, attachment_id)), durable=False)

    async def load_audited(self) -> dict[str, str]:
        """Return the stored audited names by attachment id."""
        return await self._run("load_audited", lambda db: dict(db.execute("SELECT id, names FROM audited").fetchall()))

    async def save_contact(self, contact: str) -> None:
        """Store when the control plane was last there; no fsync: a power cut may make it half a minute older."""
        await self._run("save_contact", lambda db: db.execute("UPDATE daemon SET contact=?", (contact,)), durable=False)
        self.contact = contact

    async def replace(self, row: Row) -> None:
        """Store anew where and how an attachment is hooked (slot, mechanism, identity, boot); its policy stays."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "UPDATE attachments SET slot=?, name=?, identity=?, mechanism=?, boot_id=? WHERE id=?",
                (row.slot, row.name, row.identity, row.mechanism, row.boot_id, row.id),
            )

        await self._run("replace", work)

    async def move(self, attachment_id: str, name: str) -> None:
        """Store the new name of a renamed interface."""
        values = (name, attachment_id)
        await self._run("move", lambda db: db.execute("UPDATE attachments SET name=? WHERE id=?", values))

    async def remove(self, attachment_id: str) -> None:
        """Delete an attachment; one that is not there is no error."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM attachments WHERE id=?", (attachment_id,))
            connection.execute("DELETE FROM audited WHERE id=?", (attachment_id,))

        await self._run("remove", work)

    async def close(self) -> None:
        """Close the database, and let go of the directory unless somebody else has claimed it. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._pool, self._connection.close)
        self._pool.shutdown()
        if self._claim is not None:
            self._claim.close()

    async def _run(self, what: str, work: Callable[[sqlite3.Connection], T], *, durable: bool = True) -> T:
        def transaction() -> T:
            try:
                # The level cannot change inside a transaction.
                self._connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    result = work(self._connection)
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise NetfenceError(f"{what} state in {self._path}: {error}; {DISK}") from error
            return result

        return await asyncio.get_running_loop().run_in_executor(self._pool, transaction)


def _own_directory(data_dir: Path) -> None:
    """Create the directory 0700, or refuse one that others may write."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = data_dir.stat()
    except OSError as error:
        why = error.strerror
        raise PreconditionError(f"open data_dir {data_dir}: {why}; set data_dir to a writable path") from error
    if not stat.S_ISDIR(info.st_mode):
        raise PreconditionError(f"open data_dir {data_dir}: not a directory; set data_dir to a directory")
    if info.st_uid != os.geteuid() or info.st_mode & 0o022:
        raise PreconditionError(
            f"open data_dir {data_dir}: others may write it (owner {info.st_uid}, mode {info.st_mode & 0o7777:04o});"
            f" run chown {os.geteuid()} and chmod 0700 on it"
        )


def _lock(data_dir: Path) -> int:
    path = data_dir / LOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise PreconditionError(f"lock {path}: {error.strerror}; check the directory's permissions") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise PreconditionError(
            f"lock {path}: another netfenced uses this data_dir; stop it or set another data_dir"
        ) from error
    return fd


def _is_damage(error: BaseException) -> bool:
    """Tell whether the file itself is broken, not the disk, its rights or another's lock."""
    if isinstance(error, sqlite3.OperationalError):
        return not hasattr(error, "sqlite_errorcode")  # not SQLite's, but Python's: text that is not UTF-8
    return isinstance(error, (ValueError, sqlite3.DatabaseError))


def _open(path: Path) -> tuple[sqlite3.Connection, Known, dict[str, Row]]:
    """Open the database, or a new one in place of a damaged one; return it with what it knows and what was saved."""
    try:
        connection, known = connect(path)
    except sqlite3.DatabaseError as error:
        if not _is_damage(error):
            raise
        return _renew(path, error)
    try:
        return connection, known, {row.id: row for row in select(connection, "saved")}
    except (sqlite3.DatabaseError, ValueError, TypeError) as error:
        connection.close()
        if not _is_damage(error):
            raise
        return _renew(path, error, known)
    except BaseException:
        connection.close()
        raise


def _renew(
    path: Path, damage: BaseException, known: Known | None = None
) -> tuple[sqlite3.Connection, Known, dict[str, Row]]:
    """Put a new database with what can be read of a damaged one in its place, and return it as `_open` does.

    The new one is whole before it takes the name, and the damaged one keeps its own until then.
    """
    found, read = _read(path)
    fresh = path.with_name(f"{path.name}.new")
    for suffix in SUFFIXES:  # what a start that was cut short left
        fresh.with_name(fresh.name + suffix).unlink(missing_ok=True)
    connection, _ = connect(fresh, known or found)
    with contextlib.closing(connection):
        connection.execute("BEGIN")
        for row in read.values():
            try:
                insert(connection, row, "saved")
            except (sqlite3.IntegrityError, sqlite3.ProgrammingError, TypeError) as error:
                log.error("saved_row_makes_no_sense", attachment=row.id, error=str(error), effect="it is lost")  # noqa: TRY400
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode=DELETE")  # or what its log has would not go with it
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    try:
        os.link(path, aside)
        for suffix in SUFFIXES[1:]:  # a new database must not find the log of another
            with contextlib.suppress(FileNotFoundError):
                path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
        fresh.replace(path)
    except OSError as error:
        what = f"set damaged state {path} aside as {aside}: {error.strerror}"
        raise PreconditionError(f"{what}; {DISK}, or move the file away") from error
    effect = "fences stay in force; they are known again from the kernel and what was read; the rest is lost"
    log.critical("state_damaged", file=str(path), error=str(damage), moved_to=str(aside), read=len(read), effect=effect)
    connection, known = connect(path)
    return connection, known, {row.id: row for row in select(connection, "saved")}


def _read(path: Path) -> tuple[Known | None, dict[str, Row]]:
    """Return what can be read of a damaged database: what was saved of one before it, and rows from both their ends."""
    known: Known | None = None
    rows: dict[str, Row] = {}
    unreadable = (sqlite3.Error, ValueError, TypeError)
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        with contextlib.suppress(*unreadable):
            (known,) = connection.execute(_KNOWN).fetchall()
        for table in ("saved", "attachments"):
            for order in ("rowid", "rowid DESC"):
                with contextlib.suppress(*unreadable):
                    for row in select(connection, table, order):
                        rows[row.id] = row
    return known, rows
