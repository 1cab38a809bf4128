"""The stream itself: SyncRequest first, what happens while there is none, and how it comes back (wire.md 1, 5, 9)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import control_commands as commands
from control_stage import (
    BOTH,
    NET4,
    NOERROR,
    NONE,
    ONLY4,
    ONLY6,
    OUT4,
    RECONNECT_S,
    REFUSED,
    Stage,
    ask,
    daemon_of,
    staged,
)
from harness.agent import Agent
from harness.controlplane import ControlPlaneProcess
from harness.deadline import wait_for
from harness.fresh import Fresh
from harness.topology import Topology, Workload
from harness.unbound import Unbound
from netfence.v1 import types_pb2

pytestmark = [pytest.mark.userspace, pytest.mark.timeout(150)]  # a reconnect may take 30 s

CONNECTED, CONNECTING = types_pb2.CONNECTION_STATE_CONNECTED, types_pb2.CONNECTION_STATE_CONNECTING


@pytest.fixture(scope="module")
def stage(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(topology, tmp_path_factory.mktemp("netfenced")) as stage:
        yield stage


# -- SyncRequest -------------------------------------------------------------------------------------------------------


def test_sync_comes_first_and_once_and_tells_everything(fresh: Fresh, tmp_path: Path) -> None:
    topology = fresh.topology()
    left, right = topology.add_veth(), topology.add_veth()
    more = {"metadata": {"rack": "7", "zone": "ü"}}
    with (
        ControlPlaneProcess(topology.host) as plane,
        daemon_of(plane, topology, tmp_path / "daemon", more, heartbeat_interval=0.1) as daemon,
    ):
        stage = Stage(topology, plane, daemon)
        first = plane.wait_event("sync")
        status = daemon.status()
        assert (first.daemon_id, first.hostname) == (status.daemon_id, status.hostname)
        assert (first.daemon_version, dict(first.metadata)) == (status.version, more["metadata"])
        assert {"audit", "nonce", "policy_hash"} <= set(first.capabilities)
        assert list(first.capabilities) == sorted(first.capabilities)
        assert list(first.attachments) == []
        one = stage.attach(left, commands.ack(allow=[NET4], version="1"), tenant="acme")
        two = stage.attach(right, commands.ack(mode="denylist", dns=commands.dns("denylist")))
        for number, lose in ((1, plane.end), (2, daemon.restart)):
            lose()
            again = plane.wait_event("sync", stream=number)
            assert again.daemon_id == first.daemon_id
            told = {attachment.id: attachment for attachment in again.attachments}
            assert told.keys() == {one.id, two.id}
            for info in daemon.attachments():
                for field in ("target", "type", "mode", "dns_mode", "metadata", "dns_address", "policy_version",
                              "policy_hash"):  # fmt: skip
                    assert getattr(told[info.id], field) == getattr(info, field), field
            plane.wait_event("heartbeat", stream=number)
            names = [seen.name for seen in plane.events(stream=number)]
            assert (names[0], names.count("sync")) == ("sync", 1)


# -- without a stream --------------------------------------------------------------------------------------------------


def test_without_a_control_plane_the_last_policy_stays(
    stage: Stage, topology: Topology, workload: Workload, agent: Agent, names: Unbound
) -> None:
    """Packets, names and leases go on by it, new ones too; what is detached meanwhile is not fenced any more."""
    names.replace([f"good.test. 300 IN A {OUT4}"])
    spare = topology.add_veth()
    dns = commands.dns("allowlist", ["good.test"])
    attached = stage.attach(workload, commands.ack(allow=["2001:db8:77::/48"], dns=dns, version="last"))
    other = stage.attach(spare, commands.ack())
    assert stage.state == CONNECTED
    assert stage.reach(workload) == ONLY6
    stage.plane.kill()
    wait_for(lambda: stage.state != CONNECTED, "the daemon to notice")
    assert stage.reach(workload) == ONLY6
    assert ask(agent, attached.dns, "bad.test") == (REFUSED, [])
    assert ask(agent, attached.dns, "good.test") == (NOERROR, [OUT4])
    assert stage.reach(workload) == BOTH
    assert stage.reach(spare) == NONE
    stage.daemon.detach(other.id)
    assert stage.reach(spare) == BOTH
    stage.plane.start()
    stage.hurry(spare)
    sync = stage.plane.wait_event("sync", stream=stage.plane.stream)
    assert [(told.id, told.policy_version) for told in sync.attachments] == [(attached.id, "last")]
    stage.good(commands.set_mode(attached.id, "block_all"))
    assert stage.reach(workload) == NONE
    stage.detach_all()


def test_it_is_back_within_seconds_after_the_control_plane_was_killed(stage: Stage) -> None:
    stage.anew()
    stream = stage.plane.stream
    stage.plane.restart()
    begun = time.monotonic()
    assert stage.plane.wait_seen("sync", stream=stream + 1).at - begun < 4
    stage.connected()


def test_status_tells_the_state(fresh: Fresh, tmp_path: Path) -> None:
    topology = fresh.topology()
    with ControlPlaneProcess(topology.host) as plane:
        plane.on_sync()
        with daemon_of(plane, topology, tmp_path / "daemon") as daemon:
            stage = Stage(topology, plane, daemon)
            plane.wait_event("sync")
            assert stage.state == CONNECTING
            assert daemon.status().control_plane_address == plane.address
            plane.send(commands.SYNC_ACK)
            stage.connected()
            assert daemon.cli_json("status")["control_plane_address"] == plane.address
            plane.kill()
            wait_for(lambda: stage.state != CONNECTED, "the daemon to notice", 2)


# -- addresses ---------------------------------------------------------------------------------------------------------


def test_the_next_address_is_tried_when_one_is_dead(fresh: Fresh, tmp_path: Path) -> None:
    topology = fresh.topology()
    workload = topology.add_veth()
    addresses = [f"127.0.0.1:{port}" for port in (50051, 50052, 50053)]
    planes = [ControlPlaneProcess(topology.host, address) for address in addresses]
    with ExitStack() as stack:
        for plane in planes:
            stack.callback(plane.kill)
            plane.on_subscribed(commands.ack(allow=[NET4]))
        planes[1].start()
        daemon = stack.enter_context(daemon_of(planes[0], topology, tmp_path / "daemon", url=addresses))
        stage = Stage(topology, planes[1], daemon)
        planes[1].wait_event("sync")
        stage.connected()
        assert daemon.status().control_plane_address == addresses[1]
        daemon.attach(interface=workload.host_if)
        assert stage.reach(workload) == ONLY4
        planes[1].kill()
        planes[2].start()
        sync = planes[2].wait_event("sync", timeout_s=RECONNECT_S)
        assert len(sync.attachments) == 1
        stage.connected()
        assert daemon.status().control_plane_address == addresses[2]
        assert planes[0].seen == []


@pytest.mark.parametrize("address", ["unix", "localhost:50051", "[::1]:50051", "[2001:db8:b::80]:50051"])
def test_an_address_may_be(fresh: Fresh, tmp_path: Path, address: str) -> None:
    topology = fresh.topology()
    workload = topology.add_veth()
    listens = f"unix:{tmp_path}/plane.sock" if address == "unix" else address.replace("localhost", "127.0.0.1")
    place = topology.internet if "2001" in address else topology.host
    url = listens if address == "unix" else address
    with (
        ControlPlaneProcess(place, listens) as plane,
        daemon_of(plane, topology, tmp_path / "daemon", url=url, insecure="2001" in address) as daemon,
    ):
        stage = Stage(topology, plane, daemon)
        stage.attach(workload, commands.ack(allow=[NET4]))
        assert stage.reach(workload) == ONLY4
        assert daemon.status().control_plane_address == url


# -- peers that do not want it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["OK", "UNIMPLEMENTED"])
def test_a_peer_that_ends_every_stream_is_not_hammered(fresh: Fresh, tmp_path: Path, code: str) -> None:
    topology = fresh.topology()
    workload, spare = topology.add_veth(), topology.add_veth()
    with ControlPlaneProcess(topology.host) as plane, daemon_of(plane, topology, tmp_path / "daemon") as daemon:
        stage = Stage(topology, plane, daemon)
        attached = stage.attach(workload, commands.ack(allow=[NET4]))
        begun = time.monotonic()
        plane.refuse_streams(code, "not now")
        plane.end(code, "not now")
        wait_for(lambda: time.monotonic() > begun + 5, "five seconds")
        assert 2 <= len(plane.streams) <= 7
        assert stage.reach(workload) == ONLY4
        assert stage.state != CONNECTED
        plane.accept_streams()
        stage.hurry(spare)
        stage.still_works(workload, attached.id)


def test_a_peer_without_connect(fresh: Fresh, tmp_path: Path) -> None:
    topology = fresh.topology()
    workload = topology.add_veth()
    with ExitStack() as stack:
        stranger = stack.enter_context(ControlPlaneProcess(topology.host, without=["Connect", "QueryDns"]))
        daemon = stack.enter_context(daemon_of(stranger, topology, tmp_path / "daemon"))
        said = wait_for(
            lambda: [entry for entry in daemon.events() if "UNIMPLEMENTED" in str(entry.get("error"))], "it to be told"
        )
        assert len(said) <= 2
        stranger.kill()
        plane = stack.enter_context(ControlPlaneProcess(topology.host))
        stage = Stage(topology, plane, daemon)
        stage.hurry(workload)
        attached = stage.attach(workload, commands.ack())
        stage.still_works(workload, attached.id)
