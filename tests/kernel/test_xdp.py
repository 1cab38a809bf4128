"""The XDP hook: what only it has. Verdicts, shapes and random packets run under XDP in the tests of those."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness import packets
from harness.fence import Fence
from harness.topology import Topology
from netfence.policy.modes import Mode, Reason

WEB = {"ipv4": "203.0.113.80", "ipv6": "2001:db8:b::80"}
SHAPES = {"ipv4": packets.UDP4, "ipv6": packets.UDP6}
COUNT = 3


@pytest.fixture(scope="module")
def fence(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fence]:
    with Fence(topology, tmp_path_factory.mktemp("fence")) as made:
        yield made


@pytest.mark.parametrize("kind", ["veth", "tap"])
@pytest.mark.parametrize("family", SHAPES)
def test_drops_are_bracketed(topology: Topology, fence: Fence, family: str, kind: str) -> None:
    workload = topology.add_veth() if kind == "veth" else topology.add_tap()
    shape, to = SHAPES[family], WEB[family]
    with fence.interface(workload.host_if, xdp=True) as fenced:
        assert fenced.mechanism == "xdp-native"
        for mode, reason in (
            (Mode.DISABLED, Reason.DISABLED),
            (Mode.DENYLIST, Reason.DEFAULT_PASS),
            (Mode.ALLOWLIST, Reason.DEFAULT_DROP),
        ):
            fenced.replace(mode)
            with fenced.counts(reason, COUNT):
                assert topology.arrived(workload, shape, to, COUNT) == (0 if reason is Reason.DEFAULT_DROP else COUNT)
        fenced.allow(to)
        with fenced.counts(Reason.ALLOW_RULE, COUNT):
            assert topology.arrived(workload, shape, to, COUNT) == COUNT
        fenced.remove(to)
        with fenced.counts(Reason.DEFAULT_DROP, COUNT):
            assert topology.arrived(workload, shape, to, COUNT) == 0
    assert topology.arrived(workload, shape, to, COUNT) == COUNT
