"""The control plane's process: serves raw gRPC as it is told and reports what it saw. `controlplane` starts it.

It speaks bytes on the wire's side, so that it can send what no honest peer would, and pickled tuples on its standard
input, a socket: requests `(number, method, arguments)` come in; `(number, answer)` and `(None, seen)` go out.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from netfence.v1 import control_pb2

SERVICE = "netfence.v1.ControlPlane"
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
HANG = "HANG"  # as a status: never answer, until released


class Stream:
    """One `Connect` call."""

    def __init__(self, number: int, context: Any) -> None:
        self.number = number
        self.context = context
        self.writing = asyncio.Lock()  # fair: commands go out in the order they were given
        self.end: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()

    async def write(self, command: bytes) -> float:
        """Hand one command to gRPC; return when (monotonic seconds), taken just before."""
        async with self.writing:
            at = time.monotonic()
            await self.context.write(command)
            return at


class Plane:
    """The servicer, and the methods that requests call by name."""

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._streams: dict[int, Stream] = {}
        self._numbers: Iterator[int] = itertools.count()
        self._rules: dict[str, Any] = {}
        self._reading = asyncio.Event()
        self._reading.set()
        self._released = asyncio.Event()
        self._asked = 0  # QueryDns calls that wait for our answer
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: Any = None

    # -- the parent's side ---------------------------------------------------------------------------------------------

    def saw(self, kind: str, **values: Any) -> None:
        """Report something that happened now."""
        self._link.send((None, {"kind": kind, "at": time.monotonic(), **values}))

    def take_request(self) -> None:
        """Read one request and begin to work on it; the end of the parent is ours."""
        try:
            number, method, arguments = self._link.recv()
        except EOFError:
            os._exit(0)
        self._start(self._answer(number, method, arguments))

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, number: int, method: str, arguments: dict[str, Any]) -> None:
        try:
            answer: Any = await getattr(self, method)(**arguments)
        except Exception as error:  # noqa: BLE001 - it belongs to the parent
            answer = error if isinstance(error, LookupError | RuntimeError | OSError) else RuntimeError(repr(error))
        self._link.send((number, answer))

    # -- requests ------------------------------------------------------------------------------------------------------

    async def serve(
        self, address: str, first_stream: int, tls: dict[str, str] | None, without: tuple[str, ...]
    ) -> None:
        """Listen; `without` names methods that this peer does not implement."""
        self._numbers = itertools.count(first_stream)
        methods = {
            "Connect": grpc.stream_stream_rpc_method_handler(self._connect),
            "QueryDns": grpc.unary_unary_rpc_method_handler(self._query_dns),
        }
        handlers = {name: handler for name, handler in methods.items() if name not in without}
        self._server = grpc.aio.server(options=UNLIMITED)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        if tls is None:
            self._server.add_insecure_port(address)
        else:
            self._server.add_secure_port(address, _credentials(**tls))
        await self._server.start()

    async def rules(self, rules: dict[str, Any]) -> None:
        """Take the rules of how to answer, all of them."""
        self._rules = rules

    async def send(self, stream: int, commands: list[bytes]) -> float:
        """Send commands on a stream, one after the other; return when the first was written."""
        found = self._streams[stream]
        at = [await found.write(command) for command in commands]
        return at[0]

    async def end(self, stream: int, code: str, details: str) -> None:
        """End a stream with a status."""
        end = self._streams[stream].end
        if not end.done():
            end.set_result((code, details))

    async def read_on(self, reading: bool) -> None:
        """Stop or go on reading what daemons send; one message that was waited for may still come."""
        self._reading.set() if reading else self._reading.clear()

    async def settle(self) -> None:
        """Do nothing: what was seen before has been reported before."""

    async def release(self) -> None:
        """Answer the questions that hang, by the rules of now."""
        released, self._released = self._released, asyncio.Event()
        released.set()

    # -- the daemon's side ---------------------------------------------------------------------------------------------

    async def _connect(self, _requests: Any, context: Any) -> None:
        number = next(self._numbers)
        self.saw("opened", stream=number, metadata=_metadata(context), identity=_identity(context))
        stream = Stream(number, context)
        refusal = self._rules["refusal"]
        if refusal is not None:
            stream.end.set_result(refusal)
        self._streams[number] = stream
        reader = asyncio.get_running_loop().create_task(self._read(stream))
        how = "lost"
        try:
            for command in self._rules["on_open"]:
                await stream.write(command)
            code, details = await stream.end
            how = f"ended {code}"
            async with stream.writing:  # gRPC loses a status that is sent while a write is under way
                if code != "OK":
                    await context.abort(getattr(grpc.StatusCode, code), details)
        finally:
            reader.cancel()
            del self._streams[number]
            self.saw("closed", stream=number, how=how)

    async def _read(self, stream: Stream) -> None:
        with suppress(grpc.aio.BaseError, grpc.RpcError, asyncio.InvalidStateError):
            while True:
                await self._reading.wait()
                data = await stream.context.read()
                if data is grpc.aio.EOF:
                    self.saw("half_closed", stream=stream.number)
                    stream.end.set_result(("OK", ""))
                    return
                self.saw("event", stream=stream.number, data=data)
                self._react(stream, control_pb2.DaemonEvent.FromString(data))

    def _react(self, stream: Stream, event: Any) -> None:
        kind = event.WhichOneof("event")
        if kind == "sync":
            self._start(self._reply(stream, self._rules["on_sync"], "", 0.0))
        elif kind == "subscribed":
            subscribed = event.subscribed
            for rule in self._rules["on_subscribed"]:
                wanted = rule["metadata"].items() <= dict(subscribed.metadata).items()
                if wanted and rule["target"] in {"", subscribed.target}:
                    self._start(self._reply(stream, rule["commands"], subscribed.id, rule["delay_s"]))
                    return

    async def _reply(self, stream: Stream, commands: list[bytes], attachment_id: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        with suppress(grpc.aio.BaseError, grpc.RpcError, asyncio.InvalidStateError):  # the stream has ended meanwhile
            for data in commands:
                command = control_pb2.ControlCommand.FromString(data)
                command.id = command.id or attachment_id
                await stream.write(command.SerializeToString())

    async def _query_dns(self, data: bytes, context: Any) -> bytes:
        self._asked += 1
        try:
            self.saw("query", data=data, asked=self._asked, metadata=_metadata(context))
            name = control_pb2.DnsQueryRequest.FromString(data).domain
            while (answer := self._rules["names"].get(name, self._rules["other_names"])) == HANG:
                await self._released.wait()
            if isinstance(answer, str):
                await context.abort(getattr(grpc.StatusCode, answer), "so says the test")
            return bytes(answer)
        finally:
            self._asked -= 1


def _credentials(key: str, cert: str, client_ca: str) -> Any:
    """Make the server's credentials of PEM files; with `client_ca` clients have to show a certificate of it."""
    roots = Path(client_ca).read_bytes() if client_ca else None
    pair = (Path(key).read_bytes(), Path(cert).read_bytes())
    return grpc.ssl_server_credentials([pair], root_certificates=roots, require_client_auth=bool(client_ca))


def _metadata(context: Any) -> dict[str, str | bytes]:
    return {str(key): value for key, value in context.invocation_metadata() or ()}


def _identity(context: Any) -> list[str]:
    """Tell the common names of the client's certificate."""
    return [name.decode() for name in context.auth_context().get("x509_common_name", ())]


async def main() -> None:
    """Serve until the parent ends or kills us."""
    link = Connection(sys.stdin.fileno())
    plane = Plane(link)
    asyncio.get_running_loop().add_reader(link.fileno(), plane.take_request)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
