"""Confine this process as a JSON argument says, then become the program behind it; started by `confined.py`.

What systemd does with CapabilityBoundingSet=, SupplementaryGroups=, Limit…=, NoNewPrivileges=, SystemCallFilter=,
RestrictAddressFamilies=, RestrictNamespaces= and MemoryDenyWriteExecute=, by the library that it uses itself for system
calls (libseccomp); but what systemd answers with EPERM ends the process here, so that it is seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import socket
import sys
from typing import Any

PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
LAST_CAPABILITY = 63
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
NE, EQ, MASKED_EQ = 1, 4, 7  # enum scmp_compare
PROT_WRITE, PROT_EXEC = 2, 4
NAMESPACES = 0x7E020080  # CLONE_NEWNS … CLONE_NEWNET, and CLONE_NEWTIME
CLONE_FLAGS_ARGUMENT = 0  # on all machines but s390

_libc = ctypes.CDLL(None, use_errno=True)


class Compare(ctypes.Structure):
    """`struct scmp_arg_cmp`: what must hold of one argument of a system call."""

    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


class Filter:
    """System calls that are allowed; any other ends the process with SIGSYS."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libseccomp.so.2")
        self._lib.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._lib.seccomp_init(KILL))

    def add(self, action: int, name: str, *conditions: Compare) -> None:
        """Add a rule; system calls that this machine or library does not know are left out."""
        number = self._lib.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            return
        array = (Compare * len(conditions))(*conditions)
        failed = self._lib.seccomp_rule_add_array(self._context, action, number, len(conditions), array)
        if failed:
            raise OSError(-failed, f"seccomp rule for {name}")

    def load(self) -> None:
        """Put it in force, for this process and what it starts."""
        failed = self._lib.seccomp_load(self._context)
        if failed:
            raise OSError(-failed, "seccomp_load")


def drop_capabilities(kept: list[int]) -> None:
    """Take all capabilities but `kept` out of the bounding set; the next exec loses them."""
    for number in range(LAST_CAPABILITY + 1):
        if number not in kept and _libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0) and ctypes.get_errno() != errno.EINVAL:
            raise OSError(ctypes.get_errno(), f"drop capability {number}")


def filter_system_calls(told: dict[str, Any]) -> None:
    """Allow the system calls, address families, and memory that the unit allows."""
    special = {"socket", "mmap", "mprotect", "pkey_mprotect", "clone", "clone3", "unshare", "setns"}
    rules = Filter()
    for name in sorted(set(told["system_calls"]) - special):
        rules.add(ALLOW, name)
    for family in told["families"]:
        rules.add(ALLOW, "socket", Compare(0, EQ, getattr(socket, family)))
    for name in told["tried"]:
        rules.add(ERRNO | errno.EPERM, name)
    both = PROT_WRITE | PROT_EXEC
    for protection in (0, PROT_WRITE, PROT_EXEC):
        rules.add(ALLOW, "mmap", Compare(2, MASKED_EQ, both, protection))
    for name in ("mprotect", "pkey_mprotect"):
        rules.add(ALLOW, name, Compare(2, MASKED_EQ, PROT_EXEC, 0))
    rules.add(ALLOW, "clone", Compare(CLONE_FLAGS_ARGUMENT, MASKED_EQ, NAMESPACES, 0))
    rules.add(ERRNO | errno.ENOSYS, "clone3")  # its flags cannot be seen; the C library takes clone then
    rules.load()


def main() -> None:
    """Do all of it."""
    told = json.loads(sys.argv[1])
    os.setgroups(told["groups"])
    for name, value in told["limits"].items():
        with contextlib.suppress(ValueError):  # a test machine that may not raise it: its own limit is lower
            resource.setrlimit(getattr(resource, name), (value, value))
    drop_capabilities(told["capabilities"])
    if _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    filter_system_calls(told)
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
