"""The place of the API's unix socket in the file system: who may connect, and whose it is.

The listener binds a name in a private directory beside the final one; owner and mode are set there, and only then does
the socket appear under its final name (`publish`). So nobody can connect before the permissions stand, no process-wide
umask is touched, and two daemons that start at once cannot both win: the final name is made by link(2), which fails if
there is one already. A socket that nobody listens on is replaced; one with a listener, or anything else, is left alone.
"""

from __future__ import annotations

import errno
import grp
import os
import secrets
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from netfence.errors import InvalidError, NetfenceError, NotFoundError, PermissionDeniedError, PreconditionError

MAX_PATH_BYTES: Final = 107
"""Bytes of a unix socket's path: sun_path has 108 with its final NUL (unix(7))."""

_PRIVATE_NAME_BYTES: Final = 10
"""Bytes that the private name adds to the directory: "/.n" + 5 + "/s"."""

_LARGEST_GID: Final = 2**32 - 2
"""The largest number of a group; the next one means "leave it as it is" to chown(2)."""

_PROBE_TIMEOUT_S: Final = 2.0
"""How long a connect to an existing socket may take; a unix socket answers at once or its backlog is full."""


@dataclass(frozen=True, slots=True)
class _Inode:
    device: int
    number: int

    @classmethod
    def of(cls, path: Path) -> _Inode | None:
        try:
            found = path.lstat()
        except FileNotFoundError:
            return None
        return cls(found.st_dev, found.st_ino)


class SocketPlace:
    """One socket's way from its private name to its final one and away again. Not for use by several threads."""

    def __init__(self, path: Path, group: str | None, setting: str = "`socket` or --socket") -> None:
        """Check `path` and `group` and make the private directory; nothing that exists is touched.

        `setting` is what error messages name as the place where the path was chosen.

        Raises InvalidError for a path that is too long or an unknown group, NotFoundError for a missing directory,
        PreconditionError for a path in use, PermissionDeniedError where the directory is not ours to write.
        """
        self.path = path.absolute()
        self._setting = setting
        self._gid = group_id(group) if group else None
        _check_length(self.path, setting)
        self._stale = self._probe()
        private = self.path.parent / f".n{secrets.token_urlsafe(4)[:5]}"
        try:
            private.mkdir(mode=0o700)
        except OSError as error:
            raise self._failure(error) from error
        self._private: Path | None = private
        self._ours: _Inode | None = None

    @property
    def bind_path(self) -> Path:
        """Where the listener has to bind before `publish`."""
        if self._private is None:
            raise RuntimeError("the socket has been published or given up")
        return self._private / "s"

    def publish(self) -> None:
        """Give the bound socket its mode (0600, or 0660 with a group) and its final name. Raises as the constructor."""
        bound = self.bind_path
        try:
            if self._gid is not None:
                os.chown(bound, -1, self._gid)
            bound.chmod(0o600 if self._gid is None else 0o660)
            if self._stale is not None:
                self._set_aside(self._stale)
            os.link(bound, self.path)
        except FileExistsError as error:
            raise self._in_use("another daemon took it just now") from error
        except OSError as error:
            raise self._failure(error) from error
        self._ours = _Inode.of(bound)
        self.give_up()

    def give_up(self) -> None:
        """Remove the private directory; for a start that failed before `publish`, and harmless otherwise."""
        if self._private is None:
            return
        for name in ("s", "stale"):
            (self._private / name).unlink(missing_ok=True)
        self._private.rmdir()
        self._private = None

    def remove(self) -> None:
        """Take the socket away from its final name if it is still the one that we published."""
        if self._ours is not None and _Inode.of(self.path) == self._ours:
            self.path.unlink(missing_ok=True)
        self._ours = None

    def _probe(self) -> _Inode | None:
        """Return the inode of a socket that nobody listens on, None for no file; raise for anything else."""
        try:
            found = self.path.lstat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failure(error) from error
        if not stat.S_ISSOCK(found.st_mode):
            raise self._in_use("it exists and is not a socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_PROBE_TIMEOUT_S)
            try:
                probe.connect(os.fspath(self.path))
            except (ConnectionRefusedError, FileNotFoundError):
                return _Inode(found.st_dev, found.st_ino)
            except (TimeoutError, BlockingIOError) as error:
                raise self._in_use("a process listens on it but does not answer") from error
            except OSError as error:
                raise self._failure(error) from error
        raise self._in_use("another process is listening on it")

    def _set_aside(self, stale: _Inode) -> None:
        """Move the dead socket into the private directory, unless it has become somebody's living one meanwhile."""
        aside = self.bind_path.with_name("stale")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        if _Inode.of(aside) != stale:
            os.link(aside, self.path)
            raise self._in_use("another daemon took it just now")

    def _in_use(self, why: str) -> PreconditionError:
        return PreconditionError(
            f"listen on socket {self.path}: {why}; stop that process, or choose another path with {self._setting}"
        )

    def _failure(self, error: OSError) -> NetfenceError:
        what = f"listen on socket {self.path}: {os.strerror(error.errno or 0).lower()}"
        other = f"choose another path with {self._setting}"
        match error.errno:
            case errno.ENOENT | errno.ENOTDIR:
                return NotFoundError(f"{what}; create the directory {self.path.parent} or {other}")
            case errno.EACCES | errno.EPERM:
                return PermissionDeniedError(f"{what}; run as root, or {other}")
            case _:
                return PreconditionError(f"{what}; free the cause or {other}")


def _check_length(path: Path, setting: str) -> None:
    longest = max(len(os.fsencode(path)), len(os.fsencode(path.parent)) + _PRIVATE_NAME_BYTES)
    if longest > MAX_PATH_BYTES:
        raise InvalidError(
            f"listen on socket {path}: the path needs {longest} bytes and a unix socket's may have {MAX_PATH_BYTES};"
            f" choose a shorter one with {setting}"
        )


def group_id(group: str) -> int:
    """Return the number of a group given by name or by number, which may be nobody's; raises InvalidError.

    What is a group's name is a name, whatever it looks like.
    """
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        pass
    if not (group.isascii() and group.isdigit()):
        what = f"socket_group {group!r}: no such group on this host"
        raise InvalidError(f"{what}; create it, or give the name or number of one that exists")
    if int(group) > _LARGEST_GID:
        raise InvalidError(f"socket_group {group}: numbers of groups end at {_LARGEST_GID}; give a smaller one")
    return int(group)
