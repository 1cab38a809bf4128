"""Faults of the machine under a running daemon: nothing opens, nothing is lost, and it goes on when they are over.

Whatever the fault and the operation: the caller is told why, what was in force stays in force, `list`, kernel and store
say the same, the daemon lives, and the same operation succeeds when the fault is gone.
"""

from __future__ import annotations

import socket
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dnslib
import pytest

import faults
from daemons import Fenced, Start
from harness.agent import Agent
from harness.daemon import Attached
from harness.deadline import SLOWNESS, wait_for
from harness.fresh import Fresh
from harness.packets import UDP4
from harness.topology import Topology, Workload
from netfence.api.client import DaemonClient, RefusedError
from netfence.api.views import AttachSpec
from netfence.config import Dns
from netfence.dataplane import rtnl
from netfence.dataplane.compile import map_specs
from netfence.dataplane.layout import Layout
from netfence.dataplane.links import obj_get
from netfence.dataplane.maps import Map
from netfence.store import DATABASE

pytestmark = pytest.mark.userspace

ALLOWED, OTHER, DENIED, LEARNED = "203.0.113.99", "203.0.113.97", "203.0.113.98", "203.0.113.80"
WILD = "203.0.113.81"
RECORDS = [f"good.test. 300 IN A {LEARNED}", f"*.wild.test. 300 IN A {WILD}"]
LEASES = 64
DAY_S = 86_400.0
RECOVERY_S = 10.0 * SLOWNESS


def policy(*cidrs: str | dict[str, str]) -> dict[str, Any]:
    dns = {"mode": "allowlist", "allow": ["good.test", "*.wild.test"]}
    return {"default": {"mode": "allowlist", "allow_cidrs": list(cidrs), "dns": dns}}


@dataclass
class Bench:
    """A daemon with one attachment in force, and a workload that may be attached."""

    topology: Topology
    daemon: Fenced
    fenced: Workload
    other: Workload
    attached: Attached
    agent: Agent

    @property
    def data(self) -> Path:
        return self.daemon.directory / "data"

    def stored(self) -> list[str]:
        with closing(sqlite3.connect(f"file:{self.data / DATABASE}?mode=ro", uri=True)) as database:
            return [str(name) for (name,) in database.execute("SELECT id FROM attachments ORDER BY attached_at")]

    def holds(self, *, attached: bool = True) -> None:
        """See that the policy is in force, and list, kernel and store agree."""
        assert self.daemon.alive
        listed = [info.id for info in self.daemon.attachments()]
        assert listed == ([self.attached.id] if attached else [])
        assert self.stored() == listed
        assert {name.rpartition("-")[0] for name in self.daemon.link_pins()} == set(listed)
        assert self.topology.arrived(self.other, UDP4, DENIED) == 3  # it is not fenced
        self.enforced()

    def enforced(self, *, attached: bool = True) -> None:
        """See what packets of the fenced workload meet."""
        assert self.topology.arrived(self.fenced, UDP4, ALLOWED) == 3
        assert self.topology.arrived(self.fenced, UDP4, DENIED) == (0 if attached else 3)

    def resolves(self, name: str = "good.test", *, tcp: bool = False) -> bool:
        return bool(self.agent.query(self.attached.dns, name, tcp=tcp).rr)

    def refused(self, work: Callable[[], object]) -> str:
        """Do something that must be refused, in the daemon's own words and with nothing changed; return those words."""
        with pytest.raises(RefusedError) as raised:
            work()
        assert "internal error" not in str(raised.value)
        return str(raised.value)

    def attach_other(self) -> Attached:
        return self.daemon.attach(interface=self.other.host_if)

    def works(self) -> None:
        """See that everything can be done again."""
        self.daemon.detach(self.attach_other().id)
        self.daemon.set_policy(policy(ALLOWED, OTHER))
        assert self.topology.arrived(self.fenced, UDP4, OTHER) == 3
        self.daemon.set_policy(policy(ALLOWED))
        assert self.topology.arrived(self.fenced, UDP4, OTHER) == 0
        assert self.resolves()
        self.holds()
        self.daemon.detach(self.attached.id)
        self.attached = self.daemon.attach(interface=self.fenced.host_if)
        self.holds()


Disk = Callable[[Path], Any]


@pytest.fixture
def disks() -> Iterator[ExitStack]:
    """Give what keeps mounts until the daemons are gone."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def bench_on(disks: ExitStack, fresh: Fresh, start: Start, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Give a maker of a bench whose daemon has its state on a disk of its own."""
    with ExitStack() as stack:

        def make(disk: Disk | None = None, **arguments: Any) -> Bench:
            topology = fresh.topology()
            fresh.names(topology, *RECORDS)
            if disk is not None:
                disks.enter_context(disk(tmp_path / "daemon1" / "data"))
            daemon = start(topology, policy=policy(ALLOWED), **arguments)
            fenced, other = topology.add_veth(), topology.add_veth()
            agent = stack.enter_context(Agent(netns=fenced.netns))
            return Bench(topology, daemon, fenced, other, daemon.attach(interface=fenced.host_if), agent)

        yield make


# -- a full disk -------------------------------------------------------------------------------------------------------


def test_a_full_disk_under_a_running_daemon(bench_on: Callable[..., Bench]) -> None:
    bench = bench_on(faults.small_disk)
    with faults.full(bench.data):
        said = bench.refused(bench.attach_other)
        assert f"{DATABASE}: database or disk is full; free disk space" in said
        bench.holds()
        said = bench.refused(lambda: bench.daemon.detach(bench.attached.id))
        assert f"{DATABASE}: database or disk is full; free disk space" in said
        bench.holds()
        bench.daemon.write_policy(f"{policy(ALLOWED, OTHER)}")
        bench.daemon.wait_event("policy_not_applied")
        assert bench.topology.arrived(bench.fenced, UDP4, OTHER) == 0
        assert bench.resolves()
        assert bench.topology.arrived(bench.fenced, UDP4, LEARNED) == 3
        bench.holds()
    bench.daemon.hang_up()
    wait_for(bench.daemon.policy_in_force, "the policy that could not be stored")
    assert bench.topology.arrived(bench.fenced, UDP4, OTHER) == 3
    bench.works()


def test_a_target_that_goes_while_the_disk_is_full(bench_on: Callable[..., Bench]) -> None:
    bench = bench_on(faults.small_disk)
    with faults.full(bench.data):
        bench.topology.host.ip(f"link del {bench.fenced.host_if}")
        assert "disk is full" in bench.daemon.wait_event("target_not_cleaned_up")["error"]
        assert bench.daemon.alive
    wait_for(lambda: not bench.daemon.attachments(), "the attachment of a target that is gone to end", RECOVERY_S)
    wait_for(lambda: bench.stored() == bench.daemon.link_pins() == [], "nothing to be left of it")
    bench.daemon.detach(bench.attach_other().id)


def test_a_start_on_a_full_disk(bench_on: Callable[..., Bench]) -> None:
    bench = bench_on(faults.small_disk)
    assert bench.daemon.stop() == 0
    with faults.full(bench.data):
        bench.daemon.launch()
        assert f"open state {bench.data / DATABASE}: " in bench.daemon.ended_saying()
        bench.enforced()
    bench.daemon.start()
    bench.works()


# -- a read-only disk --------------------------------------------------------------------------------------------------


def test_a_start_on_a_read_only_disk(bench_on: Callable[..., Bench]) -> None:
    bench = bench_on(faults.small_disk)
    assert bench.daemon.stop() == 0
    with faults.read_only(bench.data):
        bench.daemon.launch()
        assert f"{bench.data}/state.lock: Read-only file system" in bench.daemon.ended_saying()
        bench.enforced()
    bench.daemon.start()
    bench.works()


def test_a_disk_that_fails_under_a_running_daemon(bench_on: Callable[..., Bench]) -> None:
    bench = bench_on(faults.image_disk)
    faults.fail_disk(bench.data)
    said = bench.refused(bench.attach_other)
    assert str(bench.data) in said
    bench.holds()
    bench.refused(lambda: bench.daemon.detach(bench.attached.id))
    bench.holds()
    assert bench.resolves()
    assert bench.daemon.stop() == 0
    bench.enforced()
    faults.mount_again(bench.data)
    bench.daemon.start()
    bench.holds()
    bench.works()


# -- a read-only bpffs -------------------------------------------------------------------------------------------------


@contextmanager
def no_filter_goes(topology: Topology) -> Iterator[None]:
    """Have the kernel tell of what is taken from the host's interfaces, and see that nothing is, not for a moment."""
    with topology.host.inside():
        listening = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
    with closing(listening):
        listening.bind((0, 0x8))  # RTMGRP_TC
        yield
        told: list[int] = []
        with suppress(BlockingIOError):
            while True:
                told += [message.type for message in rtnl.split(listening.recv(1 << 16))]
        assert not {rtnl.RTM_DELTFILTER, rtnl.RTM_DELQDISC} & set(told)


@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "clsact"])
def test_a_read_only_bpffs_under_a_running_daemon(bench_on: Callable[..., Bench], *, tcx: bool) -> None:
    bench = bench_on(tcx=tcx)
    with faults.read_only(bench.daemon.bpffs):
        assert "read-only file system" in bench.refused(bench.attach_other).lower()
        bench.holds()
        with no_filter_goes(bench.topology):
            assert "read-only file system" in bench.refused(lambda: bench.daemon.detach(bench.attached.id)).lower()
        bench.holds()
        bench.daemon.set_policy(policy(ALLOWED, OTHER))  # tables have no pins
        assert bench.topology.arrived(bench.fenced, UDP4, OTHER) == 3
        assert bench.resolves()
    bench.works()


def test_a_start_on_a_read_only_bpffs(bench_on: Callable[..., Bench]) -> None:
    bench = bench_on()
    assert bench.daemon.stop() == 0
    with faults.read_only(bench.daemon.bpffs):
        bench.daemon.start()
        bench.holds()
        assert bench.resolves()
        bench.refused(bench.attach_other)
        bench.holds()
    bench.works()


# -- no room -----------------------------------------------------------------------------------------------------------


def greets(daemon: Fenced) -> bool:
    """Tell whether the API says something to a new connection: an HTTP/2 server speaks first."""
    with closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.settimeout(0.5 * SLOWNESS)
        sock.connect(str(daemon.socket))
        try:
            return bool(sock.recv(1))
        except TimeoutError:
            return False


def test_no_file_can_be_opened(bench_on: Callable[..., Bench]) -> None:
    bench = bench_on()
    assert bench.resolves()
    with DaemonClient(bench.daemon.socket) as client:
        client.status()  # connected
        assert greets(bench.daemon)
        with faults.no_files(bench.daemon.pid):
            assert not greets(bench.daemon)
            with pytest.raises(RefusedError, match=r"(?i)too many open files"):
                client.attach(AttachSpec(interface=bench.other.host_if))
            assert [info.id for info in client.list_all()] == [bench.attached.id]
            with pytest.raises(RefusedError) as raised:
                client.detach(bench.attached.id)
            assert "internal error" not in str(raised.value)
            bench.enforced()
            assert bench.resolves()  # from the cache
            bench.daemon.write_policy(f"{policy(ALLOWED, OTHER)}")
            wait_for(lambda: "Too many open files" in bench.daemon.log_file.read_text(), "a word about the policy file")
            assert bench.topology.arrived(bench.fenced, UDP4, OTHER) == 0
            assert not bench.resolves("new.wild.test")  # SERVFAIL: no socket towards the upstream
            with pytest.raises(OSError):  # noqa: PT011 - a time-out
                bench.agent.query(bench.attached.dns, "good.test", tcp=True, timeout_s=0.5)
        wait_for(lambda: bench.resolves(tcp=True), "DNS over TCP", RECOVERY_S)
        assert bench.resolves("new.wild.test")
        assert [info.id for info in client.list_all()] == [bench.attached.id]
    wait_for(lambda: greets(bench.daemon), "the API to accept", RECOVERY_S)
    bench.daemon.hang_up()
    wait_for(bench.daemon.policy_in_force, "the policy that could not be read", RECOVERY_S)
    assert bench.topology.arrived(bench.fenced, UDP4, OTHER) == 3
    bench.works()


@contextmanager
def no_lease_left(daemon: Fenced) -> Iterator[None]:
    """Fill the kernel's table of leases, behind the daemon's back, with those of a slot that nobody has."""
    layout = Layout.load(next((daemon.directory / "data").glob("layout-*.json")))
    spec = next(spec for spec in map_specs(layout, LEASES) if spec.name == "leases")
    slot = (layout.constants["SLOTS"] - 1).to_bytes(4, sys.byteorder)
    with closing(Map(obj_get(next(daemon.pins.glob("maps*")) / spec.name), spec)) as leases:
        keys = [slot + number.to_bytes(spec.key_size - len(slot), sys.byteorder) for number in range(2 * LEASES)]
        with pytest.raises(OSError, match="Argument list too long"):
            _add(leases, keys, bytes(spec.value_size))
        yield
        for key in keys:
            leases.delete(key)


@contextmanager
def no_memory_left(daemon: Fenced) -> Iterator[None]:
    """Take, for leases of a slot that nobody has, what memory the kernel has put by for the map."""
    layout = Layout.load(next((daemon.directory / "data").glob("layout-*.json")))
    spec = next(spec for spec in map_specs(layout, Dns().max_leases_total) if spec.name == "leases")
    slot = (layout.constants["SLOTS"] - 1).to_bytes(4, sys.byteorder)
    with closing(Map(obj_get(next(daemon.pins.glob("maps*")) / spec.name), spec)) as leases:
        keys = [slot + number.to_bytes(spec.key_size - len(slot), sys.byteorder) for number in range(100_000)]
        with pytest.raises(OSError, match="Cannot allocate memory"):
            _add(leases, keys, bytes(spec.value_size))
        yield
        for key in keys:
            leases.delete(key)


def _add(table: Map, keys: list[bytes], value: bytes) -> None:
    for key in keys:
        table.update(key, value)


def test_the_kernel_has_no_room_for_a_lease(bench_on: Callable[..., Bench]) -> None:
    bench = bench_on(config={"dns": {"max_leases": LEASES, "max_leases_total": LEASES}})
    assert bench.resolves()
    with no_lease_left(bench.daemon):
        reply = bench.agent.query(bench.attached.dns, "new.wild.test")
        assert (reply.header.rcode, reply.rr) == (dnslib.RCODE.SERVFAIL, [])
        assert "the lease table is full" in bench.daemon.wait_event("lease_refused")["error"]
        assert bench.topology.arrived(bench.fenced, UDP4, WILD) == 0
        assert bench.resolves()
        assert bench.topology.arrived(bench.fenced, UDP4, LEARNED) == 3
        bench.holds()
    assert bench.resolves("new.wild.test")
    assert bench.topology.arrived(bench.fenced, UDP4, WILD) == 3
    bench.works()


@pytest.mark.nightly
def test_the_kernel_has_no_memory_for_a_lease(bench_on: Callable[..., Bench]) -> None:
    with closing(faults.KernelMemory()) as memory:
        with memory.charged():
            bench = bench_on(cold=True)
        assert bench.resolves()
        with memory.none_left(bench.daemon), no_memory_left(bench.daemon):
            reply = bench.agent.query(bench.attached.dns, "new.wild.test")
            assert (reply.header.rcode, reply.rr) == (dnslib.RCODE.SERVFAIL, [])
            assert "cannot allocate memory" in bench.daemon.wait_event("lease_refused")["error"]
            assert bench.topology.arrived(bench.fenced, UDP4, WILD) == 0
            assert bench.resolves()
            assert bench.topology.arrived(bench.fenced, UDP4, LEARNED) == 3
            bench.holds()
        # The kernel puts memory by again when it finds the time.
        wait_for(lambda: bench.resolves("new.wild.test"), "memory to be there again", RECOVERY_S)
        assert bench.topology.arrived(bench.fenced, UDP4, WILD) == 3
        bench.works()


# -- a wall clock that jumps -------------------------------------------------------------------------------------------


def test_the_wall_clock_decides_nothing(fresh: Fresh, tmp_path: Path) -> None:
    """TTLs and leases are the kernel's time, which nobody sets."""
    topology = fresh.topology()
    fresh.names(topology, *RECORDS)
    workload = topology.add_veth()
    lasting = {"cidr": ALLOWED, "ttl": "1h"}
    with (
        faults.WronglyClocked(topology, tmp_path / "daemon", policy=policy(lasting)) as daemon,
        Agent(netns=workload.netns) as agent,
    ):
        attached = daemon.attach(interface=workload.host_if)
        assert agent.query(attached.dns, "good.test").rr
        for jump_s in (-10 * DAY_S, 10 * DAY_S, 0.0):
            daemon.jump(jump_s)
            daemon.set_policy(policy(lasting, {"cidr": DENIED, "ttl": "2s"}, f"192.0.2.{int(jump_s / DAY_S) + 100}"))
            assert topology.arrived(workload, UDP4, DENIED) == 3
            wait_for(lambda: topology.arrived(workload, UDP4, DENIED) == 0, "two seconds to be over")
            assert agent.query(attached.dns, "good.test").rr
            for wrong_s in (jump_s, -jump_s):  # as it was when the policy was stored, and set while no daemon runs
                daemon.stop()
                daemon.jump(wrong_s)
                daemon.start()
                assert [info.id for info in daemon.attachments()] == [attached.id]
                for address in (ALLOWED, LEARNED):
                    assert topology.arrived(workload, UDP4, address) == 3
                assert topology.arrived(workload, UDP4, DENIED) == 0
            daemon.detach(daemon.attach(interface=topology.add_veth().host_if).id)
