"""What `ci/test` runs: one nox session per kind of check.

Sessions use the environment they are started from (`.venv`, made by ci/bootstrap) instead of one of their own: bcc is a
distribution package that only such an environment sees, and a fresh one per session would cost minutes for nothing.
Sessions that need root go through sudo where we are not root.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.options.default_venv_backend = "none"
nox.options.error_on_missing_interpreters = True
# `matrix` is last: what failed on which kernel is among the closing lines.
nox.options.sessions = ["lint", "types", "unit", "docs", "kernel", "vms", "perf_smoke", "demo", "matrix"]

ROOT = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
JUNIT = ROOT / "build" / "junit"
CHOSEN = ROOT / "build" / "junit-chosen"  # of a selection: the matrix would miss the rest
KERNELS = [kernel["series"] for kernel in tomllib.loads((ROOT / "ci/kernels.toml").read_text())["kernel"]]
GUESTS = [series for series in KERNELS if series != "host"]
BPF_FILES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "bpf").glob("*.[ch]"))]
NO_TESTS = 5  # pytest's exit status when a marker selects nothing


def python(session: nox.Session, *args: str, root: bool = False, ok: tuple[int, ...] = (0,), **env: str) -> None:
    """Run our Python with `args` in the repo, with `env` added; as root if asked for."""
    command = [sys.executable, *args]
    if root and os.geteuid() != 0:
        # Root must leave nothing in the user's tree that the user cannot delete: no bytecode.
        assignments = [f"{key}={value}" for key, value in {"PYTHONDONTWRITEBYTECODE": "1", **env}.items()]
        session.run("sudo", "env", *assignments, *command, external=True, success_codes=list(ok))
        return
    session.run(*command, external=True, env=env, success_codes=list(ok))


def run_all(session: nox.Session, *commands: tuple[str, ...], **env: str) -> None:
    """Run programs of our environment, all of them even if some fail: one run tells everything."""
    failed = []
    for name, *args in commands:
        try:
            session.run(str(BIN / name), *args, external=True, env=env)
        except CommandFailed:
            failed.append(" ".join([name, *args[:2]]))
    if failed:
        session.error(f"failed: {', '.join(failed)}")


@nox.session
def lint(session: nox.Session) -> None:
    """Style of Python and C, the direction of imports, and that the generated code is what the proto files give."""
    run_all(
        session,
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("clang-format", "--dry-run", "-Werror", *BPF_FILES),
        ("lint-imports", "--no-logo"),
        ("python", "ci/gen_proto.py", "--check"),
    )


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    # tests/perf on its own, because two conftest.py cannot both be the module `conftest`.
    run_all(session, ("mypy",), ("mypy", "tests/perf"), MYPYPATH="tests/perf")


@nox.session
def unit(session: nox.Session) -> None:
    """Test the pure parts: without root, without bcc, on any kernel."""
    python(session, "-m", "pytest", "-n", "2", "tests/unit", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into build/site; a warning is an error."""
    run_all(session, ("mkdocs", "build", "--strict"), NO_MKDOCS_2_WARNING="1")


@nox.session
def kernel(session: nox.Session) -> None:
    """Test on the running kernel, as root: real namespaces, interfaces, cgroups and packets."""
    pytest = ("-m", "pytest", "-p", "no:cacheprovider", "tests/kernel")
    if session.posargs:
        results = CHOSEN / "host.xml"
        CHOSEN.mkdir(parents=True, exist_ok=True)
        results.unlink(missing_ok=True)
        try:
            python(session, *pytest, f"--junitxml={results}", *session.posargs, root=True)
        finally:  # what was measured is told, whatever failed
            if results.exists():
                python(session, "ci/measured.py", str(results))
        return
    JUNIT.mkdir(parents=True, exist_ok=True)
    for old in JUNIT.glob("host*"):
        old.unlink()
    passes = (("-n", "2", "-m", "not serial and not nightly"), ("-m", "serial and not nightly"))
    failed = []
    for number, arguments in enumerate(passes, start=1):
        try:
            python(session, *pytest, *arguments, f"--junitxml={JUNIT}/host-{number}.xml", root=True, ok=(0, NO_TESTS))
        except CommandFailed:
            failed.append(" ".join(arguments))
    told = {"kernel": "host", "release": os.uname().release, "outcome": "failed" if failed else "passed", "detail": ""}
    (JUNIT / "host.json").write_text(json.dumps(told), encoding="utf-8")
    if failed:
        session.error(f"failed: {', '.join(failed)}")


@nox.session
@nox.parametrize("series", [nox.param(series, id=series) for series in GUESTS])
def vm(session: nox.Session, series: str) -> None:
    """Run all of tests/kernel on another kernel, in a virtual machine: minutes with KVM, an hour and a half without."""
    python(session, "ci/vm_tests.py", series, "--", *session.posargs)


@nox.session
def vms(session: nox.Session) -> None:
    """Run what a kernel can change of tests/kernel on all other kernels, two machines at a time."""
    python(session, "ci/vm_tests.py", "--quick", "--", *session.posargs)


@nox.session
def matrix(session: nox.Session) -> None:
    """Put the kernels' results together, on the terminal and in build/matrix.html; compare them with the README."""
    results = ("build/junit", "--html", "build/matrix.html", "--kernels", ",".join(KERNELS))
    python(session, "ci/matrix.py", *results, "--readme", "README.md", "--check", *session.posargs)


@nox.session
def perf(session: nox.Session) -> None:
    """Measure with full sizes, write report.html and report.json; `-- --compare BASE` fails on a regression."""
    measure(session, "full", "report")


@nox.session
def perf_smoke(session: nox.Session) -> None:
    """Run every benchmark with small sizes: they work, and what they measure is really done. Two minutes at most."""
    (ROOT / "build").mkdir(exist_ok=True)
    measure(session, "smoke", "build/report-smoke")


def measure(session: nox.Session, size: str, out: str) -> None:
    """Run tests/perf and report to `out`.json and .html; NETFENCE_PERF tells the benchmarks which sizes to use.

    Leaves with status 2 where BASE is unusable, before anything is measured; 1 for a regression or a failed benchmark.
    """
    parser = argparse.ArgumentParser(prog="nox -s perf --", allow_abbrev=False)
    parser.add_argument("--compare", metavar="BASE", help="an older report.json")
    parser.add_argument("--with", dest="report", help="compare this report.json with BASE, measure nothing")
    options, selection = parser.parse_known_args(session.posargs)
    compare = ("--compare", options.compare) if options.compare else ()
    if options.report:
        if not compare:
            parser.error("--with needs --compare")
        _perf_report(session, "compare", options.compare, options.report)
        return
    if compare:
        _perf_report(session, "check", options.compare, "--size", size)
    lines = ROOT / "report.jsonl"
    lines.unlink(missing_ok=True)
    pytest = ("-m", "pytest", "-p", "no:cacheprovider", "-s", "--timeout=1800", "tests/perf", *selection)
    try:
        python(session, *pytest, root=True, NETFENCE_PERF=size)
    finally:  # what was measured is told, whatever failed
        if lines.exists():
            _perf_report(session, "write", "--out", out, *compare, "--selection", *selection)


def _perf_report(session: nox.Session, *args: str) -> None:
    """Run perf_report.py; its exit status is nox's where reports are compared, as nox makes 1 of all."""
    command = [sys.executable, "tests/perf/perf_report.py", *args]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode  # noqa: S603 - ours
    if status and ("--compare" in args or args[0] != "write"):
        raise SystemExit(status)
    if status:
        session.error("no report")


@nox.session
def demo(session: nox.Session) -> None:
    """Run the main job for real."""
    python(session, "ci/demo.py", *session.posargs, root=True)
