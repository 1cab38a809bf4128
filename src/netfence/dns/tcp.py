"""One TCP connection of a client: length-prefixed messages, pipelined, bounded, with an idle time-out (RFC 7766).

A bad length prefix, a response, or a connection too many closes it. Reading pauses while `MAX_TCP_PIPELINE` queries are
being answered or the client does not read its answers. The loop reads 256 kB of a stream at once, thousands of queries:
they are answered in slices (`turns`).
"""

from __future__ import annotations

import asyncio
from typing import cast

from netfence.dns.decision import Peer
from netfence.dns.handler import Handler
from netfence.dns.limits import (
    MAX_TCP_CONNECTIONS,
    MAX_TCP_PIPELINE,
    MAX_TCP_QUERY,
    MAX_TCP_UNSENT,
    TCP_IDLE_S,
)
from netfence.dns.turns import Turns
from netfence.dns.wire import HEADER_LEN

_PREFIX = 2  # octets of the length before a message


class TcpConnection(asyncio.Protocol):
    """Frames messages for a `Handler`. `open_connections` holds the live connections of the attachment."""

    def __init__(
        self, handler: Handler, open_connections: set[TcpConnection], turns: Turns, idle_s: float = TCP_IDLE_S
    ) -> None:
        self._handler = handler
        self._open = open_connections
        self._turns = turns
        self._idle_s = idle_s
        self._transport: asyncio.Transport | None = None
        self._peer: Peer = None
        self._buffer = bytearray()
        self._backlog = False  # it waits for its turn
        self._answering = 0
        self._full = False  # the client does not read
        self._ended = False  # the client sends no more
        self._progress = 0.0  # loop time of the last complete query or answer taken
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection, unless there are too many."""
        if len(self._open) >= MAX_TCP_CONNECTIONS:
            transport.close()
            return
        self._transport = cast(asyncio.Transport, transport)
        self._peer = transport.get_extra_info("peername")
        self._open.add(self)
        self._transport.set_write_buffer_limits(high=MAX_TCP_UNSENT)
        loop = asyncio.get_running_loop()
        self._progress = loop.time()
        self._timer = loop.call_later(self._idle_s, self._on_timer)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Forget the connection."""
        self._transport = None
        self._open.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take what the client sent."""
        self._buffer += data
        self._work()

    def eof_received(self) -> bool:
        """Let what is waiting and being answered go out, then close."""
        self._ended = True
        return self._answering > 0 or self._backlog or self._full

    def pause_writing(self) -> None:
        """Stop taking queries: the client does not read."""
        self._full = True
        self._work()

    def resume_writing(self) -> None:
        """Go on."""
        self._full = False
        self._progress = asyncio.get_running_loop().time()
        self._work()

    def _work(self) -> None:
        """Hand complete messages to the handler for a slice, as far as the bounds allow, and read on or pause."""
        if not self._backlog:
            began = self._turns.clock()
            self._backlog = self._slice(began)
            self._turns.note(self._handler, began)
            if self._backlog:
                self._turns.join(self._handler, self._go_on)
        self._settle()

    def _go_on(self) -> bool:
        """Have one slice of the backlog."""
        self._backlog = self._slice(self._turns.clock())
        if not self._backlog:
            self._settle()
        return self._backlog

    def _slice(self, now: float) -> bool:
        """Take messages for a slice, one at least where there is one; True when there is another."""
        until = self._turns.until(self._handler, now)
        if (message := self._next()) is None:
            return False
        self._progress = asyncio.get_running_loop().time()
        while True:
            del self._buffer[: _PREFIX + len(message)]
            self._message(message)
            if (message := self._next()) is None:
                return False
            if self._turns.clock() > until:
                return True

    def _next(self) -> bytes | None:
        """Return the next complete message, which stays in the buffer; None when none may be taken."""
        buffer = self._buffer
        if self._transport is None or self._full or self._answering >= MAX_TCP_PIPELINE or len(buffer) < _PREFIX:
            return None
        length = buffer[0] << 8 | buffer[1]
        if not HEADER_LEN <= length <= MAX_TCP_QUERY:
            self._transport.abort()
            return None
        return bytes(buffer[_PREFIX : _PREFIX + length]) if len(buffer) >= _PREFIX + length else None

    def _settle(self) -> None:
        """Read on, or wait, or end, after a slice."""
        if self._transport is None or self._transport.is_closing():
            return
        if self._full or self._backlog or self._answering >= MAX_TCP_PIPELINE:
            self._transport.pause_reading()
        elif not self._ended:
            self._transport.resume_reading()
        elif not self._answering:
            self._transport.close()

    def _message(self, message: bytes) -> None:
        if (reply := self._handler.ready(message)) is not None:
            self._write(reply)
            return
        self._answering += 1
        if not self._handler.take(message, self._answer, tcp=True, peer=self._peer):
            self._answering -= 1
            self.abort()

    def _answer(self, reply: bytes) -> None:
        """Send the reply to one query, now or later, and go on with those behind it."""
        self._answering -= 1
        if self._transport is None:
            return
        self._write(reply)
        if self._ended and not self._answering and not self._is_whole():
            self._transport.close()
        elif self._answering == MAX_TCP_PIPELINE - 1:
            asyncio.get_running_loop().call_soon(self._work)

    def _is_whole(self) -> bool:
        """Tell whether a whole message waits: of a client that sends no more, what is left else will never be one."""
        buffer = self._buffer
        return len(buffer) >= _PREFIX and len(buffer) >= _PREFIX + (buffer[0] << 8 | buffer[1])

    def _write(self, reply: bytes) -> None:
        if self._transport is not None:
            self._transport.write(len(reply).to_bytes(2, "big") + reply)

    def _on_timer(self) -> None:
        """Close when nothing moved for the idle time; queries being answered hold it open unless nobody reads."""
        self._timer = None
        if self._transport is None:
            return
        loop = asyncio.get_running_loop()
        left = self._progress + self._idle_s - loop.time()
        if left <= 0 and (self._full or not self._answering):
            self._transport.abort()
            return
        self._timer = loop.call_later(max(left, 1.0 if left <= 0 else left), self._on_timer)
