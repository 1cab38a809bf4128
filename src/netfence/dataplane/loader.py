"""Gets the programs and maps into the kernel, or finds them there: build id, compile child, pins.

Layout of `bpffs_dir`: ``maps-<build>/<name>``, for a map inside a map ``<name>-<key>``; ``programs-<build>/<name>``;
``links/<attachment>-<hook>`` (without dots). The build id is a hash of the BPF sources, of what compiles them and of
the map sizes: the same id is taken over without compiling. bpffs holds no ordinary files, so ``layout-<build>.json``
stands in `data_dir`. Refuses to know what any program does.

Another build's programs stay in force while ours are made and its maps' contents carried over (carry.py); whoever takes
an attachment over puts our programs in their places, and when none of theirs is left `forget` removes what they pinned.
A directory ``maps-<build>/whole`` says that ours hold all there is: without it, a start that was cut short is begun
anew, because no hook can have our programs yet. ``maps-<build>/order-<number>`` says which of several came last: not
the time, which somebody may set back between two upgrades.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog
from packaging.version import Version

from netfence import __version__
from netfence.dataplane import compile as child
from netfence.dataplane.carry import carry_over
from netfence.dataplane.failure import explain
from netfence.dataplane.layout import Layout
from netfence.dataplane.links import obj_get
from netfence.dataplane.maps import Map
from netfence.errors import NetfenceError, PreconditionError

COMPILE_TIMEOUT_S = 180.0
"""Ten times what an emulated guest takes; a child that hangs must not hang the start for ever."""

WHOLE = "whole"
"""The directory among a build's maps that says that they hold everything."""

ORDER = "order-"
"""How the directory's name begins that says how many builds were in force before. Older netfences make none."""

log = structlog.get_logger(__name__)


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


def load(bpffs_dir: Path, data_dir: Path, max_leases: int, lock_fd: int) -> Loaded:
    """Open the pins of this build, after having a child make what is missing. Blocks, up to seconds.

    The child dies with us and has the lock on `bpffs_dir` until then: nobody else's pins are mixed with its own.

    What another build has in force is carried over; its pins stay for `forget`. Raises PreconditionError: no bcc,
    compile error, attachments of a newer netfence, or of a build whose layout is not known.
    """
    sources = bpf_sources()
    build = build_id(sources, max_leases)
    maps_dir, programs_dir, layout_file = _maps(bpffs_dir, build), _programs(bpffs_dir, build), _layout(data_dir, build)
    try:
        if not any(bpffs_dir.glob("links/*")):
            forget(bpffs_dir, data_dir, others(bpffs_dir, build))  # nothing is in force
        source = in_force(bpffs_dir)
        if source not in ("", build):
            _require_older(source, _layout(data_dir, source))
            forget(bpffs_dir, data_dir, [build])  # of a start that was cut short, or of an upgrade that is taken back
        for directory in (maps_dir, programs_dir, bpffs_dir / "links"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _unread(layout_file) or not all((programs_dir / name).exists() for name in child.PROGRAMS):
            job = child.Job(str(sources), str(maps_dir), str(programs_dir), str(layout_file), max_leases)
            _compile(dataclasses.replace(job, parent=os.getpid()), lock_fd)
        layout = Layout.load(layout_file)
        specs = child.map_specs(layout, max_leases)
        maps = {spec.name: Map(obj_get(maps_dir / spec.name), spec, maps_dir / spec.name) for spec in specs}
        programs = {name: obj_get(programs_dir / name) for name in child.PROGRAMS}
        if source != build:
            if source:
                pins = [pin for pin in _maps(bpffs_dir, source).iterdir() if pin.name != WHOLE and "-" not in pin.name]
                old = {pin.name: Map.pinned(pin) for pin in pins}
                carried = carry_over(old, Layout.load(_layout(data_dir, source)), maps, layout)
                log.warning("upgrading", from_build=source, to_build=build, **carried)
            put_in_force(bpffs_dir, build)
    except OSError as error:
        raise explain(f"load the data plane under {bpffs_dir}", error) from error
    return Loaded(build, layout, maps, programs)


def others(bpffs_dir: Path, build: str) -> list[str]:
    """List the other builds that have pins here."""
    found = {path.name.partition("-")[2] for kind in ("programs", "maps") for path in bpffs_dir.glob(f"{kind}-*")}
    return sorted(found - {build})


def forget(bpffs_dir: Path, data_dir: Path, builds: Iterable[str]) -> None:
    """Remove what these builds have pinned beside links; hooks that run their programs keep those. Idempotent."""
    for build in builds:
        _layout(data_dir, build).unlink(missing_ok=True)
        for directory in (_programs(bpffs_dir, build), _maps(bpffs_dir, build)):
            _remove(directory)


def unload(bpffs_dir: Path) -> None:
    """Remove every pin of ours; what is attached through a pinned link is thereby detached. Idempotent."""
    for directory in (bpffs_dir / "links", *bpffs_dir.glob("programs-*"), *bpffs_dir.glob("maps-*")):
        _remove(directory)


def _remove(directory: Path) -> None:
    for pin in directory.glob("*"):
        if pin.is_dir():
            pin.rmdir()
        else:
            pin.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        directory.rmdir()


def _maps(bpffs_dir: Path, build: str) -> Path:
    return bpffs_dir / f"maps-{build}"


def _programs(bpffs_dir: Path, build: str) -> Path:
    return bpffs_dir / f"programs-{build}"


def _layout(data_dir: Path, build: str) -> Path:
    return data_dir / f"layout-{build}.json"


def _unread(layout_file: Path) -> bool:
    """Tell whether a layout is to be written again: it is not there, or a power cut left something else."""
    try:
        Layout.load(layout_file)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return True
    return False


def put_in_force(bpffs_dir: Path, build: str) -> None:
    """Say that this build's maps hold all there is, and that it is the last one that did."""
    last = max((_order(path) for path in bpffs_dir.glob(f"maps-*/{WHOLE}")), default=(0, 0))
    directory = _maps(bpffs_dir, build)
    # First, because it counts with the other one alone; of a start cut short between the two it is there already.
    (directory / f"{ORDER}{last[0] + 1}").mkdir(mode=0o700, exist_ok=True)
    (directory / WHOLE).mkdir(mode=0o700)


def in_force(bpffs_dir: Path) -> str:
    """Tell which build's maps hold what is in force: of several, which upgrades cut short leave, the last; "": none."""
    whole = sorted(bpffs_dir.glob(f"maps-*/{WHOLE}"), key=_order)
    return whole[-1].parent.name.partition("-")[2] if whole else ""


def _order(whole: Path) -> tuple[int, int]:
    """Return what sorts builds by when they were put in force; those that have no number come first, by their time."""
    numbers = [int(path.name.removeprefix(ORDER)) for path in whole.parent.glob(f"{ORDER}*")]
    return max(numbers, default=0), whole.stat().st_mtime_ns


def _require_older(build: str, layout_file: Path) -> None:
    """Refuse to take over from a newer netfence, and from a build of which we do not know how to read its maps."""
    whose = f"take over the attachments of another build of netfence ({build})"
    remedy = "they stay in force; start that version again, with on_shutdown: detach to take them off"
    try:
        version = str(json.loads(layout_file.read_text(encoding="utf-8"))["version"])
        newer = is_newer(version, __version__)
    except (OSError, ValueError, KeyError) as error:
        raise PreconditionError(f"{whose}: read {layout_file}: {error}; {remedy}") from error
    if newer:
        message = f"{whose}: it is of version {version}, this is {__version__}, and no way leads back; {remedy}"
        raise PreconditionError(message)


def is_newer(version: str, than: str) -> bool:
    """Tell whether a version comes after another (PEP 440); what is behind a ``+`` says who built it, and counts not.

    Raises ValueError for what is no version.
    """
    one, other = (Version(each.partition("+")[0]) for each in (version, than))
    return one > other


def _compile(job: child.Job, lock_fd: int) -> None:
    # -P and cwd: neither modules nor headers come from where somebody happened to start us.
    command = [sys.executable, "-P", "-m", child.__name__, json.dumps(dataclasses.asdict(job))]
    try:
        done = subprocess.run(  # noqa: S603 - our own module
            command,
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
            cwd=job.sources,
            pass_fds=[lock_fd],
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
