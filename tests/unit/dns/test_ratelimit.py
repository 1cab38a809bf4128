"""The token bucket."""

from __future__ import annotations

from netfence.dns.ratelimit import TokenBucket


def test_a_second_s_worth_at_once_then_the_rate() -> None:
    bucket = TokenBucket(10, 100.0)
    assert [bucket.take(100.0) for _ in range(11)] == [True] * 10 + [False]
    assert [bucket.take(100.25) for _ in range(3)] == [True, True, False]
    assert sum(bucket.take(200.0) for _ in range(50)) == 10
