"""This process's own mount namespace, in which everything the harness mounts lives and dies with us."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import syscalls

PREFIX = "nf-test-"
_entered = False


def run_name() -> str:
    """Name what this process makes, where names are shared with others; the pid tells later runs whose it was."""
    return f"{PREFIX}{os.getpid()}"


def enter() -> None:
    """Give the calling thread, and every process it starts from now on, a mount namespace of its own. Idempotent.

    Mounts of the machine stay visible; ours are not visible to it. Look inside with `nsenter --mount --target <pid>`.
    """
    global _entered  # noqa: PLW0603  # a fact about this process
    if _entered:
        return
    if os.geteuid() != 0:
        message = "this needs root: run ci/test kernel or ci/demo, which use sudo"
        raise PermissionError(message)
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", Path("/"), None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    _entered = True


@contextmanager
def bpffs(directory: Path) -> Iterator[Path]:
    """Mount a bpffs of our own on `directory` (made if missing) and take it, and every pin in it, away at the end."""
    enter()
    directory.mkdir(parents=True, exist_ok=True)
    syscalls.mount("bpf", directory, "bpf")
    try:
        yield directory
    finally:
        syscalls.unmount(directory)
