"""Which build of netfence comes after which."""

from __future__ import annotations

import pytest

from netfence import __version__
from netfence.dataplane.loader import is_newer

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
