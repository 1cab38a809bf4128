"""ci/kernelcache.py and ci/debfetch.py with the real apt and dpkg, from an archive of tiny kernels made here."""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

import aptsources
import debfetch
import kernels
from debfetch import check_sha256
from infrastructure import InfrastructureError
from kernelcache import cached

pytestmark = pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt is what is tested: Debian and Ubuntu only")

KERNEL = kernels.Kernel(
    series="6.1", why="", supports=frozenset(), lacks=frozenset(),
    suite="bookworm", package=r"linux-image-6\.1\.\d+-amd64",
)  # fmt: skip
NINE_P = "kernel/fs/9p/9p.ko"
ADDRESSES_OF_NOBODY = "http://127.0.0.1:9/debian"  # the discard port, where nobody listens


@dataclass
class Archive:
    """A Debian archive in a directory, as apt sees it: unsigned, which its entry in the sources allows."""

    root: Path
    index: list[str] = field(default_factory=list)

    def source(self) -> aptsources.Source:
        """Write the entry that a machine would have for it."""
        return aptsources.Source((f"file:{self.root}",), ("bookworm",), ("main",), (("Trusted", "yes"),))

    def add(self, name: str, files: dict[str, bytes], version: str = "1", depends: str = "base-files") -> Path:
        """Build a package and put it into the archive."""
        tree = self.root / "build" / f"{name}-{version}"
        for path, content in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(content)
        (tree / "DEBIAN").mkdir(parents=True)
        control = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nDepends: {depends}\n"
        (tree / "DEBIAN" / "control").write_text(f"{control}Maintainer: nobody\nDescription: none\n")
        deb = self.root / f"{name}_{version}_amd64.deb"
        subprocess.run(
            ["dpkg-deb", "-Znone", "--root-owner-group", "--build", tree, deb], check=True, capture_output=True
        )
        content = deb.read_bytes()
        told = f"Filename: ./{deb.name}\nSize: {len(content)}\nSHA256: {hashlib.sha256(content).hexdigest()}\n"
        self.index.append(control + told)
        self._publish()
        return deb

    def _publish(self) -> None:
        packages = "\n".join(self.index).encode()
        suite = self.root / "dists" / "bookworm"
        (suite / "main" / "binary-amd64").mkdir(parents=True, exist_ok=True)
        (suite / "main" / "binary-amd64" / "Packages").write_bytes(packages)
        listed = f"{hashlib.sha256(packages).hexdigest()} {len(packages)} main/binary-amd64/Packages"
        (suite / "Release").write_text(f"Suite: bookworm\nCodename: bookworm\nSHA256:\n {listed}\n")


def whole(release: str, image: bytes = b"image") -> dict[str, bytes]:
    """Tell the files of a kernel in one package, as Debian had it until 6.18."""
    return {f"boot/vmlinuz-{release}": image, f"lib/modules/{release}/{NINE_P}": b"module"}


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """Have an archive that this machine's apt is configured with, and a cache of our own."""
    made = Archive(tmp_path / "archive")
    monkeypatch.setattr(aptsources, "configured", lambda: [made.source()])
    monkeypatch.setenv("NETFENCE_KERNELS", str(tmp_path / "cache"))
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def entries(cache: Path) -> list[str]:
    """List what a fetch left in the cache, but for its lock: a kernel is complete or absent."""
    return sorted(path.name for path in cache.iterdir() if not path.name.startswith(".lock-"))


def test_the_newest_is_chosen_as_debian_orders_versions(archive: Archive) -> None:
    """Neither by name (-9), nor by the numbers alone (the release candidate)."""
    versions = {"9-amd64": "6.1.9-1", "10-amd64": "6.1.11-1", "11-amd64": "6.1.11~rc1-1", "12-cloud-amd64": "6.1.12-1"}
    for release, version in versions.items():
        archive.add(f"linux-image-6.1.0-{release}", whole(f"6.1.0-{release}"), version)
    assert kernels.ensure(replace(KERNEL, package=r"linux-image-6\.1\.0-\d+-amd64")).release == "6.1.0-10-amd64"


def test_it_lies_as_virtme_looks_for_it_and_needs_no_archive_again(archive: Archive) -> None:
    archive.add("linux-image-6.1.5-amd64", whole("6.1.5-amd64"))
    installed = kernels.ensure(KERNEL)
    assert installed.release == "6.1.5-amd64"
    assert installed.vmlinuz.read_bytes() == b"image"
    assert installed.modules == installed.vmlinuz.parent / "lib" / "modules" / "6.1.5-amd64"
    assert (installed.modules / NINE_P).read_bytes() == b"module"
    assert (installed.modules / "modules.dep").is_file()
    assert installed.vmlinuz.parent.stat().st_mode & 0o777 == 0o755  # the guest's user may be another one
    shutil.rmtree(archive.root)
    assert kernels.ensure(KERNEL) == installed


def test_compressed_modules_and_a_kernel_in_parts(archive: Archive) -> None:
    """As Debian has it from 6.19 on: the image package is empty, and vmlinuz lies among the modules."""
    modules = "usr/lib/modules/6.1.5-amd64"
    archive.add(
        "linux-image-6.1.5-amd64",
        {},
        "2",
        "linux-binary-6.1.5-amd64 (= 2), linux-base (>= 4), linux-modules-6.1.5-amd64",
    )
    archive.add("linux-binary-6.1.5-amd64", {f"{modules}/vmlinuz": b"image in parts"}, "2")
    archive.add("linux-modules-6.1.5-amd64", {f"{modules}/{NINE_P}.xz": lzma.compress(b"module")}, "2")
    archive.add("linux-base", {"etc/must-not-be-fetched": b""}, "5")
    installed = kernels.ensure(KERNEL)
    assert installed.vmlinuz.read_bytes() == b"image in parts"
    assert (installed.modules / NINE_P).read_bytes() == b"module"
    assert not list(installed.modules.rglob("*.xz"))


def test_a_kernel_without_9p_is_refused(archive: Archive, cache: Path) -> None:
    archive.add(
        "linux-image-6.1.5-amd64", {"boot/vmlinuz-6.1.5-amd64": b"", "lib/modules/6.1.5-amd64/kernel/a.ko": b""}
    )
    with pytest.raises(InfrastructureError, match=r"it has no 9p.* choose another flavour than cloud"):
        kernels.ensure(KERNEL)
    assert entries(cache) == []


def truncate(installed: kernels.Installed) -> None:
    (installed.modules / NINE_P).write_bytes(b"mod")


def remove(installed: kernels.Installed) -> None:
    (installed.modules / NINE_P).unlink()


def other_image(installed: kernels.Installed) -> None:
    installed.vmlinuz.write_bytes(b"egami")


def no_image(installed: kernels.Installed) -> None:
    installed.vmlinuz.unlink()


def half_a_manifest(installed: kernels.Installed) -> None:
    manifest = installed.vmlinuz.with_name("manifest.json")
    manifest.write_bytes(manifest.read_bytes()[:20])


@pytest.mark.parametrize("damage", [truncate, remove, other_image, no_image, half_a_manifest])
def test_what_is_damaged_is_fetched_again(
    archive: Archive, cache: Path, damage: Callable[[kernels.Installed], None]
) -> None:
    archive.add("linux-image-6.1.5-amd64", whole("6.1.5-amd64"))
    installed = kernels.ensure(KERNEL)
    damage(installed)
    assert cached(KERNEL, cache) is None
    assert kernels.ensure(KERNEL) == installed == cached(KERNEL, cache)
    assert installed.vmlinuz.read_bytes() == b"image"


def test_a_newer_one_comes_when_asked_for_and_replaces_the_older(archive: Archive, cache: Path) -> None:
    archive.add("linux-image-6.1.5-amd64", whole("6.1.5-amd64"), "5")
    archive.add("linux-image-6.10.1-amd64", whole("6.10.1-amd64"), "1")
    neighbour = replace(KERNEL, series="6.10", package=r"linux-image-6\.10\.\d+-amd64")
    kernels.ensure(neighbour)
    assert kernels.ensure(KERNEL, update=True) == kernels.ensure(KERNEL)
    archive.add("linux-image-6.1.6-amd64", whole("6.1.6-amd64"), "6")
    assert kernels.ensure(KERNEL).release == "6.1.5-amd64"
    assert kernels.ensure(KERNEL, update=True).release == "6.1.6-amd64"
    assert kernels.ensure(KERNEL).release == "6.1.6-amd64"
    assert cached(neighbour, cache)
    assert len(entries(cache)) == 2


def test_another_entry_in_the_list_is_another_kernel(archive: Archive, cache: Path) -> None:
    archive.add("linux-image-6.1.5-amd64", whole("6.1.5-amd64"))
    kernels.ensure(KERNEL)
    assert cached(replace(KERNEL, suite="bookworm-backports"), cache) is None
    assert cached(replace(KERNEL, package="linux-image-6.1.6-amd64"), cache) is None
    assert cached(KERNEL, cache)


def test_two_at_once_fetch_once(archive: Archive, cache: Path) -> None:
    archive.add("linux-image-6.1.5-amd64", whole("6.1.5-amd64"))
    told: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(kernels.ensure, KERNEL, lambda what, _fraction: told.append(what)) for _ in range(2)]
    assert both[0].result() == both[1].result()
    assert told.count("index of bookworm") == 1
    assert told.count("waiting for another process that fetches it") == 1
    assert len(entries(cache)) == 1


def test_what_a_killed_process_left_is_removed(archive: Archive, cache: Path) -> None:
    archive.add("linux-image-6.1.5-amd64", whole("6.1.5-amd64"))
    (cache / ".work-6.1-killed" / "apt").mkdir(parents=True)
    kernels.ensure(KERNEL)
    assert len(entries(cache)) == 1


def test_no_such_package_names_the_entry_to_correct(archive: Archive, cache: Path) -> None:
    archive.add("linux-image-6.2.5-amd64", whole("6.2.5-amd64"))
    with pytest.raises(InfrastructureError, match=r"^infrastructure: find a package linux-image-6.*ci/kernels\.toml"):
        kernels.ensure(KERNEL)
    assert entries(cache) == []


def test_a_package_that_is_not_what_was_signed_is_refused(archive: Archive, cache: Path) -> None:
    deb = archive.add("linux-image-6.1.5-amd64", whole("6.1.5-amd64"))
    content = deb.read_bytes()
    deb.write_bytes(content.replace(b"image", b"egami"))
    assert deb.stat().st_size == len(content)
    with pytest.raises(InfrastructureError, match=r"^infrastructure: .*(Hash Sum mismatch|SHA256 is)"):
        kernels.ensure(KERNEL)
    assert entries(cache) == []


def test_our_own_check_does_not_lean_on_apts(tmp_path: Path) -> None:
    deb = tmp_path / "a.deb"
    deb.write_bytes(b"package")
    check_sha256(deb, hashlib.sha256(b"package").hexdigest())
    with pytest.raises(InfrastructureError, match=r"check a\.deb: SHA256 is [0-9a-f]{64}, the signed index says 0000"):
        check_sha256(deb, "0" * 64)


def test_each_package_goes_through_our_own_check(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    debs = [
        archive.add("linux-image-6.1.5-amd64", {}, depends="linux-binary-6.1.5-amd64, linux-modules-6.1.5-amd64"),
        archive.add("linux-binary-6.1.5-amd64", {"boot/vmlinuz-6.1.5-amd64": b"image"}),
        archive.add("linux-modules-6.1.5-amd64", {f"usr/lib/modules/6.1.5-amd64/{NINE_P}": b"module"}),
    ]
    checked: dict[str, str] = {}

    def check(file: Path, expected: str) -> None:
        checked[file.name] = expected

    monkeypatch.setattr(debfetch, "check_sha256", check)
    kernels.ensure(KERNEL)
    assert checked == {deb.name: hashlib.sha256(deb.read_bytes()).hexdigest() for deb in debs}


def test_an_archive_without_a_signature_is_refused(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    archive.add("linux-image-6.1.5-amd64", whole("6.1.5-amd64"))
    unsigned = aptsources.Source(archive.source().uris, ("bookworm",), ("main",))
    monkeypatch.setattr(aptsources, "configured", lambda: [unsigned])
    with pytest.raises(InfrastructureError, match="is not signed"):
        kernels.ensure(KERNEL)


def test_a_mirror_out_of_reach_is_told_apart_from_a_failed_test(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.add("linux-image-6.1.0-5-amd64", whole("6.1.0-5-amd64"))
    gone = aptsources.Source((ADDRESSES_OF_NOBODY,), ("bookworm",), ("main",))
    monkeypatch.setattr(aptsources, "configured", lambda: [gone])
    monkeypatch.setattr(sys, "argv", ["kernels.py", "fetch", "6.1"])
    assert kernels.main() == 3
    said = capsys.readouterr().err
    assert "\ninfrastructure: run apt-get update: exit status 100: " in said
    assert "check the network and the mirrors" in said
    monkeypatch.setattr(aptsources, "configured", lambda: [archive.source()])
    assert kernels.main() == 0
    monkeypatch.setattr(sys, "argv", ["kernels.py", "path", "6.1"])
    assert kernels.main() == 0
    assert Path(capsys.readouterr().out.strip()).read_bytes() == b"image"


def test_a_path_is_printed_of_what_is_there_only(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels.py", "path", "6.1"])
    assert kernels.main() == 3
    assert capsys.readouterr() == ("", "infrastructure: Linux 6.1 is not in the cache; fetch it first\n")


def test_a_cache_that_cannot_be_written_is_infrastructure(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETFENCE_KERNELS", os.devnull + "/kernels")
    with pytest.raises(InfrastructureError, match=r"keep Linux 6\.1 in /dev/null/kernels: .*; set NETFENCE_KERNELS"):
        kernels.ensure(KERNEL)


def test_a_missing_program_is_infrastructure(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InfrastructureError, match=r"^infrastructure: run apt-get: not found; run ci/bootstrap"):
        kernels.ensure(KERNEL)
