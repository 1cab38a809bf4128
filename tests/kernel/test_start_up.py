"""How long a start takes with one, a hundred and a thousand attachments to take over, and what each of them costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

from daemons import Start
from harness.deadline import SLOWNESS
from harness.fresh import Fresh

pytestmark = [pytest.mark.nightly, pytest.mark.userspace]

POLICY: dict[str, Any] = {"default": {"mode": "allowlist", "allow_cidrs": [f"10.{n}.0.0/16" for n in range(20)]}}
LONGEST_S = 5.0
ROUNDS = 3

Tell = Callable[[str, object], None]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("attachments", [1, 100, 1000])
def test_a_start_takes_over(fresh: Fresh, start: Start, record_property: Tell, attachments: int) -> None:
    topology = fresh.topology()
    names = [f"many{number}" for number in range(attachments)]
    topology.host.ip(*[f"link add {name} type veth peer name p{name}" for name in names])
    topology.host.ip(*[f"link set {name} up" for name in names])
    daemon = start(topology, policy=POLICY, config={"log_level": "warning"})
    descriptors, memory = daemon.descriptors(), daemon.memory_kb()
    for name in names:
        daemon.attach(interface=name)
    each = (daemon.descriptors() - descriptors) / attachments, (daemon.memory_kb() - memory) / attachments
    before = sorted((info.id, info.dns_address, info.policy_hash) for info in daemon.attachments())
    times = []
    for _ in range(ROUNDS):
        daemon.kill()
        began = time.monotonic()
        daemon.start()
        times.append(time.monotonic() - began)
        assert sorted((info.id, info.dns_address, info.policy_hash) for info in daemon.attachments()) == before
    record_property("start_s", [round(one, 2) for one in times])
    record_property("descriptors_each", round(each[0], 2))
    record_property("memory_kb_each", round(each[1], 1))
    assert statistics.median(times) <= LONGEST_S * SLOWNESS
