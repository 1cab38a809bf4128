"""The workflow runs what there is to run: its lists are those of noxfile.py and ci/kernels.toml."""

from __future__ import annotations

import re
import runpy
import tomllib
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
