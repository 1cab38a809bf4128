"""A program that runs another in its stead, because the kernel takes each only once into one chain (EEXIST).

It tail-calls the other and does nothing besides. Should the call fail it drops: the kernel empties the table of calls
when the last descriptor of it is closed, so what a daemon that was killed leaves behind passes nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator

from netfence.dataplane import rawprog, sysbpf
from netfence.dataplane.rawprog import ProgType
from netfence.dataplane.sysbpf import Cmd

_PROG_ARRAY = 3  # BPF_MAP_TYPE_PROG_ARRAY
_TAIL_CALL = 12  # bpf_tail_call(context, table, index)
_PSEUDO_MAP_FD = 1
_TC_ACT_SHOT = 2


@contextlib.contextmanager
def stand_ins(prog_fd: int, number: int) -> Iterator[list[int]]:
    """Load so many stand-ins for a SCHED_CLS program, and unload them with the block: by then none may be attached.

    Raises OSError as the kernel gave it.
    """
    with contextlib.ExitStack() as stack:
        calls = _table()
        stack.callback(os.close, calls)
        key, value = struct.pack("=I", 0), struct.pack("=I", prog_fd)
        buffers = [ctypes.create_string_buffer(each, len(each)) for each in (key, value)]
        update = struct.pack("=IIQQQ", calls, 0, *(ctypes.addressof(each) for each in buffers), 0)
        sysbpf.call(Cmd.MAP_UPDATE_ELEM, ctypes.create_string_buffer(update, len(update)))
        loaded = []
        for _ in range(number):
            loaded.append(rawprog.load_raw(ProgType.SCHED_CLS, _calling(calls), name="nf_stand_in"))
            stack.callback(os.close, loaded[-1])
        yield loaded


def _table() -> int:
    # map_type, key_size, value_size, max_entries, map_flags, inner_map_fd, numa_node, map_name
    attr = struct.pack("=IIIIIII16s", _PROG_ARRAY, 4, 4, 1, 0, 0, 0, b"nf_stand_in")
    return sysbpf.call(Cmd.MAP_CREATE, ctypes.create_string_buffer(attr, len(attr)))


def _calling(table: int) -> bytes:
    insn = rawprog.insn
    return b"".join(
        (
            insn(0x18, dst=2, src=_PSEUDO_MAP_FD, imm=table),  # the context stays in r1
            insn(0),
            insn(0xB7, dst=3, imm=0),
            insn(0x85, imm=_TAIL_CALL),
            rawprog.returning(_TC_ACT_SHOT),
        )
    )
