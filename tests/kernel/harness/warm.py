"""bpffs instances with programs that the kernel has verified already: what starts on one compiles nothing.

Compiling and verifying take 1.6 s, and 15 times as long in an emulated guest: more than most tests. What a data plane
leaves when everything is detached (maps, programs, layout file) is what the next one of the same build takes over, so
it is kept and handed on, by the product's own way of taking over. One that is not left empty is thrown away.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from harness import sandbox, syscalls
from netfence.dataplane.compile import map_specs
from netfence.dataplane.layout import Layout
from netfence.dataplane.links import obj_get
from netfence.dataplane.maps import Map

PINS = "netfence"
"""`bpffs_dir` below the mount point."""

EMPTIED = ("leases", "inbound", "dns_endpoints", "if_slot_far", "seen")
"""Maps that have no entry where nothing is attached."""

_shelf: defaultdict[int, list[Path]] = defaultdict(list)


@contextmanager
def bpffs(directory: Path, data_dir: Path, max_leases: int) -> Iterator[Path]:
    """Mount a bpffs on `directory`: if one is left from before, with programs inside and their layout in `data_dir`.

    `max_leases` must be that of the data plane, because its build depends on it.
    """
    sandbox.enter()
    instance = _shelf[max_leases].pop() if _shelf[max_leases] else _make()
    directory.mkdir(parents=True, exist_ok=True)
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    for layout in instance.glob("layouts/layout-*.json"):
        shutil.copy(layout, data_dir)
    syscalls.mount(str(instance / "bpf"), directory, None, syscalls.MS_BIND)
    try:
        yield directory
    finally:
        syscalls.unmount(directory)
        _keep_layouts(data_dir, instance)
        if _is_empty(instance, max_leases):
            _shelf[max_leases].append(instance)
        else:
            syscalls.unmount(instance / "bpf")


def _make() -> Path:
    instance = Path(tempfile.mkdtemp(prefix=sandbox.PREFIX))
    for name in ("bpf", "layouts"):
        (instance / name).mkdir()
    syscalls.mount("bpf", instance / "bpf", "bpf")
    return instance


def _keep_layouts(data_dir: Path, instance: Path) -> None:
    """Keep the layouts of the builds that are there, and no other: the next one's maps must not be read by them."""
    for old in (instance / "layouts").iterdir():
        old.unlink()
    for programs in (instance / "bpf" / PINS).glob("programs-*"):
        layout = data_dir / f"layout-{programs.name.removeprefix('programs-')}.json"
        if layout.is_file():
            shutil.copy(layout, instance / "layouts")


def _is_empty(instance: Path, max_leases: int) -> bool:
    """Tell whether there is one build of programs, and nothing attached or remembered of what was."""
    pins = instance / "bpf" / PINS
    builds = [path.name.removeprefix("programs-") for path in pins.glob("programs-*")]
    if len(builds) != 1 or any(pins.glob("links/*")):
        return False
    layout_file = instance / "layouts" / f"layout-{builds[0]}.json"
    if not layout_file.is_file():
        return False
    for spec in map_specs(Layout.load(layout_file), max_leases):
        if spec.name in EMPTIED:
            with closing(Map(obj_get(next(pins.glob("maps-*")) / spec.name), spec)) as pinned:
                if any(pinned.keys()):
                    return False
    return True
