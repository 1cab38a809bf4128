"""Watch over a real unix socket: what is asked and answered, how streams end, and that none is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
from tests.unit.api.fake import VIEW, FakeDaemon, calling, serving

from netfence.api.views import FlowView
from netfence.errors import ExhaustedError, NetfenceError, UnavailableError
from netfence.flow_watcher import QUEUE
from netfence.v1 import daemon_pb2

FLOW = FlowView(
    time=1_700_000_000.25,
    id="id-0",
    kind="packet",
    verdict="drop",
    reason="deny_rule",
    protocol="udp",
    source="10.0.0.2:4000",
    destination="203.0.113.9:53",
    domain="x.test",
    rule="deny 203.0.113.0/24",
    lost=3,
)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0.005)


async def failure(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in call:
            pass
    return raised.value.code().name, raised.value.details() or ""


def test_events_arrive_whole(tmp_path: Path) -> None:
    async def test() -> None:
        port = FakeDaemon([VIEW])
        async with serving(port, tmp_path / "s"), calling(tmp_path / "s") as stub:
            call = stub.Watch(daemon_pb2.WatchRequest(id="id-0", verdicts=["drop", "would_drop"]))
            await port.tell(FLOW, replace(FLOW, verdict="pass", lost=0), end=True)
            (event,) = [event async for event in call]
        assert {field.name for field, _ in event.ListFields()} == {field.name for field in event.DESCRIPTOR.fields}
        assert (event.time.seconds, event.time.nanos) == (1_700_000_000, 250_000_000)
        assert (event.id, event.kind, event.verdict, event.reason) == ("id-0", "packet", "drop", "deny_rule")
        assert (event.protocol, event.source, event.destination) == ("udp", "10.0.0.2:4000", "203.0.113.9:53")
        assert (event.domain, event.rule, event.lost) == ("x.test", "deny 203.0.113.0/24", 3)

    run(test())


def test_initial_metadata_tells_that_it_has_begun(tmp_path: Path) -> None:
    async def test() -> None:
        port = FakeDaemon()
        async with serving(port, tmp_path / "s"), calling(tmp_path / "s") as stub:
            call = stub.Watch(daemon_pb2.WatchRequest())
            await call.initial_metadata()  # with no event yet
            assert len(port.watchers) == 1

    run(test())


@pytest.mark.parametrize(
    ("request_", "code", "said"),
    [
        (
            daemon_pb2.WatchRequest(verdicts=["pass", "nope", "DROP"]),
            "INVALID_ARGUMENT",
            "watch: 'DROP' is no verdict; use pass, drop or would_drop; watch: 'nope' is no verdict; use",
        ),
        (daemon_pb2.WatchRequest(verdicts=["x" * 10_000]), "INVALID_ARGUMENT", f"{'x' * 32!r} is no verdict"),
        (daemon_pb2.WatchRequest(id="nope"), "NOT_FOUND", "watch: no attachment nope; see `netfenced list`"),
    ],
    ids=["verdicts", "long-verdict", "unknown-id"],
)
def test_a_bad_request_is_refused(tmp_path: Path, request_: daemon_pb2.WatchRequest, code: str, said: str) -> None:
    async def test() -> None:
        async with serving(FakeDaemon(), tmp_path / "s"), calling(tmp_path / "s") as stub:
            found, details = await failure(stub.Watch(request_))
        assert found == code
        assert said in details
        assert len(details) < 300

    run(test())


@pytest.mark.parametrize("error", [ExhaustedError("watch: full"), UnavailableError("watch: stopping")], ids=str)
def test_the_daemons_errors_are_passed_on(tmp_path: Path, error: NetfenceError) -> None:
    async def test() -> None:
        port = FakeDaemon()
        port.failure = error
        async with serving(port, tmp_path / "s"), calling(tmp_path / "s") as stub:
            assert await failure(stub.Watch(daemon_pb2.WatchRequest())) == (error.code, str(error))

    run(test())


def test_an_error_in_the_middle_comes_behind_the_events_before_it(tmp_path: Path) -> None:
    async def test() -> None:
        port = FakeDaemon()
        async with serving(port, tmp_path / "s"), calling(tmp_path / "s") as stub:
            call = stub.Watch(daemon_pb2.WatchRequest())
            await port.tell(FLOW)
            port.watchers[0].end(UnavailableError("watch: the daemon is stopping"))
            stream = aiter(call)
            assert (await anext(stream)).domain == "x.test"
            assert await failure(stream) == ("UNAVAILABLE", "watch: the daemon is stopping")

    run(test())


@pytest.mark.parametrize("flood", [False, True], ids=["waiting", "writing"])
def test_a_client_that_cancels_leaves_no_watcher(tmp_path: Path, *, flood: bool) -> None:
    async def test() -> None:
        port = FakeDaemon()
        with structlog.testing.capture_logs() as logs:
            async with serving(port, tmp_path / "s"), calling(tmp_path / "s") as stub:
                call = stub.Watch(daemon_pb2.WatchRequest())
                await port.tell(*[FLOW] * (QUEUE if flood else 1))
                await anext(aiter(call))
                call.cancel()
                await until(lambda: not port.watchers)
        assert [entry for entry in logs if entry["event"] == "api_failed"] == []

    run(test())


def test_what_a_client_does_not_read_waits_in_its_watcher(tmp_path: Path) -> None:
    async def test() -> None:
        port = FakeDaemon()
        async with serving(port, tmp_path / "s"), calling(tmp_path / "s") as stub:
            call = stub.Watch(daemon_pb2.WatchRequest())
            await call.initial_metadata()
            long = replace(FLOW, rule="x" * 10_000)
            (watcher,) = port.watchers
            for _ in range(100):  # ten times what gRPC takes on its own
                await port.tell(*[long] * 10)
                await asyncio.sleep(0.001)
            assert len(watcher._queue) > 100
            call.cancel()
            await until(lambda: not port.watchers)

    run(test())
