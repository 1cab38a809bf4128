"""Exit statuses of `nox -s perf`, which come through nox and are what a pipeline sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.unit.perf.runs import result, run

from perfreport.model import save

ROOT = Path(__file__).resolve().parents[3]
NOTHING = "no-benchmark-of-this-name"  # were anything measured all the same, it would not take long


def nox_perf(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "nox", "-f", str(ROOT / "noxfile.py"), "-s", "perf", "--", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


def saved(path: Path, value: float, size: str = "full") -> str:
    save(run(result("attach-x", {"netfence": value}, "ms"), size=size), path)
    return str(path)


@pytest.mark.parametrize(("value", "status"), [(100, 0), (30, 0), (300, 1)])
def test_a_regression_is_one_and_all_else_is_zero(tmp_path: Path, value: float, status: int) -> None:
    base, new = saved(tmp_path / "base.json", 100), saved(tmp_path / "new.json", value)
    assert nox_perf("--compare", base, "--with", new).returncode == status


def test_an_unusable_base_is_two_before_anything_is_measured(tmp_path: Path) -> None:
    smoke = saved(tmp_path / "smoke.json", 100, size="smoke")
    for base, why in ((str(tmp_path / "none.json"), "No such file"), (smoke, "smoke sizes")):
        done = nox_perf("--compare", base, "-k", NOTHING)
        assert (done.returncode, NOTHING in done.stderr) == (2, False)
        assert why in done.stderr
