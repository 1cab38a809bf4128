"""The compile child: the only importer of bcc. Makes maps, compiles and loads programs, pins all, writes layout.json.

Run as ``python -m netfence.dataplane.compile JSON`` by loader.py and gone afterwards, because clang's 120 MB must not
stay in the daemon. Idempotent: maps pinned already are opened, not made; programs are pinned in their build's folder.
Prints nothing but errors. Exit status 0: everything named in `PROGRAMS` is pinned and layout.json is written.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netfence import __version__
from netfence.dataplane import probe
from netfence.dataplane.layout import Layout
from netfence.dataplane.links import obj_get, obj_pin
from netfence.dataplane.maps import BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, Map, MapSpec, MapType

SCHED_CLS, XDP, CGROUP_SKB, CGROUP_SOCK_ADDR = 3, 6, 8, 18
"""`enum bpf_prog_type`."""

PR_SET_PDEATHSIG = 1

PROGRAMS: dict[str, tuple[int, int]] = {
    "nf_tc": (SCHED_CLS, 0),
    "nf_tc_inbound": (SCHED_CLS, 0),
    "nf_xdp": (XDP, 37),
    "nf_clock": (SCHED_CLS, 0),
    "nf_cgroup_egress": (CGROUP_SKB, 1),
    "nf_cgroup_inbound": (CGROUP_SKB, 0),
    "nf_connect4": (CGROUP_SOCK_ADDR, 10),
    "nf_connect6": (CGROUP_SOCK_ADDR, 11),
    "nf_sendmsg4": (CGROUP_SOCK_ADDR, 14),
    "nf_sendmsg6": (CGROUP_SOCK_ADDR, 15),
}
"""Entry point → program type and expected attach type."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the child is asked to do; travels as JSON in its argument.

    For tests: `test_slot` is the slot by which cgroup programs judge, which cannot be told it in a test run; `programs`
    are those loaded, all where there are none.
    """

    sources: str
    maps_dir: str
    programs_dir: str
    layout_file: str
    max_leases: int
    test_slot: int | None = None
    programs: Sequence[str] = ()
    parent: int = 0  # process id: the job is not done without it


def map_specs(layout: Layout, max_leases: int) -> list[MapSpec]:
    """List every map of the data plane (design.md, Data plane), sized by the layout."""
    size, constant = layout.sizes, layout.constants
    slots, word = constant["SLOTS"], 4
    rules = [
        MapSpec(
            f"nf_lpm{family}",
            MapType.LPM_TRIE,
            size[f"rule_key{family}"],
            size["rule"],
            constant["RULES"],
            BPF_F_NO_PREALLOC,
        )
        for family in (4, 6)
    ]
    return [
        MapSpec("if_slot", MapType.ARRAY, word, word, constant["DIRECT_IFINDEX"]),
        MapSpec("if_slot_far", MapType.HASH, word, word, slots, BPF_F_NO_PREALLOC),
        # An 8-byte key shares one entry among all attach types of a cgroup.
        MapSpec("cgroup_slot", MapType.CGROUP_STORAGE, 8, word, 0),
        MapSpec("config", MapType.ARRAY, word, size["config"], slots, BPF_F_MMAPABLE),
        MapSpec("rules4", MapType.ARRAY_OF_MAPS, word, word, constant["POLICIES"], inner=rules[0]),
        MapSpec("rules6", MapType.ARRAY_OF_MAPS, word, word, constant["POLICIES"], inner=rules[1]),
        MapSpec("leases", MapType.HASH, size["lease_key"], size["lease"], max_leases, BPF_F_NO_PREALLOC),
        MapSpec("inbound", MapType.HASH, size["inbound_key"], size["inbound"], constant["INBOUND"], BPF_F_NO_PREALLOC),
        MapSpec("inbound_count", MapType.ARRAY, word, size["inbound_count"], slots, BPF_F_MMAPABLE),
        MapSpec("dns_endpoints", MapType.HASH, size["endpoint"], word, slots, BPF_F_NO_PREALLOC),
        MapSpec("host_addresses", MapType.HASH, size["address"], word, constant["HOST_ADDRESSES"], BPF_F_NO_PREALLOC),
        MapSpec("counters", MapType.PERCPU_ARRAY, word, size["counters"], slots),
        MapSpec("flows", MapType.RINGBUF, 0, 0, constant["FLOWS_BYTES"]),
        MapSpec("seen", MapType.HASH, size["seen_key"], size["seen"], constant["SEEN"], BPF_F_NO_PREALLOC),
        MapSpec("seen_count", MapType.ARRAY, word, size["seen_count"], slots, BPF_F_MMAPABLE),
        MapSpec("clock", MapType.ARRAY, word, 8, 1, BPF_F_MMAPABLE),
    ]


def _flags(sources: Path) -> list[str]:
    triple = f"{platform.machine()}-linux-gnu"
    return [
        f"-I{sources}/stubs/include",
        f"-I{sources}",
        "-idirafter",
        "/usr/include",
        "-idirafter",
        f"/usr/include/{triple}",
        "-Wno-unused-function",
    ]


def _describe(table: Any) -> dict[str, dict[str, Any]]:  # noqa: ANN401 - bcc has no types
    found: dict[str, dict[str, Any]] = {}
    for structure in (table.Key, table.Leaf):
        if not (isinstance(structure, type) and issubclass(structure, ctypes.Structure)):
            continue
        fields = {}
        for name, kind, *_ in structure._fields_:
            member = getattr(structure, name)
            fields[name] = [member.offset, member.size, not hasattr(kind, "_fields_") and not hasattr(kind, "_length_")]
        found[structure.__name__] = {"size": ctypes.sizeof(structure), "fields": fields}
    return found


def _layout(bpf_class: Any, sources: Path) -> dict[str, Any]:  # noqa: ANN401
    text = (sources / "layout.bpf.c").read_text(encoding="utf-8")
    module = bpf_class(text=text, cflags=_flags(sources))
    structs: dict[str, Any] = {}
    for name in ("rules4", "rules6", "leases", "inbound", "endpoint", "config", "counters", "seen", "flow"):
        structs.update(_describe(module[f"layout_{name}"]))
    constants: dict[str, int] = {}
    for header in ("layout.h", "reasons.h"):
        source = (sources / header).read_text(encoding="utf-8")
        for name, value in re.findall(r"^#define (?:NF_)?([A-Z0-9_]+) (\d+)\b", source, re.MULTILINE):
            constants[name] = int(value)
    return {"structs": structs, "constants": constants}


def open_or_make_maps(specs: list[MapSpec], directory: Path) -> dict[str, Map]:
    """Open each map's pin under `directory`, or make and pin the map."""
    maps: dict[str, Map] = {}
    for spec in specs:
        pin = directory / spec.name
        if pin.exists():
            maps[spec.name] = Map(obj_get(pin), spec)
        else:
            maps[spec.name] = Map.create(spec)
            obj_pin(maps[spec.name].fd, pin)
    return maps


def die_with(parent: int) -> None:
    """End when the parent does: whoever starts after it must not meet us among the pins."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def run(job: Job) -> None:
    """Do the job; raises whatever goes wrong, nothing half-written stays that a second run could not finish."""
    if job.parent:
        die_with(job.parent)
    probe.raise_memlock("compile the BPF programs")
    sources = Path(job.sources)
    os.environ["BCC_KERNEL_SOURCE"] = str(sources / "stubs")
    from bcc import BPF  # noqa: PLC0415 - a distribution package, wanted here alone

    raw = _layout(BPF, sources)
    layout = Layout.from_json(raw)
    maps = open_or_make_maps(map_specs(layout, job.max_leases), Path(job.maps_dir))
    flags = _flags(sources) + [f"-DFD_{name.upper()}={one.fd}" for name, one in maps.items()]
    if job.test_slot is not None:
        flags.append(f"-DTEST_SLOT={job.test_slot}")
    module = BPF(text=(sources / "netfence.bpf.c").read_text(encoding="utf-8"), cflags=flags)
    for name in job.programs or PROGRAMS:
        kind, attach_type = PROGRAMS[name]
        function = module.load_func(name, kind, attach_type=attach_type)
        pin = Path(job.programs_dir) / name
        if not pin.exists():
            obj_pin(function.fd, pin)
    layout_file = Path(job.layout_file)
    temporary = layout_file.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"version": __version__, **raw}, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(layout_file)


if __name__ == "__main__":
    run(Job(**json.loads(sys.argv[1])))
