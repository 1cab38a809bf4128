"""TCP connections of clients: framing, garbage, bounds, time-outs (semantics.md 19)."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
import struct

import pytest
from dnslib import DNSRecord
from structlog.testing import capture_logs
from tests.unit.dns.world import (
    PUBLIC,
    World,
    addresses,
    policy,
    question,
    rcode,
    read_framed,
    run,
    tcp_exchange,
    until,
    world,
)

from netfence.dns import tcp as tcp_module
from netfence.dns import turns as turns_module
from netfence.dns.limits import MAX_TCP_CONNECTIONS, MAX_TCP_PIPELINE, MAX_TCP_QUERY, TCP_IDLE_S
from netfence.dns.tcp import TcpConnection

ZONE = f"a.org. 300 IN A {PUBLIC}\n"


def framed(query: bytes) -> bytes:
    return struct.pack("!H", len(query)) + query


def connections(w: World) -> set[TcpConnection]:
    return w.server._connections


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0",
        b"\0\x0b" + bytes(11),
        struct.pack("!H", MAX_TCP_QUERY + 1),
        b"GET / HTTP/1.1\r\n\r\n",
        framed(question("a.org")[:2] + b"\x81\x80" + question("a.org")[4:]),
    ],
    ids=["zero", "below-a-header", "too-long", "http", "response"],
)
def test_garbage_closes_the_connection(data: bytes) -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            reader, writer = await asyncio.open_connection("127.0.0.1", w.server.port)
            writer.write(data)
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await asyncio.wait_for(read_framed(reader), 5)
            writer.close()
            await until(lambda: not connections(w))

    run(go())


def test_a_query_in_single_octets_is_answered() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            reader, writer = await asyncio.open_connection("127.0.0.1", w.server.port)
            for octet in framed(question("a.org")):
                writer.write(bytes([octet]))
                await writer.drain()
                await asyncio.sleep(0)
            reply = DNSRecord.parse(await asyncio.wait_for(read_framed(reader), 5))
            assert addresses(reply) == [PUBLIC]
            writer.close()

    run(go())


@pytest.mark.parametrize("rest", [b"", b"\0", framed(question("a.org"))[:-1]], ids=["nothing", "prefix", "partial"])
def test_a_half_closed_connection_still_gets_its_answers(rest: bytes) -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            w.upstream.hold = asyncio.Event()
            reader, writer = await asyncio.open_connection("127.0.0.1", w.server.port)
            writer.write(framed(question("a.org")) + rest)
            writer.write_eof()
            await until(lambda: bool(w.upstream.seen))
            w.upstream.hold.set()
            assert addresses(DNSRecord.parse(await asyncio.wait_for(read_framed(reader), 5))) == [PUBLIC]
            assert await asyncio.wait_for(reader.read(), TCP_IDLE_S / 2) == b""
            writer.close()

    run(go())


def test_a_connection_too_many_is_closed_and_the_others_live() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            streams = [await asyncio.open_connection("127.0.0.1", w.server.port) for _ in range(MAX_TCP_CONNECTIONS)]
            await until(lambda: len(connections(w)) == MAX_TCP_CONNECTIONS)
            reader, writer = await asyncio.open_connection("127.0.0.1", w.server.port)
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
            streams[0][1].write(framed(question("a.org")))
            assert addresses(DNSRecord.parse(await asyncio.wait_for(read_framed(streams[0][0]), 5))) == [PUBLIC]
            for _, open_writer in streams:
                open_writer.close()
            await until(lambda: not connections(w))
            assert len(await tcp_exchange(w.server.port, question("a.org"))) == 1

    run(go())


def test_pipelined_queries_beyond_the_bound_wait() -> None:
    async def go() -> None:
        async with world(policy(allow=[".a.org"])) as w:
            w.upstream.hold = asyncio.Event()
            reader, writer = await asyncio.open_connection("127.0.0.1", w.server.port)
            total = 3 * MAX_TCP_PIPELINE
            writer.write(b"".join(framed(question(f"n{n}.a.org", ident=n)) for n in range(total)))
            await until(lambda: len(w.upstream.seen) == MAX_TCP_PIPELINE)
            await asyncio.sleep(0.05)
            assert len(w.upstream.seen) == MAX_TCP_PIPELINE
            w.upstream.hold.set()
            replies = [await asyncio.wait_for(read_framed(reader), 5) for _ in range(total)]
            assert {reply[:2] for reply in replies} == {struct.pack("!H", n) for n in range(total)}
            writer.close()

    run(go())


@pytest.mark.parametrize("sent", [b"", b"\0", framed(question("a.org"))[:-1]], ids=["nothing", "prefix", "partial"])
def test_an_idle_connection_is_closed(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_module.TcpConnection.__init__, "__defaults__", (0.1,))

    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            reader, writer = await asyncio.open_connection("127.0.0.1", w.server.port)
            writer.write(sent)
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await asyncio.wait_for(reader.readexactly(1), 5)
            writer.close()

    run(go())


def test_a_client_that_does_not_read_is_bounded_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_module.TcpConnection.__init__, "__defaults__", (0.3,))

    async def go() -> None:
        zone = "".join(f"a.org. 600 IN A 93.184.{n // 200}.{n % 200}\n" for n in range(500))
        async with world(policy(allow=["a.org"]), zone, timeout_s=5.0) as w:  # dnslib is slow
            cut = w.upstream.answer
            w.upstream.udp = lambda query: [cut(query)[:2] + b"\x83" + cut(query)[3:]][:1]
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # or the kernel takes megabytes
            sock.connect(("127.0.0.1", w.server.port))
            _, writer = await asyncio.open_connection(sock=sock)
            await until(lambda: bool(connections(w)))
            (connection,) = connections(w)
            writer.write(framed(question("a.org")) * 2000)
            await until(lambda: connection._full)
            transport = connection._transport
            assert transport is not None
            assert transport.get_write_buffer_size() < 131_072 + MAX_TCP_PIPELINE * 65_537
            await until(lambda: not connections(w))
            writer.close()

    run(go())


ONE_READ = 256 * 1024  # octets that uvloop reads of a stream at once


@pytest.fixture
def one_message_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLICE_S", "LONG_SLICE_S"):
        monkeypatch.setattr(turns_module, name, 0.0)


async def sample(counts: dict[bool, int], seen: list[int]) -> None:
    """Note in each turn of the loop how many queries were allowed so far."""
    while True:
        seen.append(counts[True])
        await asyncio.sleep(0)


@pytest.mark.usefixtures("one_message_a_slice")
def test_a_stream_of_ready_replies_leaves_the_loop_to_others_between_slices() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            await w.ask("a.org", edns=0)
            reader, writer = await asyncio.open_connection("127.0.0.1", w.server.port)
            total = 500
            writer.write(framed(question("a.org")) * total)
            seen: list[int] = []
            sampling = asyncio.ensure_future(sample(w.gate.counts, seen))
            for _ in range(total):
                assert addresses(DNSRecord.parse(await asyncio.wait_for(read_framed(reader), 5))) == [PUBLIC]
            sampling.cancel()
            assert max(after - before for before, after in itertools.pairwise(seen)) <= 2
            assert w.gate.counts[True] == total + 1
            writer.close()

    run(go())


@pytest.mark.usefixtures("one_message_a_slice")
def test_no_more_is_read_of_a_stream_whose_messages_wait_for_their_turn() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            reader, writer = await asyncio.open_connection("127.0.0.1", w.server.port)
            await until(lambda: bool(connections(w)))
            (connection,) = connections(w)
            long, total = question("a.org") + bytes(4000), 1000  # with what has no place there
            writer.write(framed(long) * total)
            kept = []
            for _ in range(total):
                assert rcode(DNSRecord.parse(await asyncio.wait_for(read_framed(reader), 5))) == "FORMERR"
                kept.append(len(connection._buffer))
            assert max(kept) <= ONE_READ + len(framed(long))
            writer.close()

    run(go())


@pytest.mark.usefixtures("one_message_a_slice")
def test_a_half_closed_stream_gets_the_answers_that_wait_for_their_turn() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            await w.ask("a.org", edns=0)
            reader, writer = await asyncio.open_connection("127.0.0.1", w.server.port)
            total = 100
            writer.write(framed(question("a.org")) * total)
            writer.write_eof()
            for _ in range(total):
                assert addresses(DNSRecord.parse(await asyncio.wait_for(read_framed(reader), 5))) == [PUBLIC]
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
            await until(lambda: not connections(w))

    run(go())


class NoDescriptorLeft:
    """A listener that has nothing but an error, some times."""

    def __init__(self, sock: socket.socket, times: int) -> None:
        self._sock, self.left = sock, times

    def accept(self) -> tuple[socket.socket, object]:
        if self.left:
            self.left -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._sock.accept()


def test_connections_are_taken_again_when_there_are_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "PAUSE_S", 0.02)

    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            listener = w.server._listener
            assert listener is not None
            listener._sock = without = NoDescriptorLeft(listener._sock, 3)  # type: ignore[assignment]
            with capture_logs() as logs:
                assert len(await tcp_exchange(w.server.port, question("a.org"))) == 1
            assert without.left == 0
            (told,) = (entry for entry in logs if entry["event"] == "dns_accept_failed")
            assert "Too many open files" in told["error"]

    run(go())


def test_a_connection_that_waits_for_its_turn_is_closed_with_the_server() -> None:
    async def go() -> None:
        async with world(policy(allow=["a.org"]), ZONE) as w:
            listener = w.server._listener
            assert listener is not None
            reader, writer = await asyncio.open_connection("127.0.0.1", w.server.port)
            await until(lambda: bool(connections(w)))
            ours, theirs = socket.socketpair()
            listener._held = ours
            with theirs:
                await w.server.close()
                assert theirs.recv(1) == b""
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()

    run(go())
