"""DaemonService, health and reflection over a real unix socket, with a daemon that has no kernel."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
import structlog
from google.protobuf import empty_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.unit.api.fake import STATUS, VIEW, FakeDaemon, calling, channel, many, serving

from netfence.api.paging import make_token
from netfence.errors import (
    DeadlineError,
    ExhaustedError,
    ExistsError,
    InvalidError,
    NetfenceError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnavailableError,
)
from netfence.v1 import daemon_pb2, types_pb2


async def _status_of(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code().name, raised.value.details() or ""


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


VETH = daemon_pb2.AttachRequest(interface_name="veth0")


def test_attach_passes_on_what_was_asked(tmp_path: Path) -> None:
    async def test() -> None:
        port = FakeDaemon()
        async with serving(port, tmp_path / "s"), calling(tmp_path / "s") as stub:
            answer = await stub.Attach(
                daemon_pb2.AttachRequest(
                    interface_name="eth0",
                    metadata={"vm": "7"},
                    hook=daemon_pb2.HOOK_TC,
                    direction=daemon_pb2.DIRECTION_HOST,
                )
            )
            assert (answer.id, answer.dns_address) == ("id-0", "127.0.0.1:11000")
            await stub.Attach(daemon_pb2.AttachRequest(cgroup_path="/sys/fs/cgroup/box"))
        first, second = port.specs
        assert (first.interface, first.cgroup, first.hook, first.direction) == ("eth0", None, "tc", "host")
        assert first.metadata == {"vm": "7"}
        assert (second.interface, second.cgroup) == (None, "/sys/fs/cgroup/box")
        assert (second.hook, second.direction, second.metadata) == ("auto", "auto", {})

    run(test())


KINDS = (
    InvalidError, NotFoundError, ExistsError, ExhaustedError, PreconditionError, UnavailableError, DeadlineError,
    PermissionDeniedError,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.code)
@pytest.mark.parametrize("method", ["Attach", "Detach", "List", "GetStatus"])
def test_every_error_kind_becomes_its_status(kind: type[NetfenceError], method: str, tmp_path: Path) -> None:
    async def test() -> None:
        port = FakeDaemon()
        port.failure = kind("attach tc on veth3: operation not permitted; needs CAP_NET_ADMIN")
        request = {
            "Attach": VETH,
            "Detach": daemon_pb2.DetachRequest(id="x"),
            "List": daemon_pb2.ListRequest(),
            "GetStatus": empty_pb2.Empty(),
        }[method]
        async with serving(port, tmp_path / "s"), calling(tmp_path / "s") as stub:
            assert await _status_of(getattr(stub, method)(request)) == (kind.code, str(port.failure))

    run(test())


def test_a_defect_tells_the_log_and_not_the_client(tmp_path: Path) -> None:
    async def test() -> None:
        port = FakeDaemon()
        port.failure = KeyError("/secret/path")
        async with serving(port, tmp_path / "s"), calling(tmp_path / "s") as stub:
            code, details = await _status_of(stub.Attach(VETH))
            assert code == "INTERNAL"
            assert "secret" not in details
            assert "Traceback" not in details
            assert "log" in details
            port.failure = None
            assert (await stub.Attach(VETH)).id == "id-0"  # and the server lives on

    with structlog.testing.capture_logs() as logs:
        run(test())
    (line,) = (log for log in logs if log["event"] == "api_failed")
    assert line["log_level"] == "error"
    assert line["method"] == "attach"
    assert isinstance(line["exc_info"], KeyError)


BAD_ATTACHES = {
    "no-target": (daemon_pb2.AttachRequest(), ["no target"]),
    "empty-interface": (daemon_pb2.AttachRequest(interface_name=""), ["interface_name is empty"]),
    "empty-cgroup": (daemon_pb2.AttachRequest(cgroup_path=""), ["cgroup_path is empty"]),
    "long-interface": (daemon_pb2.AttachRequest(interface_name="v" * 128), ["128 bytes", "at most 127"]),
    "nul": (daemon_pb2.AttachRequest(cgroup_path="/a\0b"), ["NUL"]),
    "unknown-hook": (daemon_pb2.AttachRequest(interface_name="v", hook=9), ["hook 9", "HOOK_TC (1)"]),  # type: ignore[arg-type]
    "unknown-direction": (
        daemon_pb2.AttachRequest(interface_name="v", direction=9),  # type: ignore[arg-type]
        ["direction 9", "DIRECTION_HOST (2)"],
    ),
    "cgroup-hook": (daemon_pb2.AttachRequest(cgroup_path="/c", hook="HOOK_TC"), ["leave them out for a cgroup"]),
    "cgroup-direction": (
        daemon_pb2.AttachRequest(cgroup_path="/c", direction="DIRECTION_HOST"),
        ["leave them out for a cgroup"],
    ),
    "xdp-host": (
        daemon_pb2.AttachRequest(interface_name="e", hook="HOOK_XDP", direction="DIRECTION_HOST"),
        ["XDP sees only what comes in"],
    ),
    "metadata-many": (
        daemon_pb2.AttachRequest(interface_name="v", metadata={f"k{n}": "" for n in range(65)}),
        ["65 keys", "at most 64"],
    ),
    "all-at-once": (
        daemon_pb2.AttachRequest(hook=9, metadata={"": "", "k" * 64: "v" * 1025, "a=b": "\x1b[2J"}),  # type: ignore[arg-type]
        ["no target", "hook 9", "empty key", "64 bytes", "1025 bytes", '"=" and ","', "cannot be printed"],
    ),
}


@pytest.mark.parametrize(("request_", "said"), BAD_ATTACHES.values(), ids=BAD_ATTACHES)
def test_bad_attach_is_refused_before_the_daemon(
    request_: daemon_pb2.AttachRequest, said: list[str], tmp_path: Path
) -> None:
    async def test() -> None:
        port = FakeDaemon()
        async with serving(port, tmp_path / "s"), calling(tmp_path / "s") as stub:
            code, details = await _status_of(stub.Attach(request_))
        assert code == "INVALID_ARGUMENT"
        assert [part for part in said if part not in details] == []
        assert port.specs == []
        assert details.isprintable()

    run(test())


def test_metadata_at_its_bounds_is_accepted(tmp_path: Path) -> None:
    async def test() -> None:
        metadata = {f"{n:02}" + "k" * 61: "ü" * 512 for n in range(64)}
        port = FakeDaemon()
        async with serving(port, tmp_path / "s"), calling(tmp_path / "s") as stub:
            await stub.Attach(daemon_pb2.AttachRequest(interface_name="v", metadata=metadata))
        assert port.specs[0].metadata == metadata

    run(test())


def test_a_thousand_faults_fit_a_status(tmp_path: Path) -> None:
    async def test() -> None:
        port = FakeDaemon()
        port.failure = InvalidError([f"allow_cidrs[{n}]: '10.0.0.0/33' ist ungültig" for n in range(1000)])
        async with serving(port, tmp_path / "s"), calling(tmp_path / "s") as stub:
            code, details = await _status_of(stub.Attach(VETH))
        assert code == "INVALID_ARGUMENT"
        shown = details.split("; ")
        assert shown[0].startswith("allow_cidrs[0]")
        assert shown[-1] == f"and {1000 - (len(shown) - 1)} more faults"
        assert len(shown) > 50

    run(test())


def test_a_caller_that_hangs_up_cancels_its_attach(tmp_path: Path) -> None:
    async def test() -> None:
        port = FakeDaemon()
        port.hold = asyncio.Event()
        async with serving(port, tmp_path / "s"), calling(tmp_path / "s") as stub:
            call = stub.Attach(VETH)
            await port.attaching.wait()
            call.cancel()
            await asyncio.wait_for(port.cancelled.wait(), 10)
        assert port.views == []

    run(test())


def test_detach(tmp_path: Path) -> None:
    async def test() -> None:
        port = FakeDaemon([VIEW])
        async with serving(port, tmp_path / "s"), calling(tmp_path / "s") as stub:
            code, details = await _status_of(stub.Detach(daemon_pb2.DetachRequest()))
            assert code == "INVALID_ARGUMENT"
            assert "id is empty" in details
            assert (await _status_of(stub.Detach(daemon_pb2.DetachRequest(id="nope"))))[0] == "NOT_FOUND"
            assert port.views == [VIEW]
            assert await stub.Detach(daemon_pb2.DetachRequest(id="id-0")) == empty_pb2.Empty()
        assert port.views == []

    run(test())


def test_list_carries_every_field(tmp_path: Path) -> None:
    async def test() -> None:
        cgroup = replace(VIEW, id="id-1", hook="cgroup", attach_mechanism="cgroup-link", target="/c")
        xdp = replace(VIEW, id="id-2", hook="xdp", attach_mechanism="xdp-native", direction="host")
        async with serving(FakeDaemon([VIEW, cgroup, xdp]), tmp_path / "s"), calling(tmp_path / "s") as stub:
            answer = await stub.List(daemon_pb2.ListRequest())
        info = answer.attachments[0]
        assert {field.name for field, _ in info.ListFields()} == {field.name for field in info.DESCRIPTOR.fields}
        assert (info.id, info.target, info.type) == ("id-0", "veth0", types_pb2.ATTACHMENT_TYPE_TC)
        assert (info.mode, info.dns_mode) == (types_pb2.POLICY_MODE_ALLOWLIST, types_pb2.DNS_MODE_PROXY)
        assert (info.dns_address, dict(info.metadata)) == ("127.0.0.1:11000", {"tenant": "acme"})
        assert (info.packets_allowed, info.packets_blocked) == (2**63 + 1, 2)
        assert (info.dns_queries_allowed, info.dns_queries_blocked) == (3, 4)
        assert (info.attached_at.seconds, info.attached_at.nanos) == (1_700_000_000, 250_000_000)
        assert (info.policy_version, info.policy_hash) == ("v7", "ab" * 32)
        assert (info.hook, info.direction) == (daemon_pb2.HOOK_TC, daemon_pb2.DIRECTION_WORKLOAD)
        assert info.attach_mechanism == "tcx"
        second, third = answer.attachments[1:]
        assert (second.type, second.hook, second.direction) == (types_pb2.ATTACHMENT_TYPE_CGROUP, 0, 0)
        assert (third.type, third.hook) == (types_pb2.ATTACHMENT_TYPE_XDP, daemon_pb2.HOOK_XDP)
        assert third.direction == daemon_pb2.DIRECTION_HOST
        assert (answer.total_count, answer.next_page_token) == (3, "")

    run(test())


@pytest.mark.parametrize(
    ("asked", "count", "got"),
    [(0, 101, 100), (0, 100, 100), (7, 101, 7), (1000, 1001, 1000), (1001, 1001, 1000), (2**31 - 1, 5, 5), (3, 0, 0)],
)
def test_page_size(asked: int, count: int, got: int, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(FakeDaemon(many(count)), tmp_path / "s"), calling(tmp_path / "s") as stub:
            answer = await stub.List(daemon_pb2.ListRequest(page_size=asked))
        assert len(answer.attachments) == got
        assert answer.total_count == count
        assert bool(answer.next_page_token) == (got < count)

    run(test())


def test_pages_cover_everything_once_while_attachments_come_and_go(tmp_path: Path) -> None:
    async def test() -> None:
        port = FakeDaemon(many(20))
        seen: list[str] = []
        async with serving(port, tmp_path / "s"), calling(tmp_path / "s") as stub:
            token = ""
            while True:
                page = await stub.List(daemon_pb2.ListRequest(page_size=3, page_token=token))
                seen += [info.id for info in page.attachments]
                token = page.next_page_token
                if not token:
                    break
                if len(seen) == 6:
                    gone = {"id-0000", "id-0005", "id-0009"}  # before, at, and behind the place of the token
                    port.views = [view for view in port.views if view.id not in gone]
                    port.views.append(replace(VIEW, id="new", attached_at=1e6))
        assert seen == [f"id-{n:04}" for n in range(20) if n != 9] + ["new"]

    run(test())


def test_page_is_bounded_in_bytes(tmp_path: Path) -> None:
    async def test() -> None:
        metadata = {f"{n:02}" + "k" * 61: "v" * 1024 for n in range(64)}
        port = FakeDaemon(many(100, metadata=metadata))
        seen = 0
        async with serving(port, tmp_path / "s"), calling(tmp_path / "s") as stub:
            token = ""
            while True:
                page = await stub.List(daemon_pb2.ListRequest(page_size=1000, page_token=token))
                assert page.ByteSize() <= 2 * 1024 * 1024 + 1024
                assert len(page.attachments) > 0
                seen += len(page.attachments)
                token = page.next_page_token
                if not token:
                    break
        assert seen == 100

    run(test())


BAD_PAGES = {
    "negative-size": daemon_pb2.ListRequest(page_size=-1),
    "garbage": daemon_pb2.ListRequest(page_token="garbage!"),
    "offset": daemon_pb2.ListRequest(page_token="100"),
    "truncated": daemon_pb2.ListRequest(page_token=make_token((100.0, "id"))[:5]),
    "tail": daemon_pb2.ListRequest(page_token=make_token((100.0, "id")) + "="),
    "not-utf8": daemon_pb2.ListRequest(page_token="AUBZAAAAAAAA_w"),
    "nan": daemon_pb2.ListRequest(page_token=make_token((float("nan"), "id"))),
    "emoji": daemon_pb2.ListRequest(page_token="🐳"),
}


@pytest.mark.parametrize("request_", BAD_PAGES.values(), ids=BAD_PAGES)
def test_bad_page(request_: daemon_pb2.ListRequest, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(FakeDaemon(many(3)), tmp_path / "s"), calling(tmp_path / "s") as stub:
            assert (await _status_of(stub.List(request_)))[0] == "INVALID_ARGUMENT"

    run(test())


def test_status_carries_every_field(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(FakeDaemon([VIEW]), tmp_path / "s"), calling(tmp_path / "s") as stub:
            answer = await stub.GetStatus(empty_pb2.Empty())
        assert {field.name for field, _ in answer.ListFields()} == {field.name for field in answer.DESCRIPTOR.fields}
        assert (answer.version, answer.daemon_id, answer.hostname) == ("0.1.0", "d-1", "host")
        assert answer.control_plane_state == types_pb2.CONNECTION_STATE_CONNECTED
        assert (answer.control_plane_address, answer.attachment_count) == ("file:/etc/policy.yaml", 1)
        assert (answer.uptime.seconds, answer.uptime.nanos) == (3723, 500_000_000)
        assert (answer.kernel_release, dict(answer.features)) == ("6.18.0", STATUS.features)
        assert {key: (json.loads(one.json), one.source) for key, one in answer.config.items()} == STATUS.config

    run(test())


def test_health(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(FakeDaemon(), tmp_path / "s"), channel(tmp_path / "s") as made:
            stub = cast("Any", health_pb2_grpc).HealthStub(made)
            for name in ("", "netfence.v1.DaemonService"):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            assert (await _status_of(stub.Check(health_pb2.HealthCheckRequest(service="no"))))[0] == "NOT_FOUND"

    run(test())


def test_reflection_lists_the_services_and_gives_the_contract(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(FakeDaemon(), tmp_path / "s"), channel(tmp_path / "s") as made:
            stub = cast("Any", reflection_pb2_grpc).ServerReflectionStub(made)
            request = reflection_pb2.ServerReflectionRequest
            asked = [request(list_services=""), request(file_containing_symbol="netfence.v1.DaemonService")]
            answers = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
        names = {service.name for service in answers[0].list_services_response.service}
        assert names == {
            "netfence.v1.DaemonService", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection",
        }  # fmt: skip
        assert daemon_pb2.DESCRIPTOR.serialized_pb in answers[1].file_descriptor_response.file_descriptor_proto

    run(test())


def test_close_gives_calls_under_way_their_grace(tmp_path: Path) -> None:
    async def test() -> None:
        port = FakeDaemon()
        port.hold = asyncio.Event()
        async with serving(port, tmp_path / "s") as server, calling(tmp_path / "s") as stub:
            call = stub.Attach(VETH)
            await port.attaching.wait()
            closing = asyncio.ensure_future(server.close(10))
            while (tmp_path / "s").exists():  # noqa: ASYNC110 - a file has no event; the test has a deadline
                await asyncio.sleep(0)
            port.hold.set()
            assert (await call).id == "id-0"
            await closing

    run(test())


def test_close_cancels_what_outlives_the_grace(tmp_path: Path) -> None:
    async def test() -> None:
        port = FakeDaemon()
        port.hold = asyncio.Event()
        async with serving(port, tmp_path / "s") as server, calling(tmp_path / "s") as stub:
            call = stub.Attach(VETH)
            await port.attaching.wait()
            await server.close(0.05)
            await asyncio.wait_for(port.cancelled.wait(), 10)
            assert (await _status_of(call))[0] in {"UNAVAILABLE", "CANCELLED"}

    run(test())
