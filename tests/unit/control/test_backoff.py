"""When the next try comes: a window that doubles up to its cap, and chance within it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netfence.control.backoff import CAP_S, FIRST_S, Backoff


class Edge(random.Random):
    """Takes one end of every range and keeps them."""

    def __init__(self, end: int) -> None:
        super().__init__(0)
        self.end = end

    def uniform(self, a: float, b: float) -> float:
        return (a, b)[self.end]


def test_the_window_doubles_up_to_its_cap() -> None:
    backoff = Backoff(Edge(1))
    assert [backoff.next() for _ in range(7)] == [3, 6, 12, 24, 30, 30, 30]
    assert (FIRST_S, CAP_S) == (3, 30)  # wire.md, behaviour 5


def test_every_moment_of_the_window_may_be_taken() -> None:
    backoff = Backoff(Edge(0))
    assert [backoff.next() for _ in range(7)] == [0] * 7  # full jitter: not half of it


def test_a_proven_control_plane_begins_anew() -> None:
    backoff = Backoff(Edge(1))
    for _ in range(5):
        backoff.next()
    backoff.reset()
    assert [backoff.next(), backoff.next()] == [3, 6]


@pytest.mark.parametrize(("end", "expected"), [(0, 15), (1, 30)], ids=["least", "most"])
def test_what_soon_cannot_mend_waits_long_and_then_too(end: int, expected: float) -> None:
    backoff = Backoff(Edge(end))
    assert backoff.longest() == expected
    assert backoff.next() == (0, 30)[end]
    backoff.reset()
    assert backoff.next() == (0, 3)[end]


@given(st.randoms(use_true_random=False), st.integers(1, 20))
def test_no_try_comes_later_than_the_cap(rng: random.Random, tries: int) -> None:
    backoff = Backoff(rng)
    assert 0 <= backoff.next() <= FIRST_S
    for _ in range(tries):
        assert 0 <= backoff.next() <= CAP_S


def test_two_daemons_do_not_come_together() -> None:
    assert len({Backoff().next() for _ in range(20)}) == 20
