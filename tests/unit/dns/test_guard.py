"""The rebinding guard's decision."""

from __future__ import annotations

import math

import pytest
from tests.unit.dns.world import packed, policy

from netfence.dns.guard import PrivateSpace, permitted
from netfence.policy.cidr import CidrTable, parse_cidr
from netfence.policy.policy import Policy


@pytest.mark.parametrize(
    ("address", "inside"),
    [
        ("10.0.0.0", True),
        ("10.255.255.255", True),
        ("11.0.0.0", False),
        ("192.168.7.7", True),
        ("192.168.7.8", False),
        ("fd00::1", True),
        ("fe00::1", False),
        ("::a00:1", False),
    ],
)
def test_private_space(address: str, inside: bool) -> None:
    space = PrivateSpace([parse_cidr(text) for text in ("10.0.0.0/8", "192.168.7.7", "fd00::/8")])
    assert (packed(address)[0] in space) is inside


def test_the_longest_live_prefix_decides_and_its_end_is_told() -> None:
    table = (
        CidrTable()
        .allow(parse_cidr("10.0.0.0/8"))
        .allow(parse_cidr("10.1.0.0/16"), 50.0)
        .deny(parse_cidr("10.2.0.0/16"))
    )
    rules = Policy(cidrs=table)
    nowhere = PrivateSpace([])
    assert permitted(packed("10.3.0.1"), nowhere, rules, 0.0) == (frozenset(packed("10.3.0.1")), math.inf)
    assert permitted(packed("10.1.0.1", "10.3.0.1"), nowhere, rules, 0.0) == (
        frozenset(packed("10.1.0.1", "10.3.0.1")),
        50.0,
    )
    assert permitted(packed("10.2.0.1"), nowhere, rules, 0.0) == (frozenset(), math.inf)


def test_nothing_is_permitted_without_a_rule() -> None:
    assert permitted(packed("10.0.0.1", "::1"), PrivateSpace([]), policy(), 0.0) == (frozenset(), math.inf)
