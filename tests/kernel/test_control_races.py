"""Things that happen at once: acks and commands, bulk updates and kill -9, detach and what waits for its result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import control_commands as commands
from control_stage import BOTH, NET4, NET6, NONE, ONLY4, ONLY6, Stage, nothing_left, staged
from harness.controlplane import Command
from harness.daemon import host_port
from harness.deadline import wait_for
from harness.topology import Topology, Workload
from netfence.api.client import RefusedError, UnreachableError

pytestmark = [pytest.mark.userspace, pytest.mark.timeout(150)]  # a reconnect may take 30 s

API_S = 1.0


@pytest.fixture(scope="module")
def stage(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(topology, tmp_path_factory.mktemp("netfenced"), heartbeat_interval=0.5) as stage:
        yield stage


def test_commands_right_behind_the_ack(stage: Stage, workload: Workload) -> None:
    attached = stage.attach(
        workload,
        commands.ack(allow=[NET4], version="1"),
        commands.allow_cidr("", NET6, version="2", nonce="behind-1"),
        commands.remove_cidr("", NET4, version="3", nonce="behind-2"),
    )
    assert [stage.plane.wait_event("command_result", nonce=f"behind-{number}").ok for number in (1, 2)] == [True, True]
    assert stage.reach(workload) == ONLY6
    assert stage.daemon.info(attached.id).policy_version == "3"
    stage.daemon.detach(attached.id)


def test_the_stream_ends_right_behind_the_ack(stage: Stage, workload: Workload) -> None:
    """The policy was there: the attach succeeds, and the next SyncRequest lists it."""
    stage.anew()
    stream = stage.plane.stream
    with stage.attaching(workload) as (subscribed, future):
        stage.plane.send(commands.ack(subscribed.id, allow=[NET4], version="just"))
        stage.plane.end()
        try:
            attached = future.result()
        except RefusedError as error:
            assert "ended before its SubscribedAck" in str(error)  # noqa: PT017 - one of two good ends
            assert stage.reach(workload) == BOTH
            return
    assert stage.reach(workload) == ONLY4
    (listed,) = stage.plane.wait_event("sync", stream=stream + 1).attachments
    assert (listed.id, listed.policy_version) == (attached.id, "just")
    stage.daemon.detach(attached.id)


def test_many_attaches_at_once(stage: Stage, topology: Topology) -> None:
    count = 16
    stage.plane.on_subscribed(commands.ack(version="v"), delay_s=0.2)
    topology.host.ip(*[f"link add many{number} type veth peer name peer{number}" for number in range(count)])
    begun = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        attached = [
            *pool.map(lambda number: stage.daemon.attach(interface=f"many{number}", direction="workload"), range(count))
        ]
    assert time.monotonic() - begun < 0.2 * count
    assert {info.id: info.policy_version for info in stage.daemon.attachments()} == {one.id: "v" for one in attached}
    results = [stage.do(commands.set_mode(one.id, "denylist")) for one in attached]
    assert all(result.ok for result in results)
    topology.host.ip(*[f"link del many{number}" for number in range(count)])
    for one in attached:
        stage.plane.wait_event("unsubscribed", id=one.id)


def test_detach_amid_commands(stage: Stage, workload: Workload) -> None:
    """Every command gets its result, applied or for nobody; nothing comes back to life."""
    attached = stage.attach(workload, commands.ack(mode="block_all"))
    since = len(stage.plane.seen)
    count = 600
    stage.plane.flood(
        *[commands.allow_cidr(attached.id, f"10.0.{number % 250}.0/24", nonce=f"d-{number}") for number in range(count)]
    )
    stage.daemon.detach(attached.id)
    stage.plane.wait_event("command_result", nonce=f"d-{count - 1}")
    results = [seen.body for seen in stage.plane.events("command_result", since=since)]
    assert sorted(result.nonce for result in results) == sorted(f"d-{number}" for number in range(count))
    oks = {int(result.nonce[2:]) for result in results if result.ok}
    assert oks == set(range(len(oks)))
    assert stage.reach(workload) == BOTH
    assert (stage.daemon.attachments(), stage.daemon.link_pins()) == ([], [])


def test_a_rename_is_listed(stage: Stage, topology: Topology) -> None:
    stage.anew()
    renamed = topology.add_veth()
    attached = stage.attach(renamed, commands.ack())
    topology.host.ip(
        f"link set {renamed.host_if} down", f"link set {renamed.host_if} name other7", "link set other7 up"
    )
    wait_for(lambda: stage.daemon.info(attached.id).target == "other7", "the new name")
    stream = stage.plane.stream
    stage.plane.end()
    (listed,) = stage.plane.wait_event("sync", stream=stream + 1).attachments
    assert listed.target == "other7"
    stage.daemon.detach(attached.id)


def big(attachment_id: str, mode: str, **stamp: Any) -> Command:
    cidrs = [f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}" for number in range(100_000)]
    return commands.bulk(attachment_id, mode, [*cidrs, NET4], **stamp)


def test_a_large_update_blocks_nobody(stage: Stage, topology: Topology, workload: Workload) -> None:
    """While 100,000 prefixes are put in force, the API, another attachment's commands and heartbeats go on."""
    other = topology.add_veth()
    attached = stage.attach(workload, commands.ack())
    small = stage.attach(other, commands.ack())
    stage.plane.flood(big(attached.id, "allowlist", nonce="big"))
    longest = 0.0
    while not stage.plane.events("command_result", nonce="big"):
        begun = time.monotonic()
        stage.daemon.status()
        stage.good(commands.set_mode(small.id, "denylist"))
        longest = max(longest, time.monotonic() - begun)
    assert longest < API_S
    assert stage.plane.wait_event("command_result", nonce="big").ok
    assert stage.reach(workload) == ONLY4
    assert stage.reach(other) == BOTH
    stage.detach_all()


@pytest.mark.parametrize("after_s", [0.0, 0.15, 0.4, 0.8])
def test_killed_amid_a_large_update(stage: Stage, workload: Workload, after_s: float) -> None:
    """Whatever the next daemon says is in force, is: the old policy or the new one, never half of it."""
    attached = stage.attach(workload, commands.ack(mode="block_all", version="old"))
    old = stage.daemon.info(attached.id).policy_hash
    stream = stage.plane.stream
    stage.plane.flood(big(attached.id, "allowlist", version="new"))
    begun = time.monotonic()
    wait_for(lambda: time.monotonic() > begun + after_s, "the moment")
    stage.daemon.kill()
    stage.daemon.start()
    (listed,) = stage.plane.wait_event("sync", stream=stream + 1).attachments
    assert listed.policy_version in {"old", "new"}
    assert (listed.policy_hash == old) == (listed.policy_version == "old")
    assert stage.reach(workload) == (NONE if listed.policy_version == "old" else ONLY4)
    stage.daemon.detach(attached.id)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_the_daemon_ends_while_an_attach_waits(stage: Stage, workload: Workload, how: str) -> None:
    """The next one finds nothing of it, or takes it away; nobody is told of an attachment that never was."""
    stream = stage.plane.stream
    with stage.attaching(workload) as (subscribed, future):
        getattr(stage.daemon, how)()
        assert isinstance(future.exception(), UnreachableError | RefusedError)
        assert stage.reach(workload) == (BOTH if how == "stop" else NONE)
    stage.daemon.start()
    stage.connected()
    sync = stage.plane.wait_event("sync", stream=stream + 1)
    assert list(sync.attachments) == []
    stage.plane.settle()
    assert not stage.plane.events("subscribed", stream=stream + 1)
    nothing_left(stage, workload, host_port(subscribed.dns_address))
