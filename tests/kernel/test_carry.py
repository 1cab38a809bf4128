"""Carrying maps over between two builds, map by map: what is left out when there is no room, and what never is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harness.fence import MAX_LEASES, Fence
from harness.topology import Topology
from netfence.dataplane.carry import carry_over
from netfence.dataplane.compile import map_specs
from netfence.dataplane.layout import Layout
from netfence.dataplane.maps import Map
from netfence.dataplane.plane import DataPlane
from netfence.policy.modes import Mode

pytestmark = pytest.mark.userspace

LEASES = 50


@pytest.fixture
def full(topology: Topology, tmp_path: Path) -> tuple[Fence, Layout]:
    """Give a data plane with an attachment that has rules and leases."""
    fence = Fence(topology, tmp_path)
    attachment = fence.interface(topology.add_veth().host_if)
    attachment.replace(Mode.DENYLIST, deny=["203.0.113.0/24", "10.0.0.0/8", "2001:db8:77::/64"])
    attachment.lease(*[f"192.0.2.{number}" for number in range(LEASES)])
    return fence, fence.plane._loaded.layout


def fresh_maps(layout: Layout, leases: int, rules: int | None = None) -> dict[str, Map]:
    if rules is not None:
        layout = Layout(layout.sizes, layout.fields, {**layout.constants, "RULES": rules})
    return {spec.name: Map.create(spec) for spec in map_specs(layout, leases)}


def test_leases_without_room_are_left_out(full: tuple[Fence, Layout]) -> None:
    fence, layout = full
    with fence:
        new = fresh_maps(layout, LEASES // 5)
        carried = carry_over(fence.plane._loaded.maps, layout, new, layout)
        assert (carried["rules"], carried["leases"]) == (3, LEASES // 5)
        assert len(list(new["leases"].keys())) == LEASES // 5


def test_a_rule_without_room_ends_it(full: tuple[Fence, Layout]) -> None:
    fence, layout = full
    with fence, pytest.raises(OSError, match="No space left"):
        carry_over(fence.plane._loaded.maps, layout, fresh_maps(layout, LEASES, rules=1), layout)


def test_the_same_layout_carries_every_byte(full: tuple[Fence, Layout]) -> None:
    fence, layout = full
    with fence:
        old, new = fence.plane._loaded.maps, fresh_maps(layout, LEASES)
        carry_over(old, layout, new, layout)
        for name in ("config", "leases", "dns_endpoints", "host_addresses", "if_slot", "inbound_count", "counters"):
            seen = [{key: one.lookup(key) for key in one.keys()} for one in (old[name], new[name])]  # noqa: SIM118
            if name == "config":  # the start mode belongs to the daemon
                for one in seen:
                    one.pop((0).to_bytes(4, sys.byteorder))
            assert seen[0] == seen[1], name


@pytest.mark.parametrize("content", ["", "{", '{"structs": 1}', "[]"])
def test_a_layout_that_a_power_cut_spoiled_is_written_again(topology: Topology, tmp_path: Path, content: str) -> None:
    with Fence(topology, tmp_path) as fence:
        bpffs, data, build = fence.plane._bpffs_dir, fence.plane._data_dir, fence.plane._loaded.build
        layout = data / f"layout-{build}.json"
        was = layout.read_text()
        fence.run(fence.plane.close(detach=False))
        layout.write_text(content)
        fence.plane = fence.run(DataPlane.open(bpffs, data, Mode.BLOCK_ALL, max_leases_total=MAX_LEASES))
        assert layout.read_text() == was
