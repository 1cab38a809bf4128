"""Channels against real servers: who is trusted, what travels, what the environment cannot change."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from tests.unit.control.pki import SERVER_NAME, Pki

from netfence.control import channel
from netfence.control.channel import call_metadata, make_channel
from netfence.control.credentials import Secrets

ECHO, DOUBLE = "/test/Echo", "/test/Double"
SIZE = 64 << 10
SINK = "127.0.0.1:9"  # discard: nobody listens there
PROXIES = {"http_proxy": f"http://{SINK}", "https_proxy": f"http://{SINK}", "grpc_proxy": f"http://{SINK}"}
ADDRESS_PROXY = {"GRPC_ADDRESS_HTTP_PROXY": SINK, "GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES": "127.0.0.0/8"}


@dataclass
class Server(grpc.GenericRpcHandler):
    """Answers every call with what it was sent and keeps the call's metadata and host."""

    port: int = 0
    metadata: dict[str, str] = field(default_factory=dict)

    def service(self, details: Any) -> Any:
        async def echo(request: bytes, context: Any) -> bytes:
            del context
            self.metadata = {item.key: item.value for item in details.invocation_metadata}
            return request * 2 if details.method == DOUBLE else request

        return grpc.unary_unary_rpc_method_handler(echo)


@asynccontextmanager
async def serving(credentials: Any = None, address: str = "127.0.0.1:0") -> AsyncIterator[Server]:
    handler = Server()
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 16 * SIZE)])
    server.add_generic_rpc_handlers((handler,))
    if credentials is None:
        handler.port = server.add_insecure_port(address)
    else:
        handler.port = server.add_secure_port(address, credentials)
    await server.start()
    try:
        yield handler
    finally:
        await server.stop(None)


async def ask(address: str, secrets: Secrets, request: bytes = b"hello", method: str = ECHO) -> bytes:
    """Make one call on one channel."""
    made = make_channel(address, secrets, max_message_size=SIZE)
    try:
        answer = await made.unary_unary(method)(request, metadata=call_metadata(secrets), timeout=10)
        return bytes(answer)
    finally:
        await made.close()


async def refused(address: str, secrets: Secrets, request: bytes = b"hello", method: str = ECHO) -> tuple[str, str]:
    """Make one call that fails; return its status and details."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ask(address, secrets, request, method)
    return raised.value.code().name, raised.value.details() or ""


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki()


def test_the_server_of_our_ca_is_trusted(pki: Pki) -> None:
    async def test() -> None:
        async with serving(pki.server_credentials("localhost")) as server:
            assert await ask(f"localhost:{server.port}", Secrets(ca=pki.ca)) == b"hello"

    run(test())


def test_the_server_of_another_ca_is_not(pki: Pki) -> None:
    async def test() -> None:
        async with serving(pki.server_credentials("localhost")) as server:
            code, details = await refused(f"localhost:{server.port}", Secrets(ca=Pki().ca))
            assert code == "UNAVAILABLE"
            assert "CERTIFICATE_VERIFY_FAILED" in details

    run(test())


def test_a_certificate_for_another_name_is_refused_unless_that_name_is_expected(pki: Pki) -> None:
    async def test() -> None:
        async with serving(pki.server_credentials()) as server:
            code, details = await refused(f"localhost:{server.port}", Secrets(ca=pki.ca))
            assert code == "UNAVAILABLE"
            assert "Hostname Verification" in details
            for name in ("other.example", "localhost"):
                code, _ = await refused(f"localhost:{server.port}", Secrets(ca=pki.ca, server_name=name))
                assert code == "UNAVAILABLE"
            named = Secrets(ca=pki.ca, server_name=SERVER_NAME)
            assert await ask(f"127.0.0.1:{server.port}", named) == b"hello"

    run(test())


def test_plaintext_is_not_spoken_to_by_tls_nor_the_other_way_round(pki: Pki) -> None:
    async def test() -> None:
        async with serving() as plain, serving(pki.server_credentials("localhost")) as secure:
            assert (await refused(f"localhost:{plain.port}", Secrets(ca=pki.ca)))[0] == "UNAVAILABLE"
            assert (await refused(f"localhost:{secure.port}", Secrets()))[0] == "UNAVAILABLE"

    run(test())


def test_mutual_tls_wants_a_certificate_of_its_ca(pki: Pki) -> None:
    async def test() -> None:
        async with serving(pki.server_credentials("localhost", mutual=True)) as server:
            address = f"localhost:{server.port}"
            ours, strange = pki.client(), Pki().client()
            assert (await refused(address, Secrets(ca=pki.ca)))[0] == "UNAVAILABLE"
            assert (await refused(address, Secrets(ca=pki.ca, cert=strange.cert, key=strange.key)))[0] == "UNAVAILABLE"
            assert await ask(address, Secrets(ca=pki.ca, cert=ours.cert, key=ours.key)) == b"hello"

    run(test())


@pytest.mark.parametrize("token", ["s3cret", None], ids=["token", "none"])
def test_the_token_arrives(pki: Pki, token: str | None) -> None:
    async def test() -> None:
        async with serving(pki.server_credentials("localhost")) as server:
            await ask(f"localhost:{server.port}", Secrets(ca=pki.ca, token=token))
            assert server.metadata.get("authorization") == (f"Bearer {token}" if token else None)

    run(test())


@pytest.mark.parametrize("environment", [PROXIES, ADDRESS_PROXY], ids=["by-name", "by-address"])
def test_the_environment_does_not_redirect(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)

    async def test() -> None:
        async with serving() as server:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as other:  # that the bait is taken
                with pytest.raises(grpc.aio.AioRpcError):
                    await other.unary_unary(ECHO)(b"", timeout=10)
            assert await ask(f"127.0.0.1:{server.port}", Secrets()) == b"hello"

    run(test())


@pytest.mark.parametrize("secure", [False, True], ids=["plaintext", "tls"])
@pytest.mark.parametrize("name", ["s", "a #?%20b"], ids=["plain-path", "odd-path"])
def test_unix_sockets(name: str, secure: bool, pki: Pki, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(pki.server_credentials("localhost") if secure else None, f"unix:{tmp_path}/bound"):
            (tmp_path / "bound").rename(tmp_path / name)
            assert await ask(f"unix:{tmp_path}/{name}", Secrets(ca=pki.ca if secure else None)) == b"hello"

    run(test())


def test_ipv6() -> None:
    async def test() -> None:
        async with serving(address="[::1]:0") as server:
            assert await ask(f"[::1]:{server.port}", Secrets()) == b"hello"

    run(test())


@pytest.mark.parametrize("host", ["unix", "dns", "ipv4", "localhost"])
def test_a_short_host_name_is_no_scheme(host: str) -> None:
    async def test() -> None:
        _, details = await refused(f"{host}:9", Secrets())
        assert "127.0.0.1:9" in details if host == "localhost" else f"lookup failed for {host}:9" in details

    run(test())


def first_bytes(listener: socket.socket) -> bytes:
    """Accept a connection and return what the client says before it is answered."""
    connection, _ = listener.accept()
    with connection:
        connection.sendall(b"\0\0\0\4\0\0\0\0\0")  # an empty SETTINGS frame: only then does a client send its call
        said = b""
        while b"localhost" not in said and (some := connection.recv(4096)):
            said += some
    return said


def test_a_unix_socket_is_called_localhost(tmp_path: Path) -> None:
    async def test() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{tmp_path}/s")
            listener.listen()
            listener.settimeout(10)
            said = asyncio.create_task(asyncio.to_thread(first_bytes, listener))
            await refused(f"unix:{tmp_path}/s", Secrets())
            assert b"localhost" in await said

    run(test())


def test_message_sizes_are_bounded_in_both_directions() -> None:
    async def test() -> None:
        async with serving() as server:
            address = f"127.0.0.1:{server.port}"
            assert len(await ask(address, Secrets(), bytes(SIZE))) == SIZE
            code, details = await refused(address, Secrets(), bytes(SIZE + 1))
            assert code == "RESOURCE_EXHAUSTED"
            assert "Sent message" in details

            code, details = await refused(address, Secrets(), bytes(SIZE), method=DOUBLE)
            assert code == "RESOURCE_EXHAUSTED"
            assert "Received message" in details

    run(test())


@contextmanager
def sockets_to(port: int) -> Iterator[list[socket.socket]]:
    """Give duplicates of this process's sockets that are connected to a port."""
    found: list[socket.socket] = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - descriptors, not files
        try:
            one = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        try:
            matches = one.family in {socket.AF_INET, socket.AF_INET6} and one.getpeername()[1] == port
        except OSError:
            matches = False
        if matches:
            found.append(one)
        else:
            one.close()
    try:
        yield found
    finally:
        for one in found:
            one.close()


def test_unacknowledged_data_ends_a_connection() -> None:
    async def test() -> None:
        async with serving() as server:
            made = make_channel(f"127.0.0.1:{server.port}", Secrets(), max_message_size=SIZE)
            await made.unary_unary(ECHO)(b"", timeout=10)
            with sockets_to(server.port) as found:
                times = [one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) for one in found]
            await made.close()
        assert times == [channel.KEEPALIVE_TIMEOUT_MS]

    run(test())


def test_a_peer_that_accepts_and_is_silent_is_given_up(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "CONNECT_TIMEOUT_MS", 300)

    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            code, _ = await refused(f"127.0.0.1:{listener.getsockname()[1]}", Secrets(ca=pki.ca))
            assert code == "UNAVAILABLE"  # not the call's own DEADLINE_EXCEEDED

    run(test())


def test_two_channels_are_two_connections() -> None:
    async def test() -> None:
        async with serving() as server:
            made = [make_channel(f"127.0.0.1:{server.port}", Secrets(), max_message_size=SIZE) for _ in range(2)]
            for one in made:
                await one.unary_unary(ECHO)(b"", timeout=10)
            with sockets_to(server.port) as found:
                count = len(found)
            for one in made:
                await one.close()
        assert count == 2

    run(test())
