"""matrix_results on files that pytest itself wrote, whole, cut off and missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from matrix_results import FAILED, LOST, PASSED, SKIPPED, Result, Run, by_version, read_runs

TESTS = """
import pytest
def covering(record_property, mode):
    for name, value in (("hook", "tcx"), ("mode", mode), ("family", "ipv4, ipv6")):
        record_property(name, value)
@pytest.mark.parametrize("mode", ["allowlist", "block_all, audit"])
def test_passes(record_property, mode): covering(record_property, mode)
def test_fails(record_property):
    covering(record_property, "allowlist")
    assert 1 == 2, "<no> way\\nsecond line"
def test_is_skipped(): pytest.skip("tcx: waits for kernel 6.6")
@pytest.mark.xfail(reason="the kernel's fault")
def test_is_known_to_fail(): assert False
@pytest.fixture
def broken(): raise OSError("no such device")
def test_cannot_start(broken): pass
@pytest.fixture
def untidy():
    yield
    raise OSError("still mounted")
def test_passes_and_fails_to_clean_up(untidy): pass
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give what pytest writes about tests of every outcome."""
    directory = tmp_path_factory.mktemp("written")
    (directory / "test_some.py").write_text(TESTS)
    (directory / "pytest.ini").write_text("[pytest]\n")
    arguments = ["-q", "-p", "no:cacheprovider", "--junitxml=out.xml"]
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=directory, check=False, capture_output=True)
    assert done.returncode == 1
    return (directory / "out.xml").read_text()


def outcome(directory: Path, kernel: str, told: str, **more: str) -> None:
    (directory / f"{kernel}.json").write_text(json.dumps({"kernel": kernel, "outcome": told, **more}))


def test_tests_their_reasons_and_what_they_cover(tmp_path: Path, written: str) -> None:
    (tmp_path / "6.12.xml").write_text(written)
    outcome(tmp_path, "6.12", "failed", release="6.12.1-amd64")
    (run,) = read_runs(tmp_path)
    assert (run.kernel, run.release, run.outcome, run.lost) == ("6.12", "6.12.1-amd64", FAILED, False)
    both = ("ipv4", "ipv6")
    tests = {test.name: test for test in run.tests}
    assert tests["test_some::test_passes[allowlist]"] == Result(
        "test_some::test_passes[allowlist]", PASSED, "", ("tcx",), ("allowlist",), both
    )
    assert tests["test_some::test_passes[block_all, audit]"].modes == ("block_all", "audit")
    assert tests["test_some::test_fails"].outcome == FAILED
    assert tests["test_some::test_fails"].reason == "AssertionError: <no> way"
    assert tests["test_some::test_is_skipped"] == Result(
        "test_some::test_is_skipped", SKIPPED, "tcx: waits for kernel 6.6"
    )
    assert (tests["test_some::test_cannot_start"].outcome, tests["test_some::test_cannot_start"].hooks) == (
        FAILED,
        ("-",),
    )
    assert tests["test_some::test_passes_and_fails_to_clean_up"].outcome == FAILED
    assert tests["test_some::test_is_known_to_fail"].reason == "known to fail: the kernel's fault"
    assert [len(run.of(each)) for each in (PASSED, FAILED, SKIPPED)] == [2, 3, 2]


def test_several_files_are_one_run_and_the_worst_of_a_test_counts(tmp_path: Path, written: str) -> None:
    (tmp_path / "6.1.xml").write_text(written.replace("test_some", "test_parallel"))
    (tmp_path / "6.1-2.xml").write_text(written.replace("test_some", "test_serial"))
    (tmp_path / "6.1-3.xml").write_text(
        '<testsuites><testcase classname="test_serial" name="test_fails"/></testsuites>'
    )
    (tmp_path / "6.12.xml").write_text(written)
    one, other = read_runs(tmp_path)
    assert (one.kernel, len(one.tests), len(one.of(FAILED))) == ("6.1", 14, 6)
    assert (other.kernel, len(other.tests)) == ("6.12", 7)


@pytest.mark.parametrize("told", LOST)
def test_a_lost_machine_is_not_a_failed_test(tmp_path: Path, written: str, told: str) -> None:
    outcome(tmp_path, "5.10", told, detail="Oops: 0002 [#1] SMP")
    assert read_runs(tmp_path) == [Run("5.10", "?", told, "Oops: 0002 [#1] SMP")]
    (tmp_path / "5.10.xml").write_text(written)
    (run,) = read_runs(tmp_path)
    assert (run.outcome, run.lost, len(run.tests)) == (told, True, 7)


def test_a_pass_needs_results(tmp_path: Path) -> None:
    outcome(tmp_path, "7.3", "passed")
    (run,) = read_runs(tmp_path)
    assert (run.outcome, run.detail) == ("infrastructure", "no results")


def test_a_failed_test_outweighs_what_the_session_says(tmp_path: Path, written: str) -> None:
    outcome(tmp_path, "7.3", "passed")
    (tmp_path / "7.3.xml").write_text(written)
    assert read_runs(tmp_path)[0].outcome == FAILED


def test_a_session_that_failed_without_a_failed_test_has_failed(tmp_path: Path) -> None:
    outcome(tmp_path, "7.3", "failed", detail="exit status 4")
    (tmp_path / "7.3.xml").write_text('<testsuites><testcase classname="a" name="test_b"/></testsuites>')
    assert (read_runs(tmp_path)[0].outcome, read_runs(tmp_path)[0].detail) == (FAILED, "exit status 4")


def test_a_file_that_is_cut_off_is_no_pass(tmp_path: Path, written: str) -> None:
    (tmp_path / "6.1.xml").write_text(written[: len(written) // 2])
    (run,) = read_runs(tmp_path)
    assert run.outcome == "infrastructure"
    assert run.detail.startswith("6.1.xml is no whole JUnit file: ")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"outcome": "fine"}', '{"outcome": null}'])
def test_an_outcome_that_says_nothing_is_no_pass(tmp_path: Path, text: str) -> None:
    (tmp_path / "6.1.xml").write_text('<testsuites><testcase classname="a" name="test_b"/></testsuites>')
    (tmp_path / "6.1.json").write_text(text)
    assert read_runs(tmp_path)[0].outcome == "infrastructure"


def test_expected_kernels_are_missed(tmp_path: Path, written: str) -> None:
    (tmp_path / "6.1.xml").write_text(written)
    found = {run.kernel: run.outcome for run in read_runs(tmp_path, ["5.10", "6.1"])}
    assert found == {"5.10": "infrastructure", "6.1": "failed"}
    assert read_runs(tmp_path / "nowhere") == []


def test_kernels_stand_in_order_of_version() -> None:
    assert sorted(["7.3", "6.12", "host", "5.10", "6.1"], key=by_version) == ["host", "5.10", "6.1", "6.12", "7.3"]
