#!/usr/bin/env python3
"""One command on one kernel: boot it in a throw-away virtual machine, run the command there as root, bring back files.

    .venv/bin/python ci/vm.py 6.1 -- uname -a

virtme-ng boots the kernel over this machine's own files: the guest sees the repo and .venv under the same paths, read
only, and whatever it writes elsewhere is forgotten; what is to be kept goes to the shared directory (`$SHARE` there).
The console is not a protocol: that the guest is up, the command's output and its exit status are files in the shared
directory, and the console is only looked at when the guest is gone without having left a status.

KVM is used where it runs a guest, which is tried (/dev/kvm may be there and do nothing), else software emulation.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from infrastructure import EXIT_STATUS, InfrastructureError
from kernelcache import Installed, ensure
from kernellist import load

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NEW_ROOT = ROOT / "ci" / "guest_root.sh"
POLL_S = 0.2
KVM_BOOT_S = 30.0
"""Ten times what a guest takes to come up where KVM works; where it does not, it often hangs without a word."""
OOPS_LINES = 60
_SBIN = "/usr/sbin:/sbin"  # not in everybody's PATH
_IMAGE_ADVICE = "it takes mkfs.ext4 (ci/bootstrap) and 2 GB in build/"

_OOPS = re.compile(
    r"Kernel panic|Oops:|BUG: (?!sleeping|workqueue)|kernel BUG at|general protection fault|Unable to handle kernel"
)
# A boot sector that writes to the exit port of `isa-debug-exit`: mov dx, 0xf4; mov al, 0x10; out dx, al; hlt
_PROOF = b"\xba\xf4\x00\xb0\x10\xee\xf4".ljust(510, b"\0") + b"\x55\xaa"
_PROOF_STATUS = 0x10 << 1 | 1


class Outcome(enum.StrEnum):
    """How a run ended; the last three say nothing about the command."""

    PASSED = "passed"
    FAILED = "failed"
    CRASHED = "crashed"
    HUNG = "hung"
    NOBOOT = "noboot"


@dataclass(frozen=True, slots=True)
class Ended:
    """A run's end. `status`: the command's, None if it never ended; `detail`: why, with the oops of a crash."""

    outcome: Outcome
    status: int | None
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Machine:
    """What to boot and with how much; limits in seconds of this machine's clock."""

    kernel: Installed
    cpus: int = 1
    memory: str = "2G"
    boot_s: float = 180.0  # until the guest says that it is up: ten times what emulation takes
    idle_s: float = 240.0  # without a byte of output
    total_s: float = 3600.0


@functools.cache
def kvm_works() -> bool:
    """Tell whether KVM runs a guest on this machine, by having it run one of four instructions on the host's own CPU.

    That is quick and no proof for a kernel: `run` emulates where the guest does not come up all the same.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    with contextlib.suppress(OSError, subprocess.TimeoutExpired), tempfile.NamedTemporaryFile() as sector:
        sector.write(_PROOF)
        sector.flush()
        command = [
            *("qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-nodefaults", "-display", "none", "-no-reboot"),
            *("-drive", f"file={sector.name},format=raw,if=floppy,readonly=on"),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=1"),
        ]
        done = subprocess.run(command, capture_output=True, timeout=KVM_BOOT_S, check=False)
        return done.returncode == _PROOF_STATUS
    return False


def run(
    machine: Machine,
    command: Sequence[str],
    share: Path,
    *,
    env: Mapping[str, str] | None = None,
    images: Mapping[Path, Path] | None = None,
    tell: Callable[[str], None] = lambda _line: None,
) -> Ended:
    """Boot, run `command` in the repo's directory with `env` added, wait for its end; never raises for a guest's sake.

    Where the guest is emulated, `NETFENCE_EMULATED=1` tells the command so. `images`: directory → the `image` of it
    that the guest reads instead.

    `share` is rid of what an earlier run left there, and holds `output`, `console` and the command's own files
    afterwards. `tell` gets each line of output as it comes. Raises InfrastructureError where no guest can be started.
    """
    if kvm_works():
        ended = _run(replace(machine, boot_s=KVM_BOOT_S), command, share, env or {}, images or {}, tell, kvm=True)
        if ended.outcome is not Outcome.NOBOOT:
            return ended
        tell(f"KVM runs no kernel here ({ended.detail.splitlines()[-1]}): emulating")
    return _run(machine, command, share, {"NETFENCE_EMULATED": "1", **(env or {})}, images or {}, tell, kvm=False)


def image(directory: Path, made: Path) -> Path:
    """Make `made` a file system of what is in the directory.

    Guests read this machine's files over 9p without keeping them (Linux 5.10: page by page); Python starts three times
    as fast from an image. Raises InfrastructureError.
    """
    command = ["mkfs.ext4", "-q", "-O", "^has_journal", "-T", "small", "-d", str(directory), str(made)]
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:{_SBIN}"}
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        used = sum(-(-each.lstat().st_size // 4096) * 4096 + 512 for each in directory.rglob("*"))
        made.unlink(missing_ok=True)
        with made.open("wb") as file:
            file.truncate(used * 5 // 4 + (32 << 20))  # sparse
        done = subprocess.run(
            command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise InfrastructureError(f"make an image of {directory}: {error}; {_IMAGE_ADVICE}") from error
    if done.returncode:
        said = "; ".join(done.stderr.splitlines()) or f"exit status {done.returncode}"
        raise InfrastructureError(f"make an image of {directory}: {said}; {_IMAGE_ADVICE}")
    return made


def _run(
    machine: Machine,
    command: Sequence[str],
    share: Path,
    env: Mapping[str, str],
    images: Mapping[Path, Path],
    tell: Callable[[str], None],
    *,
    kvm: bool,
) -> Ended:
    begun = time.monotonic()
    guest = _start(_boot(machine, share, kvm=kvm), share, _script(command, share, env, images))
    try:
        lost = _follow(guest, machine, share, tell)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(guest.pid, signal.SIGKILL)
        guest.wait()
    return _judge(share, lost, time.monotonic() - begun)


def _start(boot: list[str], share: Path, script: str) -> subprocess.Popen[bytes]:
    path = f"{BIN}:{os.environ['PATH']}"
    if shutil.which(boot[0], path=path) is None:
        raise InfrastructureError(f"start a guest: {boot[0]}: not found in {path}; run ci/bootstrap")
    try:
        share.mkdir(parents=True, exist_ok=True)
        for name in ("up", "status", "output", "console", "run.sh"):
            (share / name).unlink(missing_ok=True)
        (share / "run.sh").write_text(script, encoding="utf-8")
        with (share / "console").open("wb") as console:
            return subprocess.Popen(
                boot, stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                env={**os.environ, "PATH": path}, start_new_session=True,
            )  # fmt: skip
    except OSError as error:
        raise InfrastructureError(f"start a guest with {share}: {error}; is there space?") from error


def _boot(machine: Machine, share: Path, *, kvm: bool) -> list[str]:
    return [
        *("vng", "--run", str(machine.kernel.vmlinuz), "--verbose"),
        *(() if kvm else ("--disable-kvm",)),
        *("--cpus", str(machine.cpus), "--memory", machine.memory, f"--rwdir={share}", "--cwd", str(ROOT)),
        *("--append", "panic_on_oops=1", "--append", "panic=-1"),  # an oops ends the guest at once
        *("--append", "rcupdate.rcu_expedited=1"),  # from 6.x on, taking anything down waits for RCU for tens of ms
        *("--exec", f"sh {shlex.quote(str(share / 'run.sh'))}"),
    ]


def _script(command: Sequence[str], share: Path, env: Mapping[str, str], images: Mapping[Path, Path]) -> str:
    exports = {"SHARE": str(share), "HOME": "/root", "PYTHONDONTWRITEBYTECODE": "1", **env}
    lines = [
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        f'cd {shlex.quote(str(ROOT))} && : > "$SHARE/up"',
        "mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf",
        *(_from_images(images) if images else []),
        f"cd {shlex.quote(str(ROOT))}",  # once more: the directory may be another by now
        "modprobe tun",  # /dev/net/tun: where udev runs it is there, virtme-ng's own init makes none
        f'{shlex.join(command)} > "$SHARE/output" 2>&1 < /dev/null',
        'echo $? > "$SHARE/status.new" && mv "$SHARE/status.new" "$SHARE/status"',
        "sync",
    ]
    return "\n".join(lines) + "\n"


def _from_images(images: Mapping[Path, Path]) -> list[str]:
    """Put the images in the places of their directories; where that fails the guest reads those, and is slow."""
    root = shlex.quote(str(ROOT))
    return [
        "modprobe -a loop ext4",
        f"mount --rbind {root} {root}",  # a mount point is not looked up again over 9p
        *(
            f"mount -o loop,ro,noatime {shlex.quote(str(made))} {shlex.quote(str(directory))}"
            for directory, made in images.items()
        ),
        f"sh {shlex.quote(str(NEW_ROOT))}",
    ]


def _follow(guest: subprocess.Popen[bytes], machine: Machine, share: Path, tell: Callable[[str], None]) -> str:
    """Pass output on until the guest is gone; return what limit it broke, "" if none."""
    begun = last = time.monotonic()
    read, rest = 0, b""
    while True:
        gone = guest.poll() is not None
        fresh = _read_from(share / "output", read)
        now = time.monotonic()
        if fresh:
            read, last = read + len(fresh), now
            *lines, rest = (rest + fresh).split(b"\n")
            for line in lines:
                tell(line.decode("utf-8", "replace"))
        if gone or (share / "status").exists():
            # It has said all; it may take long to power off, and may fail at that.
            if rest:
                tell(rest.decode("utf-8", "replace"))
            return ""
        if not (share / "up").exists():
            if now - begun > machine.boot_s:
                return f"not up after {machine.boot_s:.0f} s"
            last = now
        elif now - last > machine.idle_s:
            return f"no output for {machine.idle_s:.0f} s"
        elif now - begun > machine.total_s:
            return f"no end after {machine.total_s:.0f} s"
        time.sleep(POLL_S)


def _read_from(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read()
    except FileNotFoundError:
        return b""


def _judge(share: Path, lost: str, seconds: float) -> Ended:
    console = (share / "console").read_text("utf-8", "replace").replace("\r", "")
    if (share / "status").exists():
        status = int((share / "status").read_text())
        outcome = Outcome.FAILED if status else Outcome.PASSED
        return Ended(outcome, status, f"exit status {status}", seconds)
    oops = oops_of(console)
    if not (share / "up").exists():
        return Ended(
            Outcome.NOBOOT, None, oops or _last_words(lost or "the guest ended before it was up", console), seconds
        )
    if oops:
        return Ended(Outcome.CRASHED, None, oops, seconds)
    if lost:
        return Ended(Outcome.HUNG, None, _last_words(lost, console), seconds)
    return Ended(Outcome.CRASHED, None, _last_words("the guest went away without a word", console), seconds)


def oops_of(console: str) -> str:
    """Cut the first oops, BUG or panic out of a console's text, `OOPS_LINES` lines of it; "" if there is none."""
    lines = console.splitlines()
    first = next((at for at, line in enumerate(lines) if _OOPS.search(line)), None)
    return "" if first is None else "\n".join(lines[first : first + OOPS_LINES])


def _last_words(why: str, console: str) -> str:
    return "\n".join([f"{why}; the console's last lines:", *console.splitlines()[-15:]])


def main() -> int:
    """Run as the docstring of the module says; the command's exit status, or 3 where the guest was lost."""
    listed = {kernel.series: kernel for kernel in load() if not kernel.is_host}
    parser = argparse.ArgumentParser(description="Run a command on another kernel.")
    parser.add_argument("series", choices=listed)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--memory", default="2G")
    parser.add_argument("--share", type=Path, help="directory for what is to be kept; default: a new one below /tmp")
    parser.add_argument("command", nargs="+", metavar="-- command")
    arguments = parser.parse_args()
    try:
        installed = ensure(listed[arguments.series])
        share = arguments.share or Path(tempfile.mkdtemp(prefix=f"netfence-vm-{arguments.series}-"))
        machine = Machine(installed, arguments.cpus, arguments.memory)
        ended = run(machine, arguments.command, share.resolve(), tell=lambda line: print(line, flush=True))
    except InfrastructureError as error:
        print(error, file=sys.stderr)
        return EXIT_STATUS
    except OSError as error:  # a full disk
        print(f"infrastructure: {error}", file=sys.stderr)
        return EXIT_STATUS
    if ended.status is None:
        print(f"infrastructure: Linux {arguments.series}: {ended.outcome}: {ended.detail}", file=sys.stderr)
        return EXIT_STATUS
    return ended.status


if __name__ == "__main__":
    sys.exit(main())
