"""The DNS server of one attachment: UDP and TCP on exactly one address and port.

Owns the sockets and the fast path of UDP. What a query gets is `handler`'s to say, `tcp` frames messages on streams.
This is the module that the daemon imports: the names in `__all__` are the package's interface.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any, cast

from netfence.dns.cache import SharedCache
from netfence.dns.gate import Gate, ProxyAnswer
from netfence.dns.handler import Handler
from netfence.dns.settings import DnsSettings
from netfence.dns.tcp import TcpConnection
from netfence.dns.upstream import Resolver

__all__ = ["DnsServer", "DnsSettings", "Gate", "ProxyAnswer", "Resolver", "SharedCache"]

_BACKLOG = 64
_SO_BINDTOIFINDEX = 62  # include/uapi/asm-generic/socket.h; Linux 5.0


class DnsServer:
    """Serves one attachment's workload. `cache` and `resolver` are shared by all servers of the daemon.

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
    ) -> None:
        self._device = device
        self._sockets: tuple[socket.socket, ...] = ()
        self._handler = Handler(gate, settings, cache, resolver, clock)
        self._udp: asyncio.DatagramTransport | None = None
        self._tcp: asyncio.Server | None = None
        self._connections: set[TcpConnection] = set()
        self.port = 0

    async def start(self, address: str, port: int) -> None:
        """Bind UDP and TCP on exactly `address` and `port` and serve; port 0 takes any free one, then in `self.port`.

        Raises OSError as the kernel gave it; then nothing is bound, and it may be tried again.
        """
        udp, tcp = self._sockets = _bind(address, port, self._device)
        loop = asyncio.get_running_loop()
        try:
            self._udp, _ = await loop.create_datagram_endpoint(lambda: _Udp(self._handler), sock=udp)
            self._tcp = await loop.create_server(self._connection, sock=tcp, backlog=_BACKLOG)
        except BaseException:
            self._unbind()
            udp.close()
            tcp.close()
            raise
        self.port = udp.getsockname()[1]

    def use_device(self, device: int) -> None:
        """Serve what arrives by another interface from now on (a bridge took it in, or let it go); raises OSError."""
        self._device = device
        if self._udp is not None:
            for sock in self._sockets:
                sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, device)

    async def close(self) -> None:
        """Stop serving for good: sockets first, then the queries that still wait."""
        self._unbind()
        for connection in list(self._connections):
            connection.abort()
        await self._handler.close()

    def _unbind(self) -> None:
        if self._udp is not None:
            self._udp.close()
            self._udp = None
        if self._tcp is not None:
            self._tcp.close()
            self._tcp = None

    def _connection(self) -> TcpConnection:
        return TcpConnection(self._handler, self._connections)


class _Udp(asyncio.DatagramProtocol):
    """Datagrams in, datagrams out."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._hot = handler.hot
        self._clock = handler.clock
        self._gate = handler.gate
        self._unlimited = handler.bucket is None
        self._transport: asyncio.DatagramTransport | None = None
        self._sendto: Callable[[bytes, Any], None] = _nowhere

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what sends."""
        # Not isinstance: uvloop's transport is none of asyncio's classes.
        self._transport = cast(asyncio.DatagramTransport, transport)
        self._sendto = self._transport.sendto

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Drop answers that come after the end."""
        self._transport = None
        self._sendto = _nowhere

    def pause_writing(self) -> None:
        """Drop answers while the workload does not take them: it asks more than it reads; nothing is kept for it."""
        self._sendto = _nowhere

    def resume_writing(self) -> None:
        """Answer again."""
        if self._transport is not None:
            self._sendto = self._transport.sendto

    def datagram_received(self, data: bytes, addr: Any) -> None:  # noqa: ANN401 - 2- or 4-tuple, opaque to us
        """Answer one datagram. This is `Handler.ready` written out, for its speed (tests/perf/dns_bench.py)."""
        entry = self._hot.get(data[2:])
        if entry is not None and self._unlimited and entry.generation == self._gate.generation:
            now = self._clock()
            if now < entry.fresh_until or entry.current(now):
                self._gate.note_query(entry.allowed)
                self._sendto(data[:2] + entry.body, addr)
                return
        elif entry is not None and (body := self._handler.ready(data)) is not None:
            self._sendto(body, addr)
            return
        self._handler.take(data, lambda reply: self._sendto(reply, addr), tcp=False)


def _nowhere(_data: bytes, _addr: Any) -> None:  # noqa: ANN401 - as above
    """Send nothing: the socket is closed or full."""


def _bind(address: str, port: int, device: int) -> tuple[socket.socket, socket.socket]:
    """Return a UDP and a TCP socket bound to the same address, port and device; raises OSError, leaves none open."""
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
        udp.bind((address, port))
        tcp.bind((address, udp.getsockname()[1]))
    except BaseException:
        udp.close()
        tcp.close()
        raise
    return udp, tcp
