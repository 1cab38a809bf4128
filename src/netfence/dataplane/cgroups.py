"""Resolve the cgroup that shall be fenced, and know the daemon's own.

Owns the facts of a cgroup v2 directory, read from the mount table, the directory and /proc. Refuses to know about
slots, policies and hooks. The cgroup id is the directory's inode number: on every 64-bit kernel since 5.5 that is what
`bpf_skb_cgroup_id` and the link's info say.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from netfence.dataplane import probe
from netfence.dataplane.failure import explain
from netfence.errors import InvalidError, NotFoundError, PreconditionError

ROOT_CGROUP_ID = 1


@dataclass(frozen=True, slots=True)
class CgroupTarget:
    """A cgroup v2 directory; `fd` is open (O_PATH is not enough for bpf) and belongs to the caller."""

    path: str
    cgroup_id: int
    fd: int

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


def resolve_cgroup(path: str) -> CgroupTarget:
    """Open a cgroup v2 directory; links in the path are followed, `path` of the result is canonical.

    Raises InvalidError (not a cgroup, version 1, or the daemon itself is inside: root always is), NotFoundError.
    """
    what = f"attach to cgroup {path!r}"
    if not path.startswith("/") or "\0" in path:
        raise InvalidError(f"{what}: not an absolute path; give the directory below the cgroup2 mount")
    canonical = os.path.realpath(path)
    try:
        fd = os.open(canonical, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFoundError(f"{what}: no such directory; see `systemd-cgls` or {_cgroup_mount()}") from error
    except NotADirectoryError as error:
        raise InvalidError(f"{what}: not a directory; give the cgroup's directory") from error
    except OSError as error:
        raise explain(what, error) from error
    try:
        cgroup_id = _check_cgroup(fd, canonical, what)
    except BaseException:
        os.close(fd)
        raise
    return CgroupTarget(canonical, cgroup_id, fd)


def find_cgroup(cgroup_id: int) -> str | None:
    """Look for the directory of a cgroup by its id; None when it is gone. Walks the whole tree."""
    for directory, _, _ in os.walk(_cgroup_mount()):
        try:
            if Path(directory).stat().st_ino == cgroup_id:
                return directory
        except FileNotFoundError:
            continue
    return None


def _check_cgroup(fd: int, path: str, what: str) -> int:
    status = os.fstat(fd)
    kind, mount = probe.mounts().get(status.st_dev, ("", ""))
    if kind == "cgroup":
        raise InvalidError(f"{what}: a cgroup of version 1; give one of version 2, below {_cgroup_mount()}")
    if kind != "cgroup2":
        raise InvalidError(f"{what}: not a cgroup; give a directory below {_cgroup_mount()}")
    if status.st_ino == ROOT_CGROUP_ID or path == mount:
        raise InvalidError(f"{what}: the root cgroup holds the whole host and netfenced too; give a cgroup below it")
    own = _own_cgroup_path()
    if own is not None and Path(path) in (own, *own.parents):
        raise InvalidError(
            f"{what}: netfenced itself runs inside it ({own}) and would cut itself off; "
            "give a cgroup without it, or start netfenced in one of its own"
        )
    return status.st_ino


def _cgroup_mount() -> str:
    return next((point for kind, point in probe.mounts().values() if kind == "cgroup2"), "a cgroup2 mount (none here)")


def _own_cgroup_path() -> Path | None:
    """Find the directory of our own cgroup; None when it cannot be seen (no mount, or outside our cgroup namespace)."""
    mount = next((point for kind, point in probe.mounts().values() if kind == "cgroup2"), None)
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if mount is None or own is None or own.startswith("/.."):
        return None
    return Path(mount + own) if own != "/" else Path(mount)


def daemon_cgroup() -> tuple[int, tuple[int, ...]]:
    """Tell our own cgroup's id and the other processes in it (our children are ours; pid 0: out of our pid namespace).

    A host-direction attachment lets this cgroup's traffic pass, so the caller refuses it when there are others:
    `require_own_cgroup`. Raises PreconditionError when the cgroup cannot be seen.
    """
    own = _own_cgroup_path()
    if own is None:
        raise PreconditionError(
            "find the cgroup of netfenced: no cgroup2 mount shows it; mount cgroup2, or start it outside a container"
        )
    try:
        cgroup_id = own.stat().st_ino
        pids = [int(line) for line in (own / "cgroup.procs").read_text(encoding="ascii").split()]
    except OSError as error:
        raise explain(f"read the cgroup of netfenced at {own}", error) from error
    if os.getpid() not in pids:
        raise PreconditionError(
            f"find the cgroup of netfenced: {own} should hold it and does not; mount cgroup2 whole, at /sys/fs/cgroup"
        )
    return cgroup_id, tuple(pid for pid in pids if pid != os.getpid() and _parent(pid) != os.getpid())


def require_own_cgroup(name: str) -> int:
    """Give the daemon's cgroup id for a host-direction attachment; raises PreconditionError when others share it."""
    cgroup_id, others = daemon_cgroup()
    if others:
        raise PreconditionError(
            f"attach to {name} in direction host: netfenced's own traffic must pass and is told by its cgroup, but "
            f"{len(others)} other processes share that (pid {others[0]} is one); start netfenced in a cgroup of its "
            "own, as the systemd unit does"
        )
    return cgroup_id


def raw_senders(path: str) -> tuple[int, ...]:
    """List the processes in and below a cgroup that hold CAP_NET_RAW: their AF_PACKET traffic meets no cgroup hook."""
    bit = 1 << probe.CAPABILITIES["CAP_NET_RAW"]
    found = []
    for directory, _, _ in os.walk(path):
        try:
            pids = (Path(directory) / "cgroup.procs").read_text(encoding="ascii").split()
        except OSError:  # removed meanwhile, or threaded: its processes are listed above
            continue
        for pid in pids:
            try:
                holds = probe.effective_capabilities(pid) & bit
            except OSError:
                continue
            if holds:
                found.append(int(pid))
    return tuple(found)


def _parent(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[1])
