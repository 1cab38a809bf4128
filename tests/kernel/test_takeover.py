"""A new data plane on the pins of an old one: what is in force stays in force at every step (semantics.md 24)."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import faults
from harness import warm
from harness.cgroup import Cgroup
from harness.deadline import wait_for
from harness.fence import MAX_LEASES
from harness.packets import UDP4
from harness.topology import Topology, Workload
from netfence.dataplane.cgroups import resolve_cgroup
from netfence.dataplane.maps import u32
from netfence.dataplane.plane import DataPlane, Static
from netfence.dataplane.target import Direction, resolve_interface
from netfence.errors import ExhaustedError, NetfenceError
from netfence.policy.commands import BulkUpdate, CidrSpec, apply
from netfence.policy.limits import MAX_ATTACHMENTS
from netfence.policy.modes import Mode, Reason
from netfence.policy.policy import EMPTY

DENIED, OTHER = "203.0.113.81", "203.0.113.80"
POLICY = apply(
    EMPTY,
    BulkUpdate(
        mode=int(Mode.DENYLIST), allow_cidrs=[], deny_cidrs=[CidrSpec(f"{DENIED}/32", 0)], dns=None, audit=False
    ),
    time.monotonic(),
)
STATIC = Static(dns_address=bytes([198, 51, 100, 254]), dns_port=11000)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    with warm.bpffs(tmp_path / "bpf", tmp_path / "data", MAX_LEASES):
        yield tmp_path


def _holds(topology: Topology, workload: Workload) -> None:
    assert topology.arrived(workload, UDP4, OTHER) == 3
    assert topology.arrived(workload, UDP4, DENIED) == 0


@pytest.mark.parametrize("tcx", [None, False], ids=["tcx", "clsact"])
def test_the_next_daemon_empties_no_table_in_force(topology: Topology, directory: Path, tcx: bool | None) -> None:
    workload = topology.add_veth()
    with topology.host.inside(), asyncio.Runner() as runner:
        target = resolve_interface(workload.host_if)
        first = runner.run(_open_with(directory, tcx))
        slot = first.allocate_slot()
        runner.run(first.attach(slot, target, STATIC, Direction.WORKLOAD, "one"))
        runner.run(first.apply(slot, POLICY, None))
        _holds(topology, workload)
        dropped = first.counters(slot).packets[Reason.DENY_RULE]
        runner.run(first.close(detach=False))
        _holds(topology, workload)

        second = runner.run(_open_with(directory, tcx))
        _holds(topology, workload)  # the trap: tables made ready at the start must not be those in force
        second.claim_slot(slot)
        assert runner.run(second.restore(slot, target, STATIC, Direction.WORKLOAD, "one"))
        _holds(topology, workload)
        runner.run(second.apply(slot, POLICY, None))
        _holds(topology, workload)
        assert second.counters(slot).packets[Reason.DENY_RULE] == dropped + 4 * 3

        runner.run(second.detach(slot, target, "one"))
        assert topology.arrived(workload, UDP4, DENIED) == 3
        runner.run(second.close(detach=False))
    assert not any((directory / "bpf").rglob("links/*"))


async def _open_with(directory: Path, tcx: bool | None) -> DataPlane:
    """Open one; but for one, tests close it without `detach`, which would take the programs off the shelf (warm.py)."""
    pins = directory / "bpf" / warm.PINS
    return await DataPlane.open(pins, directory / "data", Mode.BLOCK_ALL, max_leases_total=MAX_LEASES, tcx=tcx)


def test_a_slot_starts_afresh(topology: Topology, directory: Path) -> None:
    """Nothing of an attachment is left for the next one of its slot: no lease, no rule, no count; nor a full table."""
    workload = topology.add_veth()
    with topology.host.inside(), asyncio.Runner() as runner:
        target = resolve_interface(workload.host_if)
        plane = runner.run(_open_with(directory, None))
        slot = plane.allocate_slot()
        runner.run(plane.attach(slot, target, STATIC, Direction.WORKLOAD, "one"))
        runner.run(plane.apply(slot, POLICY, None))
        plane.open_leases(slot, [bytes([203, 0, 113, 80])], time.monotonic() + 3600)
        _holds(topology, workload)
        index = plane._slots[slot].index
        assert len(plane._rules.read(index)) == 1
        runner.run(plane.detach(slot, target, "one"))
        plane.free_slot(slot)
        runner.run(_settled(plane))
        assert len(plane._rules.read(index)) == 0  # its table is anybody's, and empty

        assert plane.allocate_slot() == slot
        runner.run(plane.attach(slot, target, STATIC, Direction.WORKLOAD, "two"))
        assert sum(plane.counters(slot).packets) == 0
        assert topology.arrived(workload, UDP4, OTHER) == 0  # start_mode
        assert plane.counters(slot).packets[Reason.START] == 3
        runner.run(plane.apply(slot, EMPTY_ALLOWLIST, None))
        assert topology.arrived(workload, UDP4, OTHER) == 0
        assert plane.counters(slot).packets[Reason.DEFAULT_DROP] == 3
        runner.run(plane.detach(slot, target, "two"))
        runner.run(plane.close(detach=False))


@pytest.mark.parametrize("tcx", [None, False], ids=["tcx", "clsact"])
def test_what_a_detach_cut_short_left_in_a_slot_is_nobody_elses(
    topology: Topology, directory: Path, tcx: bool | None
) -> None:
    """Killed behind the pins, before anything was cleared, and the database lost: nobody knows of the slot any more."""
    workload = topology.add_veth()

    def cut_short(slot: int) -> None:
        raise ConnectionAbortedError(slot)

    with topology.host.inside(), asyncio.Runner() as runner:
        target = resolve_interface(workload.host_if)
        first = runner.run(_open_with(directory, tcx))
        kept, slot = first.allocate_slot(), first.allocate_slot()
        first.config.write(kept, STATIC, "kept")
        first._leases.open(kept, [bytes([203, 0, 113, 80])], time.monotonic() + 3600)
        runner.run(first.attach(slot, target, STATIC, Direction.WORKLOAD, "one"))
        runner.run(first.apply(slot, POLICY, None))
        first.open_leases(slot, [bytes([203, 0, 113, 80])], time.monotonic() + 3600)
        _holds(topology, workload)
        first._clear = cut_short  # type: ignore[method-assign]
        with pytest.raises(ConnectionAbortedError):
            runner.run(first.detach(slot, target, "one"))
        runner.run(first.close(detach=False))

        second = runner.run(_open_with(directory, tcx))
        second.claim_slot(kept)
        assert runner.run(second.clear_unclaimed([])) == [slot]
        assert runner.run(second.clear_unclaimed([])) == []
        assert second.config.read(kept) is not None
        assert second._leases.expiry(kept, bytes([203, 0, 113, 80])) is not None
        assert second.allocate_slot() == slot
        assert sum(second.counters(slot).packets) == 0
        runner.run(second.attach(slot, target, STATIC, Direction.WORKLOAD, "two"))
        runner.run(second.apply(slot, EMPTY_ALLOWLIST, None))
        second.open_leases(slot, [bytes([203, 0, 113, 99])], time.monotonic() + 3600)  # so that leases are looked at
        assert topology.arrived(workload, UDP4, OTHER) == 0
        runner.run(second.detach(slot, target, "two"))
        second._leases.clear(kept)
        second.config.clear(kept)
        runner.run(second.close(detach=False))


async def _settled(plane: DataPlane) -> None:
    """Wait until what is done in the background is done."""
    while plane._tasks:
        await asyncio.wait(list(plane._tasks))


EMPTY_ALLOWLIST = apply(
    EMPTY,
    BulkUpdate(mode=int(Mode.ALLOWLIST), allow_cidrs=[], deny_cidrs=[], dns=None, audit=False),
    time.monotonic(),
)


def test_a_lease_is_shortened_and_opened_again(topology: Topology, directory: Path) -> None:
    workload = topology.add_veth()
    address = bytes([203, 0, 113, 80])
    with topology.host.inside(), asyncio.Runner() as runner:
        target = resolve_interface(workload.host_if)
        plane = runner.run(_open_with(directory, None))
        slot = plane.allocate_slot()
        runner.run(plane.attach(slot, target, STATIC, Direction.WORKLOAD, "one"))
        runner.run(plane.apply(slot, EMPTY_ALLOWLIST, None))
        plane.open_leases(slot, [address], time.monotonic() + 3600)
        assert topology.arrived(workload, UDP4, OTHER) == 3
        plane.open_leases(slot, [address], time.monotonic() + 1)  # a renewal never shortens
        plane.shorten_lease(slot, address, time.monotonic())
        # By the kernel's ticks, of which a busy machine that emulates may be behind.
        wait_for(lambda: topology.arrived(workload, UDP4, OTHER) == 0, "the lease of an hour to end now")
        plane.open_leases(slot, [address], time.monotonic() + 3600)
        assert topology.arrived(workload, UDP4, OTHER) == 3
        plane.close_leases(slot, [address])
        plane.shorten_lease(slot, address, time.monotonic() + 3600)  # closed: nothing to shorten, nothing opened
        assert topology.arrived(workload, UDP4, OTHER) == 0
        runner.run(plane.detach(slot, target, "one"))
        runner.run(plane.close(detach=False))


def test_a_claimed_slot_takes_policies_and_leases_before_its_hooks_are_taken_over(
    topology: Topology, directory: Path
) -> None:
    workload = topology.add_veth()
    with topology.host.inside(), asyncio.Runner() as runner:
        target = resolve_interface(workload.host_if)
        first = runner.run(_open_with(directory, None))
        slot = first.allocate_slot()
        runner.run(first.attach(slot, target, STATIC, Direction.WORKLOAD, "one"))
        runner.run(first.apply(slot, POLICY, None))
        runner.run(first.close(detach=False))

        second = runner.run(_open_with(directory, None))
        second.claim_slot(slot)
        _holds(topology, workload)
        runner.run(second.apply(slot, EMPTY_ALLOWLIST, None))
        assert topology.arrived(workload, UDP4, OTHER) == 0
        second.open_leases(slot, [bytes([203, 0, 113, 80])], time.monotonic() + 3600)
        assert topology.arrived(workload, UDP4, OTHER) == 3
        runner.run(second.detach(slot, target, "one"))
        assert list(second._loaded.maps["dns_endpoints"].keys()) == []  # also what only the first daemon wrote
        runner.run(second.close(detach=False))


def test_a_detach_that_the_bpffs_refuses_leaves_a_cgroup_its_policy(
    directory: Path, cgroups: Callable[[str], Cgroup]
) -> None:
    """Its slot goes first: without it `start_mode` judges, which may let everything pass."""
    target = resolve_cgroup(str(cgroups("kept").path))
    with asyncio.Runner() as runner:
        plane = runner.run(_open_with(directory, None))
        slot = plane.allocate_slot()
        runner.run(plane.attach(slot, target, STATIC, None, "one"))
        key = target.cgroup_id.to_bytes(8, sys.byteorder)
        with faults.read_only(directory / "bpf"), pytest.raises(NetfenceError, match="read-only file system"):
            runner.run(plane.detach(slot, target, "one"))
        assert (plane._loaded.maps["cgroup_slot"].lookup(key) or b"")[:4] == u32(slot)
        runner.run(plane.detach(slot, target, "one"))
        runner.run(plane.close(detach=False))
    target.close()


def test_a_slot_freed_twice_is_not_given_to_two(topology: Topology, directory: Path) -> None:
    with topology.host.inside(), asyncio.Runner() as runner:
        plane = runner.run(_open_with(directory, None))
        slot = plane.allocate_slot()
        plane.free_slot(slot)
        plane.free_slot(slot)
        assert plane.allocate_slot() == slot
        assert plane.allocate_slot() != slot
        runner.run(plane.close(detach=False))


def test_slots_end_at_the_limit_of_attachments(topology: Topology, directory: Path) -> None:
    with topology.host.inside(), asyncio.Runner() as runner:
        plane = runner.run(_open_with(directory, None))
        assert len({plane.allocate_slot() for _ in range(MAX_ATTACHMENTS)}) == MAX_ATTACHMENTS
        with pytest.raises(ExhaustedError, match=f"{MAX_ATTACHMENTS} attachments are the limit of one daemon; detach"):
            plane.allocate_slot()
        plane.free_slot(7)
        assert plane.allocate_slot() == 7
        runner.run(plane.close(detach=False))


def test_a_slot_lets_go_only_of_its_own_interface(topology: Topology, directory: Path) -> None:
    workload = topology.add_veth()
    with topology.host.inside(), asyncio.Runner() as runner:
        target = resolve_interface(workload.host_if)
        plane = runner.run(_open_with(directory, False))
        slot = plane.allocate_slot()
        runner.run(plane.attach(slot, target, STATIC, Direction.WORKLOAD, "one"))
        runner.run(plane.apply(slot, POLICY, None))
        plane.forget_interface(slot + 1, target.ifindex)
        _holds(topology, workload)
        runner.run(plane.detach(slot, target, "one"))
        runner.run(plane.close(detach=False))


def test_one_that_detaches_leaves_nothing(topology: Topology, directory: Path) -> None:
    """The last here: whoever comes behind it has to compile."""
    workload = topology.add_veth()
    with topology.host.inside(), asyncio.Runner() as runner:
        plane = runner.run(_open_with(directory, None))
        target = resolve_interface(workload.host_if)
        slot = plane.allocate_slot()
        runner.run(plane.attach(slot, target, STATIC, Direction.WORKLOAD, "one"))
        runner.run(plane.apply(slot, POLICY, None))
        _holds(topology, workload)
        runner.run(plane.detach(slot, target, "one"))
        runner.run(plane.close(detach=True))
    assert topology.arrived(workload, UDP4, DENIED) == 3
    assert list((directory / "bpf" / warm.PINS).rglob("*")) == []
