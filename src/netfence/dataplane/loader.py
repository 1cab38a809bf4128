"""Gets the programs and maps into the kernel, or finds them there: build id, compile child, pins.

Layout of `bpffs_dir`: ``maps/<name>``, ``programs-<build>/<name>``, ``links/<attachment>-<hook>`` (without dots).
The build id is a hash of the BPF sources, of what compiles them and of the map sizes: the same id is taken over without
compiling. bpffs holds no ordinary files, so ``layout-<build>.json`` stands in `data_dir`. Refuses to know what any
program does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from netfence.dataplane import compile as child
from netfence.dataplane.failure import explain
from netfence.dataplane.layout import Layout
from netfence.dataplane.links import obj_get
from netfence.dataplane.maps import Map
from netfence.errors import NetfenceError, PreconditionError

COMPILE_TIMEOUT_S = 180.0
"""Ten times what an emulated guest takes; a child that hangs must not hang the start for ever."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What is in the kernel: maps by name, program descriptors by entry point, and the layouts."""

    build: str
    layout: Layout
    maps: dict[str, Map]
    programs: dict[str, int]


def bpf_sources() -> Path:
    """Find the BPF sources: in the wheel beside the package, in a checkout at its top level."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "bpf", package.parent.parent / "bpf"):
        if (candidate / "netfence.bpf.c").is_file():
            return candidate
    message = f"find the BPF sources: neither in {package / 'bpf'} nor in the checkout; reinstall netfence"
    raise PreconditionError(message)


def build_id(sources: Path, max_leases: int) -> str:
    """Hash everything that decides about programs and maps."""
    digest = hashlib.sha256(f"max_leases={max_leases}".encode())
    for path in sorted([*sources.rglob("*.h"), *sources.rglob("*.c"), Path(child.__file__)]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def load(bpffs_dir: Path, data_dir: Path, max_leases: int) -> Loaded:
    """Open the pins of this build, after having a child make what is missing. Blocks, up to seconds.

    Raises PreconditionError: no bcc, compile error, pins of another build in the way.
    """
    sources = bpf_sources()
    build = build_id(sources, max_leases)
    maps_dir, programs_dir = bpffs_dir / "maps", bpffs_dir / f"programs-{build}"
    layout_file = data_dir / f"layout-{build}.json"
    try:
        _refuse_other_build(bpffs_dir, build)
        for directory in (maps_dir, programs_dir, bpffs_dir / "links"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not layout_file.is_file() or not all((programs_dir / name).exists() for name in child.PROGRAMS):
            _compile(child.Job(str(sources), str(maps_dir), str(programs_dir), str(layout_file), max_leases))
        layout = Layout.load(layout_file)
        maps = {spec.name: Map(obj_get(maps_dir / spec.name), spec) for spec in child.map_specs(layout, max_leases)}
        programs = {name: obj_get(programs_dir / name) for name in child.PROGRAMS}
    except OSError as error:
        raise explain(f"load the data plane under {bpffs_dir}", error) from error
    return Loaded(build, layout, maps, programs)


def unload(bpffs_dir: Path) -> None:
    """Remove every pin of ours; what is attached through a pinned link is thereby detached. Idempotent."""
    for pattern in ("links/*", "programs-*/*", "maps/*"):
        for pin in bpffs_dir.glob(pattern):
            if pin.is_dir():
                pin.rmdir()  # the note that we made an interface's clsact qdisc
            else:
                pin.unlink(missing_ok=True)
    for directory in (*bpffs_dir.glob("programs-*"), bpffs_dir / "links", bpffs_dir / "maps"):
        if directory.is_dir():
            directory.rmdir()


def _refuse_other_build(bpffs_dir: Path, build: str) -> None:
    """Another build's maps may differ in layout: taken away when nothing is attached, refused otherwise."""
    others = [path for path in bpffs_dir.glob("programs-*") if path.name != f"programs-{build}"]
    if not others:
        return
    if any(bpffs_dir.glob("links/*")):
        message = (
            f"load the data plane under {bpffs_dir}: it holds attachments of another netfence build "
            f"({others[0].name}); they stay in force; detach them with that version, or stop it with "
            "enforcement.on_shutdown: detach"
        )
        raise PreconditionError(message)
    unload(bpffs_dir)


def _compile(job: child.Job) -> None:
    command = [sys.executable, "-m", child.__name__, json.dumps(dataclasses.asdict(job))]
    try:
        done = subprocess.run(  # noqa: S603 - our own module
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        message = (
            f"compile the BPF programs: no end after {COMPILE_TIMEOUT_S:.0f} s; try again on a less loaded machine"
        )
        raise PreconditionError(message) from error
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    if "No module named 'bcc'" in lines[-1]:
        message = (
            f"compile the BPF programs: {sys.executable} has no module bcc; "
            "apt install python3-bpfcc and use an environment with system site packages"
        )
        raise PreconditionError(message)
    first = next((line for line in lines if "error:" in line), lines[0])
    raise _compile_error(first, lines[-1])


def _compile_error(first: str, last: str) -> NetfenceError:
    hint = "install linux-libc-dev" if "file not found" in first else "see the log of the compile child"
    return PreconditionError(f"compile and load the BPF programs: {first.strip()} … {last.strip()}; {hint}")
