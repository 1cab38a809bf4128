"""The HTTP server of the metrics: one page, for Prometheus, on `metrics.listen`.

Not the one of prometheus_client, which gives every connection a thread and no time-out: whoever reaches the port may be
a workload. Here a client has one short request per connection, `REQUEST_S` to send it and `ANSWER_S` to take the
answer. Of more than `MAX_CONNECTIONS` the oldest goes, first of those that have not sent their request: who holds them
keeps nobody else out for long. What pages cost is bounded by who makes them (`metrics_collector`). Nothing a client
sends is logged, and nothing of it is sent back.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import structlog

from netfence.errors import NetfenceError, PermissionDeniedError, PreconditionError
from netfence.log import LogLimit
from netfence.metrics import CONTENT_TYPE

KEY: Final = "metrics.listen"

MAX_CONNECTIONS: Final = 16
"""Open connections: some Prometheus servers and a curl, each of which has one for a second."""

MAX_REQUEST: Final = 8192
"""Octets of a request: Prometheus sends 300."""

REQUEST_S: Final = 3.0
"""Seconds a client has for sending its request."""

ANSWER_S: Final = 10.0
"""Seconds a client has for taking the answer once it is made; Prometheus itself gives up after as long by default."""

BETWEEN_S: Final = 0.01
"""Seconds between two connections: who opens ever new ones costs the loop, which answers DNS too, a few percent."""

RESOLVE_S: Final = 2.0
"""Seconds for resolving a name in `metrics.listen`: fences that a reboot took off wait for it."""

AGAIN_S: Final = 1.0
"""How often an address that is not to be had is tried again."""

COMPLAIN_EVERY: Final = 60
"""Tries between two complaints about it."""

PAUSE_S: Final = 1.0
"""How long a socket on which nothing can be accepted (no descriptor left) is left alone."""

BACKLOG: Final = 32

_TEXT: Final = "text/plain; charset=utf-8"
_HOME: Final = b"netfenced: the metrics are at /metrics\n"
_WILDCARDS: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104 - to warn of them

_NOT_HERE: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

MakePage = Callable[[], Awaitable[bytes]]

log = structlog.get_logger(__name__)


async def listen(address: str) -> list[socket.socket]:
    """Listen on `host:port` (IPv6 in brackets), on every address of the host where that is a name.

    Raises PreconditionError or PermissionDeniedError naming the key; then nothing is bound.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    what = f"{KEY}: listen on {address}"
    try:
        async with asyncio.timeout(RESOLVE_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        why = error.strerror or str(error) or f"{host} is not resolved within {RESOLVE_S:g} s"
        remedy = "set it to an address of this host and a free port"
        raise PreconditionError(f"{what}: {why}; {remedy}") from error
    sockets: list[socket.socket] = []
    failures: list[OSError] = []
    for family, _, _, _, place in dict.fromkeys(found):
        try:
            sockets.append(_bound(family, place))
        except OSError as error:
            failures.append(error)
    # A name may stand for an address that this host has not (localhost, where IPv6 is off), if it has another.
    if fatal := [error for error in failures if not sockets or error.errno not in _NOT_HERE]:
        for sock in sockets:
            sock.close()
        worst = min(fatal, key=lambda one: one.errno in _NOT_HERE)
        raise _explain(what, worst) from worst
    if any(sock.getsockname()[0] in _WILDCARDS for sock in sockets):
        effect = "whoever reaches any address of this host reads the metrics, workloads included if policies let them"
        log.warning("metrics_on_every_address", listen=address, effect=effect)
    return sockets


def _bound(family: int, place: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        # A restart must not wait for old connections in TIME_WAIT; listeners still exclude each other.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(place)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _explain(what: str, error: OSError) -> PreconditionError | PermissionDeniedError:
    why = f"{what}: {error.strerror or error}"
    if error.errno == errno.EADDRINUSE:
        return PreconditionError(f"{why}; stop what listens there, or set {KEY} to another port")
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDeniedError(f"{why}; needs CAP_NET_BIND_SERVICE, or set {KEY} to a port from 1024 on")
    return PreconditionError(f"{why}; set {KEY} to an address of this host")


class MetricsPlace:
    """Where the metrics are served, `address` (None: nowhere), also where it is to be had only later."""

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._sockets: list[socket.socket] = []

    async def open(self) -> NetfenceError | None:
        """Listen, and return what is in the way.

        Let that end the start where nothing is fenced yet, and never else: a fenced workload may share the host's
        ports, and take this one while the daemon is away.
        """
        if self._address is not None:
            try:
                self._sockets = await listen(self._address)
            except NetfenceError as error:
                return error
        return None

    async def serve(self, make: MakePage) -> None:
        """Serve the page that `make` makes until cancelled, as soon as there is something to listen on."""
        tries = 0
        while not self._sockets:
            if (error := await self.open()) is not None:
                if tries % COMPLAIN_EVERY == 0:
                    log.error("metrics_not_served", error=str(error), effect="nobody reads them; it is tried again")
                tries += 1
                await asyncio.sleep(AGAIN_S)
        await MetricsServer(self._sockets, make).run()

    def close(self) -> None:
        """Listen no more. Idempotent."""
        for sock in self._sockets:
            sock.close()


class MetricsServer:
    """Serves the page that `make` makes, on sockets that listen; they stay the caller's to close."""

    def __init__(self, sockets: Sequence[socket.socket], make: MakePage) -> None:
        self._sockets, self._make = sockets, make
        self._open: dict[asyncio.Task[None], None] = {}  # oldest first
        self._asking: dict[asyncio.Task[None], None] = {}  # of these: have not sent their request yet
        self._failures = LogLimit()

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            for sock in self._sockets:
                group.create_task(self._accept(sock, group), name="metrics")

    async def _accept(self, listener: socket.socket, group: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                self._complain("metrics_accept_failed", error)
                await asyncio.sleep(PAUSE_S)
                continue
            sock.setblocking(False)
            self._make_room()
            task = group.create_task(self._serve(sock), name="metrics connection")
            self._open[task] = self._asking[task] = None
            task.add_done_callback(self._forget)
            await asyncio.sleep(BETWEEN_S)

    def _make_room(self) -> None:
        """Drop a connection if there are as many as there may be."""
        if len(self._open) >= MAX_CONNECTIONS:
            oldest = next(iter(self._asking or self._open))
            self._forget(oldest)
            oldest.cancel()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._open.pop(task, None)
        self._asking.pop(task, None)

    async def _serve(self, sock: socket.socket) -> None:
        """Have one request and answer it."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        try:
            async with asyncio.timeout(REQUEST_S):
                request = await _request(sock)
            if request is None or task is None:
                return
            self._asking.pop(task, None)
            answer = await self._answer(request)
            async with asyncio.timeout(ANSWER_S):
                await loop.sock_sendall(sock, answer)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        except (OSError, TimeoutError):
            """The client went away, or took too long."""
        finally:
            sock.close()

    async def _answer(self, request: bytes) -> bytes:
        method, path = _line(request)
        if not method:
            return _response("400 Bad Request", b"not an HTTP request\n")
        if method != "GET":
            return _response("405 Method Not Allowed", b"GET only\n", allow="GET")
        if path == "/metrics":
            return await self._page()
        if path == "/":
            return _response("200 OK", _HOME)
        return _response("404 Not Found", _HOME)

    async def _page(self) -> bytes:
        try:
            return _response("200 OK", await self._make(), content_type=CONTENT_TYPE)
        except Exception as error:  # noqa: BLE001 - one scrape; it must not end the server
            self._complain("metrics_failed", error)
            return _response("500 Internal Server Error", b"see the log of netfenced\n")

    def _complain(self, event: str, error: Exception) -> None:
        if self._failures.due(time.monotonic()):
            log.warning(event, error=repr(error), since_start=self._failures.count)


async def _request(sock: socket.socket) -> bytes | None:
    """Read the head of a request; None when the client ended without one. One that is too long is cut, and refused."""
    loop = asyncio.get_running_loop()
    data = b""
    while b"\r\n\r\n" not in data and b"\n\n" not in data:
        if len(data) >= MAX_REQUEST:
            return b""
        more = await loop.sock_recv(sock, MAX_REQUEST)
        if not more:
            return None
        data += more
    return data


def _line(request: bytes) -> tuple[str, str]:
    """Return method and path of a request line, empty when it is none; what follows a `?` is for nobody."""
    words = request.split(b"\n", 1)[0].split()
    if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
        return "", ""
    method, target, _ = (word.decode("latin-1") for word in words)
    return method, target.partition("?")[0]


def _response(status: str, body: bytes, *, content_type: str = _TEXT, allow: str = "") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {content_type}", f"Content-Length: {len(body)}", "Connection: close"]
    if allow:
        lines.append(f"Allow: {allow}")
    return "\r\n".join([*lines, "X-Content-Type-Options: nosniff", "", ""]).encode() + body
