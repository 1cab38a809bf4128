"""What the sessions run: noxfile.py with a recorder in the place of whatever starts programs."""

from __future__ import annotations

import importlib.util
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nox.registry
import pytest
from nox.command import CommandFailed

ROOT = Path(__file__).resolve().parents[3]
PASSES = [("-n", "2", "-m", "not serial and not nightly"), ("-m", "serial and not nightly")]


@pytest.fixture
def noxfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load noxfile.py; what its sessions write goes to `tmp_path`."""
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(nox.registry, "_REGISTRY", OrderedDict())  # a session registered twice is warned of
    spec.loader.exec_module(loaded)
    for name in ("JUNIT", "CHOSEN"):
        monkeypatch.setattr(loaded, name, tmp_path / getattr(loaded, name).relative_to(loaded.ROOT))
    monkeypatch.setattr(loaded, "ROOT", tmp_path)
    return loaded


class Recorder:
    """A nox session, and `subprocess`, that start nothing; a command that holds all of `fails` fails."""

    def __init__(self, *posargs: str, fails: Sequence[str] = ()) -> None:
        self.posargs = [*posargs]
        self.commands: list[list[str]] = []
        self.env: list[Mapping[str, str]] = []
        self.may_select_nothing: list[bool] = []
        self._fails = fails

    def run(
        self, *argv: str, success_codes: Sequence[int], external: bool, env: Mapping[str, str] | None = None
    ) -> None:
        assert external
        self.commands.append([*argv])
        # Where sudo is needed, it is `env` that sets them.
        self.env.append(env or dict(word.split("=", 1) for word in argv if re.match(r"\w+=", word)))
        self.may_select_nothing.append(5 in success_codes)
        if self._fails and set(self._fails) <= set(argv):
            raise CommandFailed

    def error(self, *words: str) -> None:
        raise RuntimeError(*words)


def after(command: Sequence[str], word: str) -> list[str]:
    """Return what stands behind a word of a command."""
    return [*command][[*command].index(word) + 1 :]


@pytest.mark.usefixtures("noxfile")
def test_ci_test_without_arguments_runs_every_kind_of_check() -> None:
    assert nox.options.sessions == ["lint", "types", "unit", "docs", "kernel", "vms", "perf_smoke", "demo", "matrix"]


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_kernel_runs_what_may_run_side_by_side_and_then_the_rest(noxfile: ModuleType, failing: int | None) -> None:
    """Both whatever becomes of the first: one run tells everything."""
    session = Recorder(fails=() if failing is None else PASSES[failing])
    if failing is None:
        noxfile.kernel(session)
    else:
        with pytest.raises(RuntimeError, match=f"failed: {' '.join(PASSES[failing])}$"):
            noxfile.kernel(session)
    ran = [after(command, "tests/kernel") for command in session.commands]
    assert [tuple(one for one in arguments if not one.startswith("--junitxml=")) for arguments in ran] == PASSES
    assert session.may_select_nothing == [True, True]
    assert len({one for arguments in ran for one in arguments if one.startswith("--junitxml=")}) == 2
    told = (noxfile.JUNIT / "host.json").read_text()
    assert ('"passed"' in told) == (failing is None)


class Leaving(Recorder):
    """Leaves results as pytest does: in the file that it is told."""

    def run(
        self, *argv: str, success_codes: Sequence[int], external: bool, env: Mapping[str, str] | None = None
    ) -> None:
        for one in argv:
            if one.startswith("--junitxml="):
                results = Path(one.partition("=")[2])
                assert not results.exists(), "results of another run"
                results.touch()
        super().run(*argv, success_codes=success_codes, external=external, env=env)


@pytest.mark.parametrize("fails", [(), ("tests/kernel",)], ids=["passes", "fails"])
def test_kernel_with_a_selection_runs_that_alone_and_tells_what_it_measured(
    noxfile: ModuleType, fails: tuple[str, ...]
) -> None:
    session = Leaving("-k", "vlan", "-x", fails=fails)
    for _ in range(2):
        session.commands.clear()
        with pytest.raises(CommandFailed) if fails else nullcontext():
            noxfile.kernel(session)
        ran, told = session.commands
        results = f"{noxfile.CHOSEN}/host.xml"
        assert after(ran, "tests/kernel") == [f"--junitxml={results}", "-k", "vlan", "-x"]
        assert told[-2:] == ["ci/measured.py", results]
    assert not any(session.may_select_nothing)
    assert not noxfile.JUNIT.exists()  # the matrix would take it for all there is


def test_kernel_with_a_selection_that_leaves_nothing_tells_nothing(noxfile: ModuleType) -> None:
    session = Recorder("--collect-only")
    noxfile.kernel(session)
    assert len(session.commands) == 1


class Measured(Recorder):
    """Measures by leaving a line; keeps what perf_report.py is told."""

    def __init__(self, root: Path, *posargs: str, status: int = 0, fails: Sequence[str] = ()) -> None:
        super().__init__(*posargs, fails=fails)
        self.told: list[list[str]] = []
        self._root, self._status = root, status

    def run(
        self, *argv: str, success_codes: Sequence[int], external: bool, env: Mapping[str, str] | None = None
    ) -> None:
        assert not (self._root / "report.jsonl").exists(), "lines of another run"
        (self._root / "report.jsonl").touch()
        super().run(*argv, success_codes=success_codes, external=external, env=env)

    def perf_report(self, command: Sequence[str], **_: object) -> SimpleNamespace:
        self.told.append(after(command, "tests/perf/perf_report.py"))
        return SimpleNamespace(returncode=self._status if self.told[-1][0] == "write" else 0)


@pytest.mark.parametrize(
    ("name", "size", "out"), [("perf", "full", "report"), ("perf_smoke", "smoke", "build/report-smoke")]
)
def test_perf_measures_and_compares_with_the_base(
    noxfile: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, size: str, out: str
) -> None:
    (noxfile.ROOT / "report.jsonl").write_text("of another run")
    session = Measured(noxfile.ROOT, "--compare", "base.json", "-k", "verdict")
    monkeypatch.setattr(noxfile, "subprocess", SimpleNamespace(run=session.perf_report))
    getattr(noxfile, name)(session)
    assert [after(command, "tests/perf") for command in session.commands] == [["-k", "verdict"]]
    assert [env["NETFENCE_PERF"] for env in session.env] == [size]
    write = ["write", "--out", out, "--compare", "base.json", "--selection", "-k", "verdict"]
    assert session.told == [["check", "base.json", "--size", size], write]


def test_perf_without_a_base_compares_with_none(noxfile: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Measured(noxfile.ROOT)
    monkeypatch.setattr(noxfile, "subprocess", SimpleNamespace(run=session.perf_report))
    noxfile.perf(session)
    assert session.told == [["write", "--out", "report", "--selection"]]


def test_a_regression_is_the_exit_status_of_perf(noxfile: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Measured(noxfile.ROOT, "--compare", "base.json", status=1)
    monkeypatch.setattr(noxfile, "subprocess", SimpleNamespace(run=session.perf_report))
    with pytest.raises(SystemExit, match=r"^1$"):
        noxfile.perf(session)


def test_what_was_measured_is_told_though_a_benchmark_failed(
    noxfile: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Measured(noxfile.ROOT, fails=["tests/perf"])
    monkeypatch.setattr(noxfile, "subprocess", SimpleNamespace(run=session.perf_report))
    with pytest.raises(CommandFailed):
        noxfile.perf(session)
    assert session.told == [["write", "--out", "report", "--selection"]]
