"""What a user installs: the wheel has what is compiled and read at run time; the source distribution gives it too."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from netfence import __version__

ROOT = Path(__file__).resolve().parents[2]


def built(where: Path, target: str, directory: Path) -> Path:
    """Build from the tree `where`; return the file."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(directory)]
    subprocess.run(command, cwd=where, check=True, capture_output=True)
    (made,) = directory.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(built(ROOT, "wheel", tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> tarfile.TarFile:
    return tarfile.open(built(ROOT, "sdist", tmp_path_factory.mktemp("sdist")))


def names(sdist: tarfile.TarFile) -> set[str]:
    return {name.partition("/")[2] for name in sdist.getnames()}


def test_the_wheel_ships_what_is_compiled_and_read_at_run_time(wheel: zipfile.ZipFile) -> None:
    wanted = {"netfence/netfence.yaml", "netfence/py.typed"}
    for folder in ("bpf", "proto"):
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".c", ".h", ".proto")]
        assert files
        wanted |= {f"netfence/{path.relative_to(ROOT).as_posix()}" for path in files}
    shipped = set(wheel.namelist())
    assert wanted <= shipped, wanted - shipped


def test_the_source_distribution_gives_a_wheel_with_the_same_files(
    wheel: zipfile.ZipFile, sdist: tarfile.TarFile, tmp_path: Path
) -> None:
    sdist.extractall(tmp_path)  # the filters that newer Pythons have are for archives of others
    (source,) = tmp_path.iterdir()
    again = zipfile.ZipFile(built(source, "wheel", tmp_path))
    assert set(again.namelist()) == set(wheel.namelist())


def test_the_source_distribution_has_what_packages_are_built_of_and_no_more(sdist: tarfile.TarFile) -> None:
    shipped = names(sdist)
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "packaging").rglob("*") if path.is_file()}
    assert wanted | {"ci/gen_man.py", "CHANGELOG.md", "LICENSE", "bpf/LICENSE.BSD"} <= shipped, wanted - shipped
    assert not [name for name in shipped if re.search(r"(^|/)(\.git|\.venv|build|dist|__pycache__)(/|$)", name)]


def test_there_is_one_version(wheel: zipfile.ZipFile, sdist: tarfile.TarFile) -> None:
    """`tests/kernel/test_package.py` has the same of the Debian package."""
    metadata = wheel.read(f"netfence-{__version__}.dist-info/METADATA").decode()
    assert f"\nVersion: {__version__}\n" in metadata
    assert f"netfence-{__version__}/PKG-INFO" in sdist.getnames()
    said = subprocess.run(
        [sys.executable, "-c", "from netfence.cli import main; main()", "--version"], capture_output=True, check=True
    )
    assert said.stdout.decode() == f"netfenced {__version__}\n"
    manual = subprocess.run([sys.executable, "ci/gen_man.py"], cwd=ROOT, capture_output=True, check=True)
    assert f'"netfence {__version__}"' in manual.stdout.decode().partition("\n")[0]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## (Unreleased|\[?{re.escape(__version__)}\b)", changes, re.MULTILINE)
