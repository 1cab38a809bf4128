"""What survives the daemon: attachments with their policies, and the daemon's id, in SQLite.

Owns `data_dir`: its permissions, the lock that keeps a second daemon out, the schema and its version. All work on the
database happens in one thread, away from the event loop, in small transactions. It knows nothing of kernel or network;
policies are text to it (see `policy_codec`).

Durability: a row is written before anything of an attachment is in the kernel (`reserve`), so that whatever an
interrupted attach left there is found again; without fsync, because pins do not survive a power cut either. It is made
durable with the first policy (`save`, fsync before it returns). After that every policy change is durable before it is
acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import sqlite3
import stat
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import structlog

from netfence.errors import NetfenceError, PreconditionError

SCHEMA_VERSION = 2  # PRAGMA user_version; raise it with every change of SCHEMA and write the migration
DATABASE = "state.db"
LOCK = "state.lock"
BUSY_S = 5.0  # how long a write waits for a human's sqlite3 shell; nobody else writes

SCHEMA = """
CREATE TABLE IF NOT EXISTS daemon (
  id TEXT NOT NULL,
  contact TEXT                   -- JSON: when the control plane was last there, on all clocks; NULL: never
) STRICT;
CREATE TABLE IF NOT EXISTS attachments (
  id TEXT PRIMARY KEY,
  slot INTEGER NOT NULL UNIQUE,
  kind TEXT NOT NULL,            -- interface | cgroup
  name TEXT NOT NULL,            -- interface name or cgroup path
  identity TEXT NOT NULL,        -- what tells this target from a later one of the same name
  link_kind TEXT NOT NULL,       -- kind of interface ("" for cgroups), for the look-up after a reboot
  direction TEXT NOT NULL,       -- workload | host
  hook TEXT NOT NULL,            -- tc | xdp
  mechanism TEXT NOT NULL,       -- tcx | clsact | cgroup-link | ...
  metadata TEXT NOT NULL,        -- JSON object
  dns_host TEXT NOT NULL,
  dns_port INTEGER NOT NULL,
  boot_id TEXT NOT NULL,         -- of the last attach or take-over: pins of an earlier boot are gone
  attached_at REAL NOT NULL,     -- seconds since the epoch
  policy TEXT,                   -- see policy_codec; NULL until the first policy was acknowledged
  policy_version TEXT NOT NULL,
  dns_allowed INTEGER NOT NULL,
  dns_blocked INTEGER NOT NULL,
  acked INTEGER NOT NULL DEFAULT 1 -- 0: attached without waiting, and no control plane gave it a policy yet
) STRICT;
"""

# From each older version to the next one.
MIGRATIONS: dict[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE daemon ADD COLUMN contact TEXT",
        "ALTER TABLE attachments ADD COLUMN acked INTEGER NOT NULL DEFAULT 1",
    ),
}

COLUMNS = (
    "id, slot, kind, name, identity, link_kind, direction, hook, mechanism, metadata, dns_host, dns_port,"
    " boot_id, attached_at, policy, policy_version, dns_allowed, dns_blocked, acked"
)
_INSERT = f"INSERT INTO attachments ({COLUMNS}) VALUES ({', '.join('?' for _ in COLUMNS.split(','))})"  # noqa: S608 - constants
_SAVE = (
    "UPDATE attachments SET policy=?, policy_version=?, mechanism=?, dns_allowed=?, dns_blocked=?, acked=? WHERE id=?"
)
_SELECT = f"SELECT {COLUMNS} FROM attachments ORDER BY attached_at, id"  # noqa: S608 - constants

DISK = "free disk space, or check the disk"
_OF_THE_DISK = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}

T = TypeVar("T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """One attachment as it is stored; `policy` is None until its first policy was in force (see `Store.save`)."""

    id: str
    slot: int
    kind: str
    name: str
    identity: str
    link_kind: str
    direction: str
    hook: str
    mechanism: str
    dns_host: str
    dns_port: int
    boot_id: str
    attached_at: float
    metadata: Mapping[str, str] = field(default_factory=dict)
    policy: str | None = None
    policy_version: str = ""
    dns_allowed: int = 0
    dns_blocked: int = 0
    acked: bool = True


class Store:
    """The state of one daemon. Open it with `Store.open`; every method may raise NetfenceError naming the file."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lock_fd: int, pool: ThreadPoolExecutor) -> None:
        self._path = path
        self._connection = connection
        self._lock_fd = lock_fd
        self._pool = pool
        self.daemon_id = ""
        self.contact: str | None = None
        self.saved: dict[str, Row] = {}  # what could be read of a damaged database, by id

    @classmethod
    def open(cls, data_dir: Path) -> Store:
        """Create or open the state in `data_dir`. Blocks; call it before the loop does anything else.

        Raises PreconditionError when the directory is not ours alone, another daemon holds it, or the schema is of
        another version.
        """
        _own_directory(data_dir)
        lock_fd = _lock(data_dir)
        path = data_dir / DATABASE
        pool = ThreadPoolExecutor(1, thread_name_prefix="netfence-store")
        saved: list[Row] = []
        try:
            try:
                connection, daemon_id, contact = pool.submit(_connect, path).result()
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                saved, known = _set_aside(path, error)
                connection, daemon_id, contact = pool.submit(_connect, path, known).result()
            self = cls(path, connection, lock_fd, pool)
            self.daemon_id, self.contact, self.saved = daemon_id, contact, {row.id: row for row in saved}
        except sqlite3.Error as error:
            pool.shutdown()
            os.close(lock_fd)
            remedy = (
                DISK if error.sqlite_errorcode & 0xFF in _OF_THE_DISK else "move the file away to start without state"
            )
            raise PreconditionError(f"open state {path}: {error}; {remedy}") from error
        except BaseException:
            pool.shutdown()
            os.close(lock_fd)
            raise
        return self

    async def load(self) -> list[Row]:
        """Return every stored attachment, oldest first; none if the database is damaged, which is set aside then."""
        try:
            return await self._run("load", _load)
        except (NetfenceError, ValueError) as error:
            cause = error.__cause__ if isinstance(error, NetfenceError) else error
            if cause is None or not _is_damage(cause):
                raise
            damage = cause

        def replace_it() -> list[Row]:
            self._connection.close()
            saved, _ = _set_aside(self._path, damage)
            self._connection, _, _ = _connect(self._path, (self.daemon_id, self.contact))
            return saved

        saved = await asyncio.get_running_loop().run_in_executor(self._pool, replace_it)
        self.saved = {row.id: row for row in saved}
        return []

    async def reserve(self, row: Row) -> None:
        """Insert an attachment that is about to be hooked; survives our death, not a power cut (see the module)."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(_INSERT, _values(row))

        await self._run("reserve", work, durable=False)

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
        await self._run("remove", lambda db: db.execute("DELETE FROM attachments WHERE id=?", (attachment_id,)))

    async def close(self) -> None:
        """Close the database and let go of the directory. Idempotent."""
        if self._lock_fd < 0:
            return
        await asyncio.get_running_loop().run_in_executor(self._pool, self._connection.close)
        self._pool.shutdown()
        os.close(self._lock_fd)
        self._lock_fd = -1

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
    return isinstance(error, ValueError) or (
        isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
    )


def _set_aside(path: Path, damage: BaseException) -> tuple[list[Row], tuple[str, str | None] | None]:
    """Rename a damaged database; return what can be read of it: rows, and the daemon's id and last contact."""
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    for suffix in ("-shm", "-wal", ""):  # the log first: a new database must not find it
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    rows: list[Row] = []
    known = None
    connection = sqlite3.connect(f"file:{aside}?mode=ro", uri=True)
    with contextlib.closing(connection), contextlib.suppress(sqlite3.Error, ValueError, TypeError):
        known = connection.execute("SELECT id, contact FROM daemon").fetchone()
        for values in connection.execute(_SELECT.partition(" ORDER")[0]):
            rows.append(_row(values))  # noqa: PERF401 - those before the damage count
    effect = "fences stay in force and are recovered from the kernel; metadata and names may be lost"
    log.critical("state_damaged", file=str(path), error=str(damage), moved_to=str(aside), read=len(rows), effect=effect)
    return rows, known


def _connect(path: Path, known: tuple[str, str | None] | None = None) -> tuple[sqlite3.Connection, str, str | None]:
    """Open the database in this thread; return it, the daemon id and when the control plane was last there.

    `known`: those two, for a new database.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA trusted_schema=OFF")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        _check_version(path, version)
        connection.execute("BEGIN IMMEDIATE")
        for older in range(version or SCHEMA_VERSION, SCHEMA_VERSION):
            for statement in MIGRATIONS[older]:
                connection.execute(statement)
        for statement in SCHEMA.split(";\n"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        if (row := connection.execute("SELECT id, contact FROM daemon").fetchone()) is None:
            row = known or (str(uuid.uuid4()), None)
            connection.execute("INSERT INTO daemon VALUES (?, ?)", row)
        connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection, str(row[0]), row[1]


def _check_version(path: Path, version: int) -> None:
    if version not in (0, *MIGRATIONS, SCHEMA_VERSION):
        raise PreconditionError(
            f"open state {path}: schema version {version}, this netfenced reads {SCHEMA_VERSION};"
            " run the version that wrote it, or move the file away to start without state"
        )


def _load(connection: sqlite3.Connection) -> list[Row]:
    return [_row(values) for values in connection.execute(_SELECT).fetchall()]


def _row(values: Sequence[Any]) -> Row:
    data = dict(zip([name.strip() for name in COLUMNS.split(",")], values, strict=True))
    metadata, acked = json.loads(data.pop("metadata")), bool(data.pop("acked"))
    return replace(Row(**data), metadata=metadata, acked=acked)


def _values(row: Row) -> tuple[object, ...]:
    metadata = json.dumps(dict(row.metadata), sort_keys=True)
    data = {name: getattr(row, name) for name in Row.__dataclass_fields__} | {"metadata": metadata}
    return tuple(data[name.strip()] for name in COLUMNS.split(","))
