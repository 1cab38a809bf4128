"""`memory-*`: what a daemon, its attachments and their rules cost: resident memory, kernel maps, descriptors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pytest

from bench_daemon import descriptors, idle_interfaces, map_mb, rss_mb, slab_mb
from harness.daemon import Netfenced
from harness.topology import Topology
from measure import FULL, Series, report

MANY = 100 if FULL else 20
RULES = (10_000, 100_000) if FULL else (10_000,)
SLAB_RULES = 100_000
"""With fewer, what the rest of the machine allocates meanwhile would be more than they are."""
RSS_LIMIT_MB = 90
PER_ATTACHMENT_KB = 1_000
PER_10K_RULES_MB = 40


class Cost(NamedTuple):
    """What is in use at one moment."""

    rss_mb: float
    maps_mb: float
    descriptors: float


@pytest.fixture(scope="module")
def interfaces(topology: Topology) -> list[str]:
    return idle_interfaces(topology.host, MANY)


@pytest.fixture(scope="module")
def daemon(topology: Topology, interfaces: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Netfenced]:
    directory = tmp_path_factory.mktemp("netfenced")
    with Netfenced(topology.host, directory, policy=_policy(20), config={"log_level": "warning"}) as one:
        yield one


def _policy(rules: int) -> Mapping[str, object]:
    cidrs = [f"{11 + (n >> 16)}.{n >> 8 & 255}.{n & 255}.0/24" for n in range(rules)]
    return {"default": {"mode": "allowlist", "allow_cidrs": cidrs}}


def _cost(daemon: Netfenced) -> Cost:
    return Cost(rss_mb(daemon.pid), map_mb(daemon), descriptors(daemon.pid))


def _tell(name: str, unit: str, values: Mapping[str, float], **sizes: int) -> None:
    """Report figures that are counted once: they do not vary as times do."""
    report(name, {what: Series(unit, [value, value]) for what, value in values.items()}, None, **sizes)


def test_idle_and_each_attachment(daemon: Netfenced, interfaces: list[str]) -> None:
    idle = _cost(daemon)
    _tell("memory-idle", "MB", {"daemon-rss": idle.rss_mb, "map-memory": idle.maps_mb})
    _tell("memory-idle-descriptors", "descriptors", {"daemon": idle.descriptors})
    attached = [daemon.attach(interface=interfaces[0]).id]  # what is loaded with the first is not the second's cost
    one = _cost(daemon)
    attached += [daemon.attach(interface=name).id for name in interfaces[1:]]
    many = _cost(daemon)
    more = MANY - 1
    each = Cost(*((after - before) / more for before, after in zip(one, many, strict=True)))
    kb = {"daemon-rss": each.rss_mb * 1024, "map-memory": each.maps_mb * 1024}
    _tell("memory-per-attachment", "KB", kb, attachments=MANY)
    _tell("memory-per-attachment-descriptors", "descriptors", {"daemon": each.descriptors}, attachments=MANY)
    for one_id in attached:
        daemon.detach(one_id)
    assert idle.rss_mb <= RSS_LIMIT_MB
    assert sum(kb.values()) <= PER_ATTACHMENT_KB
    assert each.descriptors <= 10


@pytest.mark.timeout(120)
@pytest.mark.parametrize("rules", RULES)
def test_rules(daemon: Netfenced, interfaces: list[str], rules: int) -> None:
    """What 10,000 more rules cost, with what replacing them takes for a moment: the allocator keeps some of it."""
    daemon.set_policy(_policy(20))
    attached = daemon.attach(interface=interfaces[0])
    before, slab_before = _cost(daemon), slab_mb()
    daemon.set_policy(_policy(rules))
    after, slab_after = _cost(daemon), slab_mb()
    each = {
        "daemon-rss": (after.rss_mb - before.rss_mb) * 10_000 / rules,
        "map-memory": (after.maps_mb - before.maps_mb) * 10_000 / rules,
    }
    _tell("memory-per-10k-rules", "MB", each, rules=rules)
    if rules >= SLAB_RULES:
        _tell("memory-per-10k-rules-slab", "MB", {"slab": (slab_after - slab_before) * 10_000 / rules}, rules=rules)
    daemon.detach(attached.id)
    daemon.set_policy(_policy(20))
    assert 0.3 < each["map-memory"] < PER_10K_RULES_MB, "the rules are not there"
    assert each["daemon-rss"] < PER_10K_RULES_MB
