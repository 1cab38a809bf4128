"""The cache of kernels, and what fills it.

The cache (`NETFENCE_KERNELS`, default `${XDG_CACHE_HOME:-~/.cache}/netfence/kernels`) has one directory per kernel,
named after what its packages hold, made elsewhere and renamed: complete or absent.

    6.1-2645ba3567568ed1/vmlinuz
    6.1-2645ba3567568ed1/lib/modules/6.1.0-50-amd64/    modules, decompressed, with what depmod writes
    6.1-2645ba3567568ed1/manifest.json                  packages with their SHA256; what makes the directory whole

virtme-ng looks for lib/modules beside the image that it boots and above, so `vng --run <vmlinuz>` needs no more. Its
initramfs can insert nothing compressed, which is why the modules (`.ko.xz` from 6.12 on) are decompressed here: all of
them, since that takes 9 s of one core per kernel, no longer than fetching them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aptsources
import debfetch
from debfetch import Package, PrivateApt
from infrastructure import InfrastructureError
from kernellist import Kernel

_FORMAT = 1  # of a cache entry; another number makes all entries be made anew
_IMAGE_PARTS = ("base", "binary", "modules")  # what Debian splits linux-image-* into, from 6.19 on

Report = Callable[[str, float | None], None]  # told what goes on and the fraction of it that is done, if known


@dataclass(frozen=True)
class Installed:
    """A kernel in the cache: the image, lib/modules/<release>, and what `uname -r` will say in the guest."""

    vmlinuz: Path
    modules: Path
    release: str


def cache_directory() -> Path:
    """Tell where kernels are kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("NETFENCE_KERNELS") or base / "netfence" / "kernels").absolute()


def cached(kernel: Kernel, cache: Path) -> Installed | None:
    """Find the kernel in the cache, whole and made from the entry as it is now; None if there is none."""
    for manifest in sorted(cache.glob(f"{kernel.series}-*/manifest.json")):
        try:
            told = json.loads(manifest.read_text())
            fits = (told["format"], told["suite"]) == (_FORMAT, kernel.suite)
            fits = fits and re.fullmatch(kernel.package, told["package"]) is not None
            if fits and told["content"] == _content(manifest.parent):
                return _installed(manifest.parent, told["release"])
        except (ValueError, KeyError):
            continue  # not a manifest of ours, or a disk that lost a part of it
    return None


def ensure(kernel: Kernel, report: Report = lambda _what, _fraction: None, *, update: bool = False) -> Installed:
    """Return where the kernel lies, fetched if it is not there; `update` asks for a newer one than is there.

    Several processes may ask at once: the second waits for the first. Takes some 30 ms when the kernel is there.
    Raises InfrastructureError when it is not to be had and ValueError for the host's own kernel.
    """
    if kernel.is_host:
        raise ValueError("the host's kernel is running: there is nothing to fetch")
    cache = cache_directory()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".lock-{kernel.series}", report):
            found = cached(kernel, cache)
            if found is None or update:
                found = _fetch(kernel, cache, report)
        report(found.release, 1.0)
    except OSError as error:
        advice = "free 2 GB there, or set" if error.errno == errno.ENOSPC else "set"
        raise InfrastructureError(
            f"keep Linux {kernel.series} in {cache}: {error}; {advice} NETFENCE_KERNELS to another directory"
        ) from error
    return found


def _fetch(kernel: Kernel, cache: Path, report: Report) -> Installed:
    """Fetch the newest package of the entry and make a directory of it, unless it is there; remove older ones."""
    for stale in cache.glob(f".work-{kernel.series}-*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(stale)
    work = Path(tempfile.mkdtemp(prefix=f".work-{kernel.series}-", dir=cache))
    try:
        report(f"index of {kernel.suite}", None)
        source = aptsources.mirror_for(kernel.suite, aptsources.configured())
        apt = PrivateApt(work / "apt", kernel.suite, source)
        image = apt.newest(kernel.package)
        packages = parts_of(image, apt)
        name = hashlib.sha256(" ".join(package.sha256 for package in packages).encode()).hexdigest()[:16]
        entry = cache / f"{kernel.series}-{name}"
        found = cached(kernel, cache)
        if found is None or found.vmlinuz.parent != entry:
            size_mb = sum(package.size for package in packages) / 1e6
            what = f"{image.name} {image.version}, {size_mb:.0f} MB"
            # Downloaded is not done: what has reached 1 is finished, and its clock stands still.
            debs = apt.download(packages, lambda fraction: report(what, min(fraction, 0.99)))
            tree = work / "tree"
            release = image.name.removeprefix("linux-image-")
            unpack(debs, tree, release, report)
            manifest = {
                "format": _FORMAT, "suite": kernel.suite, "package": image.name, "version": image.version,
                "release": release, "content": _content(tree),
                "sha256": {package.name: package.sha256 for package in packages},
            }  # fmt: skip
            (tree / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            for older in cache.glob(f"{kernel.series}-*"):
                shutil.rmtree(older)
            tree.rename(entry)
            found = _installed(entry, release)
        return found
    finally:
        shutil.rmtree(work)


def parts_of(image: Package, apt: PrivateApt) -> list[Package]:
    """Name all packages that make up the kernel: the image and, where Debian splits it, its parts of the same name."""
    release = image.name.removeprefix("linux-image-")
    parts = [f"linux-{part}-{release}" for part in _IMAGE_PARTS]
    return [image, *apt.packages([part for part in parts if part in image.depends])]


def unpack(debs: list[Path], tree: Path, release: str, report: Report) -> None:
    """Make `tree` of the packages: vmlinuz, and lib/modules/<release> with the modules decompressed and indexed."""
    unpacked = tree.with_name("unpacked")
    for deb in debs:
        report(f"unpacking {deb.name.partition('_')[0]}", None)
        debfetch.run("dpkg-deb", "-x", str(deb), str(unpacked))
    modules = tree / "lib" / "modules" / release
    modules.parent.mkdir(parents=True)
    _one_of(unpacked / "lib/modules" / release, unpacked / "usr/lib/modules" / release).rename(modules)
    _one_of(unpacked / f"boot/vmlinuz-{release}", modules / "vmlinuz").rename(tree / "vmlinuz")
    compressed = [str(file) for file in modules.rglob("*.ko.xz")]
    if compressed:
        report(f"decompressing {len(compressed)} modules", None)
        debfetch.run("xz", "--decompress", "--files", stdin="\n".join(compressed) + "\n")
    report("depmod", None)
    debfetch.run("depmod", "-b", str(tree), release)
    if not (modules / "kernel" / "fs" / "9p" / "9p.ko").is_file():
        raise InfrastructureError(
            f"use Linux {release}: it has no 9p, so its guest cannot see the host's files; "
            "choose another flavour than cloud in ci/kernels.toml"
        )


def _one_of(*paths: Path) -> Path:
    for path in paths:
        if path.exists():
            return path
    raise InfrastructureError(
        f"unpack a kernel: the packages have none of {', '.join(str(path) for path in paths)}; "
        "Debian's layout changed: teach ci/kernelcache.py"
    )


def _content(tree: Path) -> str:
    """Hash what makes an entry whole: the image, and path and size of each file of the modules (reading no module)."""
    whole = hashlib.sha256(debfetch.sha256(tree / "vmlinuz").encode() if (tree / "vmlinuz").is_file() else b"")
    for directory, subdirectories, files in os.walk(tree / "lib"):
        subdirectories.sort()
        for file in sorted(files):
            path = Path(directory, file)
            whole.update(f"{path.relative_to(tree)} {path.lstat().st_size}\n".encode())
    return whole.hexdigest()


def _installed(entry: Path, release: str) -> Installed:
    return Installed(entry / "vmlinuz", entry / "lib" / "modules" / release, release)


@contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    """Hold a lock that other processes and threads respect and that ends with us."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that fetches it", None)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
