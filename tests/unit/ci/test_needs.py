"""harness/needs.py: a skip before the named kernel, a failure from there on. Version and evidence are made up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from harness import needs
from netfence.dataplane import probe

KERNEL_TESTS = Path(__file__).resolve().parents[2] / "kernel"
HAS_NONE = {"MODULES": "n", "DUMMY": "n"}
Kernel = Callable[..., None]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Be on a kernel of that version, with that configuration and these modules."""

    def be(
        running: tuple[int, int] = (6, 18), configuration: dict[str, str] | None = None, modules: tuple[str, ...] = ()
    ) -> None:
        monkeypatch.setattr(probe, "kernel_version", lambda: running)
        monkeypatch.setattr(needs, "_configuration", lambda: configuration or {})
        monkeypatch.setattr(needs, "_modules", lambda: frozenset(modules))

    return be


def without(kind: str) -> tuple[str, str]:
    """Run it; a skip that got through here would make the test skipped, not failed."""
    try:
        needs.without_link_kind(kind)
    except pytest.skip.Exception as skipped:
        return "skipped", str(skipped)
    except pytest.fail.Exception as failed:
        return "failed", str(failed)


@pytest.mark.parametrize(
    ("running", "skipped"), [((5, 10), True), ((6, 5), True), ((6, 6), False), ((6, 18), False), ((7, 3), False)]
)
def test_a_feature_waits_for_its_kernel_and_no_longer(
    kernel: Kernel, running: tuple[int, int], *, skipped: bool
) -> None:
    kernel(running)
    mark = needs.needs("tcx").mark
    assert mark.args == (skipped,)
    assert mark.kwargs == {"reason": "tcx: waits for kernel 6.6"}
    assert needs.earned("tcx: waits for kernel 6.6") == skipped


def test_a_feature_without_a_first_kernel_is_no_reason() -> None:
    with pytest.raises(KeyError):
        needs.needs("luck")


@pytest.mark.parametrize(
    "reason", ["", "no tcx here", "tcx: waits for kernel 6.7", "luck: waits for kernel 9.9", "waits for kernel 6.6"]
)
def test_reasons_that_are_not_earned(kernel: Kernel, reason: str) -> None:
    kernel((5, 10))
    assert not needs.earned(reason)


@pytest.mark.parametrize(
    ("configuration", "modules", "reason"),
    [
        (HAS_NONE, (), "this kernel was built without CONFIG_DUMMY and has no modules"),
        ({"MODULES": "y"}, ("bonding",), "this kernel was built without CONFIG_DUMMY"),
        ({}, ("bonding",), "this kernel was built without CONFIG_DUMMY"),
    ],
    ids=["set-to-no", "not-mentioned", "no-such-module"],
)
def test_a_link_kind_that_the_kernel_lacks(
    kernel: Kernel, configuration: dict[str, str], modules: tuple[str, ...], reason: str
) -> None:
    kernel(configuration=configuration, modules=modules)
    assert without("dummy") == ("skipped", reason)
    assert needs.earned(reason)


@pytest.mark.parametrize(
    ("configuration", "modules", "said"),
    [
        ({"DUMMY": "y"}, (), "has CONFIG_DUMMY=y"),
        ({"DUMMY": "m"}, (), "has CONFIG_DUMMY=m"),
        ({}, ("dummy",), "has the module dummy"),
        ({}, (), "nothing tells why"),
    ],
    ids=["built-in", "module-not-found", "module", "no-evidence"],
)
def test_a_link_kind_that_the_kernel_has_or_may_have_fails(
    kernel: Kernel, configuration: dict[str, str], modules: tuple[str, ...], said: str
) -> None:
    kernel(configuration=configuration, modules=modules)
    outcome, reason = without("dummy")
    assert outcome == "failed"
    assert said in reason


def test_configurations_and_lists_of_modules_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '# CONFIG_DUMMY is not set\nCONFIG_VETH=y\nCONFIG_BONDING=m\nCONFIG_VERSION="# CONFIG_X is not set"\n'
    parsed = needs._parsed(text)
    assert (parsed["DUMMY"], parsed["VETH"], parsed["BONDING"]) == ("n", "y", "m")
    assert "X" not in parsed
    directory = tmp_path / "lib/modules" / needs._release()
    directory.mkdir(parents=True)
    (directory / "modules.dep").write_text(
        "kernel/drivers/net/dummy.ko.xz:\nkernel/net/8021q/8021q.ko: kernel/a/garp.ko\n"
    )
    (directory / "modules.builtin").write_text("kernel/drivers/net/veth.ko\n")
    monkeypatch.setattr(needs, "Path", lambda path: tmp_path / path.lstrip("/"))
    needs._modules.cache_clear()
    try:
        assert needs._modules() == {"dummy", "8021q", "garp", "veth"}
    finally:
        needs._modules.cache_clear()


@pytest.mark.parametrize(("line", "guest"), [("quiet virtme_hostname=virtme-ng", True), ("quiet root=/dev/vda", False)])
def test_what_boots_machines_does_not_run_in_guests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, *, guest: bool
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cmdline").write_text(line)
    monkeypatch.setattr(needs, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert needs.earned(needs.IN_GUEST) == guest
    with pytest.raises(pytest.skip.Exception) if guest else nullcontext():
        needs.not_in_guest()


SKIPPING = """
import pytest
def test_unearned(): pytest.skip("not today")
def test_of_a_kernel_long_gone(): pytest.skip("ringbuf: waits for kernel 5.8")
"""


def test_a_run_fails_for_a_skip_that_is_not_earned(tmp_path: Path) -> None:
    """With the hook of tests/kernel/conftest.py itself, in a run of its own."""
    (tmp_path / "test_skips.py").write_text(SKIPPING)
    (tmp_path / "conftest.py").write_text(
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('kernel_conftest', {str(KERNEL_TESTS / 'conftest.py')!r})\n"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "pytest_runtest_makereport = module.pytest_runtest_makereport\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={KERNEL_TESTS}", "."],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "2 failed" in done.stdout
    assert "a skip that is not earned (harness/needs.py): not today" in done.stdout
