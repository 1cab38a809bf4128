"""Compiles spread.bpf.c: the fence's own source, whose test runs meet ever other addresses and attachments.

Run as ``python spread_build.py JSON`` by verdict_bench.py and gone afterwards, as `netfence.dataplane.compile` is, on
whose maps it builds: clang's memory and bcc stay out of the benchmark.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from netfence.dataplane import compile as child
from netfence.dataplane import probe
from netfence.dataplane.layout import Layout
from netfence.dataplane.links import obj_pin
from netfence.dataplane.maps import MapSpec, MapType

SOURCE = Path(__file__).with_name("spread.bpf.c")
ROWS = MapSpec("rows", MapType.ARRAY, 4, 24, 2)
"""Two of `struct row` in spread.bpf.c."""


@dataclass(frozen=True, slots=True)
class SpreadJob:
    """The data plane it builds on, where the pins go, and the programs: name → program type, attach type."""

    sources: str
    maps_dir: str
    layout_file: str
    max_leases: int
    pins: str
    programs: dict[str, tuple[int, int]]


def run(job: SpreadJob) -> None:
    """Compile, load and pin `job.programs` and the map of rows; raises whatever goes wrong."""
    probe.raise_memlock("compile the benchmark's programs")
    sources = Path(job.sources)
    os.environ["BCC_KERNEL_SOURCE"] = str(sources / "stubs")
    from bcc import BPF  # noqa: PLC0415 - as in netfence.dataplane.compile

    specs = child.map_specs(Layout.load(Path(job.layout_file)), job.max_leases)
    maps = child.open_or_make_maps(specs, Path(job.maps_dir))
    maps |= child.open_or_make_maps([ROWS], Path(job.pins))
    # bcc makes programs of the main file's functions only: pasted, not included.
    fence = (sources / "netfence.bpf.c").read_text(encoding="utf-8")
    text = SOURCE.read_text(encoding="utf-8").replace('#include "netfence.bpf.c"', fence)
    flags = child._flags(sources) + [f"-DFD_{name.upper()}={one.fd}" for name, one in maps.items()]
    module = BPF(text=text, cflags=flags)
    for name, (kind, attach_type) in job.programs.items():
        obj_pin(module.load_func(name, kind, attach_type=attach_type).fd, Path(job.pins) / name)


if __name__ == "__main__":
    run(SpreadJob(**json.loads(sys.argv[1])))
