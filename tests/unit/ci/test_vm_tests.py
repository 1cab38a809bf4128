"""ci/vm_tests.py where no guest runs: a kernel that is not to be had is no failed test, and the matrix is told so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import vm
import vm_tests
from infrastructure import EXIT_STATUS, InfrastructureError
from kernelcache import Installed
from kernellist import Kernel
from matrix_results import read_runs
from vm import Ended, Machine, Outcome
from vm_tests import Result

SERIES = ["5.10", "6.1", "6.12", "7.3"]
INSTALLED = Installed(Path("/nowhere/vmlinuz"), Path("/nowhere/lib"), "6.1.0-test")
PASSED = '<testsuites><testcase classname="a" name="b"/></testsuites>'
IMAGES_OF_PROGRAMS = vm_tests.images_of_programs


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
    share = vm_tests.SHARES / "6.1"
    for directory, name in ((results, "6.1.xml"), (share, "junit.xml")):
        directory.mkdir(parents=True)
        (directory / name).write_text(PASSED)
    monkeypatch.setattr(vm_tests, "ensure", no_mirror)
    vm_tests.main()
    assert not (results / "6.1.xml").exists()


def test_a_program_that_is_missing_is_infrastructure(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vm_tests, "ensure", lambda _kernel: INSTALLED)
    monkeypatch.setattr(vm, "kvm_works", lambda: False)
    monkeypatch.setattr(vm, "BIN", Path("/nowhere"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["vm_tests.py"])
    assert vm_tests.main() == EXIT_STATUS
    assert "  6.1 | infrastructure: infrastructure: start a guest: vng: not found" in capsys.readouterr().out
    for series in SERIES:
        told = json.loads((results / f"{series}.json").read_text())
        assert told["outcome"] == "infrastructure"
        assert "vng" in told["detail"]


def test_images_that_cannot_be_made_are_infrastructure(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results.mkdir()
    (results / "6.12.xml").write_text(PASSED)
    monkeypatch.setattr(vm_tests, "images_of_programs", IMAGES_OF_PROGRAMS)
    monkeypatch.setattr(vm_tests, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(vm, "_SBIN", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["vm_tests.py"])
    assert vm_tests.main() == EXIT_STATUS
    runs = read_runs(results)
    assert [(run.kernel, run.outcome, run.tests) for run in runs] == [(each, "infrastructure", ()) for each in SERIES]
    assert all("mkfs.ext4" in run.detail for run in runs)


def test_results_that_cannot_be_written_are_infrastructure(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results.touch()
    assert vm_tests.main() == EXIT_STATUS
    assert f"infrastructure: [Errno 17] File exists: '{results}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("outcome", "status"), [("passed", 0), ("failed", 1), ("crashed", 3), ("hung", 3), ("noboot", 3)]
)
def test_each_outcome_has_its_exit_status(
    results: Path, monkeypatch: pytest.MonkeyPatch, outcome: str, status: int
) -> None:
    monkeypatch.setattr(vm_tests, "ensure", lambda _kernel: INSTALLED)
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


def collected(part: int | None) -> set[str]:
    """List what a guest would run of a file with many cases."""
    env = {**os.environ, "NETFENCE_PART": "" if part is None else f"{part}/{len(SERIES)}"}
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/kernel/test_verdict.py"], cwd=vm.ROOT, env=env, capture_output=True, text=True, check=True
    )
    return {line for line in done.stdout.splitlines() if "::" in line}


def test_the_kernels_together_run_all() -> None:
    whole, *parts = map(collected, (None, *range(len(SERIES))))
    assert len(whole) > 700
    assert set().union(*parts) == whole
    for part in parts:
        assert len(part) < len(whole) / 2


class Guests:
    """Run in place of `vm.run`: two at a time or not at all. Records what each is given, and leaves a result."""

    def __init__(self) -> None:
        self.given: dict[str, tuple[str | None, list[str]]] = {}
        self.series: list[str] = []
        self.threads: set[int] = set()
        self._together = threading.Barrier(vm_tests.AT_ONCE)

    def run(self, _machine: Machine, command: list[str], share: Path, *, env: dict[str, str], **_: object) -> Ended:
        """Be a guest."""
        self.series.append(share.name)
        self.threads.add(threading.get_ident())
        self.given[share.name] = env.get("NETFENCE_PART"), command
        self._together.wait(10)
        share.mkdir(parents=True)
        (share / "junit.xml").write_text(PASSED.replace('"a"', f'"{share.name}"'))
        return Ended(Outcome.PASSED, 0, "exit status 0", 60.0)


@pytest.fixture
def guests(results: Path, monkeypatch: pytest.MonkeyPatch) -> Guests:
    made = Guests()
    monkeypatch.setattr(vm_tests, "ensure", lambda _kernel: INSTALLED)
    monkeypatch.setattr(vm, "run", made.run)
    return made


@pytest.mark.parametrize(
    ("options", "parts", "marked"),
    [
        (["--quick"], {"0/4", "1/4", "2/4", "3/4"}, "not nightly and not registry and not userspace"),
        ([], {None}, "not nightly and not registry"),
    ],
    ids=["quick", "whole"],
)
def test_each_kernel_is_run_once_two_at_a_time(
    results: Path,
    guests: Guests,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    parts: set[str | None],
    marked: str,
) -> None:
    asked_for: list[str] = []

    def compiled_tests(marked: str) -> list[str]:
        asked_for.append(marked)
        return ["tests/kernel/a.py"]

    monkeypatch.setattr(vm_tests, "compiled_tests", compiled_tests)
    monkeypatch.setattr(sys, "argv", ["vm_tests.py", *options, "--", "-k", "clsact"])
    assert vm_tests.main() == 0
    assert sorted(guests.series, key=SERIES.index) == SERIES
    assert len(guests.threads) == 2
    assert {part for part, _ in guests.given.values()} == parts
    for series, (_, command) in guests.given.items():
        asked = [f"--junitxml={vm_tests.SHARES / series}/junit.xml", "tests/kernel/a.py", "-m", marked, "-k", "clsact"]
        assert command[-len(asked) :] == asked
    assert asked_for == [marked]
    names = {run.kernel: [test.name for test in run.tests] for run in read_runs(results)}
    assert names == {series: [f"{series}::b"] for series in SERIES}
    assert {path.name for path in results.iterdir()} == {
        f"{each}.{kind}" for each in SERIES for kind in ("xml", "json")
    }


def test_one_lost_kernel_decides_where_no_test_failed(
    results: Path, guests: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests, "_together", threading.Barrier(1))
    monkeypatch.setattr(vm_tests, "ensure", lambda kernel: no_mirror(kernel) if kernel.series == "6.12" else INSTALLED)
    monkeypatch.setattr(sys, "argv", ["vm_tests.py"])
    assert vm_tests.main() == EXIT_STATUS
    assert [run.kernel for run in read_runs(results) if run.lost] == ["6.12"]


@pytest.mark.parametrize(
    ("options", "bound_s", "slow"),
    [
        (["--quick"], 0.0, True),
        (["--quick"], 3600.0, False),
        ([], 0.0, False),
        (["--quick", *SERIES[:2]], 0.0, False),
    ],
    ids=["slow", "fast", "whole", "some"],
)
def test_the_time_of_all_is_told_and_judged_where_it_is_bounded(
    guests: Guests,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    bound_s: float,
    *,
    slow: bool,
) -> None:
    monkeypatch.setattr(vm_tests, "QUICK_S", bound_s)
    monkeypatch.setattr(sys, "argv", ["vm_tests.py", *options])
    assert vm_tests.main() == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("all machines together: 0.0 minutes")
    assert ("SLOWER than the 0 minutes" in last) is slow


def test_the_bound_is_the_issues() -> None:
    assert vm_tests.took(18 * 60 + 6, bounded=True) == (
        "all machines together: 18.1 minutes: SLOWER than the 18 minutes that issue 4 allows on two cores (no failure)"
    )
    assert vm_tests.took(18 * 60, bounded=True) == "all machines together: 18.0 minutes"
    assert vm_tests.took(90 * 60, bounded=False) == "all machines together: 90.0 minutes"
