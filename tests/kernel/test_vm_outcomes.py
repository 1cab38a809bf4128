"""ci/vm.py with real guests: one that passes, one that crashes, one that hangs, one that is no kernel. Minutes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import vm
from kernelcache import ensure
from kernellist import load
from vm import Machine, Outcome

pytestmark = [pytest.mark.nightly, pytest.mark.userspace, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def machine() -> Machine:
    oldest, *_ = load()
    return Machine(ensure(oldest))


def test_a_guest_runs_the_kernel_it_was_given(machine: Machine, tmp_path: Path) -> None:
    told: list[str] = []
    command = [
        "sh",
        "-c",
        "uname -r; id -u; touch /usr/not-yours 2>&1; echo kept > $SHARE/kept; ls /dev/net/tun; exit 7",
    ]
    ended = vm.run(machine, command, tmp_path, tell=told.append)
    assert (ended.outcome, ended.status) == (Outcome.FAILED, 7)
    assert told[:2] == [machine.kernel.release, "0"]
    assert told[-1] == "/dev/net/tun"
    assert (tmp_path / "kept").read_text() == "kept\n"
    assert not Path("/usr/not-yours").exists()


def test_a_crash_is_told_with_its_oops(machine: Machine, tmp_path: Path) -> None:
    ended = vm.run(machine, ["sh", "-c", "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger"], tmp_path)
    assert (ended.outcome, ended.status) == (Outcome.CRASHED, None)
    assert "sysrq" in ended.detail
    assert ended.seconds < machine.boot_s


def test_a_hang_is_told_apart_from_a_crash(machine: Machine, tmp_path: Path) -> None:
    ended = vm.run(replace(machine, idle_s=10), ["sh", "-c", "echo begun; sleep 1000"], tmp_path)
    assert (ended.outcome, ended.status) == (Outcome.HUNG, None)
    assert (tmp_path / "output").read_text() == "begun\n"


def test_what_is_no_kernel_does_not_boot(machine: Machine, tmp_path: Path) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(machine.kernel.vmlinuz.read_bytes()[:4096])
    ended = vm.run(
        replace(machine, kernel=replace(machine.kernel, vmlinuz=image), boot_s=20), ["true"], tmp_path / "share"
    )
    assert ended.outcome is Outcome.NOBOOT
