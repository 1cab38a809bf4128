"""Status messages fit a header whatever is in them, and lose as little as they must."""

from __future__ import annotations

from urllib.parse import quote

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netfence import errors
from netfence.api.status import MAX_MESSAGE_BYTES, status_message
from netfence.errors import InvalidError, NetfenceError, NotFoundError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6000)


@given(TEXTS | st.sampled_from(["x" * 4096, "x" * 4097, "ü" * 5000, "%" * 4096, "\x00" * 4096]))
def test_a_message_fits(text: str) -> None:
    message = status_message(NotFoundError(text))
    if message != text:
        assert message.endswith("…")
        assert text.startswith(message[:-1])
    assert len(quote(message, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~")) <= MAX_MESSAGE_BYTES


@given(st.lists(TEXTS, min_size=1, max_size=50))
def test_a_list_of_faults_fits(faults: list[str]) -> None:
    message = status_message(InvalidError(faults))
    assert len(quote(message, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~")) <= MAX_MESSAGE_BYTES


def test_short_messages_are_whole() -> None:
    assert status_message(InvalidError(["one", "two"])) == "one; two"
    assert status_message(NotFoundError("x" * MAX_MESSAGE_BYTES)) == "x" * MAX_MESSAGE_BYTES


def test_faults_are_cut_whole() -> None:
    message = status_message(InvalidError([f"fault {n:04}" for n in range(1000)]))
    *shown, rest = message.split("; ")
    assert shown == [f"fault {n:04}" for n in range(len(shown))]
    assert rest == f"and {1000 - len(shown)} more faults"
    assert len(shown) > 300


def test_one_fault_that_is_too_long_is_cut() -> None:
    assert status_message(InvalidError(["x" * 5000, "y"])).endswith("…")


def _kinds(kind: type[NetfenceError]) -> list[type[NetfenceError]]:
    return [kind, *(sub for child in kind.__subclasses__() for sub in _kinds(child))]


@pytest.mark.parametrize("kind", _kinds(NetfenceError), ids=lambda kind: kind.__name__)
def test_every_kind_names_a_code_of_grpc(kind: type[NetfenceError]) -> None:
    assert grpc.StatusCode[kind.code].name == kind.code


def test_codes_are_those_of_the_contract() -> None:
    assert {kind.code for kind in _kinds(NetfenceError) if kind.__module__ == errors.__name__} == {
        *("INTERNAL", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "RESOURCE_EXHAUSTED"),
        *("FAILED_PRECONDITION", "UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED"),
    }
