"""What the benchmarks of a whole daemon share: interfaces to attach, and what it costs in memory and descriptors."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from harness.daemon import Netfenced
from harness.netns import NetNs
from netfence.dataplane.compile import map_specs
from netfence.dataplane.layout import Layout
from netfence.dataplane.links import obj_get
from netfence.dataplane.maps import Map, MapSpec


def idle_interfaces(host: NetNs, count: int) -> list[str]:
    """Make veth pairs with both ends on the host, nothing is sent through them; return the ends to attach."""
    names = [f"many{number}" for number in range(count)]
    host.ip(*[f"link add {name} type veth peer name p{name}" for name in names])
    host.ip(*[f"link set {name} up" for name in names])
    return names


def rss_mb(pid: int) -> float:
    """Return a process's resident memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def descriptors(pid: int) -> int:
    """Count a process's open descriptors."""
    return len([*Path(f"/proc/{pid}/fd").iterdir()])


def map_mb(daemon: Netfenced) -> float:
    """Add up what the kernel tells of the daemon's pinned maps and all the rule tables inside them.

    It leaves out the inner nodes of a trie and what the allocator rounds up: `slab_mb` sees these.
    """
    return sum(_memlock(one) for one in _maps(daemon)) / 2**20


def leases(daemon: Netfenced) -> int:
    """Count the leases that are open in the kernel, of all attachments."""
    return next(len([*one.keys()]) for one in _maps(daemon) if one.spec.name == "leases")


def slab_mb() -> float:
    """Return the kernel's unreclaimable slab memory, of the whole machine: tries and hashes are allocated there."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("SUnreclaim:"))


def _maps(daemon: Netfenced) -> Iterator[Map]:
    layout = Layout.load(next((daemon.directory / "data").glob("layout-*.json")))
    for spec in map_specs(layout, 1):
        with contextlib.closing(Map(obj_get(next(daemon.pins.glob("maps-*")) / spec.name), spec)) as pinned:
            yield pinned
            yield from _inner(pinned, spec)


def _inner(outer: Map, spec: MapSpec) -> Iterator[Map]:
    if spec.inner is None:
        return
    keys = outer.keys()
    for inner in map(outer.inner, keys):
        if inner is not None:
            with contextlib.closing(inner):
                yield inner


def _memlock(one: Map) -> int:
    """Return the bytes of a map: exact since Linux 6.4, an estimate of its full size before."""
    found = re.search(r"^memlock:\s+(\d+)", Path(f"/proc/self/fdinfo/{one.fd}").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])
