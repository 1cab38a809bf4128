"""A control plane that stays away for too long: `max_stale` and `stale_action` (semantics.md 25)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

import control_commands as commands
from control_stage import NET4, NOERROR, NONE, ONLY4, OUT4, REFUSED, Stage, ask, daemon_of, staged
from harness.controlplane import ControlPlaneProcess
from harness.deadline import wait_for
from harness.fresh import Fresh
from harness.topology import Workload

pytestmark = [pytest.mark.userspace, pytest.mark.timeout(150)]  # a reconnect may take 30 s

STALE_S = 2.0
SLACK_S = 1.0


@contextmanager
def probing(stage: Stage, workload: Workload) -> Iterator[list[tuple[int, int]]]:
    """Send packets all the time, from another thread; give what got out."""
    seen: list[tuple[int, int]] = []
    over = threading.Event()

    def probe() -> None:
        while not over.is_set():
            seen.append(stage.reach(workload))

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def more_than(seen: list[tuple[int, int]], count: int) -> bool:
    return len(seen) > count


@pytest.mark.timeout(150)
def test_everything_is_blocked_until_it_is_back(fresh: Fresh, tmp_path: Path) -> None:
    """Also over a kill -9 of the daemon, and without any command at the end: the policy was kept."""
    topology = fresh.topology()
    workload, spare = topology.add_veth(), topology.add_veth()
    agent = fresh.agent(netns=workload.netns)
    fresh.names(topology, f"good.test. 300 IN A {OUT4}")
    with staged(topology, tmp_path / "daemon", max_stale=STALE_S, stale_action="block_all") as stage:
        dns = commands.dns("allowlist", ["good.test"])
        attached = stage.attach(workload, commands.ack(allow=[NET4], dns=dns, version="kept"))
        policy = stage.daemon.info(attached.id)
        begun = time.monotonic()
        wait_for(lambda: time.monotonic() > begun + STALE_S + SLACK_S, "it to be seen that it is not stale")
        assert stage.reach(workload) == ONLY4
        stage.plane.kill()
        gone = time.monotonic()
        assert stage.reach(workload) == ONLY4
        wait_for(lambda: stage.reach(workload) == NONE, "it to be stale")
        assert STALE_S - 0.1 <= time.monotonic() - gone < STALE_S + SLACK_S
        assert ask(agent, attached.dns, "good.test") == (REFUSED, [])
        info = stage.daemon.info(attached.id)
        assert (info.mode, info.policy_version) == (commands.mode_of("block_all"), "kept")
        for end in (stage.daemon.kill, stage.daemon.stop):
            with probing(stage, workload) as seen:
                end()
                stage.daemon.start()
                wait_for(partial(more_than, seen, 5), "some packets")
            assert set(seen) == {NONE}
        stage.plane.on_sync()  # it is there, and says nothing yet
        stage.plane.start()
        stage.plane.on_subscribed(commands.ack(mode="block_all"))
        stage.daemon.attach(interface=spare.host_if)
        stage.plane.wait_event("sync", stream=stage.plane.stream)
        assert stage.reach(workload) == NONE
        stage.plane.send(commands.SYNC_ACK)
        wait_for(lambda: stage.reach(workload) == ONLY4, "it to be open again", SLACK_S)
        assert ask(agent, attached.dns, "good.test") == (NOERROR, [OUT4])
        info = stage.daemon.info(attached.id)
        assert (info.mode, info.policy_hash, info.policy_version) == (policy.mode, policy.policy_hash, "kept")
        assert not stage.plane.events("command_result")


@pytest.mark.parametrize("action", ["keep", "default"])
def test_keep(fresh: Fresh, tmp_path: Path, action: str) -> None:
    topology = fresh.topology()
    workload = topology.add_veth()
    given = {"stale_action": action} if action != "default" else {}
    with staged(topology, tmp_path / "daemon", max_stale=0.5, **given) as stage:
        stage.attach(workload, commands.ack(allow=[NET4]))
        stage.connected()
        told = len(stage.daemon.events("control_plane_stale"))
        stage.plane.kill()
        with probing(stage, workload) as seen:
            wait_for(lambda: len(stage.daemon.events("control_plane_stale")) > told, "it to be stale")
            known = len(seen)
            wait_for(partial(more_than, seen, known + 20), "some packets")
        assert set(seen) == {ONLY4}


def test_a_short_absence_is_not_stale(fresh: Fresh, tmp_path: Path) -> None:
    """Nor is one that is only short because the daemon was down for longer: it counts from when it was last seen."""
    topology = fresh.topology()
    workload = topology.add_veth()
    with staged(topology, tmp_path / "daemon", max_stale=8, stale_action="block_all") as stage:
        stage.attach(workload, commands.ack(allow=[NET4]))
        with probing(stage, workload) as seen:
            stage.plane.restart()
            stage.connected()
            stage.daemon.restart()
            stage.connected()
        assert set(seen) == {ONLY4}
        assert not stage.daemon.events("control_plane_stale")


def test_what_is_attached_while_it_is_stale_is_blocked(fresh: Fresh, tmp_path: Path) -> None:
    """Whatever `start_mode` says: until the control plane is back."""
    topology = fresh.topology()
    workload, spare = topology.add_veth(), topology.add_veth()
    plane = ControlPlaneProcess(topology.host)
    with ExitStack() as stack:
        stack.callback(plane.kill)
        more = {"enforcement": {"start_mode": "disabled"}}
        settings = {"max_stale": 1, "stale_action": "block_all", "subscribe_ack_timeout": 0}
        daemon = stack.enter_context(daemon_of(plane, topology, tmp_path / "daemon", more, **settings))
        stage = Stage(topology, plane, daemon)
        daemon.wait_event("control_plane_stale")
        attached = daemon.attach(interface=workload.host_if)
        assert stage.reach(workload) == NONE
        plane.start()
        plane.on_subscribed(commands.ack(allow=[NET4]), target=workload.host_if)
        stage.hurry(spare)
        plane.wait_event("subscribed", id=attached.id)
        wait_for(lambda: stage.reach(workload) == ONLY4, "its policy to be in force")


def test_the_daemon_was_down_for_too_long(fresh: Fresh, tmp_path: Path) -> None:
    """Stale from the start: what a daemon finds is blocked before its API answers, if nobody is there."""
    topology = fresh.topology()
    workload, spare = topology.add_veth(), topology.add_veth()
    with staged(topology, tmp_path / "daemon", max_stale=1, stale_action="block_all") as stage:
        stage.attach(workload, commands.ack(allow=[NET4]))
        stage.daemon.kill()
        stage.plane.kill()
        gone = time.monotonic()
        wait_for(lambda: time.monotonic() > gone + 1.5, "it to be stale")
        assert stage.reach(workload) == ONLY4  # nobody is there to block it: the kernel knows no control plane
        stage.daemon.start()
        assert stage.reach(workload) == NONE
        stage.plane.start()
        stage.hurry(spare)
        wait_for(lambda: stage.reach(workload) == ONLY4, "it to be open again", SLACK_S)
