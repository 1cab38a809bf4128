"""Entries: when they are live, and how deep those with a TTL may nest, against an oracle that tries every chain."""

from __future__ import annotations

import ipaddress
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netfence.policy.cidr import NEVER, CidrTable, Entry, parse_cidr
from netfence.policy.family import ALLOW, BOTH, DENY, entry
from netfence.policy.limits import MAX_TTL_NESTING

NOW = 1000.0
LATER = 1060.0

CHAIN = [f"10.0.0.0/{length}" for length in (8, 12, 16, 20, 24, 28)]
assert len(CHAIN) > MAX_TTL_NESTING


@pytest.mark.parametrize(
    ("value", "now", "verdict"),
    [
        pytest.param(Entry(LATER, 0.0), NOW, True, id="allow-live"),
        pytest.param(Entry(LATER, 0.0), LATER, None, id="allow-ends-at-its-expiry"),
        pytest.param(Entry(0.0, LATER), NOW, False, id="deny-live"),
        pytest.param(Entry(LATER, LATER + 1), NOW, False, id="both-deny"),
        pytest.param(Entry(NEVER, LATER), NOW, False, id="deny-over-eternal-allow"),
        pytest.param(Entry(NEVER, LATER), LATER, True, id="expired-deny-uncovers-allow"),
        pytest.param(Entry(LATER, NEVER), LATER, False, id="expired-allow-leaves-deny"),
        pytest.param(Entry(LATER, LATER), LATER, None, id="both-expired"),
    ],
)
def test_verdict_of_an_entry(value: Entry, now: float, verdict: bool | None) -> None:
    assert value.verdict(now) is verdict
    left = value.live(now)
    assert (left.verdict(now) if left else None) is verdict


def test_entries_without_ttl_are_shared() -> None:
    assert entry(NEVER, 0.0) is ALLOW
    assert entry(0.0, NEVER) is DENY
    assert entry(NEVER, NEVER) is BOTH
    assert ALLOW.live(NOW) is ALLOW
    table = CidrTable.build([(parse_cidr(cidr), NEVER) for cidr in CHAIN])
    assert all(value is ALLOW for value in table.entries.values())


PREFIXES = st.builds(
    lambda value, length: ipaddress.IPv4Network((value << 24, length), strict=False),
    st.integers(0, 15), st.integers(4, 12),
)  # fmt: skip


def deepest(networks: set[ipaddress.IPv4Network]) -> int:
    """Return the longest chain of networks that contain one another, trying all sets of each size."""
    for size in range(len(networks), 0, -1):
        for chosen in itertools.combinations(sorted(networks, key=lambda network: network.prefixlen), size):
            if all(inner.subnet_of(outer) and inner != outer for outer, inner in itertools.pairwise(chosen)):
                return size
    return 0


@given(st.lists(PREFIXES, max_size=10))
def test_nesting_is_refused_exactly_beyond_the_limit(networks: list[ipaddress.IPv4Network]) -> None:
    table, kept = CidrTable(), set[ipaddress.IPv4Network]()
    for network in networks:
        try:
            table = table.allow(parse_cidr(str(network)), LATER)
        except ValueError:
            assert deepest(kept | {network}) > MAX_TTL_NESTING
        else:
            kept.add(network)
            assert deepest(kept) <= MAX_TTL_NESTING
    keys = [(parse_cidr(str(network)), LATER) for network in set(networks)]
    if deepest(set(networks)) > MAX_TTL_NESTING:
        with pytest.raises(ValueError, match="contain one another"):
            CidrTable.build(keys)
    else:
        assert len(CidrTable.build(keys)) == len(keys)


@pytest.mark.parametrize("last", range(MAX_TTL_NESTING + 1))
def test_one_prefix_too_many_is_refused_at_every_place_of_the_chain(last: int) -> None:
    keys = [parse_cidr(cidr) for cidr in CHAIN[: MAX_TTL_NESTING + 1]]
    table = CidrTable.build((key, LATER) for key in keys if key != keys[last])
    with pytest.raises(ValueError, match=f"more than {MAX_TTL_NESTING} prefixes with a TTL"):
        table.allow(keys[last], LATER)
    with pytest.raises(ValueError, match=f"more than {MAX_TTL_NESTING} prefixes with a TTL"):
        table.deny(keys[last], LATER)
    assert len(table.allow(keys[last])) == MAX_TTL_NESTING + 1, "without a TTL it may be there"
    assert table.allow(keys[last - 1], LATER + 5) is not table, "an entry of the chain may be renewed"


def test_every_entry_that_is_too_deep_is_named() -> None:
    with pytest.raises(ValueError, match="contain one another") as caught:
        CidrTable.build((parse_cidr(cidr), LATER) for cidr in CHAIN)
    assert [text.partition(":")[0] for text in caught.value.args] == CHAIN[MAX_TTL_NESTING:]


def test_expired_entries_no_longer_count_once_removed() -> None:
    table = CidrTable.build((parse_cidr(cidr), LATER) for cidr in CHAIN[:MAX_TTL_NESTING])
    table = table.live(LATER).allow(parse_cidr(CHAIN[-1]), LATER + 60)
    assert len(table) == 1


def test_families_nest_apart() -> None:
    table = CidrTable.build((parse_cidr(cidr), LATER) for cidr in CHAIN[:MAX_TTL_NESTING])
    six = [f"a00::/{length}" for length in (8, 12, 16, 20)]
    for cidr in six:
        table = table.allow(parse_cidr(cidr), LATER)
    assert len(table) == MAX_TTL_NESTING + len(six)
