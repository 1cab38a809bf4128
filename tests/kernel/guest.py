"""A small virtual machine behind a tap device: QEMU without KVM, a kernel of ci/kernels.toml, busybox, curl.

Owns what is in the guest and how it is started; what it is asked to do goes over its second serial port (shells.py).
The first is its console, which is kept in a file and read by people only.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import debfetch
import rootfs
from harness.deadline import SLOWNESS
from harness.netns import NetNs
from harness.spawn import spawn, stop
from kernelcache import Installed
from shells import LOOP, Said, Shell

BOOT_S = 180.0 * SLOWNESS  # 7 s on two idle cores
MEMORY = "256M"
CONSOLE_LINES = 30

# The kernel hands what it does not know on its command line to init, as environment.
INIT = f"""#!/bin/busybox sh
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
exec </dev/ttyS1 >/dev/ttyS1 2>/dev/ttyS0
stty raw -echo
for module in /modules/*; do insmod $module; done
echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad
ip link set lo up
ip link set eth0 up
ip addr add $ADDRESS dev eth0
ip route add default via $GATEWAY
ip -6 addr add $ADDRESS6 dev eth0
ip -6 route add default via $GATEWAY6
echo nameserver $NAMESERVER >/etc/resolv.conf
{LOOP}
"""


def initramfs(kernel: Installed, directory: Path) -> Path:
    """Make one of `INIT`, what it starts and the modules that a virtio network card wants, numbered in their order."""
    root = directory / "initramfs"
    rootfs.make(root)
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    (root / "modules").mkdir()
    for number, module in enumerate(_modules(kernel, "virtio_pci", "virtio_net")):
        shutil.copy(module, root / "modules" / f"{number:02}-{module.name}")
    made = directory / "initramfs.cpio"
    names = "".join(f"{each.relative_to(root)}\n" for each in sorted(root.rglob("*")))
    with made.open("wb") as archive:
        command = [str(rootfs.BUSYBOX), "cpio", "-o", "-H", "newc"]
        subprocess.run(command, cwd=root, input=names.encode(), stdout=archive, stderr=subprocess.DEVNULL, check=True)
    return made


def _modules(kernel: Installed, *wanted: str) -> list[Path]:
    """List modules and what they need, each once and after what it needs; none for what is built in."""
    # lib/modules/<release>, where modprobe looks below the directory that it is given
    base, release = str(kernel.modules.parents[2]), kernel.release
    told = [debfetch.run("modprobe", "-d", base, "-S", release, "--show-depends", name) for name in wanted]
    lines = [line.split() for line in "".join(told).splitlines()]
    return [Path(path) for path in dict.fromkeys(words[1] for words in lines if words[0] == "insmod")]


class Guest:
    """One running guest; a context manager."""

    def __init__(self, kernel: Installed, netns: NetNs, tap: str, directory: Path, network: Mapping[str, str]) -> None:
        """Boot it behind `tap`, which is in `netns`, and wait until it runs commands. `network`: what `INIT` reads."""
        self._console = directory / "console"
        append = ["console=ttyS0", "quiet", "panic=-1", *(f"{name}={value}" for name, value in network.items())]
        initrd = initramfs(kernel, directory)
        command = [
            *("qemu-system-x86_64", "-accel", "tcg", "-machine", "pc", "-smp", "1", "-m", MEMORY),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-kernel", str(kernel.vmlinuz), "-initrd", str(initrd), "-append", " ".join(append)),
            *("-serial", f"file:{self._console}", "-chardev", "stdio,id=shell,signal=off", "-serial", "chardev:shell"),
            *("-netdev", f"tap,id=net0,ifname={tap},script=no,downscript=no"),
            *("-device", "virtio-net-pci,netdev=net0,romfile="),  # it boots from no network
        ]
        with (directory / "qemu.err").open("wb") as errors:
            self._process = spawn(command, netns=netns, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        try:
            self._shell = Shell(self._process, BOOT_S)
        except (RuntimeError, TimeoutError) as error:
            stop(self._process)
            error.add_note(f"{(directory / 'qemu.err').read_text()}{self.console()}")
            raise

    def run(self, command: str) -> Said:
        """Run one command line in the guest."""
        return self._shell.run(command)

    def console(self) -> str:
        """Give the last lines of the console."""
        text = self._console.read_text("utf-8", "replace") if self._console.exists() else ""
        return "\n".join(text.splitlines()[-CONSOLE_LINES:])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop(self._process)
        if error is not None:
            error.add_note(f"the guest's console:\n{self.console()}")
