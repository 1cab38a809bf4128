"""ci/vm_tests.py where no guest runs: a kernel that is not to be had is no failed test, and the matrix is told so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import vm
import vm_tests
from infrastructure import EXIT_STATUS, InfrastructureError
from kernelcache import Installed
from kernellist import Kernel
from matrix_results import read_runs
from vm import Ended, Outcome
from vm_tests import Result


def no_mirror(_kernel: Kernel) -> Installed:
    raise InfrastructureError("no mirror has linux-image-6.1")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(vm_tests, "JUNIT", tmp_path / "junit")
    monkeypatch.setattr(vm_tests, "SHARES", tmp_path / "vm")
    monkeypatch.setattr(vm_tests, "compiled_tests", lambda _marked: ["tests/kernel/test_verdict.py"])
    monkeypatch.setattr(vm_tests, "images_of_programs", dict)
    monkeypatch.setattr(sys, "argv", ["vm_tests.py", "6.1"])
    return tmp_path / "junit"


def test_a_kernel_that_is_not_to_be_had_is_infrastructure(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vm_tests, "ensure", no_mirror)
    assert vm_tests.main() == EXIT_STATUS
    assert "  6.1 | infrastructure: infrastructure: no mirror has linux-image-6.1" in capsys.readouterr().out
    (run,) = read_runs(results, ["6.1"])
    assert run.lost
    assert "no mirror" in run.detail


def test_results_of_an_earlier_run_are_gone_before_this_one(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results.mkdir()
    (results / "6.1.xml").write_text("<testsuite/>")
    monkeypatch.setattr(vm_tests, "ensure", no_mirror)
    vm_tests.main()
    assert not (results / "6.1.xml").exists()


@pytest.mark.parametrize(
    ("outcome", "status"), [("passed", 0), ("failed", 1), ("crashed", 3), ("hung", 3), ("noboot", 3)]
)
def test_each_outcome_has_its_exit_status(
    results: Path, monkeypatch: pytest.MonkeyPatch, outcome: str, status: int
) -> None:
    installed = Installed(Path("/nowhere/vmlinuz"), Path("/nowhere/lib"), "6.1.0-test")
    monkeypatch.setattr(vm_tests, "ensure", lambda _kernel: installed)
    monkeypatch.setattr(vm, "run", lambda *_, **__: Ended(Outcome(outcome), None, "why", 12.0))
    assert vm_tests.main() == status
    told = json.loads((results / "6.1.json").read_text())
    assert Result(**told) == Result("6.1", "6.1.0-test", outcome, "why, after 12 s")


def test_a_kernel_that_is_not_listed_is_called_wrongly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vm_tests.py", "2.4"])
    with pytest.raises(SystemExit, match="2"):
        vm_tests.main()
    assert "not in ci/kernels.toml: 2.4" in capsys.readouterr().err
