from collections.abc import AsyncIterator

import grpc
import grpc.aio
from google.protobuf import empty_pb2
from netfence.v1 import daemon_pb2

class DaemonServiceStub:
    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None: ...
    Attach: grpc.UnaryUnaryMultiCallable[daemon_pb2.AttachRequest, daemon_pb2.AttachResponse]
    Detach: grpc.UnaryUnaryMultiCallable[daemon_pb2.DetachRequest, empty_pb2.Empty]
    List: grpc.UnaryUnaryMultiCallable[daemon_pb2.ListRequest, daemon_pb2.ListResponse]
    GetStatus: grpc.UnaryUnaryMultiCallable[empty_pb2.Empty, daemon_pb2.DaemonStatus]
    Watch: grpc.UnaryStreamMultiCallable[daemon_pb2.WatchRequest, daemon_pb2.FlowEvent]
    Explain: grpc.UnaryUnaryMultiCallable[daemon_pb2.ExplainRequest, daemon_pb2.ExplainResponse]
    Suggest: grpc.UnaryUnaryMultiCallable[daemon_pb2.SuggestRequest, daemon_pb2.SuggestResponse]

class DaemonServiceAsyncStub:
    Attach: grpc.aio.UnaryUnaryMultiCallable[daemon_pb2.AttachRequest, daemon_pb2.AttachResponse]
    Detach: grpc.aio.UnaryUnaryMultiCallable[daemon_pb2.DetachRequest, empty_pb2.Empty]
    List: grpc.aio.UnaryUnaryMultiCallable[daemon_pb2.ListRequest, daemon_pb2.ListResponse]
    GetStatus: grpc.aio.UnaryUnaryMultiCallable[empty_pb2.Empty, daemon_pb2.DaemonStatus]
    Watch: grpc.aio.UnaryStreamMultiCallable[daemon_pb2.WatchRequest, daemon_pb2.FlowEvent]
    Explain: grpc.aio.UnaryUnaryMultiCallable[daemon_pb2.ExplainRequest, daemon_pb2.ExplainResponse]
    Suggest: grpc.aio.UnaryUnaryMultiCallable[daemon_pb2.SuggestRequest, daemon_pb2.SuggestResponse]

class DaemonServiceServicer:
    async def Attach(self, request: daemon_pb2.AttachRequest, context: grpc.aio.ServicerContext[daemon_pb2.AttachRequest, daemon_pb2.AttachResponse]) -> daemon_pb2.AttachResponse: ...
    async def Detach(self, request: daemon_pb2.DetachRequest, context: grpc.aio.ServicerContext[daemon_pb2.DetachRequest, empty_pb2.Empty]) -> empty_pb2.Empty: ...
    async def List(self, request: daemon_pb2.ListRequest, context: grpc.aio.ServicerContext[daemon_pb2.ListRequest, daemon_pb2.ListResponse]) -> daemon_pb2.ListResponse: ...
    async def GetStatus(self, request: empty_pb2.Empty, context: grpc.aio.ServicerContext[empty_pb2.Empty, daemon_pb2.DaemonStatus]) -> daemon_pb2.DaemonStatus: ...
    def Watch(self, request: daemon_pb2.WatchRequest, context: grpc.aio.ServicerContext[daemon_pb2.WatchRequest, daemon_pb2.FlowEvent]) -> AsyncIterator[daemon_pb2.FlowEvent]: ...
    async def Explain(self, request: daemon_pb2.ExplainRequest, context: grpc.aio.ServicerContext[daemon_pb2.ExplainRequest, daemon_pb2.ExplainResponse]) -> daemon_pb2.ExplainResponse: ...
    async def Suggest(self, request: daemon_pb2.SuggestRequest, context: grpc.aio.ServicerContext[daemon_pb2.SuggestRequest, daemon_pb2.SuggestResponse]) -> daemon_pb2.SuggestResponse: ...

def add_DaemonServiceServicer_to_server(servicer: DaemonServiceServicer, server: grpc.aio.Server) -> None: ...
