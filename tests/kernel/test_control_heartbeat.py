"""Heartbeats: counters equal to what was really sent, at the interval asked for, only the newest waits (wire.md 4)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import control_commands as commands
from control_stage import BOTH, NET4, OUT4, OUT6, RECONNECT_S, REFUSED, Stage, ask, staged
from harness.agent import Agent
from harness.daemon import Attached
from harness.deadline import wait_for
from harness.fresh import Fresh
from harness.packets import UDP4, UDP6
from harness.topology import Topology, Workload
from harness.unbound import Unbound
from harness.wire import Tag

pytestmark = [pytest.mark.userspace, pytest.mark.timeout(150)]  # a reconnect may take 30 s

INTERVAL_S = 0.2


@pytest.fixture(scope="module")
def stage(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(topology, tmp_path_factory.mktemp("netfenced"), heartbeat_interval=INTERVAL_S) as stage:
        yield stage


@pytest.fixture
def fenced(stage: Stage, workload: Workload) -> Iterator[Attached]:
    dns = commands.dns("allowlist", ["good.test"])
    attached = stage.attach(workload, commands.ack(allow=[NET4], dns=dns))
    yield attached
    stage.daemon.detach(attached.id)


def stats_of(stage: Stage, attachment_id: str) -> Any:
    """Give what a heartbeat that was begun after this call says of the attachment."""
    now = time.monotonic()

    def found() -> list[Any]:
        beats = [seen for seen in stage.plane.events("heartbeat") if seen.at > now]
        # The first may have been under way.
        return [stats for seen in beats[1:] for stats in seen.body.stats if stats.id == attachment_id]

    return wait_for(found, "a heartbeat", RECONNECT_S)[0]


def moved(stage: Stage, attachment_id: str, work: Callable[[], None]) -> dict[str, int]:
    """Tell which counters move by `work`, and by how much."""
    before = stats_of(stage, attachment_id)
    work()
    after = stats_of(stage, attachment_id)
    fields = [field.name for field in after.DESCRIPTOR.fields if field.name not in {"id", "policy_hash"}]
    deltas = {field: getattr(after, field) - getattr(before, field) for field in fields}
    return {field: delta for field, delta in deltas.items() if delta}


def test_packets_and_bytes_are_those_that_were_sent(
    stage: Stage, topology: Topology, workload: Workload, fenced: Attached
) -> None:
    def send() -> None:
        assert topology.arrived(workload, UDP4, OUT4, count=7) == 7
        assert topology.arrived(workload, UDP6, OUT6, count=5) == 0

    size4, size6 = (len(workload.bytes_of(shape, to, Tag())) for shape, to in ((UDP4, OUT4), (UDP6, OUT6)))
    assert moved(stage, fenced.id, send) == {
        "packets_allowed": 7, "bytes_allowed": 7 * size4, "packets_blocked": 5, "bytes_blocked": 5 * size6,
    }  # fmt: skip


def test_queries_are_those_that_were_asked(stage: Stage, agent: Agent, fenced: Attached, names: Unbound) -> None:
    names.replace([f"good.test. 300 IN A {OUT4}"])

    def query() -> None:
        for name, rcode in (("good.test", 0), ("bad.test", REFUSED), ("good.test", 0), ("worse.test", REFUSED)):
            assert ask(agent, fenced.dns, name)[0] == rcode
        assert ask(agent, fenced.dns, "good.test")[0] == 0

    found = moved(stage, fenced.id, query)
    assert found.pop("bytes_allowed") > 5 * 42
    assert found == {"packets_allowed": 5, "dns_queries_allowed": 3, "dns_queries_blocked": 2}


def test_audit_counts_what_it_would_block(stage: Stage, workload: Workload, fenced: Attached) -> None:
    stage.good(commands.bulk(fenced.id, "allowlist", [NET4], audit=True))

    def send() -> None:
        assert stage.reach(workload) == BOTH

    found = moved(stage, fenced.id, send)
    assert found.pop("bytes_allowed") > 0
    assert found == {"packets_allowed": 6, "packets_would_block": 3}


def test_the_hash_is_the_one_in_force(stage: Stage, fenced: Attached) -> None:
    for mode in ("block_all", "disabled"):
        result = stage.good(commands.bulk(fenced.id, mode))
        assert stats_of(stage, fenced.id).policy_hash == result.policy_hash


def test_they_come_at_the_interval(stage: Stage, fenced: Attached) -> None:
    since = len(stage.plane.seen)
    begun = time.monotonic()
    wait_for(lambda: time.monotonic() > begun + 10 * INTERVAL_S, "ten intervals")
    beats = stage.plane.events("heartbeat", since=since)
    assert 7 <= len(beats) <= 11
    assert all([stats.id for stats in seen.body.stats] == [fenced.id] for seen in beats)


def test_counters_survive_the_daemon(stage: Stage, workload: Workload, fenced: Attached) -> None:
    stage.reach(workload)
    before = stats_of(stage, fenced.id)
    stage.daemon.kill()
    stage.reach(workload)
    stage.daemon.start()
    after = stats_of(stage, fenced.id)
    assert (after.packets_allowed, after.packets_blocked) == (before.packets_allowed + 3, before.packets_blocked + 3)


def test_only_the_newest_waits_for_the_stream(stage: Stage, workload: Workload, fenced: Attached) -> None:
    stage.anew()
    stream = stage.plane.stream
    stage.plane.kill()
    begun = time.monotonic()
    wait_for(lambda: time.monotonic() > begun + 8 * INTERVAL_S, "eight intervals")
    stage.reach(workload)
    stage.plane.start()
    stage.connected(20)
    beats = wait_for(lambda: stage.plane.events("heartbeat", stream=stream + 1)[:3], "a heartbeat")
    sync = stage.plane.wait_seen("sync", stream=stream + 1)
    assert len([beat for beat in beats if beat.at < sync.at + INTERVAL_S / 2]) <= 2


@pytest.mark.timeout(150)
def test_only_the_newest_waits_for_a_peer_that_does_not_read(fresh: Fresh, tmp_path: Path) -> None:
    """Heartbeats of 60 attachments fill what HTTP/2 takes; then they are left out, and Unsubscribed are not."""
    topology = fresh.topology()
    count, interval_s, beats = 60, 0.1, 45
    for buffer in ("net/ipv4/tcp_wmem", "net/ipv4/tcp_rmem"):  # else the kernel holds megabytes of them
        topology.host.sysctl(buffer, "4096 16384 32768")
    topology.host.ip(*[f"link add many{number} type veth peer name peer{number}" for number in range(count)])
    with staged(topology, tmp_path / "daemon", heartbeat_interval=interval_s) as stage:
        stage.plane.on_subscribed(commands.ack())
        ids = [stage.daemon.attach(interface=f"many{number}", direction="workload").id for number in range(count)]
        stage.plane.freeze()
        since, begun = len(stage.plane.seen), time.monotonic()
        wait_for(lambda: time.monotonic() > begun + beats * interval_s, "many heartbeats")
        for one in ids[:10]:
            stage.daemon.detach(one)
        stage.plane.thaw()
        for one in ids[:10]:
            stage.plane.wait_event("unsubscribed", id=one, since=since)
        names = [seen.name for seen in stage.plane.events(since=since)]
        assert names.count("heartbeat") < beats * 0.7
        wait_for(lambda: len(stage.plane.events("heartbeat", since=since)[-1].body.stats) == count - 10, "a new one")
        topology.host.ip(*[f"link del many{number}" for number in range(10, count)])
        wait_for(lambda: not stage.daemon.attachments(), "all of them to go")
