"""Upstreams of an attachment's own, a fence on the host's own way out, and a control plane of the old kind."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

import control_commands as commands
from control_stage import (
    BOTH,
    DETACHED,
    NET4,
    NET6,
    NOERROR,
    NONE,
    ONLY4,
    ONLY6,
    OUT4,
    RECONNECT_S,
    SERVFAIL,
    Stage,
    ask,
    daemon_of,
    staged,
)
from harness.agent import Agent
from harness.controlplane import Command, ControlPlaneProcess
from harness.daemon import host_port
from harness.deadline import wait_for
from harness.fresh import Fresh
from harness.topology import Workload
from harness.unbound import Unbound

pytestmark = pytest.mark.userspace

FIRST, SECOND = "203.0.113.81", "203.0.113.82"  # name servers
ANSWERS = {FIRST: "203.0.113.101", SECOND: "203.0.113.102"}
DEFAULT = "203.0.113.100"


def test_each_attachment_has_its_own_upstreams(fresh: Fresh, tmp_path: Path) -> None:
    topology = fresh.topology()
    workloads = [topology.add_veth() for _ in range(3)]
    with ExitStack() as stack:
        fresh.names(topology, f"who.test. 300 IN A {DEFAULT}")
        servers = {
            address: stack.enter_context(
                Unbound(topology.internet, tmp_path / address, [address], [f"who.test. 300 IN A {answer}"])
            )
            for address, answer in ANSWERS.items()
        }
        stage = stack.enter_context(staged(topology, tmp_path / "daemon"))
        agents = [fresh.agent(netns=each.netns) for each in workloads]

        def policy(*upstreams: str) -> Command:
            return commands.ack(dns=commands.dns("denylist", upstreams=upstreams))

        attached = [
            stage.attach(workload, policy(*upstreams))
            for workload, upstreams in zip(workloads, ([FIRST], [f"{SECOND}:53"], []), strict=True)
        ]
        for agent, one, answer in zip(agents, attached, [*ANSWERS.values(), DEFAULT], strict=True):
            for _ in range(2):
                assert ask(agent, one.dns, "who.test") == (NOERROR, [answer])
        assert [server.asked("who.test") for server in servers.values()] == [1, 1]
        assert stage.reach(workloads[0], to4=ANSWERS[FIRST]) == ONLY4
        assert stage.reach(workloads[0], to4=ANSWERS[SECOND]) == NONE

        swap = commands.dns("denylist", upstreams=[SECOND])
        stage.good(commands.bulk(attached[0].id, dns=swap))
        assert ask(agents[0], attached[0].dns, "who.test") == (NOERROR, [ANSWERS[SECOND]])
        assert ask(agents[1], attached[1].dns, "who.test") == (NOERROR, [ANSWERS[SECOND]])
        dead_first = commands.dns("denylist", upstreams=["203.0.113.83", FIRST])
        stage.good(commands.bulk(attached[0].id, dns=dead_first))
        assert ask(agents[0], attached[0].dns, "who.test") == (NOERROR, [ANSWERS[FIRST]])
        servers[FIRST].close()
        stage.good(commands.bulk(attached[0].id, dns=commands.dns("denylist", upstreams=[FIRST])))
        assert ask(agents[0], attached[0].dns, "other.test")[0] == SERVFAIL
        assert ask(agents[2], attached[2].dns, "who.test") == (NOERROR, [DEFAULT])


def test_the_fence_of_the_host_does_not_cut_the_daemon_off(fresh: Fresh, tmp_path: Path) -> None:
    """`block_all` on the only way to control plane and name server: both go on, and so does a new connection."""
    topology = fresh.topology()
    workload = topology.add_veth()
    fresh.names(topology, f"good.test. 5 IN A {OUT4}", f"other.test. 5 IN A {OUT4}")
    host = topology.host_workload()
    with (
        ControlPlaneProcess(topology.internet, "203.0.113.80:50051") as plane,
        daemon_of(plane, topology, tmp_path / "daemon", insecure=True, heartbeat_interval=0.2) as daemon,
        fresh.agent(netns=topology.host) as other,
        fresh.agent(netns=workload.netns) as agent,
    ):
        stage = Stage(topology, plane, daemon)
        stage.connected()
        assert stage.reach(host) == BOTH
        plane.on_subscribed(commands.ack(mode="block_all"), target=host.host_if)
        fence = daemon.attach(interface=host.host_if, direction="host")
        assert stage.reach(host) == NONE
        assert cannot_query(other)

        def goes_on(name: str) -> None:
            since = len(plane.seen)
            for _ in range(3):
                plane.wait_event("heartbeat", since=since)
                since = len(plane.seen)
            assert ask(agent, inside.dns, name) == (NOERROR, [OUT4])
            assert stage.reach(host) == NONE
            assert cannot_query(other)

        inside = stage.attach(workload, commands.ack(mode="disabled", dns=commands.dns("disabled")))
        goes_on("good.test")
        plane.restart()
        stage.hurry(topology.add_veth())
        goes_on("other.test")
        stage.good(commands.bulk(fence.id, "allowlist", [NET4]))
        assert stage.reach(host) == ONLY4
        stage.good(commands.set_mode(fence.id, "block_all"))
        assert stage.reach(host) == NONE
        daemon.restart()
        stage.connected()
        goes_on("good.test")
        daemon.detach(fence.id)
        assert stage.reach(host) == BOTH


def cannot_query(agent: Agent) -> bool:
    """Tell whether another process of the host reaches the name server."""
    try:
        agent.query(("192.0.2.53", 53), "good.test", timeout_s=0.2)
    except (TimeoutError, PermissionError):
        return True
    return False


def test_an_old_control_plane(fresh: Fresh, tmp_path: Path) -> None:
    """It knows no version, no nonce, no audit and none of the new events; everything else works."""
    topology = fresh.topology()
    workload = topology.add_veth()
    with staged(topology, tmp_path / "daemon", heartbeat_interval=0.2) as stage:
        attached = stage.attach(workload, old(commands.ack(allow=[NET4])))
        assert stage.reach(workload) == ONLY4
        steps: list[tuple[Command, tuple[int, int]]] = [
            (commands.allow_cidr(attached.id, NET6), BOTH),
            (commands.deny_cidr(attached.id, NET4), ONLY6),
            (commands.remove_cidr(attached.id, NET4), ONLY6),
            (commands.set_mode(attached.id, "denylist"), BOTH),
            (commands.bulk(attached.id, "block_all"), NONE),
            (commands.bulk(attached.id, "allowlist", [NET4]), ONLY4),
        ]
        for command, reach in steps:
            stage.plane.send(old(command))
            reaches(stage, workload, reach)
        bad = commands.set_mode(attached.id, "unspecified")
        stage.plane.send(old(bad))
        refused = stage.daemon.wait_event("command_refused")
        assert refused["attachment"] == attached.id
        assert stage.reach(workload) == ONLY4
        stage.plane.wait_event("heartbeat")
        stage.plane.restart()
        (listed,) = stage.plane.wait_event("sync", stream=1, timeout_s=RECONNECT_S).attachments
        assert (listed.id, listed.policy_version) == (attached.id, "")
        stage.daemon.detach(attached.id)
        assert stage.plane.wait_event("unsubscribed", id=attached.id).reason == DETACHED
        assert stage.plane.events("command_result") == []
        subscribed = stage.plane.wait_event("subscribed")
        assert host_port(subscribed.dns_address) == attached.dns


def old(command: Command) -> Command:
    """See that a command has nothing in it that the first implementation does not know."""
    assert (command.version, command.nonce) == ("", "")
    assert all(field.number < 100 for field, _ in command.ListFields())
    return command


def reaches(stage: Stage, workload: Workload, reach: tuple[int, int]) -> None:
    wait_for(lambda: stage.reach(workload) == reach, f"{reach} to get out")
