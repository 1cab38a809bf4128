"""What `ci/test` runs: one nox session per kind of check.

Sessions use the environment they are started from (`.venv`, made by ci/bootstrap) instead of one of their own: bcc is a
distribution package that only such an environment sees, and a fresh one per session would cost minutes for nothing.
Sessions that need root go through sudo where we are not root.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.options.default_venv_backend = "none"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "types", "unit", "kernel", "perf_smoke", "demo"]

ROOT = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
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
def kernel(session: nox.Session) -> None:
    """Test on the running kernel, as root: real namespaces, interfaces, cgroups and packets."""
    pytest = ("-m", "pytest", "-p", "no:cacheprovider", "tests/kernel")
    if session.posargs:
        python(session, *pytest, *session.posargs, root=True)
        return
    python(session, *pytest, "-n", "2", "-m", "not serial and not nightly", root=True)
    python(session, *pytest, "-m", "serial and not nightly", root=True, ok=(0, NO_TESTS))


@nox.session
def perf(session: nox.Session) -> None:
    """Measure with full sizes and write report.html and report.json."""
    measure(session, "full")


@nox.session
def perf_smoke(session: nox.Session) -> None:
    """Run every benchmark with small sizes: they work, and what they measure is really done. Two minutes at most."""
    measure(session, "smoke")


def measure(session: nox.Session, size: str) -> None:
    """Run tests/perf; NETFENCE_PERF tells the benchmarks which sizes to use."""
    python(
        session,
        *("-m", "pytest", "-p", "no:cacheprovider", "-s", "--timeout=1800", "tests/perf", *session.posargs),
        root=True,
        NETFENCE_PERF=size,
    )


@nox.session
def demo(session: nox.Session) -> None:
    """Run the main job for real."""
    python(session, "ci/demo.py", *session.posargs, root=True)
