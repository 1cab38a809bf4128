"""A control plane replaces a policy a thousand times under a workload at full speed: none is lost, none leaks [9]."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

import control_commands as commands
from flood import FarEnd, flood
from harness import packets
from harness.controlplane import ControlPlaneProcess
from harness.daemon import Netfenced
from harness.deadline import wait_for
from harness.topology import Topology, Workload
from harness.wire import Tag
from netfence.policy.modes import FIRST_DROP, Reason

pytestmark = [pytest.mark.userspace, pytest.mark.timeout(150)]  # a reconnect may take 30 s

ALLOWED, DENIED = "203.0.113.80", "203.0.113.81"
UPDATES = 1000
RULES = 300
EVERYTHING = "0.0.0.0/0"


def filler(seed: int) -> list[str]:
    return [f"10.{seed}.{number >> 8}.{number & 255}" for number in range(RULES)]


@pytest.mark.timeout(180)
def test_no_packet_is_lost_or_leaks_over_a_thousand_bulk_updates(
    topology: Topology, workload: Workload, tmp_path: Path
) -> None:
    frames = [workload.bytes_of(packets.UDP4, to, Tag()) for to in (DENIED, ALLOWED)]
    with (
        closing(FarEnd(topology, [ALLOWED, DENIED])) as far_end,
        ControlPlaneProcess(topology.host) as plane,
        Netfenced(topology.host, tmp_path, policy=None, config=plane.config()) as daemon,
    ):
        plane.on_subscribed(commands.ack(mode="allowlist", allow=[ALLOWED]))
        attached = daemon.attach(interface=workload.host_if)
        policies = [  # they agree about two addresses, each in its own way
            commands.bulk(attached.id, "allowlist", allow=[ALLOWED, *filler(1)]),
            commands.bulk(attached.id, "denylist", deny=[DENIED, *filler(2)]),
            commands.bulk(attached.id, "denylist", allow=[ALLOWED, *filler(3)], deny=[EVERYTHING]),
            commands.bulk(attached.id, "allowlist", allow=[EVERYTHING], deny=[DENIED]),
        ]
        before = daemon.reasons(attached.id)
        with flood(workload, *frames) as sent:
            for number in range(UPDATES):
                command = policies[number % len(policies)]
                command.nonce, command.version = f"n{number}", f"v{number}"
                plane.send(command)
                assert plane.wait_event("command_result", nonce=f"n{number}").ok
        assert sent[0] > UPDATES
        wait_for(
            lambda: far_end.counts()[0] >= sent[0], "the last of the allowed packets, which follow the denied ones"
        )
        assert far_end.counts() == [sent[0], 0]
        told = daemon.reasons(attached.id) - before
        assert sum(count for reason, count in told.items() if reason >= FIRST_DROP) == sent[0]
        assert {reason for reason in told if reason >= FIRST_DROP} <= {Reason.DENY_RULE, Reason.DEFAULT_DROP}
        assert daemon.info(attached.id).policy_version == f"v{UPDATES - 1}"
