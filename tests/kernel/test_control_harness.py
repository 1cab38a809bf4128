"""The scripted control plane itself, against a client made by hand: what it sends, sees and survives."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

import control_commands as commands
from harness.controlplane import HANG, ControlPlaneProcess
from harness.netns import NetNs
from netfence.v1 import control_pb2, control_pb2_grpc

pytestmark = [pytest.mark.userspace, pytest.mark.timeout(150)]  # a reconnect may take 30 s

SYNC = control_pb2.DaemonEvent(sync=control_pb2.SyncRequest(daemon_id="d1"))


def subscribed(attachment_id: str, **metadata: str) -> control_pb2.DaemonEvent:
    return control_pb2.DaemonEvent(subscribed=control_pb2.Subscribed(id=attachment_id, metadata=metadata))


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[NetNs]:
    namespace = NetNs("elsewhere")
    yield namespace
    namespace.close()


@pytest.fixture
def plane(elsewhere: NetNs, tmp_path: Path) -> Iterator[ControlPlaneProcess]:
    """Give one on a unix socket, which a channel of this process reaches whatever the namespace."""
    with ControlPlaneProcess(elsewhere, f"unix:{tmp_path}/plane.sock") as plane:
        yield plane


class Client:
    """One stream by hand."""

    def __init__(self, channel: grpc.Channel, *events: control_pb2.DaemonEvent) -> None:
        self.out: queue.Queue[control_pb2.DaemonEvent | None] = queue.Queue()
        for event in events:
            self.out.put(event)
        stub = control_pb2_grpc.ControlPlaneStub(channel)
        self.call: Any = stub.Connect(iter(self.out.get, None), wait_for_ready=True)

    def next(self) -> Any:
        return next(self.call)


@contextmanager
def channel_to(plane: ControlPlaneProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(plane.address) as channel:
        yield channel


def test_it_answers_by_its_rules_and_tells_what_it_saw(plane: ControlPlaneProcess) -> None:
    plane.on_subscribed(commands.ack(mode="denylist"))
    plane.on_subscribed(commands.ack("other"), commands.ack(mode="disabled"), metadata={"tenant": "acme"})
    with channel_to(plane) as channel:
        client = Client(channel, SYNC, subscribed("a"), subscribed("b", tenant="acme"))
        assert client.next().WhichOneof("command") == "sync_ack"
        assert [client.next() for _ in range(3)] == [
            commands.ack("a", "denylist"), commands.ack("other"), commands.ack("b", "disabled"),
        ]  # fmt: skip
        before = time.monotonic()
        seen = plane.wait_seen("subscribed", id="b")
        assert before - 5 < seen.at < time.monotonic()
        assert [seen.name for seen in plane.events(stream=0)] == ["sync", "subscribed", "subscribed"]
        at = plane.send(commands.set_mode("a", "disabled", version="7", nonce="n"))
        assert before < at < time.monotonic()
        got = client.next()
        assert (got.id, got.version, got.nonce, got.set_mode.mode) == ("a", "7", "n", 1)
        client.out.put(None)
        assert plane.wait_closed(0).how == "ended OK"
        assert [seen.kind for seen in plane.seen][-2:] == ["half_closed", "closed"]


def test_it_sends_raw_bytes_and_ends_streams(plane: ControlPlaneProcess) -> None:
    plane.on_open(commands.set_mode("early", "disabled"))
    with channel_to(plane) as channel:
        raw_call = channel.stream_stream("/netfence.v1.ControlPlane/Connect")(iter([SYNC.SerializeToString()]))
        early, _ack = next(raw_call), next(raw_call)
        assert control_pb2.ControlCommand.FromString(early).id == "early"
        plane.wait_closed(0)
        client = Client(channel)
        client.next()
        plane.end("RESOURCE_EXHAUSTED", "enough")
        with pytest.raises(grpc.RpcError) as raised:
            client.next()
        assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "enough")
        plane.on_open()
        plane.refuse_streams()
        assert list(Client(channel).call) == []
        plane.refuse_streams("UNAVAILABLE")
        with pytest.raises(grpc.RpcError):
            Client(channel).next()
        plane.accept_streams()
        raw_call = channel.stream_stream("/netfence.v1.ControlPlane/Connect")(iter(queue.Queue[bytes]().get, None))
        plane.wait_streams(5)
        plane.send(b"\xff\xff garbage")
        assert next(raw_call) == b"\xff\xff garbage"


def test_it_is_killed_started_frozen_and_thawed(plane: ControlPlaneProcess) -> None:
    with channel_to(plane) as channel:
        client = Client(channel, SYNC)
        client.next()
        plane.kill()
        with pytest.raises(grpc.RpcError):
            client.next()
        plane.start()
        client = Client(channel, SYNC)
        client.next()
        assert plane.wait_seen("sync", stream=1).body.daemon_id == "d1"
        plane.freeze()
        client.out.put(subscribed("frozen"))
        with pytest.raises(TimeoutError, match=r"waited 0\.1 s: event subscribed"):
            plane.wait_event("subscribed", timeout_s=0.1)
        plane.thaw()
        assert plane.wait_event("subscribed").id == "frozen"


def test_it_stops_reading(plane: ControlPlaneProcess) -> None:
    with channel_to(plane) as channel:
        client = Client(channel, SYNC)
        client.next()
        plane.stop_reading()
        for name in ("one", "two", "three"):
            client.out.put(subscribed(name))
        with pytest.raises(TimeoutError):
            plane.wait_event("subscribed", id="two", timeout_s=0.2)
        plane.read_on()
        plane.wait_event("subscribed", id="three")


def test_it_decides_about_names(plane: ControlPlaneProcess) -> None:
    plane.on_query({"good.test.": commands.decision(ips=["192.0.2.1"]), "slow.test.": HANG}, "NOT_FOUND")
    with channel_to(plane) as channel:
        stub = control_pb2_grpc.ControlPlaneStub(channel)

        def ask(name: str) -> Any:
            return stub.QueryDns.future(control_pb2.DnsQueryRequest(id="a", domain=name), wait_for_ready=True)

        assert ask("good.test.").result().ips == ["192.0.2.1"]
        assert ask("other.test.").exception().code() is grpc.StatusCode.NOT_FOUND
        slow = [ask("slow.test.") for _ in range(3)]
        assert plane.wait_queries(5)[-1].asked == 3
        plane.on_query({"slow.test.": commands.decision(False)})
        plane.release()
        assert [each.result().allow for each in slow] == [False] * 3
        assert plane.queries[0].request.domain == "good.test."


def test_it_may_lack_a_method(elsewhere: NetNs, tmp_path: Path) -> None:
    with (
        ControlPlaneProcess(elsewhere, f"unix:{tmp_path}/plane.sock", without=["Connect"]) as plane,
        channel_to(plane) as channel,
        pytest.raises(grpc.RpcError) as raised,
    ):
        Client(channel).next()
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_its_end_is_told(plane: ControlPlaneProcess) -> None:
    plane._process.kill()
    with pytest.raises(TimeoutError, match="the control plane has ended"):
        plane.wait_event("sync")
