"""The local API: DaemonService, health and reflection on a unix socket.

Translates calls to the daemon's port and its errors to statuses; decides nothing about attachments. The daemon gives a
`DaemonPort` to `serve` and gets an `ApiServer` to close. Status codes are in `status`, page tokens in `paging`,
permissions in `unix_socket`.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import quote

import grpc
import grpc.aio
import structlog
from google.protobuf import empty_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from netfence.api.messages import (
    attach_spec,
    attachment_message,
    daemon_status_message,
    explain_subject,
    explanation_message,
    flow_message,
    watch_verdicts,
)
from netfence.api.paging import MAX_BYTES, make_token, page_size, read_token
from netfence.api.status import abort
from netfence.api.unix_socket import SocketPlace
from netfence.api.views import (
    AttachmentInfoView,
    AttachSpec,
    ExplanationView,
    FlowVerdict,
    FlowView,
    StatusView,
    SuggestionView,
)
from netfence.errors import InvalidError, PreconditionError
from netfence.v1 import daemon_pb2, daemon_pb2_grpc

SERVICE: Final = daemon_pb2.DESCRIPTOR.services_by_name["DaemonService"].full_name

MAX_CALLS: Final = 4096
"""Calls under way at once: twice the attachments that can exist, so that attaching all of them at once is possible. One
more gets RESOURCE_EXHAUSTED."""

log = structlog.get_logger(__name__)

Response = TypeVar("Response")


class DaemonPort(Protocol):
    """What the API needs of the daemon. Every method raises `netfence.errors` kinds; anything else is a defect."""

    async def attach(self, spec: AttachSpec) -> AttachmentInfoView:
        """Fence a target. When the caller hangs up this is cancelled, and must then leave nothing of it behind."""
        ...

    async def detach(self, attachment_id: str) -> None:
        """Take a fence off; NotFoundError for an unknown id. Once begun it ends, even when cancelled."""
        ...

    async def list(self) -> Sequence[AttachmentInfoView]:
        """Return every attachment, sorted by (attached_at, id), with counters of this moment."""
        ...

    async def status(self) -> StatusView:
        """Return the daemon's status."""
        ...

    async def explain(self, attachment_id: str, subject: str) -> ExplanationView:
        """Tell what would happen to a name or an address, and why; changes nothing.

        NotFoundError for an unknown id, InvalidError for what is neither a name nor an address.
        """
        ...

    async def suggest(self, attachment_id: str) -> SuggestionView:
        """Make a policy of what audit mode let through.

        NotFoundError for an unknown id, PreconditionError where nothing was recorded, ExhaustedError where it would be
        too large.
        """
        ...

    def watch(
        self, attachment_id: str, verdicts: Collection[FlowVerdict]
    ) -> AbstractContextManager[AsyncIterable[FlowView]]:
        """Give what is decided from now on about one attachment, or ("") all; no `verdicts`: whatever the verdict.

        Leaving the block ends it. It ends by itself when that attachment leaves. NotFoundError for an unknown id,
        ExhaustedError beyond a limit of streams, UnavailableError when the daemon stops.
        """
        ...


class _Daemon(daemon_pb2_grpc.DaemonServiceServicer):
    """DaemonService over a `DaemonPort`."""

    def __init__(self, port: DaemonPort) -> None:
        self._port = port

    async def Attach(  # noqa: N802 - named by the contract
        self, request: daemon_pb2.AttachRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> daemon_pb2.AttachResponse:
        async def answer() -> daemon_pb2.AttachResponse:
            view = await self._port.attach(attach_spec(request))
            return daemon_pb2.AttachResponse(id=view.id, dns_address=view.dns_address)

        return await _answer(context, "attach", answer)

    async def Detach(  # noqa: N802
        self, request: daemon_pb2.DetachRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> empty_pb2.Empty:
        async def answer() -> empty_pb2.Empty:
            if not request.id:
                raise InvalidError("detach: id is empty; give the id that attach returned")
            await self._port.detach(request.id)
            return empty_pb2.Empty()

        return await _answer(context, "detach", answer)

    async def List(  # noqa: N802
        self, request: daemon_pb2.ListRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> daemon_pb2.ListResponse:
        async def answer() -> daemon_pb2.ListResponse:
            size = page_size(request.page_size)
            behind = read_token(request.page_token) if request.page_token else None
            return _page(await self._port.list(), size, behind)

        return await _answer(context, "list", answer)

    async def GetStatus(  # noqa: N802
        self, request: empty_pb2.Empty, context: grpc.aio.ServicerContext[Any, Any]
    ) -> daemon_pb2.DaemonStatus:
        del request

        async def answer() -> daemon_pb2.DaemonStatus:
            return daemon_status_message(await self._port.status())

        return await _answer(context, "status", answer)

    async def Explain(  # noqa: N802
        self, request: daemon_pb2.ExplainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> daemon_pb2.ExplainResponse:
        async def answer() -> daemon_pb2.ExplainResponse:
            return explanation_message(await self._port.explain(request.id, explain_subject(request)))

        return await _answer(context, "explain", answer)

    async def Suggest(  # noqa: N802
        self, request: daemon_pb2.SuggestRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> daemon_pb2.SuggestResponse:
        async def answer() -> daemon_pb2.SuggestResponse:
            if not request.id:
                raise InvalidError("suggest: id is empty; give the id that attach returned")
            view = await self._port.suggest(request.id)
            return daemon_pb2.SuggestResponse(policy=view.policy, missed=view.missed)

        return await _answer(context, "suggest", answer)

    async def Watch(  # type: ignore[override]  # noqa: N802 - writes, and yields nothing: a cancelled call unwinds here
        self, request: daemon_pb2.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        try:
            with self._port.watch(request.id, watch_verdicts(request)) as flows:
                await context.send_initial_metadata(())  # from here on nothing is missed: the client may know
                async for flow in flows:
                    await context.write(flow_message(flow))  # waits for a client that does not read
        except Exception as error:  # noqa: BLE001 - as in `_answer`
            await abort(context, "watch", error)


async def _answer(
    context: grpc.aio.ServicerContext[Any, Any], method: str, work: Callable[[], Awaitable[Response]]
) -> Response:
    """Return what `work` returns, or end the call with the status of what it raises."""
    try:
        return await work()
    except Exception as error:  # noqa: BLE001 - `abort` tells kinds from defects and logs the latter
        await abort(context, method, error)


def _page(views: Sequence[AttachmentInfoView], size: int, behind: tuple[float, str] | None) -> daemon_pb2.ListResponse:
    """Return the attachments behind a place, at most `size` of them and `MAX_BYTES`, but one at least."""
    response = daemon_pb2.ListResponse(total_count=len(views))
    room = MAX_BYTES
    last: tuple[float, str] | None = None
    for view in views:
        place = (view.attached_at, view.id)
        if behind is not None and place <= behind:
            continue
        message = attachment_message(view)
        room -= message.ByteSize()
        if last is not None and (len(response.attachments) == size or room < 0):
            response.next_page_token = make_token(last)
            break
        response.attachments.append(message)
        last = place
    return response


class ApiServer:
    """A running API; made by `serve`."""

    def __init__(self, server: grpc.aio.Server, health: health_aio.HealthServicer, place: SocketPlace) -> None:
        self._server = server
        self._health = health
        self._place = place

    async def close(self, grace_s: float) -> None:
        """Take new calls no more, give those under way `grace_s` seconds, then cancel them.

        The socket's name goes first, if it is still ours, so that a successor can start at once.
        """
        self._place.remove()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


async def serve(port: DaemonPort, socket_path: Path, group: str | None) -> ApiServer:
    """Serve `port` on a unix socket of mode 0600, or 0660 and `group` if one is given.

    Ready for calls when it returns. Raises InvalidError, NotFoundError, PermissionDeniedError or PreconditionError
    where the socket cannot be had (see `unix_socket`); nothing is left behind then.
    """
    place = SocketPlace(socket_path, group)
    server = grpc.aio.server(maximum_concurrent_rpcs=MAX_CALLS)
    try:
        health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        daemon_pb2_grpc.add_DaemonServiceServicer_to_server(_Daemon(port), server)
        names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        try:
            server.add_insecure_port(f"unix:{quote(str(place.bind_path))}")
        except RuntimeError as error:
            raise PreconditionError(
                f"listen on socket {place.path}: {error}; see the log for gRPC's own words"
            ) from error
        for name in ("", SERVICE):
            await health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        place.publish()
    except BaseException:
        place.give_up()
        await server.stop(None)
        raise
    log.info("api_ready", socket=str(place.path), group=group or "")
    return ApiServer(server, health, place)
