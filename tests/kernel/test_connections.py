"""Connections that run: cut by a revocation with the next packet, and outliving their lease (semantics.md 5 and 8).

Where flags and order decide, packets are made one by one; where a kernel's TCP must live with the verdicts, two
programs talk. What must not arrive is counted at the internet's end behind a sentinel (`Meter`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

import pytest

from connection_places import (
    ECHO,
    FAMILIES,
    KINDS,
    WEB,
    Place,
    PlaceMaker,
    assert_drops,
    assert_passes,
    assert_talks,
    is_refused,
)
from harness import packets
from harness.agent import family_of
from harness.cgroup import Cgroup
from harness.fence import Attachment, Fence
from harness.services import tcp_echo
from harness.topology import Topology, Workload
from harness.wire import Tag
from netfence.policy.modes import Mode, Reason

NET = {"ipv4": "203.0.113.0/24", "ipv6": "2001:db8:b::/64"}
Change: TypeAlias = Callable[[Attachment, str], object]  # of the fence, about WEB of that family


@pytest.fixture(scope="module")
def fence(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fence]:
    with Fence(topology, tmp_path_factory.mktemp("fence")) as made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def _echo(topology: Topology) -> Iterator[None]:
    with tcp_echo(topology.internet, "::", ECHO):
        yield


@pytest.fixture
def place_maker(fence: Fence, cgroups: Callable[[str], Cgroup]) -> Iterator[PlaceMaker]:
    with ExitStack() as stack:
        yield PlaceMaker(fence, cgroups, stack)


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, place_maker: PlaceMaker, workload: Workload) -> Place:
    return place_maker(request.param, workload)


@dataclass(frozen=True)
class Cut:
    """Something that lets an address pass, its revocation, the reason thereafter, and the revocation taken back."""

    mode: Mode
    open: Change
    shut: Change
    reason: Reason
    undo: Change


ALLOW: Change = lambda a, family: a.allow(NET[family])  # noqa: E731
LEASE: Change = lambda a, family: a.lease(WEB[family])  # noqa: E731
UNLEASE: Change = lambda a, family: a.revoke(WEB[family])  # noqa: E731
DENY: Change = lambda a, family: a.deny(WEB[family])  # noqa: E731
UNDENY: Change = lambda a, family: a.remove(WEB[family])  # noqa: E731
CUTS = {
    "rule-removed": Cut(Mode.ALLOWLIST, ALLOW, lambda a, f: a.remove(NET[f]), Reason.DEFAULT_DROP, ALLOW),
    "denied": Cut(Mode.ALLOWLIST, ALLOW, DENY, Reason.DENY_RULE, UNDENY),
    "denied-in-denylist": Cut(Mode.DENYLIST, lambda _, __: None, DENY, Reason.DENY_RULE, UNDENY),
    "block_all": Cut(
        Mode.ALLOWLIST,
        ALLOW,
        lambda a, _: a.mode(Mode.BLOCK_ALL),
        Reason.BLOCK_ALL,
        lambda a, _: a.mode(Mode.ALLOWLIST),
    ),
    "replaced": Cut(
        Mode.ALLOWLIST,
        ALLOW,
        lambda a, _: a.replace(Mode.ALLOWLIST),
        Reason.DEFAULT_DROP,
        lambda a, f: a.replace(Mode.ALLOWLIST, allow=[NET[f]]),
    ),
    "lease-closed": Cut(Mode.ALLOWLIST, LEASE, UNLEASE, Reason.DEFAULT_DROP, LEASE),
    "leased-and-denied": Cut(Mode.ALLOWLIST, LEASE, DENY, Reason.DENY_RULE, UNDENY),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_a_running_connection_is_cut_with_the_next_packet(
    topology: Topology, place: Place, family: str, cut: Cut
) -> None:
    fenced, tag = place.attachment, Tag()
    fenced.replace(cut.mode)
    cut.open(fenced, family)
    with place.agent.connect(WEB[family], ECHO) as connection:
        assert_talks(connection)
        cut.shut(fenced, family)
        before = fenced.counters().packets
        connection.send(tag.payload)
        assert topology.meter().arrived(tag) == 0
        after = fenced.counters().packets
        assert after[cut.reason] > before[cut.reason]
        assert sum(after[:16]) == sum(before[:16]), "something passed"
        assert is_refused(place.agent, WEB[family], ECHO)
        cut.undo(fenced, family)
        assert connection.recv() == tag.payload  # the kernel sent it again


@pytest.fixture
def leased(fence: Fence, workload: Workload) -> Iterator[Attachment]:
    with fence.interface(workload.host_if, established_idle_s=0.5, established_max_s=1.5) as attachment:
        attachment.replace(Mode.ALLOWLIST)
        yield attachment


@pytest.mark.parametrize("family", FAMILIES)
def test_packets_without_syn_outlive_the_lease(
    topology: Topology, workload: Workload, leased: Attachment, family: str
) -> None:
    number, to = int(family[-1]), WEB[family]
    expiry = leased.lease(to, ttl_s=0.4)
    assert_passes(topology, workload, leased, packets.tcp(number, "S"), to, Reason.LEASE)
    assert_passes(topology, workload, leased, packets.udp(number), to, Reason.LEASE)
    assert time.monotonic() < expiry, "the machine is too slow for this test's lease"
    leased.fence.wait_until(expiry)
    for flags in ("A", "PA", "FA", "R", "RA", "F", ""):
        assert_passes(topology, workload, leased, packets.tcp(number, flags), to, Reason.ESTABLISHED)
    for flags in ("S", "SA", "SF", "SR", "SPA"):
        assert_drops(topology, workload, leased, packets.tcp(number, flags), to, Reason.DEFAULT_DROP)
    icmp, fragment = (
        (packets.ICMP4, packets.UDP4_LATER_FRAGMENT) if number == 4 else (packets.ICMP6, packets.UDP6_LATER_FRAGMENT)
    )
    for shape in (packets.udp(number), icmp, fragment):
        assert_drops(topology, workload, leased, shape, to, Reason.DEFAULT_DROP)
    leased.deny(to)
    assert_drops(topology, workload, leased, packets.tcp(number, "A"), to, Reason.DENY_RULE)
    leased.remove(to)
    leased.lease(to)
    assert_passes(topology, workload, leased, packets.tcp(number, "S"), to, Reason.LEASE)
    leased.revoke(to)
    assert_drops(topology, workload, leased, packets.tcp(number, "A"), to, Reason.DEFAULT_DROP)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("used", [None, "udp"], ids=["unused", "udp-only"])
def test_a_lease_that_no_tcp_used_ends_with_its_expiry(
    topology: Topology, workload: Workload, leased: Attachment, used: str | None, family: str
) -> None:
    number, to = int(family[-1]), WEB[family]
    expiry = leased.lease(to, ttl_s=0.3)
    if used:
        assert_passes(topology, workload, leased, packets.udp(number), to, Reason.LEASE)
    leased.fence.wait_until(expiry)
    assert_drops(topology, workload, leased, packets.tcp(number, "A"), to, Reason.DEFAULT_DROP)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_established_connection_ends_when_it_is_idle(
    topology: Topology, workload: Workload, leased: Attachment, family: str
) -> None:
    number, to = int(family[-1]), WEB[family]
    ack = packets.tcp(number, "A")
    expiry = leased.lease(to, ttl_s=0.3)
    assert_passes(topology, workload, leased, ack, to, Reason.LEASE)
    leased.fence.wait_until(expiry)
    assert_passes(topology, workload, leased, ack, to, Reason.ESTABLISHED)
    leased.fence.wait_until(time.monotonic() + leased.static.established_idle_s)
    assert_drops(topology, workload, leased, ack, to, Reason.DEFAULT_DROP)
    assert_drops(topology, workload, leased, ack, to, Reason.DEFAULT_DROP)  # a dropped packet is no use


@pytest.mark.parametrize("family", FAMILIES)
def test_an_established_connection_ends_at_the_longest_time_past_expiry(
    topology: Topology, workload: Workload, leased: Attachment, family: str
) -> None:
    number, to = int(family[-1]), WEB[family]
    ack = packets.tcp(number, "A")
    expiry = leased.lease(to, ttl_s=0.3)
    assert_passes(topology, workload, leased, ack, to, Reason.LEASE)
    end = expiry + leased.static.established_max_s
    passed = 0
    while time.monotonic() < end - 0.3:  # never idle
        passed += topology.arrived(workload, ack, to, 1)
        leased.fence.wait_until(time.monotonic() + 0.05)
    assert passed > 3
    leased.fence.wait_until(end)
    assert_drops(topology, workload, leased, ack, to, Reason.DEFAULT_DROP)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_outlives_its_lease_and_a_new_one_is_refused(place: Place, family: str) -> None:
    fenced, to = place.attachment, WEB[family]
    fenced.replace(Mode.ALLOWLIST)
    expiry = fenced.lease(to, ttl_s=0.5)
    with place.agent.connect(to, ECHO) as connection:
        assert_talks(connection)
        fenced.fence.wait_until(expiry)
        before = fenced.counters().packets[Reason.ESTABLISHED]
        assert_talks(connection)
        assert fenced.counters().packets[Reason.ESTABLISHED] > before
        assert is_refused(place.agent, to, ECHO)
        with place.agent.udp(family_of(to)) as sock:
            if fenced.direction is None:
                with pytest.raises(PermissionError):
                    sock.sendto(b"x", (to, 9))
            else:
                with fenced.counts(Reason.DEFAULT_DROP, 1, besides=[Reason.ESTABLISHED]):
                    sock.sendto(b"x", (to, 9))
        fenced.lease(to)
        place.agent.connect(to, ECHO).close()
        assert_talks(connection)
