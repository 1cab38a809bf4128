"""What ci/vm.py makes of a guest's end. The guests are shell scripts in place of virtual machines: run.sh is real.

Real guests that crash, hang and do not boot are in tests/kernel/test_vm_outcomes.py.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import vm
from harness.deadline import wait_for
from kernelcache import Installed
from vm import Ended, Machine, Outcome, oops_of

PANIC = """[    1.1] tun: Universal TUN/TAP device driver, 1.6
[    2.0] BUG: sleeping function called from invalid context
[    9.3] BUG: kernel NULL pointer dereference, address: 0000000000000000
[    9.4] RIP: 0010:sysrq_handle_crash+0x16/0x20
[    9.5] Kernel panic - not syncing: Fatal exception
"""

KERNEL = Installed(Path("/nowhere/vmlinuz"), Path("/nowhere/lib/modules"), "6.1.0-test")


class Scene:
    """A share directory, and a guest that is the shell commands given to `play`."""

    def __init__(self, share: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.share = share
        self.told: list[str] = []
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(vm, "kvm_works", lambda: False)

    def play(self, guest: str, *command: str, **limits: float) -> Ended:
        """Run `command` in a machine whose boot is `guest`, where $RUN starts what the guest is to run."""
        run = f"sh {shlex.quote(str(self.share / 'run.sh'))}"
        self._monkeypatch.setattr(vm, "_boot", lambda *_, **__: ["sh", "-c", guest.replace("$RUN", run)])
        return vm.run(Machine(KERNEL, **limits), command, self.share, env={"GREETING": "it's"}, tell=self.told.append)  # type: ignore[arg-type]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    # What run.sh does to the guest's own mounts and modules would be done to this machine.
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("mountpoint", "modprobe", "sync"):
        (tools / name).write_text("#!/bin/sh\n")
        (tools / name).chmod(0o755)
    monkeypatch.setattr(vm, "BIN", tools)
    return Scene(tmp_path / "share", monkeypatch)


def test_output_streams_and_the_status_comes_back(scene: Scene) -> None:
    ended = scene.play(
        "$RUN", "sh", "-c", 'echo "$GREETING $NETFENCE_EMULATED"; printf "no newline"; echo kept > $SHARE/kept'
    )
    assert (ended.outcome, ended.status) == (Outcome.PASSED, 0)
    assert scene.told == ["it's 1", "no newline"]
    assert (scene.share / "kept").read_text() == "kept\n"


def test_a_failed_command_is_no_lost_guest(scene: Scene) -> None:
    ended = scene.play("$RUN; echo 'Kernel panic - not syncing: while powering off'", "sh", "-c", "exit 7")
    assert (ended.outcome, ended.status, ended.detail) == (Outcome.FAILED, 7, "exit status 7")


def test_a_crash_shows_its_oops(scene: Scene) -> None:
    ended = scene.play(f"touch {scene.share}/up; printf '%s' {shlex.quote(PANIC)}", "true")
    assert (ended.outcome, ended.status) == (Outcome.CRASHED, None)
    assert ended.detail.splitlines() == PANIC.splitlines()[2:]


def test_a_guest_that_goes_without_a_word_crashed(scene: Scene) -> None:
    ended = scene.play(f"touch {scene.share}/up; echo last words", "true")
    assert ended.outcome is Outcome.CRASHED
    assert "went away without a word" in ended.detail
    assert "last words" in ended.detail


def test_a_guest_that_never_comes_up_did_not_boot(scene: Scene) -> None:
    ended = scene.play("echo 'no such kernel' >&2; exit 1", "true")
    assert ended.outcome is Outcome.NOBOOT
    assert "no such kernel" in ended.detail
    ended = scene.play("sleep 60", "true", boot_s=0.3)
    assert ended.outcome is Outcome.NOBOOT
    assert "not up after 0 s" in ended.detail
    assert ended.seconds < 10


def test_silence_and_no_end_are_hanging(scene: Scene) -> None:
    silent = scene.play("$RUN", "sh", "-c", "echo begun; sleep 60", idle_s=0.5)
    assert (silent.outcome, silent.status) == (Outcome.HUNG, None)
    assert "no output for" in silent.detail
    endless = scene.play("$RUN", "sh", "-c", "while :; do echo on; sleep 0.1; done", total_s=0.8)
    assert endless.outcome is Outcome.HUNG
    assert "no end after" in endless.detail


def test_nothing_of_an_earlier_run_is_taken_for_this_ones(scene: Scene) -> None:
    assert scene.play("$RUN", "true").outcome is Outcome.PASSED
    assert scene.play("exit 1", "true").outcome is Outcome.NOBOOT


def test_a_hung_guest_is_gone_with_all_its_processes(scene: Scene) -> None:
    scene.play("$RUN", "sh", "-c", "sleep 61.5 & echo $! > $SHARE/pid; wait", idle_s=0.5)
    pid = (scene.share / "pid").read_text().strip()
    wait_for(lambda: not _is_sleep(pid), "the end of what the guest had started")


def _is_sleep(pid: str) -> bool:
    try:
        return b"61.5" in Path("/proc", pid, "cmdline").read_bytes()
    except FileNotFoundError:
        return False


def test_emulation_takes_over_where_kvm_runs_no_kernel(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "kvm_works", lambda: True)
    run = f"sh {scene.share}/run.sh"
    monkeypatch.setattr(vm, "_boot", lambda *_, kvm: ["sh", "-c", "echo MSR; exit 1" if kvm else run])
    ended = vm.run(Machine(KERNEL), ["sh", "-c", "echo ${NETFENCE_EMULATED-}"], scene.share, tell=scene.told.append)
    assert ended.outcome is Outcome.PASSED
    assert scene.told == ["KVM runs no kernel here (MSR): emulating", "1"]


def test_what_kvm_runs_is_not_emulated(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "kvm_works", lambda: True)
    monkeypatch.delenv("NETFENCE_EMULATED", raising=False)
    scene.play("$RUN", "sh", "-c", "echo [${NETFENCE_EMULATED-}]")
    assert scene.told == ["[]"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("Oops: 0000 [#1] PREEMPT SMP NOPTI", True),
        ("kernel BUG at net/core/skbuff.c:112!", True),
        ("general protection fault, probably for non-canonical address", True),
        ("BUG: workqueue lockup - pool cpus=0", False),
        ("all is well", False),
    ],
)
def test_what_is_an_oops(line: str, *, found: bool) -> None:
    assert oops_of(f"before\n{line}\nafter") == (f"{line}\nafter" if found else "")


def test_an_oops_is_cut_to_what_one_reads() -> None:
    assert len(oops_of("Oops: 1\n" + "trace\n" * 500).splitlines()) == vm.OOPS_LINES
