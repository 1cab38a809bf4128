"""Policies survive being stored: everything comes back, expiries keep their moment, damage is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netfence.errors import PreconditionError
from netfence.policy.commands import BulkUpdate, CidrSpec, DnsSpec, DomainSpec, apply
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import EMPTY, Policy
from netfence.policy_codec import PIECE, Clock, contact_text, decode, encode, seconds_since

NOW = Clock("this boot", mono=1000.0, wall=1_700_000_000.0)

UPDATE = BulkUpdate(
    mode=Mode.ALLOWLIST,
    audit=True,
    allow_cidrs=["10.0.0.0/8", CidrSpec("192.0.2.7", 60), "2001:db8::/32"],
    deny_cidrs=["10.0.0.0/8", CidrSpec("192.0.2.7", 30.25), CidrSpec("0.0.0.0/0", 5)],
    dns=DnsSpec(
        mode=DnsMode.DENYLIST,
        allow=[DomainSpec("pypi.org"), DomainSpec("pypi.org", include_subdomains=True), DomainSpec("*.pypi.org")],
        deny=[DomainSpec("*"), DomainSpec("pypi.org")],
        upstreams=["192.0.2.53", "[2001:db8::53]:5353"],
    ),
)
FULL = apply(EMPTY, UPDATE, NOW.mono)


@pytest.mark.parametrize("policy", [EMPTY, FULL, replace(EMPTY, mode=Mode.DISABLED)], ids=["empty", "full", "start"])
def test_a_policy_comes_back_whole(policy: Policy) -> None:
    assert decode(encode(policy, NOW), NOW) == policy


def test_within_a_boot_an_expiry_is_the_same_moment_however_long_nobody_looked() -> None:
    later = replace(NOW, mono=5000.0, wall=9.0)  # the wall clock may jump as it likes
    assert decode(encode(FULL, NOW), later) == FULL


def test_over_a_reboot_an_expiry_is_the_same_moment_of_the_wall_clock() -> None:
    text = encode(FULL, NOW)
    rebooted = Clock("next boot", mono=3.0, wall=NOW.wall + 20)
    entries = {key: (entry.allow, entry.deny) for key, entry in decode(text, rebooted).cidrs.entries.items()}
    assert entries[bytes((192, 0, 2, 7, 32))] == pytest.approx((3 + 40, 3 + 10.25))
    assert entries[bytes((0, 0, 0, 0, 0))] == pytest.approx((0, 3 - 15))  # over already: kept, and not live
    assert entries[bytes((10, 0, 0, 0, 8))] == (float("inf"), float("inf"))


cidrs = st.builds("{}.{}.0.0/16".format, st.integers(0, 255), st.integers(0, 255))


@given(st.dictionaries(cidrs, st.sampled_from([0.0, 7.5, 1e6]), max_size=20), st.randoms())
def test_equal_policies_have_equal_texts(entries: dict[str, float], random: Random) -> None:
    specs = [CidrSpec(cidr, ttl) for cidr, ttl in entries.items()]
    shuffled = list(specs)
    random.shuffle(shuffled)
    one, other = (
        apply(EMPTY, BulkUpdate(mode=Mode.DENYLIST, allow_cidrs=order, deny_cidrs=specs[:3]), NOW.mono)
        for order in (specs, shuffled)
    )
    assert encode(one, NOW) == encode(other, NOW)
    assert decode(encode(one, NOW), NOW) == one


@pytest.mark.parametrize("count", [PIECE - 1, PIECE, PIECE + 1, 3 * PIECE], ids=str)
def test_pieces_join_to_one_document(count: int) -> None:
    update = BulkUpdate(mode=Mode.ALLOWLIST, allow_cidrs=[f"10.{i >> 8}.{i & 255}.0/24" for i in range(count)])
    policy = apply(EMPTY, update, NOW.mono)
    text = encode(policy, NOW)
    assert len(json.loads(text)["cidrs"]) == count
    assert decode(text, NOW) == policy


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-10],
        lambda text: text.replace("10.0.0.0/8", "10.0.0.0/99"),
        lambda text: text.replace("ALLOWLIST", "SHUTLIST"),
        lambda text: text.replace('"cidrs"', '"ciders"'),
        lambda text: text.replace('"v": 1', '"v": 2'),
        lambda _text: "[]",
    ],
    ids=["cut", "cidr", "mode", "key", "version", "shape"],
)
def test_damage_is_told_and_not_guessed_around(damage: Callable[[str], str]) -> None:
    with pytest.raises(PreconditionError, match="read stored policy"):
        decode(damage(encode(FULL, NOW)), NOW)


def test_clocks_are_read_from_this_host() -> None:
    one, other = Clock.now(), Clock.now()
    assert one.boot_id == other.boot_id
    assert other.mono >= one.mono > 0
    assert one.shift_from(other) == 0


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        (NOW, replace(NOW, mono=1007.5, wall=5.0), 7.5),  # within a boot the wall clock may jump as it likes
        (NOW, NOW, 0.0),
        (NOW, replace(NOW, mono=999.0), 0.0),
        (NOW, Clock("next boot", mono=3.0, wall=NOW.wall + 20), 20.0),
        (NOW, Clock("next boot", mono=3000.0, wall=NOW.wall + 20), 20.0),
        (NOW, Clock("next boot", mono=3.0, wall=NOW.wall - 20), 0.0),  # set back
    ],
    ids=["same-boot", "at-once", "never-negative", "reboot", "reboot-long-up", "reboot-wall-set-back"],
)
def test_how_long_ago_a_moment_was(then: Clock, now: Clock, expected: float) -> None:
    assert seconds_since(contact_text(then), now) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[]", "1", "{}", '{"boot_id": "b", "mono": "1", "wall": 2}', '{"boot_id": "b", "mono": 1}',
     '{"boot_id": "b", "mono": 1, "wall": 2, "more": 3}', "null"],
    ids=["none", "empty", "cut", "list", "number", "nothing", "text", "short", "more", "null"],
)  # fmt: skip
def test_a_moment_that_cannot_be_read_is_none(text: str | None) -> None:
    assert seconds_since(text, NOW) is None
