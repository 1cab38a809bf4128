"""Half an hour of attaches, detaches, policies, names and removals: nothing that the daemon or the kernel holds grows.

`NETFENCE_SOAK_S` sets another length in seconds.
"""

from __future__ import annotations

import ctypes
import os
import random
import statistics
import struct
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from crash import RECORDS, Fleet
from harness.deadline import wait_for
from harness.fresh import Fresh
from netfence.dataplane.maps import Map
from netfence.dataplane.sysbpf import Cmd, call

pytestmark = [pytest.mark.nightly, pytest.mark.userspace]

SOAK_S = float(os.environ.get("NETFENCE_SOAK_S") or 1800)
SAMPLES = 30
MEMORY_SLACK = 1.05
NEXT_ID = {"programs": Cmd.PROG_GET_NEXT_ID, "maps": Cmd.MAP_GET_NEXT_ID, "links": Cmd.LINK_GET_NEXT_ID}
EXACT = ("pins", "tables", "dns_endpoints", "if_slot", "inbound", "descriptors", *NEXT_ID)

Tell = Callable[[str, object], None]


def _kernel_objects(pins: Path) -> dict[str, int]:
    """Count what there is in the kernel: pins, tables in maps of maps, entries; programs, maps and links of anybody."""
    (maps,) = pins.glob("maps-*")
    tables = 0
    for name in ("rules4", "rules6"):
        with closing(Map.pinned(maps / name)) as outer:
            tables += sum(outer.lookup(index) is not None for index in outer.keys())  # noqa: SIM118 - a Map is no dict
    found = {"pins": sum(1 for _ in pins.rglob("*")), "tables": tables}
    for name in ("dns_endpoints", "if_slot", "inbound"):
        with closing(Map.pinned(maps / name)) as entries:
            found[name] = sum(1 for _ in entries.keys())  # noqa: SIM118 - the same
    return found | {kind: _number_of(command) for kind, command in NEXT_ID.items()}


def _number_of(command: Cmd) -> int:
    """Count all programs, maps or links of the kernel; nothing else runs beside a nightly test."""
    last = count = 0
    while True:
        attr = ctypes.create_string_buffer(struct.pack("=III", last, 0, 0), 12)
        try:
            call(command, attr)
        except FileNotFoundError:
            return count
        _, last, _ = struct.unpack("=III", attr.raw)
        count += 1


def _sample(fleet: Fleet) -> dict[str, int]:
    """Measure with nothing but the anchors attached, when what is freed in the background is freed."""
    fleet.rest()
    seen: list[dict[str, int]] = []

    def settled() -> bool:
        time.sleep(0.3)
        seen.append(_kernel_objects(fleet.daemon.pins) | {"descriptors": fleet.daemon.descriptors()})
        return len(seen) > 3 and seen[-1] == seen[-2] == seen[-3]

    wait_for(settled, "kernel objects to be freed")
    return seen[-1] | {"memory_kb": fleet.daemon.memory_kb()}


@pytest.mark.timeout(2 * SOAK_S + 300)
@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "clsact"])
def test_nothing_grows(fresh: Fresh, tmp_path: Path, record_property: Tell, *, tcx: bool) -> None:
    seed = int(os.environ.get("NETFENCE_SEED") or random.SystemRandom().randrange(1 << 32))
    topology = fresh.topology()
    fresh.names(topology, *RECORDS)
    samples: list[dict[str, int]] = []
    with closing(Fleet(topology, tmp_path / "daemon", seed, tcx=tcx)) as fleet:
        began = time.monotonic()
        while len(samples) < SAMPLES:
            until = began + SOAK_S / 2 * (len(samples) + 1) / SAMPLES
            while time.monotonic() < until:
                fleet.cycle(kill=False)
            samples.append(_sample(fleet))
        fleet.end()
    third = SAMPLES // 3
    first, last = samples[third : 2 * third], samples[2 * third :]  # the beginning fills caches and pools
    record_property("cycles", len(fleet.story))
    for what in samples[0]:
        record_property(what, [sample[what] for sample in samples])
    for what in EXACT:
        assert max(one[what] for one in last) <= max(one[what] for one in first), (what, samples)
    before, after = (statistics.median(one["memory_kb"] for one in part) for part in (first, last))
    assert after <= before * MEMORY_SLACK, samples
