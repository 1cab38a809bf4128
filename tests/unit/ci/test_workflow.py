"""The workflow runs what there is to run: its lists are those of noxfile.py and ci/kernels.toml."""

from __future__ import annotations

import re
import runpy
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import nox.registry
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
COMMIT = re.compile(r"uses: \S+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / ".github/workflows/ci.yml").read_text()


@pytest.fixture(scope="module")
def jobs(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text)["jobs"]
    return found


def sessions() -> set[str]:
    """Ask nox which sessions noxfile.py registers, those that only run when named too."""
    runpy.run_path(str(ROOT / "noxfile.py"))
    return set(nox.registry.get())


def run_by(job: dict[str, Any]) -> set[str]:
    """List the sessions that a job runs, the matrix filled in."""
    matrix = job.get("strategy", {}).get("matrix", {})
    named = set()
    for step in job["steps"]:
        if found := re.search(r'ci/test ("[^"]+"|\$\{\{[^}]+\}\}|\S+)', step.get("run", "")):
            session = found[1].strip('"')
            for key, values in matrix.items():
                if f"matrix.{key}" in session:
                    named |= {re.sub(r"\$\{\{[^}]+\}\}", value, session) for value in values}
            if "${{" not in session:
                named.add(session)
    return named


def without_parameters(names: set[str]) -> set[str]:
    return {re.sub(r"\(.*\)", "", each) for each in names}


def test_every_session_named_exists_and_every_session_is_named(jobs: dict[str, Any]) -> None:
    named = set().union(*map(run_by, jobs.values()))
    # One job for each kernel does what `vms` does on one machine.
    assert without_parameters(named) == without_parameters(sessions()) - {"vms"}
    assert len(run_by(jobs["session"])) >= 6


def kernels() -> list[str]:
    return [each["series"] for each in tomllib.loads((ROOT / "ci/kernels.toml").read_text())["kernel"]]


def test_every_kernel_has_a_job(jobs: dict[str, Any]) -> None:
    assert run_by(jobs["vm"]) == {f"vm({series})" for series in kernels() if series != "host"}


def test_one_failure_stops_no_other_and_nothing_runs_for_ever(jobs: dict[str, Any]) -> None:
    for name, job in jobs.items():
        assert job["timeout-minutes"] <= 180, name
        assert job.get("strategy", {"fail-fast": False})["fail-fast"] is False, name


def uploads(job: dict[str, Any]) -> dict[str, list[str]]:
    """List what a job keeps: the artifact's name, one for each value of the matrix → its paths."""
    kept: dict[str, list[str]] = {}
    for step in job["steps"]:
        if "/upload-artifact@" in step.get("uses", ""):
            given = step["with"]
            names = [given["name"]]
            for key, values in job.get("strategy", {}).get("matrix", {}).items():
                placeholder = f"${{{{ matrix.{key} }}}}"
                names = [name.replace(placeholder, value) for name in names for value in values]
            kept |= dict.fromkeys(names, given["path"].split())
    return kept


def test_the_matrix_gets_what_every_run_leaves(jobs: dict[str, Any]) -> None:
    (download,) = (step["with"] for step in jobs["matrix"]["steps"] if "/download-artifact@" in step.get("uses", ""))
    assert download["merge-multiple"] is True  # else each would lie in a directory of its own, unseen
    kept = uploads(jobs["session"]) | uploads(jobs["vm"])
    assert {"results-kernel", *(f"results-vm-{series}" for series in kernels() if series != "host")} <= set(kept)
    assert [name for name in kept if not fnmatch(name, download["pattern"])] == []
    assert {path for paths in kept.values() for path in paths} == {download["path"]} == {"build/"}
    assert set(jobs["matrix"]["needs"]) == {"session", "vm"}
    # What the others keep is no kernel's result.
    rest = set().union(*(uploads(job) for name, job in jobs.items() if name not in ("session", "vm")))
    assert [name for name in rest if fnmatch(name, download["pattern"])] == []


def test_what_was_found_is_kept_whatever_failed(jobs: dict[str, Any]) -> None:
    assert uploads(jobs["matrix"]) == {"matrix": ["build/matrix.html"]}
    assert uploads(jobs["nightly"]) == {"nightly": ["build/junit-chosen/"]}
    assert uploads(jobs["perf"]) == {"perf-report": ["report.html", "report.json"]}
    for name, job in jobs.items():
        for step in job["steps"]:
            if "/upload-artifact@" in step.get("uses", ""):
                assert step["if"] == "${{ !cancelled() }}", name


def test_every_night_what_takes_long(text: str, jobs: dict[str, Any]) -> None:
    assert yaml.safe_load(text)[True]["schedule"]  # YAML 1.1 reads "on" as true
    for name, command in (("nightly", "ci/test kernel -- -m nightly"), ("perf", "ci/test perf")):
        assert "github.event_name == 'schedule'" in jobs[name]["if"]
        assert command in [step.get("run") for step in jobs[name]["steps"]]


def test_actions_are_pinned_and_may_read_only(text: str, jobs: dict[str, Any]) -> None:
    uses = [line.strip().removeprefix("- ") for line in text.splitlines() if "uses:" in line]
    assert uses
    assert [line for line in uses if not COMMIT.fullmatch(line)] == []
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    assert not [name for name, job in jobs.items() if "permissions" in job]


def test_a_cached_kernel_is_of_the_list_as_it_is(jobs: dict[str, Any]) -> None:
    (cache,) = (step["with"] for step in jobs["vm"]["steps"] if "/cache@" in step.get("uses", ""))
    assert "hashFiles('ci/kernels.toml')" in cache["key"]
    assert "matrix.kernel" in cache["key"]
    assert any(f'NETFENCE_KERNELS="$PWD/{cache["path"]}"' in step.get("run", "") for step in jobs["vm"]["steps"])
