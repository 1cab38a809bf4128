"""The gRPC server: where it listens, who may connect, and the two methods of `netfence.v1.ControlPlane`.

Owns gRPC's options and statuses. Messages pass as bytes, because what is sent is encoded once for many (`policy`), and
because what does not decode should be this module's error and not gRPC's.
"""

from __future__ import annotations

import asyncio
import inspect
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn
from urllib.parse import quote

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from netfence.api.unix_socket import SocketPlace
from netfence.controlplane.book import Book
from netfence.controlplane.entry import Entry
from netfence.controlplane.hush import Hush
from netfence.controlplane.limits import ARRIVAL_S, MAX_LARGE_WRITES, REFUSAL_S, Limits
from netfence.controlplane.session import Session
from netfence.controlplane.tls import ServerTls, TlsFiles
from netfence.controlplane.tokens import TokenCheck
from netfence.controlplane.views import Attachment, Daemon, NameAnswer, Peer
from netfence.errors import InvalidError, NetfenceError, PermissionDeniedError, PreconditionError
from netfence.policy.limits import MAX_NAME
from netfence.v1 import control_pb2

SERVICE: Final = control_pb2.DESCRIPTOR.services_by_name["ControlPlane"].full_name

KEEPALIVE_S: Final = 30
"""A daemon whose host vanished is noticed after this and `KEEPALIVE_TIMEOUT_S`: it closes no connection by itself."""
KEEPALIVE_TIMEOUT_S: Final = 10
PING_INTERVAL_S: Final = 5
"""How often a daemon may ping; gRPC's default, five minutes, would end connections that are looked after."""
STOP_GRACE_S: Final = 1.0
"""How long calls under way have when the server stops; streams are told to go at once."""

MAX_STATUS_TEXT: Final = 1000
"""Characters of a status: it travels in a header, and gRPC's bound for all of them is 8 KiB."""

AnswerDns = Callable[[Attachment, str, str], Awaitable[NameAnswer]]
Admit = Callable[[Daemon, Peer], bool | Awaitable[bool]]
Context = Any  # grpc.aio.ServicerContext, which has no types

hush = Hush(structlog.get_logger(__name__))


class Servicer:
    """The two methods."""

    def __init__(
        self, book: Book, answer_dns: AnswerDns | None, admit: Admit | None, tokens: TokenCheck | None, limits: Limits
    ) -> None:
        self._book = book
        self._answer_dns = answer_dns
        self._admit = admit
        self._tokens = tokens
        self._limits = limits
        self._large = asyncio.Semaphore(MAX_LARGE_WRITES)

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the methods for a server."""
        methods = {
            "Connect": grpc.stream_stream_rpc_method_handler(self._connect),
            "QueryDns": grpc.unary_unary_rpc_method_handler(self._query_dns),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def _connect(self, _requests: object, context: Context) -> None:
        peer = await self._authenticate(context)
        session = Session(context, self._book, self._limits, self._large)
        ended = None
        try:
            daemon, sync = await session.first_event(peer.address)
            await self._check_admission(daemon, peer)
            ended = await session.run(daemon, sync)
        except NetfenceError as error:
            hush.warning("daemon_turned_away", address=peer.address, error=str(error))
            await _abort(context, error.code, str(error))
        except (asyncio.CancelledError, grpc.aio.BaseError):
            raise
        except Exception as error:  # noqa: BLE001 - a defect, or the user's `admit`
            hush.error("stream_failed", address=peer.address, exc_info=error)
            await _abort(context, "INTERNAL", "defect in the control plane; see its log")
        if ended is not None:
            await _abort(context, ended.code, ended.why)

    async def _check_admission(self, daemon: Daemon, peer: Peer) -> None:
        if self._admit is None:
            return
        admitted: object = self._admit(daemon, peer)
        if inspect.isawaitable(admitted):
            admitted = await admitted
        if admitted is not True:  # not just anything that counts as true, such as a coroutine
            raise PermissionDeniedError(f"daemon {daemon.id[:80]!r} is not admitted with these credentials")

    async def _query_dns(self, raw: bytes, context: Context) -> bytes:
        peer = await self._authenticate(context)
        if self._answer_dns is None:
            why = "this control plane decides no names; give its policies another DNS mode than proxy"
            await _abort(context, "UNIMPLEMENTED", why)
        try:
            request = control_pb2.DnsQueryRequest.FromString(raw)
        except DecodeError:
            await _abort(context, "INVALID_ARGUMENT", "the request is no DnsQueryRequest")
        entry = await self._asker(request.id, peer, context)
        try:
            await self._check_admission(entry.attachment.daemon, peer)
            name = request.domain.removesuffix(".").lower()
            answer = await self._answer_dns(entry.attachment, name, request.query_type)
            raw_answer = answer.message().SerializeToString()
        except PermissionDeniedError as error:
            hush.warning("query_turned_away", address=peer.address, error=str(error))
            await _abort(context, error.code, str(error))
        except Exception as error:  # noqa: BLE001 - the user's code
            name = request.domain[:MAX_NAME]
            hush.warning("answer_dns_failed", attachment=request.id, name=name, error=str(error), exc_info=error)
            await _abort(context, "INTERNAL", "answer_dns failed; see the control plane's log")
        return raw_answer

    async def _asker(self, attachment_id: str, peer: Peer, context: Context) -> Entry:
        """Return who asks, or end the call.

        The id is all that a question tells. Where daemons other than ours have equal ids, the connection tells more.
        """
        await self._book.arrival(attachment_id, ARRIVAL_S)
        entries = self._book.with_id(attachment_id)
        if len(entries) > 1:
            entries = [entry for entry in entries if entry.attachment.daemon.address == peer.address]
        if len(entries) != 1:
            why = "unknown here" if not entries else "that of attachments of several daemons"
            await _abort(context, "NOT_FOUND", f"attachment id {attachment_id[:80]!r} is {why}")
        return entries[0]

    async def _authenticate(self, context: Context) -> Peer:
        """Return who calls; ends the call with UNAUTHENTICATED where the token is not accepted."""
        address = context.peer()
        token = None
        if self._tokens is not None:
            for key, value in context.invocation_metadata() or ():
                if key == "authorization" and isinstance(value, str):
                    token = self._tokens.accepted(value)
            if token is None:
                hush.warning("token_refused", address=address)
                await asyncio.sleep(REFUSAL_S)
                await _abort(context, "UNAUTHENTICATED", "no valid bearer token; set control_plane.token_file")
        return Peer(address, _certificate_names(context.auth_context()), token or "")


async def _abort(context: Context, code: str, why: str) -> NoReturn:
    """End the call with a status."""
    await context.abort(grpc.StatusCode[code], why[:MAX_STATUS_TEXT])
    raise AssertionError("abort returned")


def _certificate_names(auth: Mapping[str, list[bytes]]) -> tuple[str, ...]:
    names = (*auth.get("x509_subject_alternative_name", ()), *auth.get("x509_common_name", ()))
    return tuple(dict.fromkeys(name.decode(errors="replace") for name in names))


class Server:
    """A server that listens; made by `listen`. `address` is where, with the port that was given for port 0."""

    def __init__(self, server: Any, address: str, place: SocketPlace | None) -> None:  # noqa: ANN401
        self.address = address
        self._server = server
        self._place = place

    async def close(self) -> None:
        """Take new calls no more and end those under way."""
        if self._place is not None:
            self._place.remove()
        await self._server.stop(STOP_GRACE_S)


async def listen(servicer: Servicer, address: str, tls: ServerTls | None, *, insecure: bool, limits: Limits) -> Server:
    """Serve at ``host:port`` or ``unix:/path``; ready when it returns, and nothing is left when it raises.

    Raises InvalidError for an address or TLS files that are no good, PreconditionError for an address in use, and for
    plaintext that others could read unless it is `insecure`.
    """
    path = address.removeprefix("unix://").removeprefix("unix:") if address.startswith("unix:") else None
    if path is None:
        host, port = split_address(address)
        if tls is None and not insecure and not _is_loopback(host):
            raise PreconditionError(
                f"listen on {address}: without TLS whoever is on the way could read and change policies; give a"
                " certificate and key, listen on 127.0.0.1 or a unix socket, or say insecure=True (--insecure)"
            )
        _probe(host, port, address)
    credentials = None if tls is None else TlsFiles(tls).credentials()
    place = None if path is None else SocketPlace(Path(path), None, "`serving` or --listen")
    server = grpc.aio.server(options=_options(limits))
    try:
        server.add_generic_rpc_handlers((servicer.handlers(),))
        target = address if place is None else f"unix:{quote(str(place.bind_path))}"
        try:
            bound = (
                server.add_insecure_port(target) if credentials is None else server.add_secure_port(target, credentials)
            )
        except RuntimeError as error:
            raise PreconditionError(f"listen on {address}: {error}") from error
        await server.start()
        if place is not None:
            place.publish()
    except BaseException:
        if place is not None:
            place.give_up()
        await server.stop(None)
        raise
    shown = f"unix:{place.path}" if place is not None else f"{address.rpartition(':')[0]}:{bound}"
    return Server(server, shown, place)


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``host:port`` (``[host]:port`` for IPv6). Raises InvalidError."""
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    right = colon and port.isascii() and port.isdigit() and int(port) <= 65535 and bare
    if not right or (":" in bare) != host.startswith("["):
        raise InvalidError(f"listen on {address!r}: not an address; write host:port, [IPv6 address]:port or unix:/path")
    return bare, int(port)


def is_local(address: str) -> bool:
    """Tell whether only this host can reach a good address."""
    return address.startswith("unix:") or _is_loopback(split_address(address)[0])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _probe(host: str, port: int, address: str) -> None:
    """Bind once, because the error tells why it cannot be had, and gRPC's does not. Raises PreconditionError."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except socket.gaierror as error:
        raise InvalidError(f"listen on {address}: {error.strerror}; give an address of this host") from None
    except OSError as error:
        why = os.strerror(error.errno or 0).lower()
        raise PreconditionError(
            f"listen on {address}: {why}; stop what listens there, or choose another address"
        ) from None


def _options(limits: Limits) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # or two control planes would share one port, each with half of the daemons
        ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_S * 1000),
        ("grpc.max_concurrent_streams", limits.max_calls_per_connection),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", -1),  # a policy of a million rules is 30 MB; daemons have their own bound
    ]
