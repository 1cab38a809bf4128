"""Half an hour of attaches, detaches, policies, names and removals: nothing that the daemon or the kernel holds grows.

`NETFENCE_SOAK_S` sets another length in seconds.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from crash import RECORDS, Fleet
from harness.deadline import wait_for
from harness.fresh import Fresh
from netfence.dataplane.maps import Map

pytestmark = [pytest.mark.nightly, pytest.mark.userspace]

SOAK_S = float(os.environ.get("NETFENCE_SOAK_S") or 1800)
SAMPLES = 30
MEMORY_SLACK = 1.05

Tell = Callable[[str, object], None]


def _kernel_objects(pins: Path) -> dict[str, int]:
    """Count what keeps the daemon's objects in the kernel, beside its descriptors: pins, and tables in maps of maps."""
    (maps,) = pins.glob("maps-*")
    tables = 0
    for name in ("rules4", "rules6"):
        with closing(Map.pinned(maps / name)) as outer:
            tables += sum(outer.lookup(index) is not None for index in outer.keys())  # noqa: SIM118 - a Map is no dict
    return {"pins": sum(1 for _ in pins.rglob("*")), "tables": tables}


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
    for what in ("pins", "tables", "descriptors"):
        assert max(one[what] for one in last) <= max(one[what] for one in first), (what, samples)
    before, after = (statistics.median(one["memory_kb"] for one in part) for part in (first, last))
    assert after <= before * MEMORY_SLACK, samples
