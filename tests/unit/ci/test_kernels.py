"""ci/kernels.toml: what the list promises of each kernel agrees with the product's own table of features."""

from __future__ import annotations

import io
import re
import sys
import threading
from pathlib import Path

import pytest
import rich.console

import kernels
from infrastructure import InfrastructureError
from kernelcache import Report
from netfence.dataplane.probe import FIRST_KERNEL

LISTED = kernels.load()
DEBIAN = [kernel for kernel in LISTED if not kernel.is_host]
OLDEST = DEBIAN[0]

ENTRY = 'series = "6.1"\nsuite = "bookworm"\npackage = "linux-image"\nwhy = "because"\n'


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def test_the_kernels_of_the_design_oldest_first_then_the_host() -> None:
    assert [kernel.series for kernel in LISTED] == ["5.10", "6.1", "6.12", "7.3", "host"]


@pytest.mark.parametrize("feature", FIRST_KERNEL)
@pytest.mark.parametrize("kernel", DEBIAN, ids=lambda kernel: kernel.series)
def test_a_kernel_supports_what_came_before_it_and_lacks_the_rest(kernel: kernels.Kernel, feature: str) -> None:
    there = _numbers(FIRST_KERNEL[feature]) <= _numbers(kernel.series)
    assert (feature in kernel.supports, feature in kernel.lacks) == (there, not there)


@pytest.mark.parametrize("kernel", LISTED, ids=lambda kernel: kernel.series)
def test_nothing_is_promised_that_nobody_can_check(kernel: kernels.Kernel) -> None:
    assert kernel.supports | kernel.lacks <= set(FIRST_KERNEL)
    assert kernel.why


def test_of_the_host_no_more_is_asked_than_of_the_oldest() -> None:
    host = next(kernel for kernel in LISTED if kernel.is_host)
    assert (host.supports, host.lacks) == (OLDEST.supports, frozenset())


# Names as Debian has them; of each series one that is taken and the flavours beside it, which are not.
@pytest.mark.parametrize(
    ("series", "release"),
    [
        ("5.10", "5.10.0-46"), ("6.1", "6.1.0-50"), ("6.12", "6.12.117+deb12"), ("6.12", "6.12.90+deb12.1"),
        ("7.3", "7.3.4+deb13"), ("7.3", "7.3.11+deb13"),
    ],
)  # fmt: skip
def test_the_generic_flavour_is_taken_and_no_other(series: str, release: str) -> None:
    pattern = next(kernel.package for kernel in DEBIAN if kernel.series == series)
    assert re.fullmatch(pattern, f"linux-image-{release}-amd64")
    for other in ("cloud-amd64", "rt-amd64", "amd64-dbg", "amd64-unsigned", "arm64"):
        assert not re.fullmatch(pattern, f"linux-image-{release}-{other}")


def test_no_series_takes_the_packages_of_another() -> None:
    for name in ("linux-image-6.1.0-50-amd64", "linux-image-6.12.117+deb12-amd64", "linux-image-6.18.9+deb13-amd64"):
        assert len([kernel for kernel in DEBIAN if re.fullmatch(kernel.package, name)]) == (".18." not in name)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (f'[[kernel]]\n{ENTRY}supports = ["tcx"]\nlacks = ["tcx"]\n', "6.1: both supports and lacks tcx"),
        (f"[[kernel]]\n{ENTRY}supports = []\nlacks = []\n" * 2, "a series is there twice"),
        ('[[kernel]]\nseries = "6.1"\nwhy = ""\nsupports = []\nlacks = []\n', "6.1: all kernels but host need suite"),
        (f"[[kernel]]\n{ENTRY.replace('6.1', 'host')}supports = []\nlacks = []\n", "host: all kernels but host"),
    ],
    ids=["contradiction", "twice", "no-suite", "host-with-suite"],
)
def test_a_list_that_makes_no_sense_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "kernels.toml").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        kernels.load(tmp_path / "kernels.toml")


def test_the_host_has_nothing_to_fetch() -> None:
    with pytest.raises(ValueError, match="the host's kernel is running"):
        kernels.ensure(next(kernel for kernel in LISTED if kernel.is_host))


def test_kernels_are_fetched_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(len(DEBIAN))
    asked: dict[str, bool] = {}

    def ensure(kernel: kernels.Kernel, _report: Report, *, update: bool) -> None:
        asked[kernel.series] = update
        together.wait(10)

    monkeypatch.setattr(kernels, "ensure", ensure)
    assert kernels.fetch_all(DEBIAN, update=True) == []
    assert asked == dict.fromkeys((kernel.series for kernel in DEBIAN), True)


@pytest.mark.parametrize("terminal", [True, False])
def test_how_far_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, terminal: bool
) -> None:
    """On a terminal a bar for each kernel, elsewhere a line for each thing that begins."""
    screen = rich.console.Console(force_terminal=terminal, file=io.StringIO(), width=100)

    def ensure(kernel: kernels.Kernel, report: Report, *, update: bool) -> None:
        if kernel.series == "7.3":
            raise InfrastructureError("no mirror")
        for fraction in (0.25, 0.5):
            report("linux-image, 70 MB", fraction)

    monkeypatch.setattr(kernels, "ensure", ensure)
    monkeypatch.setattr(rich.console, "Console", lambda **_: screen)
    assert [str(error) for error in kernels.fetch_all(DEBIAN)] == ["infrastructure: no mirror"]
    drawn, lines = screen.file.getvalue(), capsys.readouterr().err.splitlines()  # type: ignore[attr-defined]
    if terminal:
        last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn).split("\r")[-1]
        for series in ("5.10", "6.1", "6.12"):
            assert re.search(rf"Linux {series} +━+[╸╺]━+ linux-image, 70 MB", last), last
        assert re.search(r"Linux 7\.3 .*not to be had", last)
        assert lines == []
    else:
        assert drawn.strip() == ""
        assert sorted(lines) == sorted(
            f"kernels: Linux {kernel.series}: {'not to be had' if kernel.series == '7.3' else 'linux-image, 70 MB'}"
            for kernel in DEBIAN
        )


def test_the_list_shows_every_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NETFENCE_KERNELS", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["kernels.py", "list"])
    assert kernels.main() == 0
    rows = [line.strip("│ ").split() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows if row[0] in {kernel.series for kernel in LISTED}] == [
        kernel.series for kernel in LISTED
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: command"),
        (["boot"], "invalid choice: 'boot'"),
        (["fetch", "2.4"], "no such kernel: 2.4; there are 5.10, 6.1, 6.12, 7.3"),
        (["fetch", "6.1", "host"], "no such kernel: host"),
        (["path", "2.4"], "invalid choice: '2.4'"),
        (["path"], "the following arguments are required: series"),
    ],
    ids=["nothing", "no-such-command", "no-such-kernel", "the-host", "no-path", "path-of-what"],
)
def test_called_wrongly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(kernels, "fetch_all", lambda *_, **__: pytest.fail("fetched"))
    monkeypatch.setattr(sys, "argv", ["kernels.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        kernels.main()
    assert said in capsys.readouterr().err
