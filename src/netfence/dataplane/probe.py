"""What this kernel and this process can do, found by trying.

Owns the list of features, the first kernel of each, and the capability names. Every probe leaves nothing behind and
never attaches anything; all together take a few milliseconds and are made once per process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import re
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

from netfence.dataplane import links, rawprog, sysbpf
from netfence.dataplane.links import AttachType
from netfence.dataplane.rawprog import Helper, ProgType
from netfence.dataplane.sysbpf import Cmd
from netfence.errors import PermissionDeniedError, PreconditionError

_LOOPBACK_IFINDEX = 1
_NO_FD = 0xFFFFFFFF
_XDP_PASS, _XDP_FLAGS_HW_MODE = 2, 1 << 3
_CLOCK_MONOTONIC_COARSE = 6  # include/uapi/linux/time.h; the time module does not name it

# enum bpf_map_type
_ARRAY, _LPM_TRIE, _ARRAY_OF_MAPS, _CGROUP_STORAGE, _RINGBUF = 2, 11, 12, 19, 27
_F_NO_PREALLOC, _F_MMAPABLE = 1, 1 << 10

# Capabilities we use, by bit number of /proc/self/status CapEff (include/uapi/linux/capability.h).
CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}

# What netfenced does with each; CAP_NET_RAW is none of ours, others are asked whether they hold it.
PURPOSES = {
    "CAP_BPF": "load BPF programs and make their maps",
    "CAP_PERFMON": "load BPF programs that calculate with packet pointers",
    "CAP_NET_ADMIN": "attach to interfaces and cgroups",
    "CAP_SYS_ADMIN": "ask the names of foreign programs in front of ours",
    "CAP_SYS_RESOURCE": "lift RLIMIT_MEMLOCK for BPF maps on Linux before 5.11",
    "CAP_NET_BIND_SERVICE": "bind DNS servers to ports below 1024",
    "CAP_CHOWN": "give the socket to socket_group",
}
ALWAYS_NEEDED = ("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON")

# The features by name, the first mainline kernel that has each, and what it is for.
FIRST_KERNEL = {
    "tcx": "6.6",
    "cgroup_link": "5.7",
    "xdp_link": "5.9",
    "ringbuf": "5.8",
    "mmapable_array": "5.5",
    "jiffies64": "5.6",
    "skb_cgroup_id": "4.18",
    "cgroup_storage": "4.19",
    "lpm_trie": "4.11",
    "lpm_batch": "5.13",
    "map_in_map_batch": "5.19",
}
YES = "yes"


def kernel_version() -> tuple[int, int]:
    """Tell the running kernel's major and minor number."""
    major, minor = os.uname().release.split("-")[0].split(".")[:2]
    return int(major), int("".join(ch for ch in minor if ch.isdigit()) or 0)


def effective_capabilities(pid: int | str = "self") -> int:
    """Read the CapEff mask of a process; raises FileNotFoundError when there is no such process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    raise FileNotFoundError(errno.ENOENT, f"/proc/{pid}/status has no CapEff")


def has_capability(name: str) -> bool:
    """Tell whether this process has the capability now; CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON as ever."""
    mask = effective_capabilities()
    wanted = {name, "CAP_SYS_ADMIN"} if name in ("CAP_BPF", "CAP_PERFMON") else {name}
    return any(mask >> CAPABILITIES[each] & 1 for each in wanted)


def missing_capabilities(*names: str) -> list[str]:
    """Of the named capabilities (default: those that loading and attaching need) list what this process lacks."""
    return [name for name in names or ("CAP_BPF", "CAP_NET_ADMIN") if not has_capability(name)]


def hz() -> int:
    """Tell the kernel's tick rate (CONFIG_HZ): jiffies per second, exact, from the coarse clock's resolution."""
    return round(1 / time.clock_getres(_CLOCK_MONOTONIC_COARSE))


def _map(kind: int, key: int, value: int, entries: int, flags: int = 0, inner_fd: int = 0) -> int:
    packed = struct.pack("=IIIIIII", kind, key, value, entries, flags, inner_fd, 0)
    return sysbpf.call(Cmd.MAP_CREATE, ctypes.create_string_buffer(packed, len(packed)))


def _try_map(kind: int, key: int, value: int, entries: int, flags: int = 0) -> None:
    os.close(_map(kind, key, value, entries, flags))


def _batch(map_fd: int, key: bytes, value: bytes) -> None:
    keys, values = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(value, len(value))
    # in_batch, out_batch, keys, values, count, map_fd, elem_flags, flags
    packed = struct.pack("=QQQQIIQQ", 0, 0, ctypes.addressof(keys), ctypes.addressof(values), 1, map_fd, 0, 0)
    sysbpf.call(Cmd.MAP_UPDATE_BATCH, ctypes.create_string_buffer(packed, len(packed)))


def _try_lpm_batch() -> None:
    map_fd = _map(_LPM_TRIE, 8, 4, 1, _F_NO_PREALLOC)
    try:
        _batch(map_fd, struct.pack("=I", 32) + bytes(4), bytes(4))
    finally:
        os.close(map_fd)


def _try_map_in_map_batch() -> None:
    with contextlib.ExitStack() as stack:
        inner_fd = _map(_ARRAY, 4, 4, 1)
        stack.callback(os.close, inner_fd)
        outer_fd = _map(_ARRAY_OF_MAPS, 4, 4, 1, 0, inner_fd)
        stack.callback(os.close, outer_fd)
        _batch(outer_fd, bytes(4), struct.pack("=I", inner_fd))


def _try_tcx() -> None:
    links.prog_query_tcx(_LOOPBACK_IFINDEX, AttachType.TCX_INGRESS)


def _try_cgroup_link() -> None:
    """Create a link on no cgroup: a kernel that knows cgroup links says EBADF, one that does not EINVAL."""
    egress = AttachType.CGROUP_INET_EGRESS
    prog_fd = rawprog.load_raw(ProgType.CGROUP_SKB, rawprog.returning(1), expected_attach_type=egress)
    try:
        os.close(links.link_create_cgroup(prog_fd, _NO_FD, egress))
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
    finally:
        os.close(prog_fd)


def _try_xdp_link() -> None:
    """Create a link in a mode that no loopback has: a kernel that knows XDP links says EOPNOTSUPP, others EINVAL."""
    prog_fd = rawprog.load_raw(ProgType.XDP, rawprog.returning(_XDP_PASS), expected_attach_type=AttachType.XDP)
    try:
        os.close(links.link_create_xdp(prog_fd, _LOOPBACK_IFINDEX, _XDP_FLAGS_HW_MODE))
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    finally:
        os.close(prog_fd)


def _try_helper(helper: Helper) -> None:
    os.close(rawprog.load_raw(ProgType.SCHED_CLS, rawprog.calling(helper)))


_PROBES: dict[str, Callable[[], None]] = {
    "tcx": _try_tcx,
    "cgroup_link": _try_cgroup_link,
    "xdp_link": _try_xdp_link,
    "ringbuf": lambda: _try_map(_RINGBUF, 0, 0, resource.getpagesize()),
    "mmapable_array": lambda: _try_map(_ARRAY, 4, 8, 1, _F_MMAPABLE),
    "jiffies64": lambda: _try_helper(Helper.JIFFIES64),
    "skb_cgroup_id": lambda: _try_helper(Helper.SKB_CGROUP_ID),
    "cgroup_storage": lambda: _try_map(_CGROUP_STORAGE, 8, 4, 0),
    "lpm_trie": lambda: _try_map(_LPM_TRIE, 8, 4, 1, _F_NO_PREALLOC),
    "lpm_batch": _try_lpm_batch,
    "map_in_map_batch": _try_map_in_map_batch,
}


def _judge(name: str) -> str:
    try:
        _PROBES[name]()
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            needs = " and ".join(missing_capabilities()) or "permission"
            return f"no: not permitted, needs {needs}"
        return f"no: {os.strerror(error.errno or 0).lower()}, first kernel {FIRST_KERNEL[name]}"
    return YES


@functools.cache
def kernel_features() -> dict[str, str]:
    """Try every feature of the kernel: name → "yes" or "no: why"; treat the result as read-only."""
    return {name: _judge(name) for name in _PROBES}


def features(bpffs_dir: Path | None = None) -> dict[str, str]:
    """Tell all there is to show in `status`: kernel, tick rate, features, capabilities, the bpf mount."""
    told = {"kernel": os.uname().release, "hz": str(hz()), **kernel_features()}
    if bpffs_dir is not None:
        told["bpffs"] = YES if on_bpffs(bpffs_dir) else f"no: {bpffs_dir} is not on a bpf mount"
    held = {name: has_capability(name) for name in PURPOSES}
    told.update({name.lower(): YES if held[name] else f"no: may not {what}" for name, what in PURPOSES.items()})
    return told


def supports(name: str) -> bool:
    """Tell whether the kernel has the feature and lets us use it."""
    return kernel_features()[name] == YES


def require_feature(name: str, what: str) -> None:
    """Raise unless the feature is there; `what` says what needed it ("attach tcx ingress on veth3")."""
    verdict = kernel_features()[name]
    if verdict == YES:
        return
    if "not permitted" in verdict:
        raise PermissionDeniedError(f"{what}: {name} {verdict.removeprefix('no: ')}")
    raise PreconditionError(
        f"{what}: kernel {os.uname().release} lacks {name}; use Linux {FIRST_KERNEL[name]} or later, with it configured"
    )


def require_capabilities(what: str, *names: str) -> None:
    """Raise PermissionDeniedError, naming every missing capability (default: those that loading and attaching need)."""
    missing = missing_capabilities(*names)
    if missing:
        raise PermissionDeniedError(f"{what}: operation not permitted; needs {' and '.join(missing)}")


def mounts() -> dict[int, tuple[str, str]]:
    """Read the mount table: device number → (file system type, mount point).

    Of a device mounted more than once the first whole mount counts, not a bind mount of a part of it.
    """
    found: dict[int, tuple[str, str]] = {}
    partial: set[int] = set()
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        head, _, tail = line.partition(" - ")
        fields = head.split()
        major, _, minor = fields[2].partition(":")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        device = os.makedev(int(major), int(minor))
        if device not in found or (fields[3] == "/" and device in partial):
            found[device] = (tail.split()[0], point)
            (partial.discard if fields[3] == "/" else partial.add)(device)
    return found


def on_bpffs(path: Path) -> bool:
    """Tell whether the path, or where it would be made, lies on a mounted bpf file system."""
    existing = next((each for each in (path, *path.parents) if each.is_dir()), Path("/"))
    kind, _ = mounts().get(existing.stat().st_dev, ("", ""))
    return kind == "bpf"


def require_bpffs(path: Path) -> None:
    """Raise PreconditionError, with the mount command, unless pins can be made at `path`."""
    if not on_bpffs(path):
        raise PreconditionError(
            f"use {path} for pins: it is not on a bpf file system; "
            "`mount -t bpf bpf /sys/fs/bpf`, or set bpffs_dir to a directory on one"
        )


def charges_memlock() -> bool:
    """Tell whether BPF maps are charged to RLIMIT_MEMLOCK here, as before 5.11."""
    return kernel_version() < (5, 11)


def raise_memlock(what: str) -> None:
    """Below 5.11 lift RLIMIT_MEMLOCK, which maps are charged to there; raises PermissionDeniedError."""
    if not charges_memlock():
        return
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (OSError, ValueError) as error:
        raise PermissionDeniedError(
            f"{what}: raise RLIMIT_MEMLOCK for BPF maps on Linux before 5.11: {error}; "
            "needs CAP_SYS_RESOURCE, or LimitMEMLOCK=infinity in the service"
        ) from error
