"""The files that prove who is who to the control plane: CA, certificate, key and token, as one snapshot at a time.

Owns reading, checking and watching them. A rotation replaces several files one after the other, so a change is taken
when the files rest and belong together; what is bad changes nothing and is reported once. Knows nothing of channels:
whoever made one with `Credentials.current` waits in `changed` for a reason to make another. What a file may contain is
in `_check`, when it is looked at in `Credentials.watch`.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import ssl
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from netfence.config import ControlPlane
from netfence.control.filewatch import FileWatch
from netfence.errors import InvalidError

MAX_FILE_BYTES: Final = 4 << 20
"""Bytes of one file: the CA bundle of a distribution has a quarter of a megabyte."""

MAX_TOKEN_BYTES: Final = 7 << 10
"""Bytes of a token: gRPC servers and proxies take 8 KiB of headers unless told otherwise."""

MAX_ROTATION_S: Final = 5.0
"""How long files may contradict each other before that is reported: tools write certificate and key within a second."""

QUIET_S: Final = 0.2
"""Files that change within this time of one another are one rotation, and cost one reconnect."""

MAX_READS: Final = 3
"""How often all files are read to get them of one moment; a file that changes faster than that is watched anyway."""

_CERTIFICATE: Final = re.compile(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)
_KEY: Final = re.compile(rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----")
_NOT_VISIBLE: Final = re.compile(rb"[^\x21-\x7e]")
_MISMATCH: Final = frozenset({"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"})
_NOT_PEM: Final = "not a certificate in PEM; it begins with -----BEGIN CERTIFICATE-----"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Secrets:
    """What all files said at one moment, in PEM; `warnings` are findings that do not make them unusable.

    Without `ca` there is no TLS, with `cert` and `key` it is mutual. `token` is visible ASCII.
    """

    ca: bytes | None = field(default=None, repr=False)
    cert: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    server_name: str | None = None
    warnings: tuple[str, ...] = field(default=(), compare=False)


class Credentials:
    """The secrets in use, kept up to date while `watch` runs. For one event loop."""

    def __init__(self, settings: ControlPlane, secrets: Secrets) -> None:
        """Begin with what `load(settings)` returned."""
        self._settings = settings
        self._current = secrets
        self._refused: tuple[_File, ...] | None = None  # reported already
        self._loading = asyncio.Lock()
        self._touched = asyncio.Event()
        self._taken = asyncio.Condition()
        _warn(secrets)

    @property
    def current(self) -> Secrets:
        """Return the newest good secrets."""
        return self._current

    async def changed(self, used: Secrets) -> Secrets:
        """Return the current secrets as soon as they differ from `used`: at once if they do already."""
        async with self._taken:
            await self._taken.wait_for(lambda: self._current != used)
            return self._current

    async def reload(self) -> None:
        """Read the files now and take them if they are good; faults are logged, also those logged before (SIGHUP)."""
        self._refused = None
        await self._load(report=True)

    async def watch(self) -> None:
        """Take new secrets whenever the files change, until cancelled."""
        watches: list[FileWatch] = []
        try:
            for path in {path for _, path in _paths(self._settings)}:
                watches.append(FileWatch(path))  # noqa: PERF401 - those made before one fails are closed
            self._touched.set()  # the files may have changed since they were loaded
            async with asyncio.TaskGroup() as group:
                for watch in watches:
                    group.create_task(self._tell(watch))
                while True:
                    await self._touched.wait()
                    await self._take()
        finally:
            for watch in watches:
                watch.close()

    async def _tell(self, watch: FileWatch) -> None:
        while True:
            await watch.changed()
            self._touched.set()

    async def _take(self) -> None:
        """Load what has changed; while it is bad, the other half of a rotation is waited for."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + MAX_ROTATION_S
        while await self._touched_within(min(QUIET_S, deadline - loop.time())):
            pass
        while not await self._load(report=loop.time() >= deadline) and loop.time() < deadline:
            await self._touched_within(deadline - loop.time())

    async def _touched_within(self, seconds: float) -> bool:
        """Wait for the next change of a file, but only so long."""
        self._touched.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._touched.wait()
        except TimeoutError:
            return False
        return True

    async def _load(self, *, report: bool) -> bool:
        """Read the files; take them if they are good and new. Faults are logged if `report`, once for one content."""
        async with self._loading:
            files = await asyncio.to_thread(_read, self._settings)
            try:
                secrets = await asyncio.to_thread(_check, self._settings, files)
            except InvalidError as error:
                if report and files != self._refused:
                    self._refused = files
                    _report(error)
                elif not report:
                    log.debug("credentials_unsettled", errors=list(error.errors))
                return False
            self._refused = None
            if secrets != self._current:
                _warn(secrets)
                log.info("credentials_loaded", files=[str(path) for _, path in _paths(self._settings)])
                async with self._taken:
                    self._current = secrets
                    self._taken.notify_all()
            return True


def load(settings: ControlPlane) -> Secrets:
    """Read and check all files; blocking.

    Raises InvalidError with every fault: key, file, what is wrong with it and what to do.
    """
    return _check(settings, _read(settings))


@dataclass(frozen=True, slots=True)
class _File:
    """A file as it was read: its content or why there is none."""

    key: str
    path: Path
    content: bytes = field(default=b"", repr=False)
    fault: str = ""
    open_to_all: bool = False
    inode: tuple[int, ...] = field(default=(), compare=False)


def _paths(settings: ControlPlane) -> list[tuple[str, Path]]:
    """Return the files to read: key below `control_plane`, path."""
    tls = settings.tls
    files = {"tls.ca": tls.ca, "tls.cert": tls.cert, "tls.key": tls.key, "token_file": settings.token_file}
    return [(key, path) for key, path in files.items() if path is not None]


def _read(settings: ControlPlane) -> tuple[_File, ...]:
    """Read all files as of one moment: if one was replaced meanwhile, all are read again."""
    files: tuple[_File, ...] = ()
    for _ in range(MAX_READS):
        files = tuple(_read_file(key, path) for key, path in _paths(settings))
        if all(_inode(file.path) == file.inode for file in files):
            break
    return files


def _read_file(key: str, path: Path) -> _File:
    try:
        # Without O_NONBLOCK the open of a pipe would wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        return _File(key, path, fault=_cannot(error))
    try:
        info = os.fstat(fd)
        content, fault = _content(fd, info)
    finally:
        os.close(fd)
    open_to_all = bool(info.st_mode & (stat.S_IROTH | stat.S_IWOTH))
    return _File(key, path, content, fault, open_to_all, _identity(info))


def _content(fd: int, info: os.stat_result) -> tuple[bytes, str]:
    """Return the content of an open file, or why it is none of ours."""
    if not stat.S_ISREG(info.st_mode):
        return b"", "not a regular file; give the path of one"
    content = bytearray()
    while len(content) <= MAX_FILE_BYTES:
        try:
            part = os.read(fd, MAX_FILE_BYTES)
        except OSError as error:
            return b"", _cannot(error)
        if not part:
            return bytes(content), ""
        content += part
    return b"", f"longer than {MAX_FILE_BYTES} bytes; give the path of a file in PEM or of a token"


def _cannot(error: OSError) -> str:
    return f"{(error.strerror or str(error)).lower()}; create it, let the daemon read it, or correct its path"


def _inode(path: Path) -> tuple[int, ...]:
    try:
        return _identity(path.stat())
    except OSError:
        return ()


def _identity(info: os.stat_result) -> tuple[int, ...]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def _check(settings: ControlPlane, files: tuple[_File, ...]) -> Secrets:
    """Return the secrets in files that were read; raises InvalidError with every fault."""
    found = {file.key: file for file in files}
    faults = [_named(file, file.fault) for file in files if file.fault]
    warnings = [
        _named(file, "every user of this host can read or write it; chmod o= it")
        for file in files
        if file.open_to_all and file.key in {"tls.key", "token_file"}
    ]

    def content(key: str) -> bytes | None:
        file = found.get(key)
        return None if file is None or file.fault else file.content

    ca, cert, key, raw_token = content("tls.ca"), content("tls.cert"), content("tls.key"), content("token_file")
    if ca is not None and not _has_certificate(ca):
        faults.append(_named(found["tls.ca"], _NOT_PEM))
    if cert is not None and not _has_certificate(cert):
        faults.append(_named(found["tls.cert"], _NOT_PEM))
        cert = None
    if key is not None and (fault := _key_fault(key, cert)):
        faults.append(_named(found["tls.key"], fault))
    if raw_token is not None and (fault := _token_fault(raw_token)):
        faults.append(_named(found["token_file"], fault))
    if faults:
        raise InvalidError(faults)
    if cert is not None and (end := _not_after(cert)) <= datetime.now(UTC):
        warnings.append(_named(found["tls.cert"], f"it expired at {end.isoformat()}; renew it"))
    token = None if raw_token is None else _stripped(raw_token).decode("ascii")
    if token and ca is None and settings.insecure:
        warnings.append(_named(found["token_file"], "the token may travel in plaintext; set control_plane.tls.ca"))
    return Secrets(ca, cert, key, token, settings.tls.server_name, tuple(warnings))


def _named(file: _File, fault: str) -> str:
    return f"control_plane.{file.key}: {file.path}: {fault}"


def _has_certificate(pem: bytes) -> bool:
    """Tell whether OpenSSL reads every certificate in a text, and there is one."""
    if not _CERTIFICATE.search(pem):  # OpenSSL also reads TRUSTED CERTIFICATE, and lone CRLs; gRPC does not
        return False
    with _as_path(pem) as path:
        try:
            _context().load_verify_locations(cafile=path)
        except ssl.SSLError:
            return False
    return True


def _key_fault(key: bytes, cert: bytes | None) -> str:
    """Tell what is wrong with a key, or with it beside a certificate; empty: nothing."""
    if not _KEY.search(key):
        return "not a private key in PEM; it begins with -----BEGIN PRIVATE KEY-----"
    if cert is None:  # its own fault is told already
        return ""
    with ExitStack() as stack:
        cert_path, key_path = stack.enter_context(_as_path(cert)), stack.enter_context(_as_path(key))
        try:
            _context().load_cert_chain(cert_path, key_path, password=_refuse)
        except _EncryptedError:
            return "encrypted, and nobody is here to type a passphrase; store it decrypted (openssl pkey), mode 0600"
        except ssl.SSLError as error:
            if error.reason in _MISMATCH:
                own = "belongs to another certificate than the first in control_plane.tls.cert"
                return f"{own}; install the pair that was issued together, intermediates after the certificate"
            return f"not a usable private key ({error.reason or error}); issue certificate and key again"
    return ""


class _EncryptedError(Exception):
    pass


def _refuse() -> str:
    """Stand in for OpenSSL's prompt, which would stop the daemon at a terminal."""
    raise _EncryptedError


def _token_fault(raw: bytes) -> str:
    token = _stripped(raw)
    if not token:
        return "empty; write the token into it, or unset control_plane.token_file"
    if bad := _NOT_VISIBLE.search(token):
        what = f"byte {bad.start() + 1} is 0x{token[bad.start()]:02x}"
        return f"{what}; allowed is visible ASCII: the token alone, in one line, without 'Bearer'"
    if len(token) > MAX_TOKEN_BYTES:
        return f"longer than {MAX_TOKEN_BYTES} bytes, which servers refuse; give the path of a token"
    return ""


def _stripped(raw: bytes) -> bytes:
    return raw.rstrip(b"\r\n")


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("DEFAULT@SECLEVEL=0")  # how strong a key must be is for the control plane to say
    return context


@contextmanager
def _as_path(content: bytes) -> Iterator[str]:
    """Give bytes a path, because OpenSSL reads keys from files only; they never touch a disk."""
    fd = os.memfd_create("netfence")
    with os.fdopen(fd, "wb") as stream:
        stream.write(content)
        stream.flush()
        yield f"/proc/self/fd/{fd}"


def _not_after(pem: bytes) -> datetime:
    """Return when the first certificate ends (RFC 5280 section 4.1); OpenSSL has found it well-formed."""
    block = _CERTIFICATE.search(pem)
    der = base64.b64decode(block[1] if block else b"")
    _, at, _ = _element(der, 0)  # Certificate
    _, at, _ = _element(der, at)  # TBSCertificate
    tag, _, end = _element(der, at)
    if tag == 0xA0:  # version, which the first version has not
        at = end
    for _ in ("serialNumber", "signature", "issuer"):
        _, _, at = _element(der, at)
    _, at, _ = _element(der, at)  # Validity
    _, _, at = _element(der, at)  # notBefore
    tag, at, end = _element(der, at)
    text = der[at:end].decode("ascii")
    if tag == 0x17:  # UTCTime, whose years are 1950 to 2049
        text = ("20" if text < "50" else "19") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Return tag, first byte and end of the content of the DER element at an offset."""
    tag, length, at = der[at], der[at + 1], at + 2
    if length & 0x80:
        octets = length & 0x7F
        length, at = int.from_bytes(der[at : at + octets], "big"), at + octets
    return tag, at, at + length


def _report(error: InvalidError) -> None:
    log.error("credentials_refused", errors=list(error.errors), effect="the credentials loaded before stay in use")


def _warn(secrets: Secrets) -> None:
    for warning in secrets.warnings:
        log.warning("credentials_warning", warning=warning)
