"""The tables of `state.db`: their columns and versions, what a row is in Python, and how the file is opened.

Owns the SQL that makes tables, adds rows and reads them; when and why rows change is the store's.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

from netfence.errors import PreconditionError

SCHEMA_VERSION = 3  # PRAGMA user_version; raise it with every change of SCHEMA and write the migration
BUSY_S = 5.0  # how long a write waits for a human's sqlite3 shell; nobody else writes

_ATTACHMENT = """
  id TEXT PRIMARY KEY,
  slot INTEGER NOT NULL,
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
"""

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS daemon (
  id TEXT NOT NULL,
  contact TEXT                   -- JSON: when the control plane was last there, on all clocks; NULL: never
) STRICT;
CREATE TABLE IF NOT EXISTS attachments ({_ATTACHMENT}, UNIQUE (slot)) STRICT;
CREATE TABLE IF NOT EXISTS saved ({_ATTACHMENT}) STRICT;
CREATE TABLE IF NOT EXISTS audited (
  id TEXT PRIMARY KEY,           -- of the attachment
  names TEXT NOT NULL            -- see audited.AuditMemory
) STRICT;
"""
"""`saved`: what could be read of a damaged database, until each row is an attachment again or refused."""

# From each older version to the next one.
MIGRATIONS: dict[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE daemon ADD COLUMN contact TEXT",
        "ALTER TABLE attachments ADD COLUMN acked INTEGER NOT NULL DEFAULT 1",
    ),
    2: (),  # tables more
}

COLUMNS = (
    "id, slot, kind, name, identity, link_kind, direction, hook, mechanism, metadata, dns_host, dns_port,"
    " boot_id, attached_at, policy, policy_version, dns_allowed, dns_blocked, acked"
)
_NAMES = [name.strip() for name in COLUMNS.split(",")]

Known = tuple[str, str | None]  # the daemon's id, and when the control plane was last there


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


def insert(connection: sqlite3.Connection, row: Row, table: str = "attachments") -> None:
    """Add a row; raises sqlite3.IntegrityError where a column is of another type or something is there already."""
    metadata = json.dumps(dict(row.metadata), sort_keys=True)
    data = {name: getattr(row, name) for name in _NAMES} | {"metadata": metadata}
    places = ", ".join("?" for _ in _NAMES)
    connection.execute(f"INSERT INTO {table} ({COLUMNS}) VALUES ({places})", [data[name] for name in _NAMES])  # noqa: S608 - constants


def select(connection: sqlite3.Connection, table: str = "attachments", order: str = "attached_at, id") -> Iterator[Row]:
    """Read rows. Raises sqlite3.Error, and ValueError or TypeError for a row that makes no sense."""
    for values in connection.execute(f"SELECT {COLUMNS} FROM {table} ORDER BY {order}"):  # noqa: S608 - constants
        data = dict(zip(_NAMES, values, strict=True))
        metadata, acked = json.loads(data.pop("metadata")), bool(data.pop("acked"))
        if not isinstance(metadata, dict):
            raise ValueError(f"read state: the metadata of {data['id']} is no JSON object")  # noqa: TRY004 - damage
        yield replace(Row(**data), metadata=metadata, acked=acked)


def connect(path: Path, known: Known | None = None) -> tuple[sqlite3.Connection, Known]:
    """Open the database in this thread, make or upgrade its tables; return it, and what it knows beside attachments.

    `known`: that, for a new database. Raises sqlite3.Error, and PreconditionError for another version's.
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
    return connection, (str(row[0]), row[1])


def require_known(path: Path) -> None:
    """Refuse a database of a version that we do not know; nothing of it is changed.

    What cannot be read is for `connect` to find. Raises PreconditionError.
    """
    with contextlib.suppress(sqlite3.Error):
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
        _check_version(path, version)


def _check_version(path: Path, version: int) -> None:
    if version not in (0, *MIGRATIONS, SCHEMA_VERSION):
        raise PreconditionError(
            f"open state {path}: schema version {version}, this netfenced reads {SCHEMA_VERSION};"
            " run the version that wrote it, or move the file away to start without state"
        )
