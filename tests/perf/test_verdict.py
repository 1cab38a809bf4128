"""`verdict-*`: nanoseconds per packet of the program alone, over an empty program, by BPF_PROG_TEST_RUN."""

from __future__ import annotations

import ipaddress
import os
import struct
import time
from collections.abc import Iterator

import pytest

from bench_plane import Plane
from frames import Frame
from harness.topology import Topology
from measure import FULL, compare, report
from netfence.dataplane import links, rawprog
from netfence.dataplane.plane import Static
from netfence.dataplane.target import Direction, resolve_interface
from netfence.policy.commands import BulkUpdate, CidrSpec, apply
from netfence.policy.modes import Mode, Reason
from netfence.policy.policy import EMPTY

RULES = (10, 1_000, 4_000, 100_000)
REPEAT = 200_000 if FULL else 50_000
IFINDEX_OFFSET = 40  # of `ifindex` in struct __sk_buff
SKB_BYTES = 192
TC_PASS, TC_DROP = 0xFFFFFFFF, 2
DNS = ipaddress.ip_address("10.9.9.9")
HIT = {4: ipaddress.ip_address("10.0.0.5"), 6: ipaddress.ip_address("2001:db8:0:5::1")}
MISS = {4: ipaddress.ip_address("203.0.113.9"), 6: ipaddress.ip_address("2001:db9::1")}
LEASED = {4: ipaddress.ip_address("203.0.113.10"), 6: ipaddress.ip_address("2001:db9::10")}


class Bench:
    def __init__(self, topology: Topology, plane: Plane) -> None:
        self.plane = plane
        workload = topology.add_veth()
        with topology.host.inside():
            self.target = resolve_interface(workload.host_if)
        self.slot = plane.plane.allocate_slot()
        static = Static(dns_address=DNS.packed, dns_port=11000)
        plane.run(plane.plane.attach(self.slot, self.target, static, Direction.WORKLOAD, "bench"))
        context = bytearray(SKB_BYTES)
        struct.pack_into("=I", context, IFINDEX_OFFSET, self.target.ifindex)
        self._context = bytes(context)
        self.program = plane.plane._loaded.programs["nf_tc"]
        self.empty = rawprog.load_raw(rawprog.ProgType.SCHED_CLS, rawprog.returning(-1))
        self.inside = topology.host.inside

    def ns(self, program: int, frame: bytes) -> float:
        with self.inside():
            run = links.prog_test_run(program, frame, repeat=REPEAT, ctx_in=self._context)
        return float(run.duration_ns)

    def verdict(self, frame: bytes) -> int:
        with self.inside():
            return links.prog_test_run(self.program, frame, ctx_in=self._context).retval

    def load(self, rules: int) -> None:
        cidrs = [CidrSpec(f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}", 0) for n in range(rules)]
        cidrs += [CidrSpec(f"2001:db8:{n >> 16:x}:{n & 0xFFFF:x}::/64", 0) for n in range(rules)]
        bulk = BulkUpdate(mode=int(Mode.ALLOWLIST), allow_cidrs=cidrs, deny_cidrs=[], dns=None, audit=False)
        policy = apply(EMPTY, bulk, time.monotonic())
        self.plane.run(self.plane.plane.apply(self.slot, policy, None))

    def close(self) -> None:
        os.close(self.empty)
        self.plane.run(self.plane.plane.detach(self.slot, self.target, "bench"))


@pytest.fixture(scope="module")
def bench(topology: Topology, plane: Plane) -> Iterator[Bench]:
    one = Bench(topology, plane)
    yield one
    one.close()


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])
def test_verdict(bench: Bench, pinned: int, family: int, rules: int) -> None:
    bench.load(rules)
    deadline = time.monotonic() + 3600
    bench.plane.plane.open_leases(bench.slot, [LEASED[family].packed], deadline)
    source = ipaddress.ip_address("192.0.2.10" if family == 4 else "2001:db8:ffff::10")
    frames = {
        name: Frame(source=source, destination=where[family], payload=bytes(18)).build()
        for name, where in (("allow-hit", HIT), ("miss", MISS), ("lease-hit", LEASED))
    }
    before = bench.plane.plane.counters(bench.slot)
    assert bench.verdict(frames["allow-hit"]) == TC_PASS
    assert bench.verdict(frames["lease-hit"]) == TC_PASS
    assert bench.verdict(frames["miss"]) == TC_DROP
    after = bench.plane.plane.counters(bench.slot)
    for reason in (Reason.ALLOW_RULE, Reason.LEASE, Reason.DEFAULT_DROP):
        assert after.packets[reason] - before.packets[reason] == 1
    contestants = {name: lambda frame=frame: bench.ns(bench.program, frame) for name, frame in frames.items()}
    series = compare("ns", {"empty": lambda: bench.ns(bench.empty, frames["miss"]), **contestants})
    for name in frames:
        over = series[name]
        over.values = [value - empty for value, empty in zip(over.values, series["empty"].values, strict=True)]
    report(f"verdict-tc-ipv{family}-over-empty", series, rules=rules, cpu_pinned=pinned)
