"""A blocking client of the local API, as the command line needs it.

Tells apart the two ways in which a call fails: the daemon refused it (`RefusedError`, its own words), or no daemon
answered (`UnreachableError`, with what is wrong with the socket). A thin layer: answers are the contract's messages.
"""

from __future__ import annotations

import errno
import math
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast
from urllib.parse import quote

import grpc
from google.protobuf import empty_pb2

from netfence.api.messages import attach_request
from netfence.api.paging import MAX_SIZE
from netfence.api.views import ANSWERED, AttachSpec
from netfence.v1 import daemon_pb2, daemon_pb2_grpc

READ_TIMEOUT_S: Final = 10.0
"""For list and status: they wait for nothing but the daemon itself."""

EXPLAIN_TIMEOUT_S: Final = 30.0
"""For explain and suggest: a name is looked up, for which the daemon gives its upstreams 20 s."""

CHANGE_TIMEOUT_S: Final = 120.0
"""For attach and detach: longer than any sensible `control_plane.subscribe_ack_timeout`."""

CONNECT_TIMEOUT_S: Final = 5.0

SHORT_ID: Final = 4
"""Characters from which the beginning of an id may stand for it: fewer name a random one too easily."""

UUID_CHARS: Final = 36

Request = TypeVar("Request")
Response = TypeVar("Response")


class RefusedError(Exception):
    """The daemon answered with an error; the text is the daemon's."""


class UnreachableError(Exception):
    """No daemon answered; the text says why and what to do."""


class DaemonClient:
    """A connection to the daemon; a context manager."""

    def __init__(self, path: Path, patience_s: float = math.inf) -> None:
        """Connect to the socket at `path`. Raises UnreachableError if nobody listens there.

        No call waits longer than `patience_s`, whatever it may wait otherwise.
        """
        self._path, self._patience_s = path.absolute(), patience_s
        self._probe()
        self._channel = grpc.insecure_channel(f"unix:{quote(str(self._path))}")
        self._stub = daemon_pb2_grpc.DaemonServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def attach(self, spec: AttachSpec) -> daemon_pb2.AttachResponse:
        """Fence a target."""
        answer: daemon_pb2.AttachResponse = self._call(self._stub.Attach, attach_request(spec), CHANGE_TIMEOUT_S)
        return answer

    def whole_id(self, text: str) -> str:
        """Return the id that begins with `text` if it is the only one, else `text` itself, for the daemon to judge."""
        if not SHORT_ID <= len(text) < UUID_CHARS:
            return text
        found = [info.id for info in self.list_all() if info.id.startswith(text)]
        return found[0] if len(found) == 1 else text

    def detach(self, attachment_id: str) -> None:
        """Take a fence off."""
        self._call(self._stub.Detach, daemon_pb2.DetachRequest(id=attachment_id), CHANGE_TIMEOUT_S)

    def list_page(self, size: int, token: str = "") -> daemon_pb2.ListResponse:
        """Return one page of attachments."""
        request = daemon_pb2.ListRequest(page_size=size, page_token=token)
        answer: daemon_pb2.ListResponse = self._call(self._stub.List, request, READ_TIMEOUT_S)
        return answer

    def list_all(self, size: int = MAX_SIZE) -> Iterator[daemon_pb2.AttachmentInfo]:
        """Yield every attachment, in pages of `size`."""
        token = ""
        while True:
            page = self.list_page(size, token)
            yield from page.attachments
            token = page.next_page_token
            if not token:
                return

    def status(self) -> daemon_pb2.DaemonStatus:
        """Return the daemon's status."""
        answer: daemon_pb2.DaemonStatus = self._call(self._stub.GetStatus, empty_pb2.Empty(), READ_TIMEOUT_S)
        return answer

    def explain(self, attachment_id: str, subject: str) -> daemon_pb2.ExplainResponse:
        """Ask what would happen to a name or an address, and why."""
        request = daemon_pb2.ExplainRequest(id=attachment_id, subject=subject)
        answer: daemon_pb2.ExplainResponse = self._call(self._stub.Explain, request, EXPLAIN_TIMEOUT_S)
        return answer

    def suggest(self, attachment_id: str) -> daemon_pb2.SuggestResponse:
        """Ask for a policy made of what audit mode let through."""
        request = daemon_pb2.SuggestRequest(id=attachment_id)
        answer: daemon_pb2.SuggestResponse = self._call(self._stub.Suggest, request, EXPLAIN_TIMEOUT_S)
        return answer

    def watch(self, attachment_id: str = "", verdicts: Sequence[str] = ()) -> FlowStream:
        """Stream decisions from the moment it returns; see `FlowStream`."""
        request = daemon_pb2.WatchRequest(id=attachment_id, verdicts=verdicts)
        call = self._stub.Watch(request)
        call.initial_metadata()  # comes when the daemon watches, or with the failure that the iteration raises
        return FlowStream(call, self._path)

    def _call(self, method: Callable[..., Response], request: Any, timeout_s: float) -> Response:  # noqa: ANN401
        timeout_s = min(timeout_s, self._patience_s)
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise _failure(error, self._path, timeout_s) from None

    def _probe(self) -> None:
        """Connect once by hand: gRPC would only say that it is unavailable, and not before some retries."""
        what = f"connect to the daemon on {self._path}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(min(CONNECT_TIMEOUT_S, self._patience_s))
            try:
                probe.connect(os.fspath(self._path))
            except OSError as error:
                raise UnreachableError(f"{what}: {_why(error)}") from None


class FlowStream:
    """A stream of decisions: an iterator, which ends when the attachment left; a context manager, which ends it.

    Iterating raises RefusedError where the daemon will not, UnreachableError when it went away.
    """

    def __init__(self, call: Any, path: Path) -> None:  # noqa: ANN401 - grpc's call objects have no types
        self._call, self._path = call, path
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def __iter__(self) -> Iterator[daemon_pb2.FlowEvent]:
        try:
            yield from self._call
        except grpc.RpcError as error:
            if self._ended:
                return
            code = cast("grpc.Call", error).code()
            if code == grpc.StatusCode.UNAVAILABLE and _answered(error):  # it stops
                raise UnreachableError(str(cast("grpc.Call", error).details())) from None
            raise _failure(error, self._path, 0.0) from None

    def end(self) -> None:
        """End it, from any thread."""
        self._ended = True
        self._call.cancel()


def _answered(error: grpc.RpcError) -> bool:
    """Tell whether a daemon said so, not gRPC itself."""
    return ANSWERED in dict(cast("grpc.Call", error).trailing_metadata() or ())


def _failure(error: grpc.RpcError, path: Path, timeout_s: float) -> RefusedError | UnreachableError:
    """Return what a failed call means."""
    call = cast("grpc.Call", error)  # what a failed blocking call raises is both; RpcError alone says nothing
    code, details = call.code(), call.details()
    if _answered(error):
        return RefusedError(details)
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        why = f"the daemon did not answer within {timeout_s:g} s; see its log"
    elif code == grpc.StatusCode.UNAVAILABLE:
        why = "the daemon closed the connection; see its log, and whether it still runs"
    else:  # made by gRPC itself: a full server, a peer that is no netfenced
        why = f"{code.name}: {details}; check that netfenced serves this socket"
    return UnreachableError(f"call the daemon on {path}: {why}")


def _why(error: OSError) -> str:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return "no such socket; start the daemon with `netfenced start`, or name its socket with --socket"
        case errno.ECONNREFUSED:
            return "nobody listens on it; start the daemon with `netfenced start`"
        case errno.EACCES | errno.EPERM:
            return "permission denied; run as root, or set `socket_group` to a group that you are in"
        case _:
            return f"{str(error).lower()}; check the path given with --socket"
