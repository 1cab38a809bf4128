"""The bpf(2) system call through ctypes: nothing but the kernel is needed, neither libbpf nor bcc.

Owns attribute packing, errno → OSError, and file descriptors as plain ints. Refuses to know what a map or a program
means. Source of every layout: `union bpf_attr` in include/uapi/linux/bpf.h (kernel 6.18), which only ever grows: a
shorter attribute means zeros behind it. ctypes releases the GIL during the call, so slow calls may run in threads.
"""

from __future__ import annotations

import ctypes
import enum
import os
import platform

_SYSCALL_NUMBER = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}[platform.machine()]
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Cmd(enum.IntEnum):
    """`enum bpf_cmd`."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_ATTACH = 8
    PROG_DETACH = 9
    PROG_TEST_RUN = 10
    PROG_GET_NEXT_ID = 11
    MAP_GET_NEXT_ID = 12
    PROG_GET_FD_BY_ID = 13
    MAP_GET_FD_BY_ID = 14
    OBJ_GET_INFO_BY_FD = 15
    PROG_QUERY = 16
    MAP_LOOKUP_BATCH = 24
    MAP_LOOKUP_AND_DELETE_BATCH = 25
    MAP_UPDATE_BATCH = 26
    MAP_DELETE_BATCH = 27
    LINK_CREATE = 28
    LINK_UPDATE = 29
    LINK_GET_FD_BY_ID = 30
    LINK_GET_NEXT_ID = 31
    LINK_DETACH = 34


def call(cmd: Cmd, attr: ctypes.Structure | ctypes.Array[ctypes.c_char]) -> int:
    """Run bpf(cmd, attr, sizeof attr); return its result, raise OSError with errno.

    `attr` is a ctypes structure or buffer laid out as the command's part of `union bpf_attr`; the kernel may write it.
    """
    result = int(_libc.syscall(_SYSCALL_NUMBER, int(cmd), ctypes.byref(attr), ctypes.sizeof(attr)))
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"bpf {cmd.name}: {os.strerror(errno)}")
    return result
