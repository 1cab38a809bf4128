"""Broken messages of all kinds (mutants.py): refused, or understood as dnslib understands them; never an exception.

`NETFENCE_SEED=…` repeats a run; what failed is told as octets. Minutes of the same: tests/kernel/test_dns_fuzz.py.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.dns.checks import Fuzz, check_answer, check_query, check_served
from tests.unit.dns.mutants import CORPUS, Edit, Sample, broken, mutated

ROUNDS = 6000  # some 2 s
SAMPLES = st.sampled_from(CORPUS)
EDITS = st.lists(st.tuples(*[st.integers(0, 65_535)] * 3), max_size=5)
QUICK = settings(max_examples=500, deadline=None, print_blob=True)


@QUICK
@given(SAMPLES, EDITS)
def test_broken_queries(one: Sample, edits: list[Edit]) -> None:
    check_query(mutated(one.query, range(len(one.query)), edits, [each.query for each in CORPUS]))


@QUICK
@given(SAMPLES, EDITS)
def test_broken_answers(one: Sample, edits: list[Edit]) -> None:
    data = broken(one, edits)
    check_answer(one.query, data)
    check_served(one.query, data)


@pytest.mark.parametrize("one", CORPUS, ids=lambda one: one.kind.replace(" ", "-"))
def test_honest_messages_are_understood(one: Sample) -> None:
    assert check_query(one.query) == "taken"
    looping = one.kind == "A loop"
    assert check_answer(one.query, one.answer) == ("refused" if looping else "taken")
    rcode = (
        5 if "denied" in one.kind else 2 if looping or one.kind == "SERVFAIL" else 3 if one.kind == "NXDOMAIN" else 0
    )
    opens = rcode == 0 and one.kind.partition(" ")[0] in ("A", "AAAA", "HTTPS")
    assert check_served(one.query, one.answer) == f"rcode {rcode}, {'opened' if opens else 'shut'}"


@pytest.mark.parametrize("first", range(12))
def test_messages_cut_anywhere(first: int) -> None:
    for one in CORPUS:
        for length in range(first, len(one.answer), 12):
            assert check_answer(one.query, one.answer[:length]) in ("no match", "refused")
        for length in range(first, len(one.query), 12):
            assert check_query(one.query[:length]) in ("silence", "rcode 1")


def test_many_broken_messages(record_property: Callable[[str, object], None]) -> None:
    seed = int(os.environ.get("NETFENCE_SEED") or random.SystemRandom().randrange(1 << 32))
    outcomes = Fuzz(seed).rounds(ROUNDS)
    record_property("messages", outcomes.total())
    record_property("outcomes", dict(outcomes))
    # It goes deep enough to say something: what is taken, and opened, is not rare.
    assert outcomes["answer: taken"] > ROUNDS / 10
    assert outcomes["served: rcode 0, opened"] > ROUNDS / 100
