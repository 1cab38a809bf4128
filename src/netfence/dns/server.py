"""The DNS server of one attachment: UDP and TCP on exactly one address and port.

Owns the sockets and the fast path of UDP. What a query gets is `handler`'s to say, `tcp` frames messages on streams,
`turns` shares the event loop among all servers. This is the module that the daemon imports: the names in `__all__` are
the package's interface.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import structlog

from netfence.dns.cache import SharedCache
from netfence.dns.counts import Counts, Totals
from netfence.dns.decision import Sink
from netfence.dns.explain import Looked
from netfence.dns.gate import Gate, ProxyAnswer
from netfence.dns.handler import Handler
from netfence.dns.limits import MAX_TCP_CONNECTIONS
from netfence.dns.settings import DnsSettings
from netfence.dns.tcp import TcpConnection
from netfence.dns.turns import Reader
from netfence.dns.upstream import Resolver
from netfence.log import LogLimit

__all__ = ["DnsServer", "DnsSettings", "Gate", "Looked", "ProxyAnswer", "Resolver", "SharedCache", "Totals"]

_BACKLOG = 64
_MAX_DATAGRAM = 65_535
_SO_BINDTOIFINDEX = 62  # include/uapi/asm-generic/socket.h; Linux 5.0

log = structlog.get_logger(__name__)


class DnsServer:
    """Serves one attachment's workload. `cache` and `resolver` (with its turns) are shared by all servers of a daemon.

    `device` is the index of the interface by which the workload's queries arrive, 0 where that cannot be told. Bound
    to it, the server hears nobody else (semantics.md 20), and an answer to a forged source cannot leave the host by
    another way: without that, a workload in block_all could have its questions echoed to any address it likes.
    """

    def __init__(
        self,
        gate: Gate,
        settings: DnsSettings,
        cache: SharedCache,
        resolver: Resolver,
        clock: Callable[[], float] = time.monotonic,
        *,
        device: int = 0,
        totals: Totals | None = None,
    ) -> None:
        self._device = device
        self._turns = resolver.turns
        self._handler = Handler(gate, settings, cache, resolver, clock, totals)
        self._readers: tuple[Reader, ...] = ()
        self._listener: _Listener | None = None
        self._connections: set[TcpConnection] = set()
        self.port = 0

    @property
    def counts(self) -> Counts:
        """Return what it has counted."""
        return self._handler.counts

    async def start(self, address: str, port: int) -> None:
        """Bind UDP and TCP on exactly `address` and `port` and serve; port 0 takes any free one, then in `self.port`.

        Raises OSError as the kernel gave it; then nothing is bound, and it may be tried again.
        """
        udp, tcp = _bind(address, port, self._device)
        self.port = udp.getsockname()[1]
        self._listener = _Listener(tcp, self._connection, self._connections, self._handler.counts.totals)
        self._readers = (
            Reader(self._handler, udp, _Udp(udp, self._handler).take, self._turns),
            Reader(self._handler, tcp, self._listener.take, self._turns),
        )

    def watch(self, sink: Sink | None, *, passes: bool = True) -> None:
        """Tell `sink` what becomes of each query from now on, of all that pass if `passes`; None: nobody any more."""
        self._handler.watch(sink, passes=passes)

    async def trace(self, name: str) -> list[Looked]:
        """Tell how questions for the addresses of a name would be answered now; see `explain.Tracer`."""
        return await self._handler.tracer().trace(self._handler.gate.policy, name)

    async def close(self) -> None:
        """Stop serving for good: sockets first, then the queries that still wait."""
        for reader in self._readers:
            reader.close()
        self._readers = ()
        listener, self._listener = self._listener, None
        if listener is not None:
            await listener.settle()
        for connection in list(self._connections):
            connection.abort()
        await self._handler.close()

    def _connection(self) -> TcpConnection:
        return TcpConnection(self._handler, self._connections, self._turns)


class _Udp:
    """Datagrams in, datagrams out.

    What the socket does not take at once is not sent: nothing is kept for a workload that asks more than it reads.
    """

    def __init__(self, sock: socket.socket, handler: Handler) -> None:
        self._sock = sock
        self._handler = handler
        self._hot = handler.hot
        self._ready = handler.counts.ready
        self._clock = handler.clock
        self._gate = handler.gate
        self._unlimited = handler.bucket is None
        self._held: tuple[bytes, Any] | None = None

    def take(self, until: float) -> bool:
        """Answer what is here, one datagram at least, until the time given; True when more is."""
        receive, now, answer = self._sock.recvfrom, time.monotonic, self._answer
        held, self._held = self._held, None
        if held is not None:
            answer(*held)
        while True:
            try:
                data, address = receive(_MAX_DATAGRAM)
            except BlockingIOError:
                return False
            if now() > until:
                self._held = (data, address)
                return True
            answer(data, address)

    def _answer(self, data: bytes, address: Any) -> None:  # noqa: ANN401 - 2- or 4-tuple, opaque to us
        """Answer one datagram. This is `Handler.ready` written out, for its speed (tests/perf/dns_bench.py)."""
        entry = self._hot.get(data[2:])
        if entry is not None and self._unlimited and entry.generation == self._gate.generation:
            now = self._clock()
            if now < entry.fresh_until or entry.current(now):
                self._gate.note_query(entry.allowed)
                self._ready[entry.rcode] += 1
                self._send(data[:2] + entry.body, address)
                return
        elif entry is not None and (body := self._handler.ready(data)) is not None:
            self._send(body, address)
            return
        self._handler.take(data, lambda reply: self._send(reply, address), tcp=False, peer=address)

    def _send(self, reply: bytes, address: Any) -> None:  # noqa: ANN401 - as above
        try:
            self._sock.sendto(reply, address)
        except OSError:
            """Closed, full, or no way to the client."""


class _Listener:
    """Connections in: those beyond `MAX_TCP_CONNECTIONS` are closed at once.

    Not the loop's own server, which takes all that are waiting in one go, and which an error of accept(2) ends for
    good, without a word (uvloop 0.23).
    """

    def __init__(
        self, sock: socket.socket, make: Callable[[], TcpConnection], taken: set[TcpConnection], totals: Totals
    ) -> None:
        self._sock, self._make, self._taken, self._totals = sock, make, taken, totals
        self._held: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures = LogLimit()

    def take(self, until: float) -> bool:
        """Accept what is here, one connection at least, until the time given; True when more is."""
        held, self._held = self._held, None
        if held is not None:
            self._welcome(held)
        while True:
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                return False
            except OSError as error:
                if self._failures.due(time.monotonic()):
                    log.warning("dns_accept_failed", error=str(error), since_start=self._failures.count)
                raise
            if time.monotonic() > until:
                self._held = sock
                return True
            self._welcome(sock)

    def _welcome(self, sock: socket.socket) -> None:
        if max(len(self._taken), len(self._tasks)) >= MAX_TCP_CONNECTIONS:  # `TcpConnection` counts them exactly
            self._totals.over_connections += 1
            sock.close()
            return
        task = asyncio.get_running_loop().create_task(self._serve(sock), name="dns-accept")
        self._tasks.add(task)
        task.add_done_callback(self._served)

    async def _serve(self, sock: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._make, sock)
        except BaseException:
            sock.close()
            raise

    def _served(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None and self._failures.due(time.monotonic()):
            log.warning("dns_accept_failed", error=repr(failure), since_start=self._failures.count)

    async def settle(self) -> None:
        """Wait for the connections that are being taken in; nothing is accepted any more."""
        if self._held is not None:
            self._held.close()
            self._held = None
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _bind(address: str, port: int, device: int) -> tuple[socket.socket, socket.socket]:
    """Return UDP socket and TCP listener on the same address, port and device; raises OSError, leaves none open."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    udp = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    tcp = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if family == socket.AF_INET6:
            for sock in (udp, tcp):
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if device:
            for sock in (udp, tcp):
                sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, device)
        # A restart must not wait for old connections in TIME_WAIT; listeners still exclude each other.
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
        udp.bind((address, port))
        tcp.bind((address, udp.getsockname()[1]))
        tcp.listen(_BACKLOG)
    except BaseException:
        udp.close()
        tcp.close()
        raise
    return udp, tcp
