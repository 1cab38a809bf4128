"""The shared cache: expiry, bounds, fairness between attachments (semantics.md 21)."""

from __future__ import annotations

from dnslib import DNSRecord
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.dns.test_answer import build, scanned
from tests.unit.dns.world import PUBLIC

from netfence.dns.answer import Answer
from netfence.dns.cache import CacheKey, SharedCache
from netfence.dns.limits import MAX_CACHED_ANSWER


def key(n: int, upstream: str = "192.0.2.53:53") -> CacheKey:
    return CacheKey((upstream,), b"%d" % n, do=False, cd=False)


def answer(ttl_s: int = 60, records: int = 1) -> Answer:
    return scanned(build("".join(f"a.org. {ttl_s} IN A 93.{n // 250}.216.{n % 250}\n" for n in range(records))))


def test_an_answer_lives_as_long_as_its_ttl_from_its_arrival() -> None:
    cache, stored = SharedCache(), answer(60)  # arrived at 5.0
    cache.put(key(1), stored, "owner")
    assert cache.get(key(1), 64.9) is stored
    assert cache.get(key(1), 65.0) is None
    assert len(cache) == 0


def test_max_lease_caps_the_time_in_the_cache() -> None:
    cache = SharedCache(10.0)
    cache.put(key(1), answer(60), "owner")
    assert cache.get(key(1), 14.9) is not None
    assert cache.get(key(1), 15.0) is None


def test_what_may_not_be_cached_is_not() -> None:
    cache = SharedCache()
    cache.put(key(1), answer(0), "owner")
    big = answer(60, records=300)
    assert len(big.raw) > MAX_CACHED_ANSWER
    cache.put(key(2), big, "owner")
    cut = bytearray(DNSRecord.question("a.org").reply().pack())
    cut[2] |= 2
    cache.put(key(3), scanned(bytes(cut)), "owner")
    assert len(cache) == 0


def test_upstreams_do_and_cd_make_different_questions() -> None:
    cache, stored = SharedCache(), answer()
    cache.put(key(1), stored, "owner")
    assert cache.get(key(1, "192.0.2.54:53"), 6.0) is None
    assert cache.get(key(1)._replace(do=True), 6.0) is None
    assert cache.get(key(1)._replace(cd=True), 6.0) is None


def test_one_attachment_has_a_share_and_replaces_its_own_oldest() -> None:
    cache = SharedCache(entries=100, share=10)
    cache.put(key(1000), answer(), "neighbour")
    for n in range(50):
        cache.put(key(n), answer(), "greedy")
    assert len(cache) == 11
    assert cache.get(key(1000), 6.0) is not None
    assert cache.get(key(39), 6.0) is None
    assert cache.get(key(40), 6.0) is not None


def test_when_full_the_largest_holder_gives() -> None:
    cache = SharedCache(entries=12, share=10)
    cache.put(key(100), answer(), "small")
    for n in range(10):
        cache.put(key(n), answer(), "greedy")
    cache.put(key(101), answer(), "small")
    cache.put(key(200), answer(), "new")  # full: the greedy one's oldest goes
    assert cache.get(key(0), 6.0) is None
    assert [cache.get(key(n), 6.0) is not None for n in (1, 100, 101, 200)] == [True] * 4
    for n in range(300, 340):
        cache.put(key(n), answer(), "greedy")  # full again: its own
    assert [cache.get(key(n), 6.0) is not None for n in (100, 101, 200)] == [True] * 3


def test_a_closed_attachment_s_entries_go() -> None:
    cache = SharedCache()
    cache.put(key(1), answer(), "gone")
    cache.put(key(2), answer(), "stays")
    cache.forget_owner("gone")
    cache.forget_owner("never was")
    assert (cache.get(key(1), 6.0), len(cache)) == (None, 1)


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abcdef"), st.integers(0, 3)), max_size=200))
def test_bounds_hold_whatever_is_stored(steps: list[tuple[int, str, int]]) -> None:
    cache = SharedCache(entries=15, share=6)
    for n, owner, what in steps:
        if what == 0:
            cache.get(key(n), 100.0)
        elif what == 1:
            cache.forget_owner(owner)
        else:
            cache.put(key(n), scanned(build(f"a.org. 60 IN A {PUBLIC}")), owner)
        held = cache._owned
        assert len(cache) <= 15
        assert all(0 < len(own) <= 6 for own in held.values())
        assert sum(map(len, held.values())) == len(cache)
        assert all(cache._entries[k].owner == who for who, own in held.items() for k in own)
