"""Asking the control plane about single names: `QueryDns`, for DNS mode `proxy` (semantics.md 14).

Owns the deadline, the bound on questions in the air and its fair sharing, and what a response may be. Who asks the same
at once, and how long a decision holds, is `dns.proxy`'s.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import grpc
import grpc.aio

from netfence.control.port import NameDecision
from netfence.control.stream import Metadata
from netfence.errors import DeadlineError, ExhaustedError, UnavailableError
from netfence.policy.prefix import parse_address
from netfence.v1 import control_pb2

QUERY_DNS: Final = "/netfence.v1.ControlPlane/QueryDns"

MAX_QUERIES: Final = 1024
"""Questions in the air: each is an HTTP/2 stream of the one connection, and servers allow a hundred to a thousand."""

MAX_FREE: Final = 768
"""Questions in the air from which on only attachments without one may ask: the flood of one leaves others room."""

MAX_IPS: Final = 512
"""Addresses of one decision: more fit no answer that a resolver of today takes."""


class NameQueries:
    """See the module. `use` a channel while there is one."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._ask: Any = None
        self._metadata: Metadata = ()
        self._total = 0
        self._asking: dict[str, int] = {}

    def use(self, channel: grpc.aio.Channel | None, metadata: Metadata = ()) -> None:
        """Ask over this channel from now on; None: there is none, every question fails at once."""
        self._metadata = metadata
        self._ask = channel and channel.unary_unary(
            QUERY_DNS,
            request_serializer=control_pb2.DnsQueryRequest.SerializeToString,
            response_deserializer=control_pb2.DnsQueryResponse.FromString,
        )

    async def ask(self, attachment_id: str, name: str, qtype: str) -> NameDecision:
        """Ask about a name (no final dot). Raises UnavailableError, DeadlineError or ExhaustedError."""
        what = f"ask the control plane about {name} {qtype}"
        if self._ask is None:
            raise UnavailableError(f"{what}: not connected to it")
        own = self._asking.get(attachment_id, 0)
        if self._total >= MAX_QUERIES or (own and self._total >= MAX_FREE):
            raise ExhaustedError(f"{what}: {self._total} questions wait for it already")
        self._total += 1
        self._asking[attachment_id] = own + 1
        try:
            request = control_pb2.DnsQueryRequest(id=attachment_id, domain=f"{name}.", query_type=qtype)
            response = await self._ask(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineError(f"{what}: no answer within {self._timeout_s:g} s") from None
            raise UnavailableError(f"{what}: {error.code().name}: {error.details()}") from None
        except (asyncio.CancelledError, grpc.aio.UsageError):
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise UnavailableError(f"{what}: the connection was closed") from None
        finally:
            self._total -= 1
            if self._asking[attachment_id] == 1:
                del self._asking[attachment_id]
            else:
                self._asking[attachment_id] -= 1
        return _decision(response, what)


def _decision(response: control_pb2.DnsQueryResponse, what: str) -> NameDecision:
    """Return what a response says; UnavailableError when it makes no sense."""
    if not response.allow:
        return NameDecision(allow=False, ttl_s=float(response.ttl_seconds))
    if len(response.ips) > MAX_IPS:
        raise UnavailableError(f"{what}: it gave {len(response.ips)} addresses, at most {MAX_IPS} are taken")
    try:
        ips = tuple(map(parse_address, response.ips))
    except ValueError as error:
        raise UnavailableError(f"{what}: it gave a bad address: {error}") from None
    return NameDecision(True, response.add_to_filter, ips, float(response.ttl_seconds))
