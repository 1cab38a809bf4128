"""Watch cgroups on the event loop: removed or not (semantics.md 23).

Owns one inotify descriptor. A cgroup's own directory tells nothing when it is removed, its parent's does (IN_DELETE),
so one watch per parent serves all its children. What a deletion means is decided by looking: the cgroup id (the inode
number) tells a cgroup from a new one of the same path.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

from netfence.dataplane.events import CgroupGone, Event
from netfence.dataplane.failure import explain
from netfence.errors import ExhaustedError

_IN_DELETE, _IN_DELETE_SELF, _IN_ONLYDIR, _IN_Q_OVERFLOW = 0x200, 0x400, 0x01000000, 0x4000
_EVENT = struct.Struct("=iIII")  # watch, mask, cookie, length of the name that follows
_READ_BYTES = 1 << 14

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class CgroupWatcher:
    """Calls back with CgroupGone; lives on the loop's thread and never waits."""

    def __init__(self, callback: Callable[[Event], None]) -> None:
        self._callback = callback
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fd = -1
        self._paths: dict[int, Path] = {}  # cgroup id → directory
        self._parents: dict[Path, int] = {}  # parent directory → inotify watch

    def open(self) -> None:
        """Start on the running loop; raises ExhaustedError (fs.inotify.max_user_instances)."""
        try:
            self._fd = _check(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            raise explain("watch cgroups", error, "raise the sysctl fs.inotify.max_user_instances") from error
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._on_readable)

    def close(self) -> None:
        """Stop; idempotent."""
        if self._fd < 0:
            return
        if self._loop is not None:
            self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1

    def watch(self, cgroup_id: int, path: str) -> None:
        """Tell when the cgroup is removed, also when it was before this call (then in the loop's next turn).

        Raises ExhaustedError naming fs.inotify.max_user_watches; then nothing is watched.
        """
        directory = Path(path)
        try:
            self._watch_parent(directory.parent)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ExhaustedError(
                    f"watch cgroup {path}: no inotify watch left; raise the sysctl fs.inotify.max_user_watches"
                ) from error
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise explain(f"watch cgroup {path}", error) from error
        self._paths[cgroup_id] = directory
        if self._loop is not None and not _exists(directory, cgroup_id):
            self._loop.call_soon(self._look_at, cgroup_id)

    def unwatch(self, cgroup_id: int) -> None:
        """Forget the cgroup."""
        directory = self._paths.pop(cgroup_id, None)
        if directory is None or any(each.parent == directory.parent for each in self._paths.values()):
            return
        watch = self._parents.pop(directory.parent, None)
        if watch is not None and self._fd >= 0:
            _libc.inotify_rm_watch(self._fd, watch)  # fails when the parent is gone, and its watch with it

    def _watch_parent(self, parent: Path) -> None:
        # Always asked, although known: a parent that was removed and made again is another inode.
        mask = _IN_DELETE | _IN_DELETE_SELF | _IN_ONLYDIR
        self._parents[parent] = _check(_libc.inotify_add_watch(self._fd, os.fsencode(parent), mask))

    def _on_readable(self) -> None:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        parents = {watch: parent for parent, watch in self._parents.items()}
        suspects: set[int] = set()
        offset = 0
        while offset + _EVENT.size <= len(data):
            watch, mask, _, length = _EVENT.unpack_from(data, offset)
            name = data[offset + _EVENT.size : offset + _EVENT.size + length].rstrip(b"\0")
            offset += _EVENT.size + length
            parent = parents.get(watch)
            if mask & _IN_Q_OVERFLOW:
                suspects |= self._paths.keys()
            elif parent is not None:
                directory = parent / os.fsdecode(name) if name else None
                suspects |= {
                    each
                    for each, path in self._paths.items()
                    if path == directory or (not name and path.parent == parent)
                }
        for cgroup_id in suspects:
            self._look_at(cgroup_id)

    def _look_at(self, cgroup_id: int) -> None:
        """Tell that a watched cgroup is gone, if it is; a failing receiver is reported and costs no later event."""
        directory = self._paths.get(cgroup_id)
        if directory is None or _exists(directory, cgroup_id):
            return
        self.unwatch(cgroup_id)
        event = CgroupGone(cgroup_id, str(directory))
        try:
            self._callback(event)
        except Exception as error:  # noqa: BLE001 - whatever the receiver raises, the watcher goes on
            if self._loop is not None:
                self._loop.call_exception_handler({"message": f"receiver of {event} failed", "exception": error})


def _exists(directory: Path, cgroup_id: int) -> bool:
    try:
        return directory.stat().st_ino == cgroup_id
    except OSError:
        return False
