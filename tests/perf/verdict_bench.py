"""Measures one verdict by BPF_PROG_TEST_RUN: rules, leases and attachments in the maps, packets that meet them.

"Hot" is the shipped source (with the slot compiled in, for the cgroup program) on one packet: everything it reads is
in the nearest cache. "Random" is the same source compiled by spread_build.py, so that every repetition has another of
up to 65,536 destinations (and another attachment, where there are many): what the tables cost when they do not fit.
Either is told over an empty program that is run the same way. Rules are host addresses spread over 10.0.0.0/8 and /64s
spread over 2001:db8::/32, a trie of log2(rules) levels; what misses them lies between them, so that the trie is walked
to its end. With ten rules random is hot plus 5 ns: that much the spreading itself distorts.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import spread_build
from bench_plane import MAX_LEASES, Plane
from frames import Frame
from harness.topology import Topology
from measure import FULL, Series
from netfence.dataplane import compile as child
from netfence.dataplane import links, loader, rawprog
from netfence.dataplane.maps import Map
from netfence.dataplane.plane import Static
from netfence.dataplane.slotword import SlotWord
from netfence.policy.cidr import NEVER, CidrTable, Key
from netfence.policy.modes import Mode, Reason
from netfence.policy.policy import Policy

HOT_RUNS = 100_000 if FULL else 20_000
ROW = 65_536
"""Runs of a random measurement: each address of the row once."""
LOOPBACK_IFINDEX = 1  # what a test run without context carries
FIRST_IFINDEX = 30_000
"""Interfaces that nobody has: of the other attachments."""
FACTOR = 0x9E3779B1
FIRST_LEASE, FIRST_MISS = 1 << 21, 1 << 22
"""Numbers beyond those of any rule."""
LEASES = ROW
DNS = ipaddress.ip_address("10.9.9.9")


class Hook(NamedTuple):
    """One way into the verdict: its program, the one that spreads, and what both return."""

    program: str
    spread: str
    passes: int
    drops: int
    empty: int  # what the empty program returns


HOOKS = {
    "tc": Hook("nf_tc", "spread_tc", 0xFFFFFFFF, 2, -1),
    "xdp": Hook("nf_xdp", "spread_xdp", 2, 1, 2),
    "cgroup": Hook("nf_cgroup_egress", "nf_cgroup_egress", 1, 0, 1),
}
NOT_JUDGING = {
    "nf_tc_inbound",
    "nf_cgroup_inbound",
    "nf_clock",
    "nf_connect4",
    "nf_connect6",
    "nf_sendmsg4",
    "nf_sendmsg6",
}
"""Programs that see no packet on its way out."""

STATES = {
    "allow-hit": (Reason.ALLOW_RULE, 0),
    "lease-hit": (Reason.LEASE, FIRST_LEASE),
    "miss": (Reason.DEFAULT_DROP, FIRST_MISS),
}
"""What is to happen → its reason, and the number of the first address."""


def address(number: int, family: int) -> bytes:
    """Return the packed address of a number, as `spread_address` in spread.bpf.c."""
    if family == 4:
        return (0x0A000000 | number * FACTOR & 0xFFFFFF).to_bytes(4, "big")
    return bytes.fromhex("20010db8") + (number * FACTOR & 0xFFFFFFFF).to_bytes(4, "big") + bytes(7) + b"\1"


def policy(rules: int, family: int) -> Policy:
    """Return an allowlist of the first `rules` addresses (their /64, in IPv6)."""

    def keys() -> Iterator[tuple[Key, float]]:
        for number in range(rules):
            packed = address(number, family)
            yield packed + b"\x20" if family == 4 else packed[:8] + bytes(8) + b"\x40", NEVER

    return Policy(mode=Mode.ALLOWLIST, cidrs=CidrTable.build(keys(), expected=rules))


def frame(number: int, family: int) -> bytes:
    """Return a 64-byte UDP packet to the address of a number."""
    source = ipaddress.ip_address("192.0.2.10" if family == 4 else "2001:db8:ffff::10")
    return Frame(source=source, destination=ipaddress.ip_address(address(number, family)), payload=bytes(18)).build()


class Bench:
    """The data plane under test; slot 1 is that of the packets that do not alternate."""

    def __init__(self, topology: Topology, plane: Plane, directory: Path) -> None:
        self.plane = plane
        self._inside = topology.host.inside
        self._slots: list[int] = []
        self.reported = 0
        self.add_attachments(1)
        self._rows, self._programs = self._compile(directory)  # programs: ours to close
        for name, hook in HOOKS.items():
            kind, attach_type = child.PROGRAMS[hook.program]
            empty = rawprog.returning(hook.empty)
            self._programs[f"empty {name}"] = rawprog.load_raw(
                rawprog.ProgType(kind), empty, expected_attach_type=attach_type
            )

    def _compile(self, directory: Path) -> tuple[Map, dict[str, int]]:
        maps, sources = next(self.plane.bpffs.glob("netfence/maps-*")), loader.bpf_sources()
        layout = directory / "layout.json"
        hot, random = self.plane.bpffs / "hot", self.plane.bpffs / "random"
        hot.mkdir()
        random.mkdir()
        # A test run gives cgroup programs fresh storage: this build knows its slot without.
        job = child.Job(str(sources), str(maps), str(hot), str(layout), MAX_LEASES, self._slots[0])
        subprocess.run([sys.executable, "-m", child.__name__, json.dumps(dataclasses.asdict(job))], check=True)
        wanted = {}
        for name, hook in HOOKS.items():
            wanted[hook.spread] = wanted[f"spread_empty_{name}"] = child.PROGRAMS[hook.program]
        spread = spread_build.SpreadJob(str(sources), str(maps), str(layout), MAX_LEASES, str(random), wanted)
        argv = [sys.executable, spread_build.__file__, json.dumps(dataclasses.asdict(spread))]
        subprocess.run(argv, check=True)
        programs = {f"random {name}": links.obj_get(random / hook.spread) for name, hook in HOOKS.items()}
        programs |= {f"empty random {name}": links.obj_get(random / f"spread_empty_{name}") for name in HOOKS}
        programs |= {f"hot {name}": links.obj_get(hot / hook.program) for name, hook in HOOKS.items()}
        return Map(links.obj_get(random / "rows"), spread_build.ROWS), programs

    # -- what is in the maps ---------------------------------------------------------------------------------------

    def add_attachments(self, total: int) -> None:
        """Fill slots, without a hook, until there are `total`; the first has the loopback interface."""
        plane = self.plane.plane
        while len(self._slots) < total:
            slot = plane.allocate_slot()
            plane._slots[slot] = SlotWord()
            plane._write_maps(slot, _static(slot), "bench")
            plane._set_interface(FIRST_IFINDEX + slot, slot)
            self._slots.append(slot)
        plane._set_interface(LOOPBACK_IFINDEX, self._slots[0])

    def load(self, rules: Policy, attachments: int = 1) -> None:
        """Put a policy in force for the first `attachments`, each in tables of its own."""
        for slot in self._slots[:attachments]:
            self.plane.run(self.plane.plane.apply(slot, rules, None))

    def open_leases(self, family: int) -> None:
        """Open a row of leases for the first attachment."""
        packed = [address(FIRST_LEASE + number, family) for number in range(LEASES)]
        self.plane.plane.open_leases(
            self._slots[0], packed, self.plane.plane.clock.seconds(self.plane.plane.clock.now()) + 3600
        )

    # -- measuring -------------------------------------------------------------------------------------------------

    def hot(self, hook: str, frame: bytes) -> Callable[[], float]:
        """Return what measures the shipped program on one packet, in ns."""
        return lambda: self._ns(f"hot {hook}", frame, HOT_RUNS)

    def hot_empty(self, hook: str, frame: bytes) -> Callable[[], float]:
        """Return what measures an empty program run as the one of `hot`."""
        return lambda: self._ns(f"empty {hook}", frame, HOT_RUNS)

    def random(self, hook: str, frame: bytes, first: int, span: int, attachments: int = 1) -> Callable[[], float]:
        """Return what measures ever other destinations, the `span` numbers from `first`, of `attachments` in turn."""
        return lambda: self._spread_ns(f"random {hook}", hook, frame, (first, span), attachments)

    def random_empty(self, hook: str, frame: bytes) -> Callable[[], float]:
        """Return what measures an empty program run as the one of `random`."""
        return lambda: self._spread_ns(f"empty random {hook}", hook, frame, (0, ROW), 1)

    def _spread_ns(
        self, program: str, hook: str, frame: bytes, row: tuple[int, int], attachments: int, runs: int = ROW
    ) -> float:
        rows = (row, self._first_of(hook, attachments))
        for index, (first, span) in enumerate(rows):
            self._rows.update(index.to_bytes(4, sys.byteorder), struct.pack("=QIIQ", 0, first, span, 0))
        ns = self._ns(program, frame, runs)
        for index in range(len(rows)):
            found = self._rows.lookup(index.to_bytes(4, sys.byteorder))
            assert found is not None
            assert struct.unpack_from("=Q", found)[0] == runs, "the program did not take each run's number"
        return ns

    def _first_of(self, hook: str, attachments: int) -> tuple[int, int]:
        """Return the row of attachments: slots for the cgroup program, interfaces for the others."""
        if hook == "cgroup":
            return self._slots[0], attachments
        return FIRST_IFINDEX + self._slots[0], attachments

    def _ns(self, program: str, frame: bytes, runs: int) -> float:
        with self._inside():
            return float(links.prog_test_run(self._programs[program], frame, repeat=runs).duration_ns)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Have the kernel tell of the first attachment's drops; `reported` counts what it told."""
        plane = self.plane.plane
        plane.watch_slots(self._slots[:1])
        yield
        plane.watch_slots(())
        while some := plane.read_flows():
            self.reported += len(some)

    def verdict(self, hook: str, frame: bytes) -> int:
        """Return the shipped program's answer to one packet."""
        with self._inside():
            return links.prog_test_run(self._programs[f"hot {hook}"], frame).retval

    def counted(self, reason: Reason, attachments: int = 1) -> int:
        """Count the packets of a reason, all attachments together."""
        return sum(self.plane.plane.counters(slot).packets[reason] for slot in self._slots[:attachments])

    def close(self) -> None:
        for fd in self._programs.values():
            os.close(fd)


def _static(slot: int) -> Static:
    return Static(dns_address=DNS.packed, dns_port=11000 + slot)


def over(values: Series, empty: Series) -> Series:
    """Take off what an empty program costs, round by round."""
    return Series(values.unit, [one - less for one, less in zip(values.values, empty.values, strict=True)])
