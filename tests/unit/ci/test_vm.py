"""What ci/vm.py makes of a guest's end. The guests are shell scripts in place of virtual machines: run.sh is real.

Real guests that crash, hang and do not boot are in tests/kernel/test_vm_outcomes.py.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest

import vm
from harness.deadline import wait_for
from infrastructure import InfrastructureError
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
        self.tell = self.told.append
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(vm, "kvm_works", lambda: False)

    def play(self, guest: str, *command: str, images: Mapping[Path, Path] | None = None, **limits: float) -> Ended:
        """Run `command` in a machine whose boot is `guest`, where $RUN starts what the guest is to run."""
        run = f"sh {shlex.quote(str(self.share / 'run.sh'))}"
        self._monkeypatch.setattr(vm, "_boot", lambda *_, **__: ["sh", "-c", guest.replace("$RUN", run)])
        machine = Machine(KERNEL, **limits)  # type: ignore[arg-type]
        return vm.run(machine, command, self.share, env={"GREETING": "it's"}, images=images, tell=self.tell)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    # What run.sh does to the guest's own mounts and modules would be done to this machine.
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("mount", "mountpoint", "modprobe", "sync"):
        (tools / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {shlex.quote(str(tools))}/done\n')
        (tools / name).chmod(0o755)
    monkeypatch.setattr(vm, "BIN", tools)
    monkeypatch.setattr(vm, "NEW_ROOT", tools / "new_root")
    (tools / "new_root").write_text(f"echo new root >> {shlex.quote(str(tools))}/done\n")
    return Scene(tmp_path / "share", monkeypatch)


def test_output_streams_and_the_status_comes_back(scene: Scene) -> None:
    ended = scene.play(
        "$RUN", "sh", "-c", 'echo "$GREETING $NETFENCE_EMULATED"; printf "no newline"; echo kept > $SHARE/kept'
    )
    assert (ended.outcome, ended.status) == (Outcome.PASSED, 0)
    assert scene.told == ["it's 1", "no newline"]
    assert (scene.share / "kept").read_text() == "kept\n"


def test_a_line_is_told_when_it_comes(scene: Scene) -> None:
    def tell(line: str) -> None:
        (scene.share / "heard").touch()
        scene.told.append(line)

    scene.tell = tell
    answer = "echo one; until [ -e $SHARE/heard ]; do sleep 0.05; done; echo two"
    assert scene.play("$RUN", "sh", "-c", answer, idle_s=5.0).outcome is Outcome.PASSED
    assert scene.told == ["one", "two"]


def test_images_are_mounted_over_their_directories_before_the_command(scene: Scene, tmp_path: Path) -> None:
    done = shlex.quote(str(vm.BIN / "done"))
    images = {Path("/opt/it's here"): tmp_path / "0.ext4", Path("/srv"): tmp_path / "1.ext4"}
    assert scene.play("$RUN", "sh", "-c", f"echo command >> {done}", images=images).outcome is Outcome.PASSED
    assert (vm.BIN / "done").read_text().splitlines() == [
        "mountpoint -q /sys/fs/bpf",
        "modprobe -a loop ext4",
        f"mount --rbind {vm.ROOT} {vm.ROOT}",
        f"mount -o loop,ro,noatime {tmp_path}/0.ext4 /opt/it's here",
        f"mount -o loop,ro,noatime {tmp_path}/1.ext4 /srv",
        "new root",
        "modprobe tun",
        "command",
        "sync ",
    ]


def test_an_image_has_what_the_directory_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "file").write_bytes(b"x" * 5_000_000)
    (tree / "link").symlink_to("sub/file")
    for number in range(3_000):  # more inodes than a file system of this size has by default
        (tree / "sub" / str(number)).write_text(str(number))
    made = tmp_path / "made.ext4"
    made.write_text("an older one")
    assert vm.image(tree, made) == made
    back = tmp_path / "back"
    back.mkdir()
    subprocess.run(["debugfs", "-R", f"rdump / {back}", str(made)], check=True, capture_output=True)
    assert (back / "link").readlink() == Path("sub/file")
    assert {each.name: each.read_bytes() for each in (back / "sub").iterdir()} == {
        each.name: each.read_bytes() for each in (tree / "sub").iterdir()
    }


def test_no_image_is_made_of_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match=r"^infrastructure: make an image of .*/nowhere: .*No such file"):
        vm.image(tmp_path / "nowhere", tmp_path / "made.ext4")


def test_a_missing_mkfs_is_infrastructure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree").mkdir()
    monkeypatch.setattr(vm, "_SBIN", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InfrastructureError, match=r"'mkfs\.ext4'; it takes mkfs\.ext4 \(ci/bootstrap\) and 2 GB"):
        vm.image(tmp_path / "tree", tmp_path / "made.ext4")


def test_what_cannot_be_written_is_infrastructure(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InfrastructureError, match=r"make an image of .*File exists"):
        vm.image(tmp_path / "tree", file / "made.ext4")
    scene.share = file / "share"
    with pytest.raises(InfrastructureError, match=r"start a guest with .*Not a directory"):
        scene.play("$RUN", "true")


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
    ("qemu", "works"),
    [(f"exit {0x21}", True), ("exit 0", False), ("exit 1", False), ("exec sleep 60", False), (None, False)],
    ids=["wrote-to-the-port", "ended", "refused", "hung", "no-qemu"],
)
def test_kvm_works_where_a_guest_ran_our_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qemu: str | None, *, works: bool
) -> None:
    if qemu:
        (tmp_path / "qemu-system-x86_64").write_text(f"#!/bin/sh\n{qemu}\n")
        (tmp_path / "qemu-system-x86_64").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if qemu else str(tmp_path))
    monkeypatch.setattr(vm, "KVM_BOOT_S", 5.0 if works else 0.5)
    monkeypatch.setattr(os, "access", lambda *_: True)
    assert vm.kvm_works.__wrapped__() is works
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert not vm.kvm_works.__wrapped__()


@pytest.mark.parametrize("kvm", [True, False])
def test_what_is_booted(tmp_path: Path, *, kvm: bool) -> None:
    boot = vm._boot(Machine(KERNEL, cpus=2, memory="3G"), tmp_path, kvm=kvm)
    options = list(pairwise(boot))
    for option in (
        ("--run", str(KERNEL.vmlinuz)),
        ("--append", "panic_on_oops=1"),  # else a guest goes on after an oops, and its tests may pass
        ("--append", "panic=-1"),
        ("--cpus", "2"),
        ("--memory", "3G"),
        ("--exec", f"sh {tmp_path}/run.sh"),
    ):
        assert option in options
    assert f"--rwdir={tmp_path}" in boot
    assert ("--disable-kvm" in boot) is not kvm


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `vm.main` on 6.1, which is in the cache, and which only emulation runs."""
    monkeypatch.setattr(sys, "argv", ["vm.py", "6.1", f"--share={tmp_path}/share", "--", "true"])
    monkeypatch.setattr(vm, "ensure", lambda _kernel: KERNEL)
    monkeypatch.setattr(vm, "kvm_works", lambda: False)


@pytest.mark.parametrize(
    ("ended", "status", "said"),
    [
        (Ended(Outcome.PASSED, 0, "", 1.0), 0, ""),
        (Ended(Outcome.FAILED, 7, "exit status 7", 1.0), 7, ""),
        (Ended(Outcome.FAILED, 1, "exit status 1", 1.0), 1, ""),
        (Ended(Outcome.HUNG, None, "no output", 1.0), 3, "infrastructure: Linux 6.1: hung: no output\n"),
        (Ended(Outcome.CRASHED, None, "Oops: 1", 1.0), 3, "infrastructure: Linux 6.1: crashed: Oops: 1\n"),
    ],
)
def test_exit_status(
    called: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ended: Ended,
    status: int,
    said: str,
) -> None:
    monkeypatch.setattr(vm, "run", lambda *_, **__: ended)
    assert vm.main() == status
    assert capsys.readouterr().err == said


def test_a_missing_vng_is_infrastructure(
    called: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vm, "BIN", Path("/nowhere"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert vm.main() == 3
    assert capsys.readouterr().err.startswith("infrastructure: start a guest: vng: not found in /nowhere:")


def test_no_place_for_a_share_is_infrastructure(
    called: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vm.py", "6.1", "--", "true"])
    monkeypatch.setattr(tempfile, "tempdir", os.devnull)
    assert vm.main() == 3
    assert capsys.readouterr().err.startswith("infrastructure: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: series"),
        (["6.1"], "the following arguments are required"),
        (["2.4", "--", "true"], "invalid choice: '2.4'"),
        (["host", "--", "true"], "invalid choice: 'host'"),
        (["6.1", "--cpus", "many", "--", "true"], "invalid int value"),
    ],
    ids=["nothing", "no-command", "no-such-kernel", "the-host", "no-number"],
)
def test_called_wrongly(
    called: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["vm.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        vm.main()
    assert said in capsys.readouterr().err


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
