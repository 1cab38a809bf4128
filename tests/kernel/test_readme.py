"""The README's sessions are what the commands really print."""

from __future__ import annotations

import pytest

import readme_session

pytestmark = pytest.mark.userspace


@pytest.mark.parametrize("name", readme_session.SESSIONS)
def test_the_readmes_session_is_real(name: str) -> None:
    now = readme_session.SESSIONS[name]()
    assert readme_session.normal(now) == readme_session.normal(readme_session.in_readme(name))


def test_ids_and_numbers_may_differ_and_words_may_not() -> None:
    one = "id: 6f1c2a9e-0000-4000-8000-0123456789ab\ntimed out after 501 milliseconds  3/14  2s"
    assert readme_session.normal(one) == readme_session.normal(one.replace("6f1c", "0a0b").replace("501", "7"))
    assert readme_session.normal(one) != readme_session.normal(one.replace("timed out", "answered"))
