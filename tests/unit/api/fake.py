"""A daemon without a kernel for the tests of the API and the command line, and ways to run a server over it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Collection, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote

import grpc.aio

from netfence.api.service import ApiServer, serve
from netfence.api.views import (
    AttachmentInfoView,
    AttachSpec,
    ExplainedAddress,
    ExplanationView,
    FlowVerdict,
    FlowView,
    StatusView,
    SuggestionView,
)
from netfence.errors import NotFoundError
from netfence.flow_watcher import Watcher
from netfence.policy.modes import DnsMode, Mode
from netfence.v1 import daemon_pb2_grpc

T = TypeVar("T")

HASH = "ab" * 32

VIEW = AttachmentInfoView(
    id="id-0",
    target="veth0",
    hook="tc",
    direction="workload",
    attach_mechanism="tcx",
    mode=Mode.ALLOWLIST,
    dns_mode=DnsMode.PROXY,
    dns_address="127.0.0.1:11000",
    attached_at=1_700_000_000.25,
    metadata={"tenant": "acme"},
    packets_allowed=2**63 + 1,
    packets_blocked=2,
    dns_queries_allowed=3,
    dns_queries_blocked=4,
    policy_version="v7",
    policy_hash=HASH,
    packets_would_block=5,
    audit=True,
)

STATUS = StatusView(
    version="0.1.0",
    daemon_id="d-1",
    hostname="host",
    control_plane_state=3,
    control_plane_address="file:/etc/policy.yaml",
    attachment_count=1,
    uptime_s=3723.5,
    kernel_release="6.18.0",
    features={"tcx": "yes", "ringbuf": "no: needs Linux 5.8"},
    config={"log_level": ("info", "default"), "metadata": ({"rack": "r1"}, "flag")},
)


EXPLANATION = ExplanationView(
    subject="pypi.org",
    name_verdict="pass",
    steps=[
        ("mode", "veth0", "packets allowlist, names allowlist"),
        ("name", "pypi.org", "rule: allow pypi.org"),
        ("answer", "pypi.org", "A: 192.0.2.1, 192.0.2.2; from cache, TTL 60 s"),
        ("address", "192.0.2.1", "global"),
        ("lease", "192.0.2.1", "live for 5 m 0 s more"),
        ("address", "192.0.2.2", "global"),
        ("rule", "192.0.2.0/24", "deny 192.0.2.0/24"),
    ],
    addresses=[
        ExplainedAddress("192.0.2.1", "pass", "lease", lease_s=299.5),
        ExplainedAddress("192.0.2.2", "drop", "deny_rule", "deny 192.0.2.0/24"),
    ],
    remedies=["remove deny 192.0.2.0/24"],
)


class FakeDaemon:
    """A `DaemonPort` that keeps its attachments in a list; `failure` is raised by the next calls if it is set."""

    def __init__(self, views: Sequence[AttachmentInfoView] = ()) -> None:
        self.views = list(views)
        self.told = STATUS
        self.specs: list[AttachSpec] = []
        self.failure: Exception | None = None
        self.explanation = EXPLANATION
        self.explained: list[tuple[str, str]] = []
        self.suggestion = SuggestionView("default:\n  mode: block_all\n", 7)
        self.suggested: list[str] = []
        self.hold: asyncio.Event | None = None
        self.attaching = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.watchers: list[Watcher] = []

    async def attach(self, spec: AttachSpec) -> AttachmentInfoView:
        self.specs.append(spec)
        self.attaching.set()
        if self.hold is not None:
            try:
                await self.hold.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        self._fail()
        number = len(self.views)
        view = replace(
            VIEW,
            id=f"id-{number}",
            target=spec.interface or spec.cgroup or "",
            metadata=dict(spec.metadata),
            attached_at=VIEW.attached_at + number,
        )
        self.views.append(view)
        return view

    async def detach(self, attachment_id: str) -> None:
        self._fail()
        left = [view for view in self.views if view.id != attachment_id]
        if len(left) == len(self.views):
            raise NotFoundError(f"detach {attachment_id}: no such attachment; see `netfenced list`")
        self.views = left

    async def list(self) -> Sequence[AttachmentInfoView]:
        self._fail()
        return sorted(self.views, key=lambda view: (view.attached_at, view.id))

    async def explain(self, attachment_id: str, subject: str) -> ExplanationView:
        self._fail()
        self.explained.append((attachment_id, subject))
        return self.explanation

    async def suggest(self, attachment_id: str) -> SuggestionView:
        self._fail()
        self.suggested.append(attachment_id)
        return self.suggestion

    async def status(self) -> StatusView:
        self._fail()
        return replace(self.told, attachment_count=len(self.views))

    @contextmanager
    def watch(self, attachment_id: str, verdicts: Collection[FlowVerdict]) -> Iterator[Watcher]:
        self._fail()
        if attachment_id and all(view.id != attachment_id for view in self.views):
            raise NotFoundError(f"watch: no attachment {attachment_id}; see `netfenced list`")
        watcher = Watcher(attachment_id, verdicts)
        self.watchers.append(watcher)
        try:
            yield watcher
        finally:
            self.watchers.remove(watcher)

    async def tell(self, *views: FlowView, end: bool = False) -> None:
        """Tell everybody who watches, when somebody does; then, with `end`, their attachment leaves."""
        while not self.watchers:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)
        for watcher in self.watchers:
            for view in views:
                if not view.verdict or watcher.wants(view.id, view.verdict):
                    watcher.lose(view.lost)
                    watcher.put(view)
            if end:
                watcher.end()

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


def many(count: int, **changes: Any) -> list[AttachmentInfoView]:
    """Return that many attachments, two at each time, so that the id has to order them."""
    return [replace(VIEW, id=f"id-{n:04}", attached_at=100.0 + n // 2, **changes) for n in range(count)]


@asynccontextmanager
async def serving(port: FakeDaemon, path: Path, group: str | None = None) -> AsyncIterator[ApiServer]:
    """Serve a fake daemon for the time of the block."""
    server = await serve(port, path, group)
    try:
        yield server
    finally:
        await server.close(0)


@asynccontextmanager
async def channel(path: Path) -> AsyncIterator[grpc.aio.Channel]:
    """Connect to a socket."""
    async with grpc.aio.insecure_channel(f"unix:{quote(str(path))}") as made:
        yield made


@asynccontextmanager
async def calling(path: Path) -> AsyncIterator[daemon_pb2_grpc.DaemonServiceAsyncStub]:
    """Connect to a socket and give the daemon's stub."""
    async with channel(path) as made:
        yield cast("daemon_pb2_grpc.DaemonServiceAsyncStub", daemon_pb2_grpc.DaemonServiceStub(made))


class Background:
    """An event loop in a thread, with a server in it, for clients that block."""

    def __init__(self, port: FakeDaemon, path: Path) -> None:
        self.port = port
        self.path = path
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="api-server", daemon=True)
        self._thread.start()
        self.server = self.run(serve(port, path, None))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and return what it returns."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(timeout=20)

    def stop(self) -> None:
        """Close the server and end the thread."""
        self.run(self.server.close(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=20)
        self._loop.close()


@contextmanager
def background(port: FakeDaemon, path: Path) -> Iterator[Background]:
    """Serve a fake daemon from a thread for the time of the block."""
    made = Background(port, path)
    try:
        yield made
    finally:
        made.stop()
