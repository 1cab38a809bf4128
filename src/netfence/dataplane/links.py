"""BPF links, pins, program facts and test runs: thin typed calls over `sysbpf`.

Owns the attribute layouts of the link, query, info, pin and test-run commands (`union bpf_attr` of kernel 6.18,
include/uapi/linux/bpf.h). Refuses to know what our programs do, which hook they belong to, or how a failure is told to
a user: every function raises OSError as the kernel gave it; `hooks/` turns that into an error with a remedy.

Every returned descriptor is close-on-exec (the kernel does that for bpf objects) and belongs to the caller.
Creating and releasing tcx links waits for RCU (about 16 ms): call from a thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import os
import struct
from pathlib import Path
from typing import NamedTuple

from netfence.dataplane import sysbpf
from netfence.dataplane.sysbpf import Cmd

F_REPLACE = 1 << 2  # BPF_F_REPLACE: the old program must be the one named
F_BEFORE = 1 << 3  # BPF_F_BEFORE without a relative program: in front of all
F_QUERY_EFFECTIVE = 1 << 0  # BPF_F_QUERY_EFFECTIVE: ancestors' programs too

_INFO_BYTES = 512  # more than any info struct of 6.18; the kernel wants what it does not know to be zero
_QUERY_PROGS = 64  # the first guess; BPF_MPROG_MAX of tcx, cgroups may hold more and the kernel says so
_TEST_RUN_HEADROOM = 256  # a program may grow a packet by what bpf_skb_change_head allows in tests


class AttachType(enum.IntEnum):
    """The `enum bpf_attach_type` values we use."""

    CGROUP_INET_INGRESS = 0
    CGROUP_INET_EGRESS = 1
    CGROUP_INET4_CONNECT = 10
    CGROUP_INET6_CONNECT = 11
    CGROUP_UDP4_SENDMSG = 14
    CGROUP_UDP6_SENDMSG = 15
    XDP = 37
    TCX_INGRESS = 46
    TCX_EGRESS = 47


class LinkType(enum.IntEnum):
    """The `enum bpf_link_type` values we use."""

    CGROUP = 3
    XDP = 6
    TCX = 11


class LinkInfo(NamedTuple):
    """What the kernel says about a link. `target` is an ifindex (0: the device is gone) or a cgroup id, by `type`."""

    type: int
    id: int
    prog_id: int
    target: int
    attach_type: int


class ProgInfo(NamedTuple):
    """What the kernel says about a program; `tag` is its 8-byte instruction hash in hex."""

    type: int
    id: int
    tag: str
    name: str


class TestRun(NamedTuple):
    """Result of BPF_PROG_TEST_RUN; `duration_ns` is the mean of one run."""

    retval: int
    duration_ns: int
    data_out: bytes
    ctx_out: bytes


def _attr(layout: str, *values: int) -> ctypes.Array[ctypes.c_char]:
    packed = struct.pack("=" + layout, *values)
    return ctypes.create_string_buffer(packed, len(packed))


def obj_pin(fd: int, path: Path) -> None:
    """Pin a bpf object; raises FileExistsError, FileNotFoundError (no such directory), EPERM (not on a bpffs)."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    sysbpf.call(Cmd.OBJ_PIN, _attr("QII", ctypes.addressof(name), fd, 0))


def obj_get(path: Path) -> int:
    """Open a pinned object; raises FileNotFoundError."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    return sysbpf.call(Cmd.OBJ_GET, _attr("QII", ctypes.addressof(name), 0, 0))


def prog_fd_by_id(prog_id: int) -> int:
    """Open a program by id; raises FileNotFoundError, PermissionError (needs CAP_SYS_ADMIN)."""
    return sysbpf.call(Cmd.PROG_GET_FD_BY_ID, _attr("III", prog_id, 0, 0))


def link_create_tcx(prog_fd: int, ifindex: int, attach_type: AttachType, *, before: bool = True) -> int:
    """Attach to a device's tcx chain, first when `before`, else last (kernel >= 6.6; waits for RCU)."""
    flags = F_BEFORE if before else 0
    # prog_fd, target_ifindex, attach_type, flags, tcx.relative_fd, padding, tcx.expected_revision
    return sysbpf.call(Cmd.LINK_CREATE, _attr("IIIIIIQ", prog_fd, ifindex, attach_type, flags, 0, 0, 0))


def link_create_xdp(prog_fd: int, ifindex: int, flags: int) -> int:
    """Attach to a device's XDP hook (kernel >= 5.9); `flags`: XDP_FLAGS_SKB_MODE or XDP_FLAGS_DRV_MODE."""
    return sysbpf.call(Cmd.LINK_CREATE, _attr("IIII", prog_fd, ifindex, AttachType.XDP, flags))


def link_create_cgroup(prog_fd: int, cgroup_fd: int, attach_type: AttachType) -> int:
    """Attach to a cgroup beside all others (kernel >= 5.7); links always mean BPF_F_ALLOW_MULTI."""
    return sysbpf.call(Cmd.LINK_CREATE, _attr("IIIIQ", prog_fd, cgroup_fd, attach_type, 0, 0))


def link_update(link_fd: int, new_prog_fd: int, old_prog_fd: int | None = None) -> None:
    """Replace the link's program between two packets; with `old_prog_fd` only if that one is attached (else EPERM)."""
    flags = 0 if old_prog_fd is None else F_REPLACE
    sysbpf.call(Cmd.LINK_UPDATE, _attr("IIII", link_fd, new_prog_fd, flags, old_prog_fd or 0))


def link_detach(link_fd: int) -> None:
    """Detach now, whoever else holds the link (kernel >= 5.9); a target that is gone already is no error."""
    try:
        sysbpf.call(Cmd.LINK_DETACH, _attr("I", link_fd))
    except OSError as error:
        # EINVAL, EOPNOTSUPP: before 5.9 or a type without detach; closing the last reference does it then.
        if error.errno not in (errno.ENOLINK, errno.EINVAL, errno.EOPNOTSUPP):
            raise


def release_pin(pin: Path) -> bool:
    """Remove a link's pin and detach it; False when there was no pin.

    The name goes first while we hold the link: a crash in between closes the link and so detaches it too.
    """
    try:
        link_fd = obj_get(pin)
    except FileNotFoundError:
        return False
    try:
        with contextlib.suppress(FileNotFoundError):
            pin.unlink()
        link_detach(link_fd)
    finally:
        os.close(link_fd)
    return True


def _info(fd: int) -> bytes:
    info = ctypes.create_string_buffer(_INFO_BYTES)
    sysbpf.call(Cmd.OBJ_GET_INFO_BY_FD, _attr("IIQ", fd, _INFO_BYTES, ctypes.addressof(info)))
    return info.raw


def link_info(link_fd: int) -> LinkInfo:
    """Read a link's facts (cgroup >= 5.8, xdp >= 5.9, tcx >= 6.6); raises EINVAL below."""
    info = _info(link_fd)
    kind, link_id, prog_id = struct.unpack_from("=III", info)
    layout = "=QI" if kind == LinkType.CGROUP else "=II"
    target, attach_type = struct.unpack_from(layout, info, 16)
    return LinkInfo(kind, link_id, prog_id, target, attach_type)


def pinned_link_info(pin: Path) -> LinkInfo | None:
    """Read the facts of a pinned link; None without such a pin."""
    try:
        link_fd = obj_get(pin)
    except FileNotFoundError:
        return None
    try:
        return link_info(link_fd)
    finally:
        os.close(link_fd)


def pinned_prog_id(pin: Path) -> int:
    """Tell the id of a pinned program, or of a pinned link's program; 0 of anything else and without such a pin."""
    try:
        fd = obj_get(pin)
    except FileNotFoundError:
        return 0
    try:
        facts = dict(line.split(":\t", 1) for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines())
    finally:
        os.close(fd)
    return int(facts.get("prog_id", 0))


def prog_info(prog_fd: int) -> ProgInfo:
    """Read a program's facts."""
    info = _info(prog_fd)
    kind, prog_id = struct.unpack_from("=II", info)
    return ProgInfo(kind, prog_id, info[8:16].hex(), info[64:80].split(b"\0", 1)[0].decode("ascii", "replace"))


def prog_query_tcx(ifindex: int, attach_type: AttachType) -> list[int]:
    """List the program ids of a tcx chain in running order (kernel >= 6.6; EINVAL below)."""
    return _query(ifindex, attach_type, 0)


def prog_query_cgroup(cgroup_fd: int, attach_type: AttachType, *, effective: bool = False) -> list[int]:
    """List the program ids of a cgroup in running order; `effective`: with those inherited from its ancestors."""
    return _query(cgroup_fd, attach_type, F_QUERY_EFFECTIVE if effective else 0)


def _query(target: int, attach_type: AttachType, flags: int) -> list[int]:
    room = _QUERY_PROGS
    while True:
        ids = (ctypes.c_uint32 * room)()
        # target, attach_type, query_flags, attach_flags, prog_ids, count, padding, three more arrays, revision:
        # all 64 bytes, because the kernel writes the revision there whatever size we claim.
        attr = _attr("IIIIQIIQQQQ", target, attach_type, flags, 0, ctypes.addressof(ids), room, 0, 0, 0, 0, 0)
        try:
            sysbpf.call(Cmd.PROG_QUERY, attr)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            room = max(2 * room, struct.unpack_from("=I", attr, 24)[0])
            continue
        return list(ids[: struct.unpack_from("=I", attr, 24)[0]])


def prog_test_run(
    prog_fd: int, data_in: bytes, *, repeat: int = 1, ctx_in: bytes | None = None, out_len: int | None = None
) -> TestRun:
    """Run a program on a packet without sending it.

    `data_in` is the frame (for skb programs at least 14 bytes, Ethernet header first); `ctx_in` a `struct __sk_buff`
    or `struct xdp_md`. `out_len` bounds `data_out` (default: the input and some room); raises ENOSPC when it is short.
    """
    room = len(data_in) + _TEST_RUN_HEADROOM if out_len is None else out_len
    source = ctypes.create_string_buffer(data_in, max(1, len(data_in)))
    result = ctypes.create_string_buffer(max(1, room))
    context = b"" if ctx_in is None else ctx_in
    context_in = ctypes.create_string_buffer(context, max(1, len(context)))
    context_out = ctypes.create_string_buffer(max(1, len(context)))
    attr = _attr(
        "IIIIQQIIIIQQ",
        prog_fd,
        0,
        len(data_in),
        room,
        ctypes.addressof(source) if data_in else 0,
        ctypes.addressof(result) if room else 0,
        repeat,
        0,
        len(context),
        len(context),
        ctypes.addressof(context_in) if context else 0,
        ctypes.addressof(context_out) if context else 0,
    )
    sysbpf.call(Cmd.PROG_TEST_RUN, attr)
    _, retval, _, data_size, _, _, _, duration, _, ctx_size, _, _ = struct.unpack("=IIIIQQIIIIQQ", attr.raw)
    return TestRun(retval, duration, result.raw[:data_size], context_out.raw[:ctx_size])
