from collections.abc import AsyncIterator

import grpc
import grpc.aio
from netfence.v1 import control_pb2

class ControlPlaneStub:
    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None: ...
    Connect: grpc.StreamStreamMultiCallable[control_pb2.DaemonEvent, control_pb2.ControlCommand]
    QueryDns: grpc.UnaryUnaryMultiCallable[control_pb2.DnsQueryRequest, control_pb2.DnsQueryResponse]

class ControlPlaneAsyncStub:
    Connect: grpc.aio.StreamStreamMultiCallable[control_pb2.DaemonEvent, control_pb2.ControlCommand]
    QueryDns: grpc.aio.UnaryUnaryMultiCallable[control_pb2.DnsQueryRequest, control_pb2.DnsQueryResponse]

class ControlPlaneServicer:
    def Connect(self, request: AsyncIterator[control_pb2.DaemonEvent], context: grpc.aio.ServicerContext[control_pb2.DaemonEvent, control_pb2.ControlCommand]) -> AsyncIterator[control_pb2.ControlCommand]: ...
    async def QueryDns(self, request: control_pb2.DnsQueryRequest, context: grpc.aio.ServicerContext[control_pb2.DnsQueryRequest, control_pb2.DnsQueryResponse]) -> control_pb2.DnsQueryResponse: ...

def add_ControlPlaneServicer_to_server(servicer: ControlPlaneServicer, server: grpc.aio.Server) -> None: ...
