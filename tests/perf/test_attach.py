"""`attach-*` and `memory-*`: a real daemon with a local policy, from the API call to the policy in force."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench_plane import Plane
from harness.cgroup import Cgroup
from harness.daemon import Netfenced
from harness.topology import Topology, Workload
from measure import FULL, Series, report
from netfence.dataplane.plane import Static
from netfence.dataplane.target import Direction, resolve_interface
from netfence.policy.commands import BulkUpdate, CidrSpec, apply
from netfence.policy.modes import Mode
from netfence.policy.policy import EMPTY

TIMES = 30 if FULL else 10
RSS_LIMIT_MB = 90
POLICY = {
    "default": {
        "mode": "allowlist",
        "allow_cidrs": [f"10.{n}.0.0/16" for n in range(20)],
        "dns": {"mode": "allowlist", "allow": ["*.example.test", "example.test"]},
    }
}


@pytest.fixture(scope="module")
def workload(topology: Topology) -> Workload:
    return topology.add_veth()


@pytest.fixture(scope="module")
def daemon(topology: Topology, workload: Workload, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Netfenced]:
    assert workload.host_if in topology.host.interfaces()  # there before the daemon: it may leave no interface behind
    directory = tmp_path_factory.mktemp("netfenced")
    with Netfenced(topology.host, directory, policy=POLICY, config={"log_level": "info"}) as one:
        yield one


def _attach_times(attach: Callable[[], str], detach: Callable[[str], None]) -> Series:
    series = Series("ms")
    for _ in range(TIMES + 1):
        start = time.perf_counter()
        attachment = attach()
        series.values.append((time.perf_counter() - start) * 1000)
        detach(attachment)
    del series.values[0]
    return series


def test_attach_interface_tcx(workload: Workload, daemon: Netfenced) -> None:
    series = _attach_times(lambda: daemon.attach(interface=workload.host_if).id, daemon.detach)
    report("attach-interface-tcx-by-api", {"netfence": series})
    assert series.median < 2 * 70


def test_attach_cgroup(daemon: Netfenced) -> None:
    cgroup = Cgroup("bench-attach")
    try:
        series = _attach_times(lambda: daemon.attach(cgroup=cgroup).id, daemon.detach)
    finally:
        cgroup.remove()
    report("attach-cgroup-by-api", {"netfence": series})
    assert series.median < 3 * 10


def test_attach_interface_clsact(topology: Topology, workload: Workload, clsact_plane: Plane) -> None:
    """Measure the data plane alone: on this kernel the daemon chooses tcx."""
    plane = clsact_plane.plane
    with topology.host.inside():
        target = resolve_interface(workload.host_if)
    rules = [CidrSpec(f"10.{n}.0.0/16", 0) for n in range(20)]
    bulk = BulkUpdate(mode=int(Mode.ALLOWLIST), allow_cidrs=rules, deny_cidrs=[], dns=None, audit=False)
    static = Static(dns_address=bytes([198, 51, 100, 254]), dns_port=11000)

    def attach() -> str:
        slot = plane.allocate_slot()
        mechanism = clsact_plane.run(plane.attach(slot, target, static, Direction.WORKLOAD, "bench"))
        clsact_plane.run(plane.apply(slot, apply(EMPTY, bulk, time.monotonic()), None))
        assert mechanism == "clsact"
        return str(slot)

    def detach(slot: str) -> None:
        clsact_plane.run(plane.detach(int(slot), target, "bench"))
        plane.free_slot(int(slot))

    series = _attach_times(attach, detach)
    report("attach-interface-clsact-data-plane", {"netfence": series})
    assert series.median < 3 * 10


def test_memory_idle(daemon: Netfenced) -> None:
    lines = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
    rss_mb = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))
    report("memory-idle-rss", {"netfence": Series("MB", [rss_mb, rss_mb])})
    assert rss_mb <= RSS_LIMIT_MB


@pytest.fixture(autouse=True)
def _nothing_left(daemon: Netfenced) -> Iterator[None]:
    yield
    with contextlib.suppress(StopIteration):
        for info in daemon.attachments():
            daemon.detach(info.id)
