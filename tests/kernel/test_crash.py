"""kill -9 at any moment, again and again: nothing opens, nothing is lost, what was cut short is finished or undone.

`NETFENCE_SEED=…` repeats a run's choices (not its timing); a failed test tells its seed and what was done.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from crash import RECORDS, Fleet
from harness.deadline import SLOWNESS
from harness.fresh import Fresh

pytestmark = pytest.mark.userspace

Tell = Callable[[str, object], None]


def _run(fresh: Fresh, directory: Path, cycles: int, tell: Tell, *, tcx: bool) -> None:
    seed = int(os.environ.get("NETFENCE_SEED") or random.SystemRandom().randrange(1 << 32))
    topology = fresh.topology()
    fresh.names(topology, *RECORDS)
    with closing(Fleet(topology, directory, seed, tcx=tcx)) as fleet:
        try:
            for _ in range(cycles):
                fleet.cycle()
            probes = fleet.end()
        except BaseException as error:
            story = "\n".join(fleet.story)
            error.add_note(f"seed {seed}, cycle {len(fleet.story)} of {cycles}:\n{story}")
            raise
    tell("cycles", cycles)
    tell("probes", sum(map(sum, probes)))
    tell("start_s", round(statistics.median(fleet.starts), 3))


@pytest.mark.timeout(120 * SLOWNESS)  # both together four minutes of ci/test at most
@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "clsact"])
def test_killed_again_and_again(fresh: Fresh, tmp_path: Path, record_property: Tell, *, tcx: bool) -> None:
    _run(fresh, tmp_path / "daemon", 10, record_property, tcx=tcx)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "clsact"])
def test_killed_two_hundred_times(fresh: Fresh, tmp_path: Path, record_property: Tell, *, tcx: bool) -> None:
    _run(fresh, tmp_path / "daemon", 100, record_property, tcx=tcx)
