"""A policy is switched between two packets: never half of the old or the new one, never a gap (semantics.md 9).

While a sender runs at full speed, policies replace one another that agree about two addresses and differ in all else:
of one address not a packet may be lost, of the other none may pass. The fence counts, and nftables at the far end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from flood import FarEnd, flood, wait_for_more
from harness import packets
from harness.deadline import SLOWNESS, wait_for
from harness.fence import Fence, moved
from harness.topology import INTERNET_IF, UP_IF, Topology, Workload
from harness.wire import Meter, PacketSender, Sniffer, Tag
from netfence.policy.commands import BulkUpdate, apply
from netfence.policy.modes import Mode, Reason
from netfence.policy.policy import EMPTY, Policy

pytestmark = pytest.mark.dealt

ALLOWED = {"ipv4": "203.0.113.80", "ipv6": "2001:db8:b::80"}
DENIED = {"ipv4": "203.0.113.81", "ipv6": "2001:db8:b::81"}
SWITCHES, FEWER_SWITCHES, RULES = (200, 40, 3000) if SLOWNESS == 1 else (10, 6, 150)


def arrived(topology: Topology, workload: Workload, to: str) -> int:
    """Send three packets and count those that arrive, with an ear of our own: the topology's is full of the flood."""
    tag = Tag()
    with (
        closing(Sniffer(topology.internet, INTERNET_IF)) as ear,
        closing(PacketSender(topology.host, UP_IF)) as sentinels,
    ):
        packet = workload.bytes_of(packets.UDP4, to, tag)
        return Meter(ear, sentinels).transmit(workload.sender, tag, [packet] * 3)


def policy(seed: int, mode: Mode, allow: list[str], deny: list[str], rules: int = RULES) -> Policy:
    """Make a policy of many rules, none of them about the addresses in question."""
    filler4 = [f"10.{seed}.{number >> 8}.{number & 255}" for number in range(rules)]
    filler6 = [f"2001:db8:{seed:x}ff:{number:x}::/64" for number in range(rules)]
    half = rules // 2
    update = BulkUpdate(
        mode=int(mode),
        allow_cidrs=[*filler4[:half], *filler6[:half], *allow],
        deny_cidrs=[*filler4[half:], *filler6[half:], *deny],
    )
    return apply(EMPTY, update, time.monotonic())


EVERYTHING = ["0.0.0.0/0", "::/0"]


def pairs(family: str) -> dict[str, tuple[Policy, Policy]]:
    """Pairs of policies that agree about ALLOWED and DENIED, each in its own way."""
    allowed, denied = ALLOWED[family], DENIED[family]
    return {
        "large-large": (
            policy(1, Mode.ALLOWLIST, [allowed], [denied]),
            policy(2, Mode.ALLOWLIST, [allowed], [denied]),
        ),
        "allowlist-denylist": (
            policy(1, Mode.ALLOWLIST, [allowed], []),
            policy(2, Mode.DENYLIST, [], [denied]),
        ),
        "exact-wide": (
            policy(1, Mode.DENYLIST, [allowed], EVERYTHING),
            policy(2, Mode.ALLOWLIST, EVERYTHING, [denied]),
        ),
        "large-small": (
            policy(1, Mode.ALLOWLIST, [allowed], []),
            policy(2, Mode.ALLOWLIST, [allowed], [], rules=0),
        ),
    }


@pytest.fixture(scope="module")
def fence(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fence]:
    with Fence(topology, tmp_path_factory.mktemp("fence")) as made:
        yield made


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["large-large", "allowlist-denylist", "exact-wide", "large-small"])
@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_no_packet_meets_half_a_policy(
    topology: Topology, fence: Fence, workload: Workload, family: str, name: str
) -> None:
    shape = packets.UDP4 if family == "ipv4" else packets.UDP6
    frames = [workload.bytes_of(shape, to, Tag()) for to in (DENIED[family], ALLOWED[family])]
    both = pairs(family)[name]
    switches = SWITCHES if name == "large-large" else FEWER_SWITCHES
    far_end = FarEnd(topology, [ALLOWED[family], DENIED[family]])
    try:
        with fence.interface(workload.host_if) as fenced:
            fenced.switch(both[0])
            before, in_force = fenced.counters(), 0
            with flood(workload, *frames) as sent:
                for _ in range(switches):
                    in_force = 1 - in_force
                    fenced.switch(both[in_force])
                    wait_for_more(fenced)
            count = sent[0]
            found = moved(before, fenced.counters())
            passed = sum(packets for key, (packets, _) in found.items() if Reason[key] < Reason.DENY_RULE)
            assert {key for key in found if key not in ("NEIGHBOUR", "ARP")} <= {
                "ALLOW_RULE", "DEFAULT_PASS", "DENY_RULE", "DEFAULT_DROP",
            }  # fmt: skip
            assert count > switches
            assert passed - found.get("NEIGHBOUR", (0, 0))[0] == count
            assert sum(packets for packets, _ in found.values()) - found.get("NEIGHBOUR", (0, 0))[0] == 2 * count
        wait_for(lambda: far_end.counts()[0] >= count, "the last of the allowed packets, which follow the denied ones")
        assert far_end.counts() == [count, 0]
    finally:
        far_end.close()


def test_a_replacement_that_fails_leaves_the_old_policy(
    topology: Topology, fence: Fence, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = ALLOWED["ipv4"]
    with fence.interface(workload.host_if) as fenced:
        fenced.switch(policy(1, Mode.ALLOWLIST, [to], []))

        def full(*_: object) -> None:
            raise OSError(12, "no memory")

        with monkeypatch.context() as patch:
            patch.setattr(fence.plane._rules, "_fill", full)
            with pytest.raises(Exception, match="memory"):
                fenced.switch(policy(2, Mode.DENYLIST, [], [to]))
        with fenced.counts(Reason.ALLOW_RULE, 3):
            assert arrived(topology, workload, to) == 3
        fenced.switch(policy(2, Mode.DENYLIST, [], [to]))
        with fenced.counts(Reason.DENY_RULE, 3):
            assert arrived(topology, workload, to) == 0


def test_a_single_change_goes_into_the_table_in_force(topology: Topology, fence: Fence, workload: Workload) -> None:
    """The same policy index has another table under it each time: never the one that was open for the last change."""
    to, indices = ALLOWED["ipv4"], []
    with fence.interface(workload.host_if) as fenced:
        for seed in range(1, 6):
            fenced.switch(policy(seed, Mode.ALLOWLIST, [], [], 4))
            with fenced.counts(Reason.DEFAULT_DROP, 3):
                assert arrived(topology, workload, to) == 0
            fenced.allow(to)
            with fenced.counts(Reason.ALLOW_RULE, 3):
                assert arrived(topology, workload, to) == 3
            fence.settle()  # the index before is free, and the next one
            indices.append(fence.plane._slots[fenced.slot].index)
    assert len(set(indices)) < len(indices)


def test_a_closed_lease_is_shut_when_the_call_returns(topology: Topology, fence: Fence, workload: Workload) -> None:
    to = ALLOWED["ipv4"]
    frame = workload.bytes_of(packets.UDP4, to, Tag())
    with fence.interface(workload.host_if) as fenced:
        fenced.replace(Mode.ALLOWLIST)
        with flood(workload, frame) as sent:
            for _ in range(SWITCHES // 2):
                fenced.lease(to)
                wait_for_more(fenced, Reason.LEASE)
                fenced.revoke(to)
                shut = fenced.counters().packets
                # One packet may have been looking when the lease went: it is through when the next has been dropped.
                wait_for_more(fenced, Reason.DEFAULT_DROP)
                closed = fenced.counters().packets
                assert closed[Reason.LEASE] - shut[Reason.LEASE] <= 1
                wait_for_more(fenced, Reason.DEFAULT_DROP)
                assert fenced.counters().packets[Reason.LEASE] == closed[Reason.LEASE]
        assert sent[0] > 0


def test_leases_outlive_a_replacement(topology: Topology, fence: Fence, workload: Workload) -> None:
    to = ALLOWED["ipv4"]
    with fence.interface(workload.host_if) as fenced:
        fenced.switch(policy(1, Mode.ALLOWLIST, [], []))
        fenced.lease(to)
        for seed in (2, 1, 3):
            fenced.switch(policy(seed, Mode.ALLOWLIST, [], []))
            with fenced.counts(Reason.LEASE, 3):
                assert arrived(topology, workload, to) == 3
        fenced.revoke(to)
        with fenced.counts(Reason.DEFAULT_DROP, 3):
            assert arrived(topology, workload, to) == 0
