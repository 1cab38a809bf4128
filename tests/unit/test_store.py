"""The store on real files: what is saved comes back, who else comes is refused, what fails changes nothing."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from netfence import schema
from netfence.errors import NetfenceError, PreconditionError
from netfence.store import DATABASE, SCHEMA_VERSION, Claim, Row, Store

ROW = Row(
    id="one",
    slot=1,
    kind="interface",
    name="veth0",
    identity="7",
    link_kind="veth",
    direction="workload",
    hook="tc",
    mechanism="",
    dns_host="127.0.0.1",
    dns_port=11000,
    boot_id="boot",
    attached_at=100.5,
    metadata={"tenant": "acme", "quote": "'\"\u00fc"},
)


def with_store(directory: Path, work: Callable[[Store], Awaitable[None]]) -> None:
    async def test() -> None:
        store = Store.open(directory)
        try:
            await work(store)
        finally:
            await store.close()

    asyncio.run(asyncio.wait_for(test(), 20))


def rows(directory: Path) -> list[Row]:
    found: list[Row] = []

    async def work(store: Store) -> None:
        found.extend(await store.load())

    with_store(directory, work)
    return found


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    saved = replace(ROW, mechanism="tcx", policy_version="v1", dns_allowed=3, dns_blocked=4)

    async def work(store: Store) -> None:
        await store.reserve(ROW)
        await store.save(saved, lambda: "the policy")

    with_store(tmp_path / "data", work)
    assert rows(tmp_path / "data") == [replace(saved, policy="the policy")]


def test_rows_come_back_oldest_first_and_a_removed_one_does_not(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        await store.reserve(replace(ROW, id="young", slot=2, attached_at=200.0))
        await store.reserve(ROW)
        await store.reserve(replace(ROW, id="gone", slot=3))
        await store.remove("gone")
        await store.remove("gone")

    with_store(tmp_path, work)
    assert [row.id for row in rows(tmp_path)] == ["one", "young"]


def test_what_changes_of_an_attachment_is_stored(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        await store.reserve(ROW)
        await store.move("one", "veth9")
        await store.save_counters({"one": (10, 20), "unknown": (1, 1)})
        await store.replace(replace(ROW, name="veth9", identity="8", slot=5, mechanism="clsact", boot_id="next"))

    with_store(tmp_path, work)
    (row,) = rows(tmp_path)
    assert (row.name, row.identity, row.slot, row.mechanism, row.boot_id) == ("veth9", "8", 5, "clsact", "next")
    assert (row.dns_allowed, row.dns_blocked) == (10, 20)


def test_the_daemon_id_is_made_once(tmp_path: Path) -> None:
    seen: list[str] = []

    async def work(store: Store) -> None:
        seen.append(store.daemon_id)

    with_store(tmp_path, work)
    with_store(tmp_path, work)
    assert seen[0]
    assert seen == [seen[0]] * 2


def test_files_are_for_the_owner_alone(tmp_path: Path) -> None:
    rows(tmp_path / "deep" / "data")
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "deep" / "data", *(tmp_path / "deep" / "data").iterdir())
    }
    assert modes["data"] == 0o700
    assert {mode for name, mode in modes.items() if name != "data"} == {0o600}


def test_a_second_daemon_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    async def work(_store: Store) -> None:
        with pytest.raises(PreconditionError, match="another netfenced uses this data_dir; stop it or set another"):
            Store.open(tmp_path)

    with_store(tmp_path, work)
    assert rows(tmp_path) == []


@pytest.mark.parametrize("mode", [0o770, 0o707], ids=oct)
def test_a_directory_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(PreconditionError, match=r"others may write it .* chmod 0700"):
        Store.open(tmp_path)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(PreconditionError, match="data_dir"):
        Store.open(tmp_path / "data")


def test_another_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    rows(tmp_path)
    with sqlite3.connect(tmp_path / DATABASE) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    connection.close()
    before = (tmp_path / DATABASE).read_bytes()
    for begin in (Store.open, Claim, Store.open):  # and the lock is free again
        with pytest.raises(PreconditionError, match=f"schema version {SCHEMA_VERSION + 1}, this netfenced reads"):
            begin(tmp_path)
    assert (tmp_path / DATABASE).read_bytes() == before


def test_a_claim_keeps_others_out_and_changes_nothing(tmp_path: Path) -> None:
    make_schema_1(tmp_path, ROW)
    before = (tmp_path / DATABASE).read_bytes()
    with closing(Claim(tmp_path)) as claim:
        with pytest.raises(PreconditionError, match="another netfenced uses this data_dir"):
            Store.open(tmp_path)
        assert (tmp_path / DATABASE).read_bytes() == before

        async def use() -> None:
            store = Store.open(tmp_path, claim)
            assert await store.load() == [ROW]
            await store.close()

        asyncio.run(use())
        with pytest.raises(PreconditionError, match="another netfenced uses this data_dir"):
            Store.open(tmp_path)  # the claim outlives the store
    assert rows(tmp_path) == [ROW]


@pytest.mark.parametrize("content", [None, b"", b"not a database at all" * 100], ids=["none", "empty", "damaged"])
def test_a_claim_leaves_what_it_cannot_read_to_the_store(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / DATABASE).write_bytes(content)
    Claim(tmp_path).close()
    assert [path.read_bytes() for path in tmp_path.glob(DATABASE)] == ([] if content is None else [content])
    assert rows(tmp_path) == []


def aside(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"{DATABASE}.damaged-*[0-9]"))


def test_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    garbage = b"not a database at all" * 100
    (tmp_path / DATABASE).write_bytes(garbage)
    assert rows(tmp_path) == []
    assert [file.read_bytes() for file in aside(tmp_path)] == [garbage]
    assert rows(tmp_path) == []
    assert len(aside(tmp_path)) == 1


def test_what_can_be_read_of_a_damaged_file_is_saved(tmp_path: Path) -> None:
    known = []

    async def fill(store: Store) -> None:
        known.append(store.daemon_id)
        for number in range(60):
            row = replace(ROW, id=f"{number:03}", slot=number + 1)
            await store.reserve(row)
            await store.save(row, lambda: "x" * 3000)

    with_store(tmp_path, fill)
    path = tmp_path / DATABASE
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 8192] = bytes(8192)
    path.write_bytes(content)

    async def look(store: Store) -> None:
        assert await store.load() == []
        assert 0 < len(store.saved) < 60
        assert {row.policy for row in store.saved.values()} == {"x" * 3000}
        assert [store.daemon_id] == known
        assert {"000", "059"} <= set(store.saved)  # before the damage and behind it
        await store.reserve(ROW)
        assert await store.load() == [ROW]

    with_store(tmp_path, look)
    assert len(aside(tmp_path)) == 1

    async def again(store: Store) -> None:
        await look_again(store)
        await store.settle()
        assert store.saved == {}

    async def look_again(store: Store) -> None:
        """As long as nobody says that all of it is done, it is there, whatever became of the daemon meanwhile."""
        assert await store.load() == [ROW]
        assert [store.daemon_id] == known
        assert store.saved["059"] == replace(ROW, id="059", slot=60, policy="x" * 3000)

    async def settled(store: Store) -> None:
        assert (await store.load(), store.saved) == ([ROW], {})

    for step in (look_again, again, settled):
        with_store(tmp_path, step)
    assert len(aside(tmp_path)) == 1


def test_what_was_saved_survives_damage_of_the_new_database(tmp_path: Path) -> None:
    async def fill(store: Store) -> None:
        for number in range(3):
            await store.reserve(replace(ROW, id=str(number), slot=number + 1, attached_at=float(number)))

    async def damage(store: Store) -> None:
        assert set(store.saved) == {"0", "1", "2"}
        await store.reserve(replace(ROW, id="2", slot=7))  # as one of them is stored again

    async def look(store: Store) -> None:
        assert {name: row.slot for name, row in store.saved.items()} == {"0": 1, "1": 2, "2": 7}

    with_store(tmp_path, fill)
    for step in (damage, look):
        damage_daemon_table(tmp_path / DATABASE)
        with_store(tmp_path, step)
    assert len(aside(tmp_path)) == 2


def damage_daemon_table(path: Path) -> None:
    """Damage what every start reads, and no attachment."""
    connection = sqlite3.connect(path)
    ((page, size),) = connection.execute(
        "SELECT rootpage, page_size FROM sqlite_schema, pragma_page_size WHERE name = 'daemon'"
    ).fetchall()
    connection.close()
    content = bytearray(path.read_bytes())
    content[(page - 1) * size : page * size] = b"\xff" * size
    path.write_bytes(content)


def test_a_damaged_file_keeps_its_name_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fill(store: Store) -> None:
        await store.reserve(ROW)

    with_store(tmp_path, fill)
    damage_daemon_table(tmp_path / DATABASE)
    before = (tmp_path / DATABASE).read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        with pytest.raises(PreconditionError, match=r"set damaged state .* aside .*: No space left on device; free"):
            Store.open(tmp_path)
    assert (tmp_path / DATABASE).read_bytes() == before

    async def look(store: Store) -> None:
        assert store.saved == {"one": ROW}

    with_store(tmp_path, look)
    assert [file.read_bytes() for file in aside(tmp_path)] == [before]
    assert not list(tmp_path.glob("*.new*"))


def test_a_row_that_makes_no_sense_is_left_behind(tmp_path: Path) -> None:
    async def fill(store: Store) -> None:
        await store.reserve(ROW)
        await store.reserve(replace(ROW, id="two", slot=2))
        await store.reserve(replace(ROW, id="three", slot=3))

    with_store(tmp_path, fill)
    path = tmp_path / DATABASE
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA writable_schema=ON")
    connection.execute("UPDATE sqlite_schema SET sql = replace(sql, ' STRICT', '')")
    connection.commit()
    connection.close()
    connection = sqlite3.connect(path)
    connection.execute("UPDATE attachments SET slot = 'rubbish' WHERE id = 'two'")
    connection.commit()
    connection.close()
    damage_daemon_table(path)

    async def look(store: Store) -> None:
        assert set(store.saved) == {"one", "three"}

    with_store(tmp_path, look)


@pytest.mark.parametrize(
    ("column", "value"), [("name", "CAST(x'ff41' AS TEXT)"), ("metadata", "'[[1]]'"), ("metadata", "'\"ab\"'")]
)
def test_a_row_that_cannot_be_read_is_damage_and_the_others_are_saved(tmp_path: Path, column: str, value: str) -> None:
    async def fill(store: Store) -> None:
        for number, name in enumerate(("zero", "one", "two")):
            await store.reserve(replace(ROW, id=name, slot=number + 1))

    async def look(store: Store) -> None:
        assert await store.load() == []
        assert set(store.saved) == {"zero", "two"}
        await store.settle()

    with_store(tmp_path, fill)
    connection = sqlite3.connect(tmp_path / DATABASE)
    connection.execute(f"UPDATE attachments SET {column} = {value} WHERE id = 'one'")
    connection.commit()
    connection.close()
    with_store(tmp_path, look)
    assert (len(aside(tmp_path)), rows(tmp_path)) == (1, [])


def test_the_log_of_a_damaged_file_does_not_reach_the_new_one(tmp_path: Path) -> None:
    other = tmp_path / "other"

    async def work(store: Store) -> None:
        store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        await store.reserve(ROW)
        shutil.copytree(tmp_path, other)  # as a daemon that is killed leaves it, with the row in the log

    with_store(tmp_path, work)
    assert (other / f"{DATABASE}-wal").stat().st_size > 0
    (other / DATABASE).write_bytes(b"garbage" * 1000)
    for _ in range(2):
        assert rows(other) == []
    assert len(aside(other)) == 1


def test_a_full_disk_fails_the_write_and_keeps_the_old_row(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        await store.reserve(ROW)
        await store.save(ROW, lambda: "old")
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count={pages + 2}")
        with pytest.raises(NetfenceError, match=r"save state in .*full; free disk space"):
            await store.save(ROW, lambda: "x" * 1_000_000)
        await store.save(replace(ROW, policy_version="v2"), lambda: "new")

    with_store(tmp_path, work)
    assert [(row.policy, row.policy_version) for row in rows(tmp_path)] == [("new", "v2")]


def test_an_encoder_that_fails_changes_nothing(tmp_path: Path) -> None:
    def broken() -> str:
        raise ValueError("broken")

    async def work(store: Store) -> None:
        await store.reserve(ROW)
        with pytest.raises(ValueError, match="broken"):
            await store.save(ROW, broken)

    with_store(tmp_path, work)
    assert rows(tmp_path) == [ROW]


def test_saving_what_was_removed_is_an_error(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        with pytest.raises(NetfenceError, match="no such attachment"):
            await store.save(ROW, lambda: "late")

    with_store(tmp_path, work)


def test_a_reserved_row_survives_kill_9(tmp_path: Path) -> None:
    program = """
import asyncio, os, signal, sys
from pathlib import Path
from tests.unit.test_store import ROW
from netfence.store import Store
async def main():
    await Store.open(Path(sys.argv[1])).reserve(ROW)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    repo = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=repo, check=False, timeout=30)
    assert done.returncode == -signal.SIGKILL
    assert rows(tmp_path) == [ROW]


def test_the_loop_goes_on_while_a_large_policy_is_encoded(tmp_path: Path) -> None:
    turns = 0

    async def work(store: Store) -> None:
        nonlocal turns
        await store.reserve(ROW)
        ready, waiting = os.pipe()

        def encode() -> str:
            os.read(ready, 1)  # would wait for ever, were it on the loop
            return "large"

        saving = asyncio.ensure_future(store.save(ROW, encode))
        for _ in range(10):
            await asyncio.sleep(0)
            turns += 1
        os.write(waiting, b"x")
        await saving
        os.close(ready)
        os.close(waiting)

    with_store(tmp_path, work)
    assert turns == 10


# -- older schemas -----------------------------------------------------------------------------------------------------

SCHEMA_1 = """
CREATE TABLE IF NOT EXISTS daemon (
  id TEXT NOT NULL
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
  dns_blocked INTEGER NOT NULL
) STRICT;
"""  # as released; never to be changed
COLUMNS_1 = (
    "id, slot, kind, name, identity, link_kind, direction, hook, mechanism, metadata, dns_host, dns_port,"
    " boot_id, attached_at, policy, policy_version, dns_allowed, dns_blocked"
)


def make_schema_1(directory: Path, *stored: Row) -> None:
    """Leave a database as the first version of the daemon did."""
    connection = sqlite3.connect(directory / DATABASE)
    connection.executescript(SCHEMA_1)
    connection.execute("INSERT INTO daemon VALUES ('the daemon')")
    for row in stored:
        values = [getattr(row, name.strip()) for name in COLUMNS_1.split(",")]
        values[9] = json.dumps(values[9])
        connection.execute(f"INSERT INTO attachments ({COLUMNS_1}) VALUES ({', '.join('?' * 18)})", values)
    connection.execute("PRAGMA user_version=1")
    connection.commit()
    connection.close()


def test_the_first_schema_is_brought_up_to_date_with_everything_in_it(tmp_path: Path) -> None:
    one = replace(ROW, mechanism="tcx", policy="the policy", policy_version="v1", dns_allowed=3, dns_blocked=4)
    half = replace(ROW, id="half", slot=2, attached_at=200.0)
    make_schema_1(tmp_path, one, half)

    async def work(store: Store) -> None:
        assert (store.daemon_id, store.contact) == ("the daemon", None)
        assert await store.load() == [one, half]
        assert all(row.acked for row in await store.load())
        assert store._connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        await store.save(replace(half, acked=False), lambda: "new")
        await store.reserve(replace(ROW, id="new", slot=3, attached_at=300.0, acked=False))
        await store.save_contact("now")

    with_store(tmp_path, work)
    assert [(row.id, row.policy, row.acked) for row in rows(tmp_path)] == [
        ("one", "the policy", True), ("half", "new", False), ("new", None, False),
    ]  # fmt: skip


def test_the_second_schema_gets_its_tables_and_keeps_everything(tmp_path: Path) -> None:
    one = replace(ROW, policy="the policy", policy_version="v1", acked=False)

    async def fill(store: Store) -> None:
        await store.reserve(one)
        await store.save(one, lambda: "the policy")
        await store.save_contact("then")

    with_store(tmp_path, fill)
    connection = sqlite3.connect(tmp_path / DATABASE)
    connection.executescript("DROP TABLE saved; DROP TABLE audited; PRAGMA user_version=2")  # the second had neither
    known = connection.execute("SELECT id FROM daemon").fetchone()[0]
    connection.close()

    async def work(store: Store) -> None:
        assert (store.daemon_id, store.contact, store.saved) == (known, "then", {})
        assert (await store.load(), await store.load_audited()) == ([one], {})
        await store.save_audited("one", lambda: "names")
        assert store._connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)

    with_store(tmp_path, work)
    assert rows(tmp_path) == [one]


def test_an_upgrade_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_schema_1(tmp_path, ROW)
    good = schema.MIGRATIONS[1]
    monkeypatch.setitem(schema.MIGRATIONS, 1, (*good, "ALTER TABLE nobody ADD COLUMN x TEXT"))
    with pytest.raises(PreconditionError, match="no such table: nobody; move the file away"):
        Store.open(tmp_path)
    monkeypatch.setitem(schema.MIGRATIONS, 1, good)
    assert rows(tmp_path) == [ROW]


def test_an_upgraded_database_has_the_columns_of_a_new_one(tmp_path: Path) -> None:
    make_schema_1(tmp_path)

    def columns(directory: Path) -> dict[str, set[tuple[object, ...]]]:
        rows(directory)
        connection = sqlite3.connect(directory / DATABASE)
        found = {
            table: {row[1:] for row in connection.execute(f"PRAGMA table_info({table})")}
            for table in ("daemon", "attachments")
        }
        connection.close()
        return found

    assert columns(tmp_path) == columns(tmp_path / "new")


# -- what the control plane is to us -----------------------------------------------------------------------------------


def test_when_the_control_plane_was_last_there_is_kept(tmp_path: Path) -> None:
    seen: list[str | None] = []

    async def work(store: Store) -> None:
        seen.append(store.contact)
        daemon_id = store.daemon_id
        await store.save_contact(f"moment {len(seen)}")
        assert (store.contact, store.daemon_id) == (f"moment {len(seen)}", daemon_id)

    for _ in range(3):
        with_store(tmp_path, work)
    assert seen == [None, "moment 1", "moment 2"]


@pytest.mark.parametrize("acked", [False, True])
def test_whether_a_policy_was_ever_given_is_kept(tmp_path: Path, acked: bool) -> None:
    async def work(store: Store) -> None:
        await store.reserve(replace(ROW, acked=not acked))
        assert [row.acked for row in await store.load()] == [not acked]
        await store.save(replace(ROW, acked=acked), lambda: "policy")

    with_store(tmp_path, work)
    assert [row.acked for row in rows(tmp_path)] == [acked]


def test_audited_names_live_as_long_as_their_attachment(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        await store.reserve(ROW)
        await store.save_audited("one", lambda: "some")
        await store.save_audited("one", lambda: "more")
        await store.save_audited("gone", lambda: "nobody's")
        assert await store.load_audited() == {"one": "more"}

    async def again(store: Store) -> None:
        assert await store.load_audited() == {"one": "more"}
        await store.remove("one")
        assert await store.load_audited() == {}

    with_store(tmp_path, work)
    with_store(tmp_path, again)
