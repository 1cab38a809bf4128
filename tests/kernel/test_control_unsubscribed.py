"""Unsubscribed: told when an attachment is gone, with the reason, also where nobody listened then (wire.md 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import control_commands as commands
from control_stage import DETACHED, REMOVED, Stage, daemon_of, staged
from harness.cgroup import Cgroup
from harness.controlplane import ControlPlaneProcess
from harness.deadline import wait_for
from harness.fresh import Fresh
from harness.topology import Topology

pytestmark = [pytest.mark.userspace, pytest.mark.timeout(150)]  # a reconnect may take 30 s

SECOND = 1.0  # semantics.md 23
SLACK_S = 0.5


@pytest.fixture(scope="module")
def stage(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(topology, tmp_path_factory.mktemp("netfenced")) as stage:
        stage.plane.on_subscribed(commands.ack())
        yield stage


def reasons(stage: Stage, stream: int) -> dict[str, int]:
    """Give the reason of every Unsubscribed of a stream; what is told twice is told alike."""
    return {seen.body.id: seen.body.reason for seen in stage.plane.events("unsubscribed", stream=stream)}


def test_a_detached_attachment(stage: Stage, topology: Topology) -> None:
    attached = stage.daemon.attach(interface=topology.add_veth().host_if)
    stage.daemon.detach(attached.id)
    told = stage.plane.wait_event("unsubscribed", id=attached.id)
    assert (told.reason, told.error) == (DETACHED, "")


def test_a_deleted_interface(stage: Stage, topology: Topology) -> None:
    workload = topology.add_veth()
    attached = stage.daemon.attach(interface=workload.host_if)
    topology.host.ip(f"link del {workload.host_if}")
    told = stage.plane.wait_event("unsubscribed", id=attached.id, timeout_s=SECOND + SLACK_S)
    assert (told.reason, told.error) == (REMOVED, "")
    assert stage.daemon.attachments() == []


def test_a_removed_cgroup(stage: Stage, cgroups: Callable[[str], Cgroup]) -> None:
    group = cgroups("gone")
    attached = stage.daemon.attach(cgroup=group)
    group.remove()
    told = stage.plane.wait_event("unsubscribed", id=attached.id, timeout_s=SECOND + SLACK_S)
    assert (told.reason, told.error) == (REMOVED, "")


def test_what_went_while_there_was_no_stream(
    stage: Stage, topology: Topology, cgroups: Callable[[str], Cgroup]
) -> None:
    """It follows the next SyncRequest, which does not list it; a rename and who stayed are listed."""
    stage.anew()
    left, right, stays = topology.add_veth(), topology.add_veth(), topology.add_veth()
    group = cgroups("gone-too")
    detached = stage.daemon.attach(interface=left.host_if)
    deleted = stage.daemon.attach(interface=right.host_if)
    removed = stage.daemon.attach(cgroup=group)
    kept = stage.daemon.attach(interface=stays.host_if)
    stage.plane.kill()
    stage.daemon.detach(detached.id)
    topology.host.ip(f"link del {right.host_if}")
    group.remove()
    wait_for(lambda: len(stage.daemon.attachments()) == 1, "the others to be gone")
    stage.plane.start()
    stage.hurry(left)
    stream = stage.plane.stream
    for one in (detached, deleted, removed):
        stage.plane.wait_event("unsubscribed", stream=stream, id=one.id)
    told = reasons(stage, stream)
    assert [told[one.id] for one in (detached, deleted, removed)] == [DETACHED, REMOVED, REMOVED]
    first, *_ = stage.plane.events(stream=stream)
    assert first.name == "sync"
    assert [attachment.id for attachment in first.body.attachments] == [kept.id]
    stage.daemon.detach(kept.id)


@pytest.mark.parametrize("how", ["stop", "kill -9"])
def test_what_went_while_the_daemon_was_down(
    stage: Stage, topology: Topology, cgroups: Callable[[str], Cgroup], how: str
) -> None:
    workload, stays = topology.add_veth(), topology.add_veth()
    group = cgroups(f"gone-{how[:4]}")
    deleted = stage.daemon.attach(interface=workload.host_if)
    removed = stage.daemon.attach(cgroup=group)
    kept = stage.daemon.attach(interface=stays.host_if)
    stream = stage.plane.stream
    if how == "stop":
        stage.daemon.stop()
    else:
        stage.daemon.kill()
    topology.host.ip(f"link del {workload.host_if}")
    group.remove()
    stage.daemon.start()
    for one in (deleted, removed):
        stage.plane.wait_event("unsubscribed", stream=stream + 1, id=one.id)
    told = reasons(stage, stream + 1)
    assert [told[one.id] for one in (deleted, removed)] == [REMOVED, REMOVED]
    first, *_ = stage.plane.events(stream=stream + 1)
    assert first.name == "sync"
    assert [attachment.id for attachment in first.body.attachments] == [kept.id]
    stage.daemon.detach(kept.id)


def test_all_are_told_of_by_a_daemon_that_detaches_them_when_it_stops(fresh: Fresh, tmp_path: Path) -> None:
    topology = fresh.topology()
    more = {"enforcement": {"on_shutdown": "detach"}}
    with (
        ControlPlaneProcess(topology.host) as plane,
        daemon_of(plane, topology, tmp_path / "daemon", more) as daemon,
    ):
        plane.on_subscribed(commands.ack())
        attached = [daemon.attach(interface=topology.add_veth().host_if) for _ in range(2)]
        assert daemon.stop() == 0
        assert daemon.link_pins() == []
        for one in attached:
            assert plane.wait_event("unsubscribed", id=one.id).reason == DETACHED


def test_none_is_lost_when_the_stream_ends_amid_them(stage: Stage, topology: Topology) -> None:
    count = 20
    stage.anew()
    topology.host.ip(*[f"link add many{number} type veth peer name peer{number}" for number in range(count)])
    ids = [stage.daemon.attach(interface=f"many{number}", direction="workload").id for number in range(count)]
    for number, one in enumerate(ids):
        stage.daemon.detach(one)
        if number == count // 2:
            stage.plane.end()
    topology.host.ip(*[f"link del many{number}" for number in range(count)])
    for one in ids:
        assert stage.plane.wait_event("unsubscribed", id=one).reason == DETACHED
