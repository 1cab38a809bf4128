"""Page tokens: what went in comes out, and nothing else is taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netfence.api.paging import DEFAULT_SIZE, MAX_SIZE, make_token, page_size, read_token
from netfence.errors import InvalidError

TIMES = st.floats(allow_nan=False, allow_infinity=False)
IDS = st.text(st.characters(exclude_categories=["Cs"]))


@given(TIMES, IDS)
def test_round_trip(attached_at: float, attachment_id: str) -> None:
    token = make_token((attached_at, attachment_id))
    assert read_token(token) == (attached_at, attachment_id)
    assert token.isascii()
    assert not set(token) & set("+/= ")


@given(st.text())
def test_only_what_we_made_is_taken(token: str) -> None:
    try:
        place = read_token(token)
    except InvalidError as error:
        assert "page_token" in str(error)  # noqa: PT017 - most texts are refused, and some few are tokens
    else:
        assert make_token(place) == token


@pytest.mark.parametrize(
    ("asked", "size"),
    [(0, DEFAULT_SIZE), (1, 1), (MAX_SIZE, MAX_SIZE), (MAX_SIZE + 1, MAX_SIZE), (2**31 - 1, MAX_SIZE)],
)
def test_page_size(asked: int, size: int) -> None:
    assert page_size(asked) == size


def test_defaults_are_the_contracts() -> None:
    assert (DEFAULT_SIZE, MAX_SIZE) == (100, 1000)


def test_negative_page_size() -> None:
    with pytest.raises(InvalidError, match="page_size is -1"):
        page_size(-1)
