"""The socket's file: permissions, whose it is, and what happens to one that is there already."""

from __future__ import annotations

import asyncio
import grp
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import empty_pb2
from tests.unit.api.fake import FakeDaemon, calling, serving

from netfence.api.service import serve
from netfence.api.unix_socket import SocketPlace, group_id
from netfence.errors import InvalidError, NotFoundError, PermissionDeniedError, PreconditionError

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another group or user: needs root")


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _bound_below(directory: Path) -> bool:
    return str(directory) in Path("/proc/net/unix").read_text()


async def _answers(path: Path) -> bool:
    async with calling(path) as stub:
        return bool((await stub.GetStatus(empty_pb2.Empty())).version)


def _dead_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
        made.listen()


def test_socket_is_for_the_owner_alone_and_nothing_else_is_left(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "nf.sock"
        before = os.umask(0)  # the mode must not depend on it
        try:
            async with serving(FakeDaemon(), path):
                assert stat.S_IMODE(path.lstat().st_mode) == 0o600
                assert _names(tmp_path) == [path.name]
                assert await _answers(path)
        finally:
            os.umask(before)
        assert _names(tmp_path) == []

    run(test())


@needs_root
@pytest.mark.parametrize("how", ["name", "number"])
def test_a_group_widens_it(tmp_path: Path, how: str) -> None:
    async def test() -> None:
        path = tmp_path / "nf.sock"
        group = next(entry for entry in grp.getgrall() if entry.gr_gid not in {0, os.getegid()})
        async with serving(FakeDaemon(), path, group.gr_name if how == "name" else str(group.gr_gid)):
            found = path.lstat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid, found.st_uid) == (0o660, group.gr_gid, os.geteuid())

    run(test())


def test_permissions_stand_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "nf.sock"
    modes: list[int] = []
    link = os.link

    def spy(source: Path, target: Path) -> None:
        modes.append(stat.S_IMODE(Path(source).lstat().st_mode))
        assert stat.S_IMODE(Path(source).parent.lstat().st_mode) == 0o700
        link(source, target)

    monkeypatch.setattr(os, "link", spy)

    async def test() -> None:
        async with serving(FakeDaemon(), path):
            assert modes == [0o600]

    run(test())


def test_unknown_group_is_an_error_naming_it(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="socket_group 'no-such-group': no such group"):
        SocketPlace(tmp_path / "s", "no-such-group")
    assert _names(tmp_path) == []


def test_a_number_may_be_nobodys_and_is_a_name_where_a_group_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert group_id("4294967294") == 2**32 - 2
    group = grp.struct_group(("4242", "x", 7, []))
    named = {"4242": group}
    monkeypatch.setattr(grp, "getgrnam", named.__getitem__)
    assert (group_id("4242"), group_id("7")) == (7, 7)


@pytest.mark.parametrize("group", ["4294967295", "99999999999999999999", "-1", "0x10", "1.5", " 7", "\u0663"])
def test_what_is_no_number_of_a_group_is_an_error_naming_the_key(group: str) -> None:
    with pytest.raises(InvalidError, match=r"^socket_group "):
        group_id(group)


def test_a_dead_daemons_socket_is_replaced(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "nf.sock"
        _dead_socket(path)
        dead = path.lstat().st_ino
        async with serving(FakeDaemon(), path):
            assert path.lstat().st_ino != dead
            assert _names(tmp_path) == [path.name]
            assert await _answers(path)

    run(test())


def test_a_living_daemons_socket_is_refused_and_untouched(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "nf.sock"
        async with serving(FakeDaemon(), path):
            before = path.lstat()
            with pytest.raises(PreconditionError, match=re.escape(f"listen on socket {path}: another process")):
                await serve(FakeDaemon(), path, None)
            after = path.lstat()
            assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (
                before.st_ino,
                before.st_mode,
                before.st_mtime_ns,
            )
            assert _names(tmp_path) == [path.name]
            assert await _answers(path)

    run(test())


def test_a_listener_with_a_full_backlog_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netfence.api.unix_socket._PROBE_TIMEOUT_S", 0.05)
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(path))
        listener.listen(0)
        waiting.connect(str(path))
        with pytest.raises(PreconditionError, match="does not answer"):
            SocketPlace(path, None)
    assert path.exists()


@pytest.mark.parametrize("kind", ["file", "directory", "dangling-link"])
def test_what_is_no_socket_is_refused_and_untouched(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "nf.sock"
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case _:
            path.symlink_to(tmp_path / "nowhere")
    before = path.lstat()
    with pytest.raises(PreconditionError, match="is not a socket"):
        SocketPlace(path, None)
    assert path.lstat() == before
    assert _names(tmp_path) == [path.name]


def test_two_daemons_that_start_at_once_cannot_both_win(tmp_path: Path) -> None:
    path = tmp_path / "nf.sock"
    _dead_socket(path)
    first, second = SocketPlace(path, None), SocketPlace(path, None)  # both saw the dead socket
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
        for place, made in ((first, one), (second, two)):
            made.bind(str(place.bind_path))
            made.listen()
        first.publish()
        winner = path.lstat().st_ino
        with pytest.raises(PreconditionError, match="another daemon took it"):
            second.publish()
        second.give_up()
        assert path.lstat().st_ino == winner
        second.remove()
        assert _names(tmp_path) == [path.name]
        first.remove()
    assert _names(tmp_path) == []


def test_a_successors_socket_is_not_removed(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "nf.sock"
        async with serving(FakeDaemon(), path):
            path.unlink()
            _dead_socket(path)
            successor = path.lstat().st_ino
        assert path.lstat().st_ino == successor

    run(test())


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=re.escape(str(tmp_path / "no"))):
        SocketPlace(tmp_path / "no" / "s", None)


@needs_root
def test_a_directory_that_is_not_ours_to_write() -> None:
    directory = Path(tempfile.mkdtemp())  # not tmp_path: another user cannot even look into that
    directory.chmod(0o755)
    try:
        os.seteuid(65534)
        try:
            with pytest.raises(PermissionDeniedError, match="run as root"):
                SocketPlace(directory / "s", None)
        finally:
            os.seteuid(0)
        assert _names(directory) == []
    finally:
        shutil.rmtree(directory)


def _path_of(length: int, tmp_path: Path) -> Path:
    """Make a directory so deep that a name of 20 bytes in it has a path of that length."""
    directory = tmp_path
    while (left := length - 21 - len(str(directory)) - 1) > 0:
        directory /= "d" * min(left, 100)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ("s" * (length - len(str(directory)) - 1))
    assert len(str(path)) == length
    return path


def test_longest_path_works_and_one_byte_more_is_told(tmp_path: Path) -> None:
    async def test() -> None:
        path = _path_of(107, tmp_path)
        async with serving(FakeDaemon(), path):
            assert await _answers(path)
        with pytest.raises(InvalidError, match="needs 108 bytes and a unix socket's may have 107"):
            SocketPlace(path.with_name(path.name + "s"), None)

    run(test())


def test_a_path_with_odd_characters(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "a b%41?#ü.sock"
        async with serving(FakeDaemon(), path):
            assert await _answers(path)

    run(test())


def test_a_start_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_source: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)

    async def test() -> None:
        with pytest.raises(PreconditionError, match="no space left"):
            await serve(FakeDaemon(), tmp_path / "s", None)
        assert not _bound_below(tmp_path)

    run(test())
    assert _names(tmp_path) == []
