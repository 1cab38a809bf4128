"""The watch sees every way in which a file changes, and nothing else."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from netfence.control import filewatch
from netfence.control.filewatch import FileWatch


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filewatch, "REARM_S", 0.05)


def sees(path: Path, change: Callable[[], object]) -> bool:
    """Tell whether the change of the file is told, and only once."""

    async def test() -> bool:
        watch = FileWatch(path)
        try:
            change()
            await asyncio.wait_for(watch.changed(), 2)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(watch.changed(), 0.3)
        except TimeoutError:
            return False
        finally:
            watch.close()
        return True

    return asyncio.run(test())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "dir").mkdir()
    path = tmp_path / "dir" / "policy.yaml"
    path.write_text("one")
    return path


def replace_file(path: Path) -> None:
    new = path.with_name(".new")
    new.write_text("two")
    new.rename(path)


def recreate_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("old"))
    path.parent.mkdir()
    path.write_text("two")


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("two"),
        replace_file,
        lambda path: path.unlink(),
        lambda path: path.rename(path.with_name("away")),
        recreate_directory,
        lambda path: shutil.rmtree(path.parent),
    ],
    ids=["written", "replaced", "removed", "moved-away", "directory-replaced", "directory-removed"],
)
def test_changes_are_told(path: Path, change: Callable[[Path], object]) -> None:
    assert sees(path, lambda: change(path))


@pytest.mark.parametrize(
    "change",
    [lambda path: path.read_text(), lambda path: path.with_name("other").write_text("x"), lambda _path: None],
    ids=["read", "neighbour", "nothing"],
)
def test_nothing_else_is_told(path: Path, change: Callable[[Path], object]) -> None:
    assert not sees(path, lambda: change(path))


def test_a_file_that_is_missing_at_first_is_seen_when_it_comes(path: Path) -> None:
    path.unlink()
    assert sees(path, lambda: path.write_text("now"))


def test_a_file_being_written_is_not_told_before_it_is_closed(path: Path) -> None:
    path.unlink()

    async def test() -> None:
        watch = FileWatch(path)
        with open(path, "w") as file:  # noqa: ASYNC230, PTH123 - two bytes, and the loop has nothing else to do
            file.write("half")
            file.flush()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(watch.changed(), 0.3)
        await asyncio.wait_for(watch.changed(), 2)
        watch.close()

    asyncio.run(test())


def test_links_as_kubernetes_makes_them(tmp_path: Path) -> None:
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.yaml").write_text(name)
    (tmp_path / "..data").symlink_to("v1")
    path = tmp_path / "policy.yaml"
    path.symlink_to("..data/policy.yaml")

    def swap() -> None:
        (tmp_path / "tmp").symlink_to("v2")
        (tmp_path / "tmp").rename(tmp_path / "..data")

    assert sees(path, swap)
    assert sees(path, lambda: (tmp_path / "v2" / "policy.yaml").write_text("again"))


def test_a_directory_that_comes_later_is_found(tmp_path: Path) -> None:
    path = tmp_path / "later" / "policy.yaml"

    def come() -> None:
        path.parent.mkdir()
        path.write_text("here")

    assert sees(path, come)
    assert sees(path, lambda: path.write_text("again"))


def test_closing_gives_everything_back(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - descriptors, not files

    async def test() -> None:
        watch = FileWatch(path)
        watch.close()
        watch.close()

    asyncio.run(test())
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_circle_of_links_is_waited_out(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)

    def repaired() -> None:
        path.unlink()
        path.write_text("two")

    assert sees(path, repaired)


def test_a_circle_elsewhere_is_seen_to_be_repaired(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    path.unlink()
    path.symlink_to(other / "link")
    (other / "link").symlink_to(path)

    def repaired() -> None:
        (other / "link").unlink()
        (other / "link").write_text("two")

    assert sees(path, repaired)


def test_without_inotify_the_file_is_looked_at_until_there_is_room(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call, full = filewatch._call, True

    def no_room(function: object, *arguments: object) -> int:
        if full and len(arguments) == 1:  # inotify_init1
            raise OSError(24, "Too many open files")
        return call(function, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(filewatch, "_call", no_room)

    def write(text: str) -> None:
        path.write_text(text)

    async def test() -> None:
        nonlocal full
        watch = FileWatch(path)
        write("two")
        await asyncio.wait_for(watch.changed(), 2)
        full = False
        write("three!")
        await asyncio.wait_for(watch.changed(), 2)
        assert watch._fd >= 0
        assert watch._armed
        watch.close()

    asyncio.run(test())
