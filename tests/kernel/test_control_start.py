"""Attach with other settings: time-out 0, `start_mode` disabled, a control plane that comes late (wire.md 2)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

import control_commands as commands
from control_stage import (
    BOTH,
    DETACHED,
    NET4,
    NET6,
    NONE,
    ONLY4,
    ONLY6,
    REFUSED,
    Stage,
    ask,
    daemon_of,
    nothing_left,
    refused_attach,
)
from harness.controlplane import ControlPlaneProcess
from harness.daemon import host_port
from harness.deadline import wait_for
from harness.fresh import Fresh

pytestmark = pytest.mark.userspace


def test_a_control_plane_that_comes_up_in_time(fresh: Fresh, tmp_path: Path) -> None:
    topology = fresh.topology()
    workload = topology.add_veth()
    plane = ControlPlaneProcess(topology.host)
    plane.on_subscribed(commands.ack(allow=[NET4]))
    with ExitStack() as stack:
        stack.callback(plane.kill)
        daemon = stack.enter_context(daemon_of(plane, topology, tmp_path / "daemon", subscribe_ack_timeout=15))
        stage = Stage(topology, plane, daemon)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(daemon.attach, interface=workload.host_if)
            wait_for(daemon.link_pins, "the fence to stand")
            assert stage.reach(workload) == NONE
            plane.start()
            attached = future.result()
        assert stage.reach(workload) == ONLY4
        sync, subscribed = plane.events()
        assert (sync.name, list(sync.body.attachments)) == ("sync", [])
        assert (subscribed.name, subscribed.body.id) == ("subscribed", attached.id)


def test_without_waiting_it_begins_in_start_mode(fresh: Fresh, tmp_path: Path) -> None:
    """Attach before there is a control plane; the ack comes late, after streams and a daemon have gone."""
    topology = fresh.topology()
    workload, spare = topology.add_veth(), topology.add_veth()
    agent = fresh.agent(netns=workload.netns)
    plane = ControlPlaneProcess(topology.host)
    with ExitStack() as stack:
        stack.callback(plane.kill)
        daemon = stack.enter_context(daemon_of(plane, topology, tmp_path / "daemon", subscribe_ack_timeout=0))
        stage = Stage(topology, plane, daemon)
        attached = daemon.attach(interface=workload.host_if)
        assert stage.reach(workload) == NONE
        assert ask(agent, attached.dns, "any.test") == (REFUSED, [])
        assert daemon.info(attached.id).mode == commands.mode_of("block_all")
        plane.start()
        for lose in (plane.end, daemon.restart, None):
            stream = plane.stream
            plane.wait_event("subscribed", id=attached.id, stream=stream)
            sync, *_ = plane.events(stream=stream)
            assert (sync.name, list(sync.body.attachments)) == ("sync", [])
            assert stage.reach(workload) == NONE
            if lose is not None:
                lose()
                plane.wait_closed(stream)
        stage.good(commands.ack(attached.id, allow=[NET4], version="late"))
        assert stage.reach(workload) == ONLY4
        stage.good(commands.ack(attached.id, allow=[NET6], version="later"))
        assert stage.reach(workload) == ONLY6
        stream = plane.stream
        plane.end()
        (listed,) = plane.wait_event("sync", stream=stream + 1).attachments
        assert (listed.id, listed.policy_version) == (attached.id, "later")
        unacked = daemon.attach(interface=spare.host_if)
        daemon.detach(unacked.id)
        assert plane.wait_event("unsubscribed", id=unacked.id).reason == DETACHED


def test_start_mode_disabled(fresh: Fresh, tmp_path: Path) -> None:
    topology = fresh.topology()
    workload = topology.add_veth()
    with (
        ControlPlaneProcess(topology.host) as plane,
        daemon_of(
            plane, topology, tmp_path / "daemon", {"enforcement": {"start_mode": "disabled"}}, subscribe_ack_timeout=1
        ) as daemon,
    ):
        stage = Stage(topology, plane, daemon)
        stage.connected()
        with stage.attaching(workload) as (subscribed, future):
            assert subscribed.mode == commands.mode_of("disabled")
            assert stage.reach(workload) == BOTH
            plane.send(commands.ack(subscribed.id, allow=[NET6]))
            attached = future.result()
        assert stage.reach(workload) == ONLY6
        daemon.detach(attached.id)
        plane.on_subscribed()
        code, _ = refused_attach(daemon, workload.host_if)
        assert code == "DEADLINE_EXCEEDED"
        nothing_left(stage, workload, host_port(subscribed.dns_address))
