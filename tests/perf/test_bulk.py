"""`bulk-*`, `match-*`: big policies. From texts to switched in, one rule more, what the event loop pays; names.

Ours against `nft -f`, which replaces a set of as many elements, or adds one to it (bulk_bench.py).
"""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Iterator

import pytest

from bulk_bench import CONTESTANTS, RULES, Bulk, BulkFence
from measure import FULL, SLOW_ROUNDS, Series, compare, report
from netfence.daemon import GC_THRESHOLD
from netfence.policy.commands import BulkUpdate, DnsSpec, DomainSpec, apply
from netfence.policy.modes import DnsMode, Mode
from netfence.policy.policy import EMPTY

DOMAINS = 100_000
LIMIT_MS, BLOCKED_MS, ONE_MORE_MS = 500, 20, 50


@pytest.fixture(scope="module")
def lanes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Bulk]]:
    """Every contestant on its own host."""
    with contextlib.ExitStack() as stack:
        made: dict[str, Bulk] = {}
        for name, kind in CONTESTANTS.items():
            made[name] = kind(tmp_path_factory.mktemp(name))
            stack.callback(made[name].close)
        yield made


@pytest.fixture
def _collected_as_in_the_daemon() -> Iterator[None]:
    """Set the garbage collector up as `netfence.daemon` does: a full collection would stop the loop for 50 ms."""
    before = gc.get_threshold()
    gc.set_threshold(*GC_THRESHOLD)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("_collected_as_in_the_daemon")
def test_replace(lanes: dict[str, Bulk]) -> None:
    fence = lanes["netfence"]
    assert isinstance(fence, BulkFence)
    series = compare("ms", {name: lane.replace for name, lane in lanes.items()}, SLOW_ROUNDS)
    blocked = Series("ms", fence.blocked[-SLOW_ROUNDS:])
    report("bulk-replace-text-to-switched", series, base="netfence", rules=RULES)
    report("bulk-replace-event-loop-blocked", {"netfence": blocked}, rules=RULES)
    assert series["netfence"].median < 2 * LIMIT_MS
    assert blocked.median < 2 * BLOCKED_MS


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("_collected_as_in_the_daemon")
def test_one_more(lanes: dict[str, Bulk]) -> None:
    """A single rule, added to what holds RULES."""
    series = compare("ms", {name: lane.add for name, lane in lanes.items()}, SLOW_ROUNDS)
    report("bulk-one-rule-more", series, base="netfence", rules=RULES)
    assert series["netfence"].median < 2 * ONE_MORE_MS


def test_domain_match(pinned: int) -> None:
    domains = [DomainSpec(f"host{n}.zone{n % 977}.example{n % 31}.test", n % 2 == 0) for n in range(DOMAINS)]
    dns = DnsSpec(mode=int(DnsMode.ALLOWLIST), allow=domains, deny=[], upstreams=[])
    bulk = BulkUpdate(mode=int(Mode.ALLOWLIST), allow_cidrs=[], deny_cidrs=[], dns=dns, audit=False)
    table = apply(EMPTY, bulk, 0.0).dns.domains
    rng = random.Random(7)
    names = [f"a.{rng.choice(domains).domain}" for _ in range(1000)] + [f"x{n}.unknown.test" for n in range(1000)]
    times = 20 if FULL else 5

    def run() -> float:
        start = time.perf_counter()
        for _ in range(times):
            for name in names:
                table.match(name)
        return (time.perf_counter() - start) / times / len(names) * 1e6

    assert table.match("a.host2.zone2.example2.test") is not None
    assert table.match("a.host1.zone1.example1.test") is None
    series = compare("µs", {"netfence": run})
    report("match-domain-100k", series, rules=DOMAINS, cpu_pinned=pinned)
    assert series["netfence"].median < 2 * 3
