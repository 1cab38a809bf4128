"""`memory-*`: what a daemon, its attachments and their rules cost: resident memory, kernel maps, descriptors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from bench_daemon import descriptors, idle_interfaces, map_mb, rss_mb, slab_mb
from harness.daemon import Netfenced
from harness.topology import Topology
from measure import FULL, SLOW_ROUNDS, Series, report

MANY = 40 if FULL else 20
FEW_RULES = 20
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


def _policy(rules: int) -> Mapping[str, object]:
    cidrs = [f"{11 + (n >> 16)}.{n >> 8 & 255}.{n & 255}.0/24" for n in range(rules)]
    return {"default": {"mode": "allowlist", "allow_cidrs": cidrs}}


def _daemon(topology: Topology, directory: Path) -> Netfenced:
    """Return one for a round: an allocator that has given back nothing of an earlier round would hide the next."""
    return Netfenced(topology.host, directory, policy=_policy(FEW_RULES), config={"log_level": "info"})


def _cost(daemon: Netfenced) -> Cost:
    return Cost(rss_mb(daemon.pid), map_mb(daemon), descriptors(daemon.pid))


def _tell(name: str, unit: str, values: Mapping[str, Sequence[float]], **sizes: int) -> None:
    report(name, {what: Series(unit, [*each]) for what, each in values.items()}, None, **sizes)


def _kb(mb: Sequence[float]) -> list[float]:
    return [value * 1024 for value in mb]


@pytest.mark.timeout(300)
def test_idle_and_each_attachment(topology: Topology, interfaces: list[str], tmp_path: Path) -> None:
    idles, eaches = [], []
    for number in range(SLOW_ROUNDS):
        with _daemon(topology, tmp_path / str(number)) as daemon:
            idles.append(_cost(daemon))
            daemon.attach(interface=interfaces[0])  # what is loaded with the first is not the second's cost
            one = _cost(daemon)
            for name in interfaces[1:]:
                daemon.attach(interface=name)
            many = _cost(daemon)
            assert len(daemon.attachments()) == MANY
        eaches.append(Cost(*((after - before) / (MANY - 1) for before, after in zip(one, many, strict=True))))
    rss, maps, fds = zip(*idles, strict=True)
    _tell("memory-idle", "MB", {"daemon-rss": rss, "map-memory": maps})
    _tell("memory-idle-descriptors", "descriptors", {"daemon": fds})
    rss_each, maps_each, fds_each = zip(*eaches, strict=True)
    kb = {"daemon-rss": _kb(rss_each), "map-memory": _kb(maps_each)}
    _tell("memory-per-attachment", "KB", kb, attachments=MANY)
    _tell("memory-per-attachment-descriptors", "descriptors", {"daemon": fds_each}, attachments=MANY)
    assert max(rss) <= RSS_LIMIT_MB
    assert 0 < max(kb["daemon-rss"]) + max(kb["map-memory"]) <= PER_ATTACHMENT_KB
    assert 0 < max(fds_each) <= 10


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rules", RULES)
def test_rules(topology: Topology, interfaces: list[str], tmp_path: Path, rules: int) -> None:
    """What 10,000 more rules cost, with what replacing them takes for a moment: the allocator keeps some of it."""
    each: defaultdict[str, list[float]] = defaultdict(list)
    per = 10_000 / rules
    for number in range(SLOW_ROUNDS):
        with _daemon(topology, tmp_path / str(number)) as daemon:
            daemon.attach(interface=interfaces[0])
            before, slab_before = _cost(daemon), slab_mb()
            daemon.set_policy(_policy(rules))
            after, slab_after = _cost(daemon), slab_mb()
        each["daemon-rss"].append((after.rss_mb - before.rss_mb) * per)
        each["map-memory"].append((after.maps_mb - before.maps_mb) * per)
        each["slab"].append((slab_after - slab_before) * per)
    slab = {"slab": each.pop("slab")}
    _tell("memory-per-10k-rules", "MB", each, rules=rules)
    if rules >= SLAB_RULES:
        _tell("memory-per-10k-rules-slab", "MB", slab, rules=rules)
    assert 0.3 < min(each["map-memory"]) <= max(each["map-memory"]) < PER_10K_RULES_MB, "the rules are not there"
    assert max(each["daemon-rss"]) < PER_10K_RULES_MB
