"""`attach-*`: a real daemon with a local policy, from the API call to the policy in force, and off again."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest

from bench_daemon import idle_interfaces
from bench_plane import Plane
from harness.cgroup import Cgroup
from harness.daemon import Netfenced
from harness.topology import Topology, Workload
from measure import CPU, FULL, SLOW_ROUNDS, Series, compare, report
from netfence.dataplane.plane import Static
from netfence.dataplane.target import Direction, resolve_interface
from netfence.policy.commands import BulkUpdate, CidrSpec, apply
from netfence.policy.modes import Mode
from netfence.policy.policy import EMPTY

ROUNDS = 30 if FULL else 7
MANY = 100 if FULL else 10
LIMITS_MS = {"tcx": 2 * 70, "xdp": 4 * 70, "cgroup": 3 * 10, "clsact-data-plane": 3 * 10}
CIDRS = [f"10.{n}.0.0/16" for n in range(20)]
POLICY = {
    "default": {
        "mode": "allowlist",
        "allow_cidrs": CIDRS,
        "dns": {"mode": "allowlist", "allow": ["*.example.test", "example.test"]},
    }
}


@pytest.fixture(scope="module")
def workload(topology: Topology) -> Workload:
    return topology.add_veth()


@pytest.fixture(scope="module")
def many(topology: Topology) -> list[str]:
    return idle_interfaces(topology.host, MANY)


@pytest.fixture(scope="module")
def daemon(
    topology: Topology,
    workload: Workload,
    many: list[str],
    pinned_module: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Netfenced]:
    names = {workload.host_if, *many}
    assert names <= topology.host.interfaces()  # there before the daemon: it may leave no interface behind
    directory = tmp_path_factory.mktemp("netfenced")
    with Netfenced(topology.host, directory, policy=POLICY, config={"log_level": "info"}) as one:
        yield one


class Times:
    """Attaches and detaches in turn; keeps how long detaching took."""

    def __init__(self) -> None:
        self.detach: defaultdict[str, list[float]] = defaultdict(list)

    def once(self, name: str, attach: Callable[[], str], detach: Callable[[str], None]) -> float:
        """Return how long attaching took, in ms."""
        start = time.perf_counter()
        attachment = attach()
        attached = time.perf_counter()
        detach(attachment)
        self.detach[name].append((time.perf_counter() - attached) * 1000)
        return (attached - start) * 1000


def test_attach_and_detach(topology: Topology, workload: Workload, daemon: Netfenced, clsact_plane: Plane) -> None:
    """By the API; clsact, which the daemon does not choose on this kernel, by the data plane alone."""
    plane = clsact_plane.plane
    other = topology.add_veth()
    with topology.host.inside():
        target = resolve_interface(other.host_if)
    bulk = BulkUpdate(
        mode=int(Mode.ALLOWLIST),
        allow_cidrs=[CidrSpec(cidr, 0) for cidr in CIDRS],
        deny_cidrs=[],
        dns=None,
        audit=False,
    )
    static = Static(dns_address=bytes([198, 51, 100, 254]), dns_port=11000)
    cgroup = Cgroup("bench-attach")

    def attach_clsact() -> str:
        slot = plane.allocate_slot()
        mechanism = clsact_plane.run(plane.attach(slot, target, static, Direction.WORKLOAD, "bench"))
        clsact_plane.run(plane.apply(slot, apply(EMPTY, bulk, time.monotonic()), None))
        assert mechanism == "clsact"
        return str(slot)

    def detach_clsact(slot: str) -> None:
        clsact_plane.run(plane.detach(int(slot), target, "bench"))
        plane.free_slot(int(slot))

    interface = workload.host_if
    attachers: dict[str, tuple[Callable[[], str], Callable[[str], None]]] = {
        "tcx": (lambda: daemon.attach(interface=interface).id, daemon.detach),
        "xdp": (lambda: daemon.attach(interface=interface, hook="xdp").id, daemon.detach),
        "cgroup": (lambda: daemon.attach(cgroup=cgroup).id, daemon.detach),
        "clsact-data-plane": (attach_clsact, detach_clsact),
    }
    for name, (attach, detach) in attachers.items():
        attachment = attach()
        if detach == daemon.detach:
            info = daemon.info(attachment)
            assert (info.mode, info.attach_mechanism.split()[0].split("-")[0]) == (int(Mode.ALLOWLIST), name), info
        detach(attachment)
    times = Times()
    try:
        series = compare("ms", {name: partial(times.once, name, *calls) for name, calls in attachers.items()}, ROUNDS)
    finally:
        cgroup.remove()
    detaching = {name: Series("ms", values[-ROUNDS:]) for name, values in times.detach.items()}
    report("attach-one", series, rules=len(CIDRS), cpu_pinned=CPU)
    report("attach-one-detach", detaching, rules=len(CIDRS), cpu_pinned=CPU)
    for name, limit_ms in LIMITS_MS.items():
        assert series[name].median < limit_ms, name


def test_many_interfaces_one_after_the_other(many: Sequence[str], daemon: Netfenced) -> None:
    """Throughput of one caller; also when it is the hundredth: nothing may grow with what is attached."""
    detached = Series("attachments/s")
    firsts, lasts = Series("ms"), Series("ms")

    def run() -> float:
        ids, took = [], []
        for name in many:
            start = time.perf_counter()
            ids.append(daemon.attach(interface=name).id)
            took.append(time.perf_counter() - start)
        assert len(daemon.attachments()) == MANY
        tenth = MANY // 10
        firsts.values.append(sum(took[:tenth]) / tenth * 1000)
        lasts.values.append(sum(took[-tenth:]) / tenth * 1000)
        start = time.perf_counter()
        for one in ids:
            daemon.detach(one)
        detached.values.append(MANY / (time.perf_counter() - start))
        assert not daemon.attachments()
        return MANY / sum(took)

    series = compare("attachments/s", {"attach": run}, SLOW_ROUNDS)
    for one in (detached, firsts, lasts):
        del one.values[0]  # of the round that is not measured
    report("attach-many-interfaces", {**series, "detach": detached}, attachments=MANY, cpu_pinned=CPU)
    report("attach-many-first-and-last", {"first": firsts, "last": lasts}, "first", attachments=MANY, cpu_pinned=CPU)
    assert series["attach"].median > 1000 / LIMITS_MS["tcx"]
