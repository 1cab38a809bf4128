"""Tiny BPF programs assembled by hand: for probes, for the kernel's clock and for tests of the hooks.

Owns instruction encoding and PROG_LOAD. The real programs come compiled from bcc's child; nothing here knows them.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import struct
import sys

from netfence.dataplane import sysbpf
from netfence.dataplane.sysbpf import Cmd

_LOG_BYTES = 16384
_INSN_BYTES = 8


class ProgType(enum.IntEnum):
    """The `enum bpf_prog_type` values we use."""

    SOCKET_FILTER = 1
    SCHED_CLS = 3
    XDP = 6
    CGROUP_SKB = 8
    CGROUP_SOCK_ADDR = 18


class Helper(enum.IntEnum):
    """Numbers of the kernel helpers that the tiny programs call (`enum bpf_func_id`)."""

    SKB_CGROUP_ID = 79
    JIFFIES64 = 118


def insn(code: int, *, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
    """Encode one `struct bpf_insn`; the register nibbles follow the machine's byte order."""
    registers = dst | src << 4 if sys.byteorder == "little" else dst << 4 | src
    return struct.pack("=BBhi", code, registers, off, imm)


EXIT = insn(0x95)


def returning(value: int) -> bytes:
    """Assemble a program that returns `value` (signed 32 bit)."""
    return insn(0xB7, dst=0, imm=value) + EXIT


def calling(helper: Helper) -> bytes:
    """Assemble a program that returns what `helper(context)` returns."""
    return insn(0x85, imm=helper) + EXIT


def load_raw(
    prog_type: ProgType,
    insns: bytes,
    license_: str = "Dual BSD/GPL",
    expected_attach_type: int = 0,
    name: str = "netfence_raw",
) -> int:
    """Load a program and return its descriptor.

    Raises OSError as the kernel gave it, with the verifier's last line when it had something to say.
    """
    code = ctypes.create_string_buffer(insns, len(insns))
    licence = ctypes.create_string_buffer(license_.encode("ascii"))

    def attempt(log: ctypes.Array[ctypes.c_char] | None) -> int:
        packed = struct.pack(
            "=IIQQIIQII16sII",
            prog_type,
            len(insns) // _INSN_BYTES,
            ctypes.addressof(code),
            ctypes.addressof(licence),
            0 if log is None else 1,
            0 if log is None else len(log),
            0 if log is None else ctypes.addressof(log),
            0,  # kern_version
            0,  # prog_flags
            name.encode("ascii")[:15],
            0,  # prog_ifindex
            expected_attach_type,
        )
        return sysbpf.call(Cmd.PROG_LOAD, ctypes.create_string_buffer(packed, len(packed)))

    try:
        return attempt(None)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES):
            raise
    log = ctypes.create_string_buffer(_LOG_BYTES)
    try:
        return attempt(log)
    except OSError as error:
        said = log.value.decode("ascii", "replace").split("\n\n")[0]  # from Linux 7.x on, an explanation follows
        lines = [line for line in said.splitlines() if not line.startswith("processed")]
        if lines:
            raise OSError(error.errno, f"{error.strerror} ({lines[-1].strip()})") from None
        raise
