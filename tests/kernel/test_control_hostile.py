"""Control planes that behave badly: nothing they send crashes the daemon or opens the fence (wire.md 3).

`survived` is the frame of every test: whatever a peer did inside it, afterwards the same daemon still enforces, answers
its API and takes good commands.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest

import control_commands as commands
from control_stage import BOTH, DETACHED, NET4, NET6, NONE, ONLY4, ONLY6, Stage, refused_attach, staged
from harness.daemon import Attached
from harness.deadline import wait_for
from harness.fresh import Fresh
from harness.services import tcp_echo, web
from harness.topology import Topology, Workload
from netfence.v1 import control_pb2, types_pb2

pytestmark = [pytest.mark.userspace, pytest.mark.timeout(150)]  # a reconnect may take 30 s

API_S = 1.0  # an answer of the local API that waits for nobody
RSS_MB = 250  # whatever a peer makes the daemon keep

Survived = Callable[[], AbstractContextManager[Attached]]


@pytest.fixture(scope="module")
def stage(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("netfenced")
    with staged(topology, directory, subscribe_ack_timeout=4, heartbeat_interval=1) as stage:
        yield stage


@pytest.fixture(scope="module")
def spare(topology: Topology) -> Workload:
    return topology.add_veth()


@pytest.fixture
def survived(stage: Stage, workload: Workload, spare: Workload) -> Survived:
    """Give the frame: attach, with an allowlist of NET4; at the end all is well again."""

    @contextmanager
    def survived() -> Iterator[Attached]:
        attached = stage.attach(workload, commands.ack(allow=[NET4]))
        assert stage.reach(workload) == ONLY4
        pid = stage.daemon.pid
        try:
            yield attached
        except BaseException:
            stage.plane.restart()  # for the next test
            stage.anew()
            stage.detach_all()
            raise
        stage.plane.on_open()
        stage.plane.on_sync(commands.SYNC_ACK)
        if stage.state != types_pb2.CONNECTION_STATE_CONNECTED:
            stage.hurry(spare)
        stage.still_works(workload, attached.id)
        assert stage.daemon.pid == pid
        stage.daemon.detach(attached.id)

    return survived


def timed(work: Callable[[], object]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


# -- messages ----------------------------------------------------------------------------------------------------------

GARBAGE = {
    "no-protobuf": b"\xff" * 100,
    "cut": commands.bulk("x", allow=[NET4]).SerializeToString()[:-3],
    "not-utf8": b"\x0a\x02\xff\xfe\x1a\x02\x08\x01",
    "zeros": bytes(5000),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage(stage: Stage, workload: Workload, survived: Survived, name: str) -> None:
    with survived():
        stream = stage.plane.stream
        stage.plane.send(GARBAGE[name])
        stage.plane.wait_closed(stream)
        assert stage.reach(workload) == ONLY4


def test_empty_messages_and_unknown_fields(stage: Stage, workload: Workload, survived: Survived) -> None:
    with survived() as attached:
        stream = stage.plane.stream
        unknown = b"\xfa\x3e\x03abc" + commands.allow_cidr(attached.id, NET6, nonce="unknown").SerializeToString()
        stage.plane.send(b"", b"", b"\xc2\x3e\x05later", unknown)
        assert stage.plane.wait_event("command_result", nonce="unknown").ok
        assert stage.plane.stream == stream
        assert stage.reach(workload) == BOTH


def test_a_second_sync_ack(stage: Stage, workload: Workload, survived: Survived) -> None:
    with survived() as attached:
        stream = stage.plane.stream
        stage.plane.send(*[commands.SYNC_ACK] * 3)
        stage.good(commands.allow_cidr(attached.id, NET6))
        assert stage.plane.stream == stream
        assert stage.reach(workload) == BOTH


def test_acks_for_nobody_and_acks_twice(stage: Stage, workload: Workload, survived: Survived) -> None:
    with survived() as attached:
        stage.plane.send(*[commands.ack(f"nobody-{number}", "disabled") for number in range(100)])
        assert stage.reach(workload) == ONLY4
        stage.good(commands.ack(attached.id, allow=[NET6], version="again"))
        assert stage.reach(workload) == ONLY6
        stage.daemon.detach(attached.id)
        stage.plane.send(commands.ack(attached.id, "block_all"))
        assert stage.reach(workload) == BOTH
        twice = [commands.ack(allow=[NET6], version="1"), commands.ack(allow=[NET4], version="2", nonce="twice")]
        again = stage.attach(workload, *twice)
        assert stage.plane.wait_event("command_result", nonce="twice").ok
        assert (stage.reach(workload), stage.daemon.info(again.id).policy_version) == (ONLY4, "2")
        stage.daemon.detach(again.id)
        stage.plane.on_subscribed(commands.ack(allow=[NET4]))
        object.__setattr__(attached, "id", stage.daemon.attach(interface=workload.host_if).id)


@pytest.mark.parametrize("when", ["on_open", "on_sync"])
def test_commands_before_sync_ack(
    stage: Stage, workload: Workload, survived: Survived, spare: Workload, when: str
) -> None:
    """Let them be applied or refused; nothing else may come of them."""
    with survived() as attached:
        early = commands.bulk(attached.id, "allowlist", [NET6], nonce=f"early-{when}")
        getattr(stage.plane, when)(early, commands.SYNC_ACK)
        if when == "on_open":
            stage.plane.on_sync()
        stage.plane.end()
        stage.hurry(spare)
        result = stage.plane.wait_event("command_result", nonce=early.nonce)
        assert stage.reach(workload) == (ONLY6 if result.ok else ONLY4)


def test_a_command_for_an_attach_that_waits_for_its_ack(stage: Stage, survived: Survived, spare: Workload) -> None:
    with survived(), stage.attaching(spare) as (subscribed, future):
        early = [commands.set_mode(subscribed.id, "disabled"), commands.allow_cidr(subscribed.id, NET4)]
        assert [stage.do(command).ok for command in early] == [False, False]
        assert stage.reach(spare) == NONE
        stage.plane.send(commands.ack(subscribed.id, allow=[NET6]))
        future.result()
        assert stage.reach(spare) == ONLY6
        stage.daemon.detach(subscribed.id)


def test_a_stream_that_ends_amid_commands(stage: Stage, workload: Workload, survived: Survived) -> None:
    with survived() as attached:
        rules = [(commands.allow_cidr, commands.remove_cidr)[number % 2] for number in range(500)]
        stage.plane.send(*[rule(attached.id, NET6) for rule in rules], commands.allow_cidr(attached.id, NET6))
        stage.plane.end("ABORTED")
        assert stage.reach(workload) in {ONLY4, BOTH}


def test_a_command_of_4_megabytes(stage: Stage, workload: Workload, survived: Survived) -> None:
    with survived() as attached:
        names = [f"{number:x}.{'x' * 60}.{'y' * 60}.{'z' * 60}.test" for number in range(22_000)]
        large = commands.bulk(attached.id, "allowlist", [NET6], dns=commands.dns("allowlist", names), version="large")
        assert large.ByteSize() > 4 << 20
        stage.good(large)
        assert stage.reach(workload) == ONLY6


@pytest.mark.timeout(150)
def test_a_message_larger_than_the_limit(fresh_stage: Stage) -> None:
    stage = fresh_stage
    workload = stage.topology.add_veth()
    attached = stage.attach(workload, commands.ack(allow=[NET4]))
    streams = len(stage.plane.streams)
    stage.plane.flood(commands.bulk(attached.id, "disabled", dns=commands.dns("disabled", ["x" * 60 + ".test"] * 4000)))
    entry = stage.daemon.wait_event("message_too_large")
    assert "control_plane.max_message_size" in entry["remedy"]
    begun = time.monotonic()
    wait_for(lambda: time.monotonic() > begun + 4, "four seconds")
    assert len(stage.plane.streams) == streams
    assert stage.reach(workload) == ONLY4
    stage.connected(35)  # from 15 to 30 s: trying soon would not help
    stage.still_works(workload, attached.id)


@pytest.fixture
def fresh_stage(fresh: Fresh, tmp_path: Path) -> Iterator[Stage]:
    with staged(fresh.topology(), tmp_path / "daemon", max_message_size=64 << 10) as stage:
        yield stage


# -- peers that do not listen ------------------------------------------------------------------------------------------


def test_a_frozen_peer_does_not_block_the_local_api(
    stage: Stage, workload: Workload, survived: Survived, spare: Workload
) -> None:
    with survived():
        other = stage.attach(spare, commands.ack())
        stage.plane.freeze()
        try:
            assert timed(stage.daemon.attachments) < API_S
            assert timed(stage.daemon.status) < API_S
            assert timed(lambda: stage.daemon.detach(other.id)) < API_S
            code, _ = refused_attach(stage.daemon, spare.host_if)
            assert code in {"DEADLINE_EXCEEDED", "UNAVAILABLE"}
            assert stage.reach(workload) == ONLY4
        finally:
            stage.plane.thaw()
        assert stage.plane.wait_event("unsubscribed", id=other.id).reason == DETACHED


def test_a_peer_that_commands_and_does_not_read(stage: Stage, workload: Workload, survived: Survived) -> None:
    count = 6000
    with survived() as attached:
        stage.plane.stop_reading()
        since = len(stage.plane.seen)
        rules = (commands.allow_cidr, commands.remove_cidr)
        stage.plane.flood(*[rules[number % 2](attached.id, NET6, nonce=f"deaf-{number}") for number in range(count)])
        assert timed(stage.daemon.attachments) < API_S
        assert stage.reach(workload)[0] == 3
        assert timed(stage.daemon.status) < API_S
        stage.plane.read_on()
        stage.plane.wait_event("command_result", nonce=f"deaf-{count - 1}", timeout_s=30)
        results = [seen.body for seen in stage.plane.events("command_result", since=since)]
        assert [result.nonce for result in results] == [f"deaf-{number}" for number in range(count)]
        assert all(result.ok for result in results)
        assert stage.reach(workload) == ONLY4
        assert rss_mb(stage) < RSS_MB


@pytest.mark.timeout(150)
def test_refusals_that_nobody_reads_are_bounded(stage: Stage, survived: Survived) -> None:
    """Twenty thousand faults in each of 90 commands, and a peer that does not want to hear of any."""
    with survived() as attached:
        before = rss_mb(stage)
        stage.plane.stop_reading()
        bad = commands.bulk(attached.id, "allowlist", ["x"] * 20_000)
        for number in range(90):
            bad.nonce = f"bad-{number}"
            stage.plane.flood(bad)
        begun = time.monotonic()
        wait_for(lambda: time.monotonic() > begun + 4, "four seconds")
        assert rss_mb(stage) - before < RSS_MB
        assert timed(stage.daemon.status) < API_S
        stage.plane.read_on()
        assert not stage.plane.wait_event("command_result", nonce="bad-89", timeout_s=30).ok


def rss_mb(stage: Stage) -> int:
    """Tell the daemon's memory."""
    return stage.daemon.memory_kb() >> 10


# -- peers that are no control planes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["echo", "web", "silent"])
def test_a_peer_that_speaks_something_else(
    stage: Stage, topology: Topology, workload: Workload, survived: Survived, kind: str
) -> None:
    stage.anew()
    with survived():
        host, _, port = stage.plane.address.rpartition(":")
        stage.plane.kill()
        known = len(stage.daemon.events("control_plane_not_reached"))
        stranger: AbstractContextManager[object]
        if kind == "silent":
            with topology.host.inside():
                sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, int(port)))
            sock.listen()
            stranger = closing(sock)
        elif kind == "echo":
            stranger = tcp_echo(topology.host, host, int(port))
        else:
            stranger = web(topology.host, host, int(port), b"hello")
        with stranger:
            wait_for(lambda: len(stage.daemon.events("control_plane_not_reached")) > known, "it to be told", 20)
            assert stage.reach(workload) == ONLY4
            assert timed(stage.daemon.status) < API_S
        stage.plane.start()


def test_what_it_cannot_say_is_not_guessed(stage: Stage, workload: Workload, survived: Survived) -> None:
    """An old daemon's field numbers in a newer oneof, and two commands in one: the last counts, as in all of proto3."""
    with survived() as attached:
        two = control_pb2.ControlCommand(id=attached.id, nonce="two", deny_cidr={"cidr": NET4}).SerializeToString()
        two += control_pb2.ControlCommand(allow_cidr={"cidr": NET6}).SerializeToString()
        stage.plane.send(two)
        assert stage.plane.wait_event("command_result", nonce="two").ok
        assert stage.reach(workload) == BOTH
