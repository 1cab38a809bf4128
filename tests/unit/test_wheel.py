"""What a user installs: the wheel carries the BPF sources, the proto files and the reference configuration."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_ships_what_is_compiled_and_read_at_run_time(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    wanted = {"netfence/netfence.yaml", "netfence/py.typed"}
    for folder in ("bpf", "proto"):
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".c", ".h", ".proto")]
        assert files
        wanted |= {f"netfence/{path.relative_to(ROOT).as_posix()}" for path in files}
    assert wanted <= shipped, wanted - shipped
