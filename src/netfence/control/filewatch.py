"""Tells when a file may have changed, by inotify on the directories it lives in.

Watching the directory sees what editors and configuration tools do: write a new file and rename it over the old one.
For a symbolic link the directory of what it points to is watched too. While something cannot be watched (a directory
is gone, a link points in a circle, inotify has no room), the file is looked at every `REARM_S`, and watching is tried
again. Knows nothing of what is in the file.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from pathlib import Path

import structlog

IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO = 0x8, 0x40, 0x80
IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF = 0x100, 0x200, 0x400, 0x800
IN_Q_OVERFLOW, IN_IGNORED, IN_ONLYDIR = 0x4000, 0x8000, 0x1000000
INTEREST = IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE | IN_DELETE_SELF | IN_MOVE_SELF

HEADER = struct.Struct("iIII")  # struct inotify_event without the name: wd, mask, cookie, len

SETTLE_S = 0.05  # writers that rename several files in a row are waited for this long
REARM_S = 1.0  # how often a directory that is gone is looked for

Signature = tuple[int, int, int, int, int] | None

_libc = ctypes.CDLL(None, use_errno=True)

log = structlog.get_logger(__name__)


class FileWatch:
    """Watches one path; make it on the running loop, `close` it after use."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._fd = -1
        self._event = asyncio.Event()
        self._directories: set[Path] = set()
        self._armed = False
        self._loop = asyncio.get_running_loop()
        if not self._open():
            remedy = "raise the sysctl fs.inotify.max_user_instances"
            log.warning("file_not_watched", file=str(self._path), effect="it is looked at every second", remedy=remedy)
        self._arm()
        self._seen = signature(self._path)

    def close(self) -> None:
        """Stop watching."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    async def changed(self) -> None:
        """Return when the file differs from when this was last called: other content, replaced, removed or back."""
        while True:
            try:
                async with asyncio.timeout(None if self._armed else REARM_S):
                    await self._event.wait()
            except TimeoutError:
                pass
            self._event.clear()
            await asyncio.sleep(SETTLE_S)
            self._arm()
            now = signature(self._path)
            if now != self._seen:
                self._seen = now
                return

    def _open(self) -> bool:
        """Begin with inotify; False when there is no room for us yet."""
        if self._fd < 0:
            try:
                self._fd = _call(_libc.inotify_init1, os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                return False
            self._loop.add_reader(self._fd, self._read)
        return True

    def _arm(self) -> None:
        """Watch the directory of the path and, for a symbolic link, the directory of its target."""
        if not self._open():
            return
        wanted = {self._path.parent}
        followed = True
        try:
            wanted.add(self._path.resolve().parent)
        except (OSError, RuntimeError):  # RuntimeError: a circle of links
            followed = False
        for directory in wanted - self._directories:
            try:
                _call(_libc.inotify_add_watch, self._fd, os.fsencode(directory), INTEREST | IN_ONLYDIR)
            except OSError:
                continue
            self._directories.add(directory)
        self._armed = followed and wanted <= self._directories

    def _read(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        offset = 0
        while offset < len(data):
            _, mask, _, length = HEADER.unpack_from(data, offset)
            offset += HEADER.size + length
            if mask & (IN_IGNORED | IN_MOVE_SELF | IN_Q_OVERFLOW):
                self._forget()
            # A file just created is not written yet; IN_CLOSE_WRITE follows. A link is complete at once.
            if not mask & IN_CREATE or self._path.is_symlink() or self._linked():
                self._event.set()

    def _forget(self) -> None:
        """Begin again: some directory is not what we watch any more. Adding a watch twice is harmless."""
        self._directories.clear()
        self._armed = False

    def _linked(self) -> bool:
        try:
            return self._path.stat().st_nlink > 1
        except OSError:
            return False


def signature(path: Path) -> Signature:
    """Return what differs when a file has other content, was replaced, or (None) cannot be seen."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _call(function: ctypes._NamedFuncPointer, *arguments: object) -> int:
    result = int(function(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
