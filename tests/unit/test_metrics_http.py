"""The HTTP server of the metrics against clients that are slow, silent, greedy or wrong."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, closing

import pytest
import uvloop
from structlog.testing import capture_logs

from netfence import metrics_http
from netfence.errors import PreconditionError
from netfence.metrics_http import MAX_CONNECTIONS, MAX_REQUEST, MetricsServer, listen

GET = b"GET /metrics HTTP/1.1\r\nHost: h\r\nAccept: */*\r\n\r\n"
PAGE = b"netfence_attachments 1.0\n"


class World:
    """A server on a free port of loopback, and clients of it."""

    def __init__(self, stack: ExitStack, sock: socket.socket) -> None:
        self._stack = stack
        self.place = sock.getsockname()
        self.sock = sock
        self.pages = 0
        self.page = PAGE
        self.failing = False
        self.server: MetricsServer | None = None

    async def make(self) -> bytes:
        self.pages += 1
        if self.failing:
            raise LookupError("slot 5 has no counters")
        return self.page

    async def client(self, data: bytes = b"", receive_bytes: int = 0) -> socket.socket:
        loop = asyncio.get_running_loop()
        sock = self._stack.enter_context(closing(socket.socket()))
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.setblocking(False)
        await loop.sock_connect(sock, self.place)
        await loop.sock_sendall(sock, data)
        return sock

    async def ask(self, data: bytes = GET) -> bytes:
        return await answer(await self.client(data))


async def answer(sock: socket.socket) -> bytes:
    """Read until the server ends the connection."""
    loop = asyncio.get_running_loop()
    data = b""
    try:
        while more := await loop.sock_recv(sock, 65536):
            data += more
    except ConnectionResetError:
        pass
    return data


def serve(work: Callable[[World], Awaitable[None]]) -> None:
    """Run `work` with a server, on the loop that the daemon has."""

    async def main() -> None:
        with ExitStack() as stack:
            sock = stack.enter_context(closing(socket.create_server(("127.0.0.1", 0))))
            sock.setblocking(False)
            world = World(stack, sock)
            world.server = MetricsServer([sock], world.make)
            server = asyncio.create_task(world.server.run())
            try:
                await asyncio.wait_for(work(world), 30)
            finally:
                server.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await server

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_a_page_is_served() -> None:
    async def work(world: World) -> None:
        head, _, body = (await world.ask()).partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        assert lines[0] == "HTTP/1.1 200 OK"
        assert "Content-Type: text/plain; version=0.0.4; charset=utf-8" in lines
        assert f"Content-Length: {len(PAGE)}" in lines
        assert "Connection: close" in lines
        assert body == PAGE

    serve(work)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param(b"GET /metrics?x=y HTTP/1.0\r\n\r\n", 200, id="query-string"),
        pytest.param(b"GET /metrics HTTP/1.1\n\n", 200, id="bare-line-ends"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", 200, id="home"),
        pytest.param(b"GET /../etc/passwd HTTP/1.1\r\n\r\n", 404, id="another-path"),
        pytest.param(b"GET http://h/metrics HTTP/1.1\r\n\r\n", 404, id="absolute"),
        pytest.param(b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405, id="post"),
        pytest.param(b"HEAD /metrics HTTP/1.1\r\n\r\n", 405, id="head"),
        pytest.param(b"CONNECT h:1 HTTP/1.1\r\n\r\n", 405, id="connect"),
        pytest.param(b"\r\n\r\n", 400, id="empty"),
        pytest.param(b"GET /metrics\r\n\r\n", 400, id="http-0.9"),
        pytest.param(b"GET /met rics HTTP/1.1\r\n\r\n", 400, id="spaces"),
        pytest.param(b"\xff\xfe \x00 HTTP/1.1\r\n\r\n", 405, id="octets"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400, id="tls"),
        pytest.param(b"GET /metrics HTTP/1.1\r\nX: " + b"x" * MAX_REQUEST, 400, id="too-long"),
    ],
)
def test_requests(request_: bytes, status: int) -> None:
    async def work(world: World) -> None:
        assert (await world.ask(request_)).split()[1] == str(status).encode()
        assert world.pages == (status == 200 and b"metrics" in request_)
        assert PAGE in await world.ask()

    serve(work)


def test_a_request_may_come_in_pieces() -> None:
    async def work(world: World) -> None:
        sock = await world.client()
        for octet in GET:
            await asyncio.get_running_loop().sock_sendall(sock, bytes([octet]))
            await asyncio.sleep(0)
        assert PAGE in await answer(sock)

    serve(work)


def test_a_client_that_sends_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_http, "REQUEST_S", 0.1)

    async def work(world: World) -> None:
        silent, slow = await world.client(), await world.client(GET[:-1])
        assert PAGE in await world.ask()
        assert (await answer(silent), await answer(slow)) == (b"", b"")
        assert world.pages == 1

    serve(work)


def test_a_client_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_http, "ANSWER_S", 0.2)

    async def work(world: World) -> None:
        world.page = PAGE * 400_000  # 10 MB: more than the kernel keeps for it
        sock = await world.client(GET, receive_bytes=4096)
        began = time.monotonic()
        while world.pages == 0 or time.monotonic() - began < 0.4:  # noqa: ASYNC110 - it may not read
            await asyncio.sleep(0.01)
        assert len(await answer(sock)) < len(world.page)
        assert await world.ask() != b""

    serve(work)


@pytest.mark.parametrize("sent", [b"", GET[:-1], GET], ids=["silent", "half", "not-reading"])
def test_who_holds_all_connections_keeps_nobody_out(sent: bytes) -> None:
    async def work(world: World) -> None:
        world.page = PAGE * 400_000
        held = [await world.client(sent, receive_bytes=4096) for _ in range(3 * MAX_CONNECTIONS)]
        assert (await world.ask()).endswith(world.page)
        assert world.server is not None
        assert 0 < len(world.server._open) <= MAX_CONNECTIONS
        assert len(held) > MAX_CONNECTIONS

    serve(work)


def test_who_opens_ever_new_connections_is_served_at_leisure() -> None:
    async def work(world: World) -> None:
        began = time.monotonic()
        for _ in range(10):
            assert PAGE in await world.ask()
        assert time.monotonic() - began >= 9 * metrics_http.BETWEEN_S

    serve(work)


def test_a_page_that_cannot_be_made_is_an_error_and_not_the_end() -> None:
    async def work(world: World) -> None:
        world.failing = True
        with capture_logs() as logs:
            got = await world.ask()
            await world.ask()
        assert got.startswith(b"HTTP/1.1 500 ")
        assert b"slot" not in got
        assert [entry["event"] for entry in logs] == ["metrics_failed"]  # not a line for each
        world.failing = False
        assert PAGE in await world.ask()

    serve(work)


def test_an_accept_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_http, "PAUSE_S", 0.01)
    failures = [OSError(errno.EMFILE, "Too many open files")] * 3

    class Loop:
        def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
            self._loop = loop

        async def sock_accept(self, sock: socket.socket) -> tuple[socket.socket, object]:
            if failures:
                raise failures.pop()
            return await self._loop.sock_accept(sock)

    async def work() -> None:
        loop = asyncio.get_running_loop()
        with closing(socket.create_server(("127.0.0.1", 0))) as sock, capture_logs() as logs:
            sock.setblocking(False)

            async def make() -> bytes:
                return PAGE

            server = MetricsServer([sock], make)
            monkeypatch.setattr(asyncio, "get_running_loop", lambda: Loop(loop))
            task = asyncio.create_task(server.run())
            while failures:  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0.01)
            monkeypatch.undo()
            with closing(socket.create_connection(sock.getsockname())) as client:
                client.setblocking(False)
                await loop.sock_sendall(client, GET)
                assert PAGE in await answer(client)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert [entry["event"] for entry in logs] == ["metrics_accept_failed"]

    asyncio.run(asyncio.wait_for(work(), 10))


# -- listen ------------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_refused_by_name() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PreconditionError) as raised:
            asyncio.run(listen(f"127.0.0.1:{port}"))
    assert str(raised.value) == (
        f"metrics.listen: listen on 127.0.0.1:{port}: Address already in use; "
        "stop what listens there, or set metrics.listen to another port"
    )


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("192.0.2.1:9100", "Cannot assign requested address; set metrics.listen to an address of this host"),
        ("no-such-host.invalid:9100", "set it to an address of this host and a free port"),
    ],
    ids=["foreign-address", "no-such-name"],
)
def test_an_address_that_is_none_of_ours_is_refused_by_name(address: str, why: str) -> None:
    with pytest.raises(PreconditionError) as raised:
        asyncio.run(listen(address))
    assert str(raised.value).startswith(f"metrics.listen: listen on {address}: ")
    assert str(raised.value).endswith(why)


def test_a_name_may_have_an_address_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    here, not_here = ("127.0.0.1", 0), ("2001:db8::1", 0, 0, 0)
    found = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", not_here), (socket.AF_INET, socket.SOCK_STREAM, 6, "", here)]

    async def work() -> None:
        async def getaddrinfo(*_: object, **__: object) -> object:
            return found

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        (sock,) = await listen("localhost:0")
        found[1] = (*found[1][:4], sock.getsockname())  # taken now
        with pytest.raises(PreconditionError, match="in use"):
            await listen("localhost:0")
        sock.close()

    asyncio.run(work())


def test_a_name_that_is_not_resolved_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", silent)
    monkeypatch.setattr(metrics_http, "RESOLVE_S", 0.01)
    with pytest.raises(PreconditionError, match=r"metrics.listen: .*: here.test is not resolved within 0.01 s; set it"):
        asyncio.run(asyncio.wait_for(listen("here.test:9100"), 20))


def test_a_wildcard_is_warned_of() -> None:
    async def work() -> None:
        with capture_logs() as logs:
            for address in ("127.0.0.1:0", "0.0.0.0:0", "[::]:0"):
                for sock in await listen(address):
                    sock.close()
        assert [entry["listen"] for entry in logs] == ["0.0.0.0:0", "[::]:0"]
        assert {entry["event"] for entry in logs} == {"metrics_on_every_address"}

    asyncio.run(work())
