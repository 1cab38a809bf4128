"""The token bucket, and how often a line is logged."""

from __future__ import annotations

from netfence.dns.ratelimit import LOG_EVERY_S, LogLimit, TokenBucket


def test_a_second_s_worth_at_once_then_the_rate() -> None:
    bucket = TokenBucket(10, 100.0)
    assert [bucket.take(100.0) for _ in range(11)] == [True] * 10 + [False]
    assert [bucket.take(100.25) for _ in range(3)] == [True, True, False]
    assert sum(bucket.take(200.0) for _ in range(50)) == 10


def test_a_line_at_once_then_rarely_and_all_are_counted() -> None:
    limit = LogLimit()
    assert [limit.due(5.0 + n * LOG_EVERY_S / 2) for n in range(5)] == [True, False, True, False, True]
    assert limit.count == 5
