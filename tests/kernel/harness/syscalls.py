"""The few system calls that Python 3.11 does not wrap: namespaces and mounts."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Move the calling thread into new namespaces."""
    _check(_libc.unshare(flags), f"unshare {flags:#x}")


def setns(descriptor: int, flags: int) -> None:
    """Move the calling thread into the namespace behind `descriptor`."""
    _check(_libc.setns(descriptor, flags), f"setns {descriptor}")


def mount(source: str, target: Path, kind: str | None, flags: int = 0) -> None:
    """Mount; `kind` None for a change of propagation."""
    fstype = None if kind is None else kind.encode()
    _check(_libc.mount(source.encode(), os.fsencode(target), fstype, flags, None), f"mount {kind} on {target}")


def unmount(target: Path) -> None:
    """Unmount lazily: what still holds it open keeps it until it ends."""
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH), f"umount {target}")
