"""Which version comes after which, and which of several builds is in force."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from netfence import __version__
from netfence.dataplane.loader import forget, in_force, is_newer, put_in_force

IN_ORDER = [
    "0.9",
    "1.0.0.dev3",
    "1.0.0a1.dev1",
    "1.0.0a1",
    "1.0.0b2",
    "1.0.0rc1",
    "1.0.0rc2",
    "1.0.0rc10",
    "1.0.0",
    "1.0.0.post1",
    "1.0.1.dev1",
    "1.0.1",
    "1.9",
    "1.10",
    "2!0.1",
]


@pytest.mark.parametrize("place", range(1, len(IN_ORDER)), ids=lambda place: IN_ORDER[place])
def test_a_version_comes_after_all_before_it(place: int) -> None:
    assert [is_newer(IN_ORDER[place], other) for other in IN_ORDER[:place]] == [True] * place
    assert not any(is_newer(other, IN_ORDER[place]) for other in IN_ORDER[: place + 1])


@pytest.mark.parametrize(
    ("one", "other"),
    [("1.0", "1.0.0"), ("1.0.0", "1"), ("1.0rc1", "1.0.0-rc.1"), ("1.0+debian2", "1.0"), ("v1.0", "1.0")],
)
def test_of_two_that_are_the_same_none_is_newer(one: str, other: str) -> None:
    assert (is_newer(one, other), is_newer(other, one)) == (False, False)


def test_ours_is_a_version() -> None:
    assert not is_newer(__version__, __version__)


@pytest.mark.parametrize("text", ["", "1.0.", "next", "1.0-or-so"])
def test_what_is_no_version_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="Invalid version"):
        is_newer(text, "1.0")


def make_maps(pins: Path, *builds: str) -> None:
    for build in builds:
        (pins / f"maps-{build}").mkdir()


def begun(pins: Path, build: str, at_s: float) -> None:
    """Have it that the clock showed this when a build was put in force."""
    os.utime(pins / f"maps-{build}" / "whole", (at_s, at_s))


def test_the_last_build_is_in_force_whatever_the_clock_was_set_to(tmp_path: Path) -> None:
    make_maps(tmp_path, "older", "newer", "newest")
    assert in_force(tmp_path) == ""
    for build, at_s in (("older", 3000.0), ("newer", 2000.0), ("newest", 1000.0)):
        put_in_force(tmp_path, build)
        begun(tmp_path, build, at_s)
        assert in_force(tmp_path) == build
    forget(tmp_path, tmp_path / "data", ["newest"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps-newer", "maps-older"]
    assert in_force(tmp_path) == "newer"


def test_what_has_no_number_is_older_and_goes_by_its_time(tmp_path: Path) -> None:
    """As older netfences left it."""
    make_maps(tmp_path, "older", "newer", "ours")
    for build, at_s in (("newer", 3000.0), ("older", 2000.0)):
        (tmp_path / f"maps-{build}" / "whole").mkdir()
        begun(tmp_path, build, at_s)
    assert in_force(tmp_path) == "newer"
    put_in_force(tmp_path, "ours")
    begun(tmp_path, "ours", 1000.0)
    assert in_force(tmp_path) == "ours"


def test_a_number_alone_puts_nothing_in_force(tmp_path: Path) -> None:
    """A start was cut short between the two: the first one, then the upgrade."""
    make_maps(tmp_path, "older", "cut")
    (tmp_path / "maps-older" / "order-1").mkdir()
    assert in_force(tmp_path) == ""
    put_in_force(tmp_path, "older")
    (tmp_path / "maps-cut" / "order-2").mkdir()
    assert in_force(tmp_path) == "older"
    forget(tmp_path, tmp_path / "data", ["cut"])
    make_maps(tmp_path, "cut")
    put_in_force(tmp_path, "cut")
    assert in_force(tmp_path) == "cut"
