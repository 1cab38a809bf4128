"""Which addresses an attachment's leases open, read from the kernel's pinned map while its daemon runs."""

from __future__ import annotations

from contextlib import closing
from ipaddress import ip_address

from harness.daemon import Netfenced
from netfence.dataplane.compile import map_specs
from netfence.dataplane.layout import Layout
from netfence.dataplane.leases import packed_address
from netfence.dataplane.links import obj_get
from netfence.dataplane.maps import Map


def open_addresses(daemon: Netfenced, attachment_id: str) -> set[str]:
    """Return the addresses of the attachment's leases, live or not yet swept."""
    slot = daemon.slot(attachment_id)
    layout = Layout.load(next((daemon.directory / "data").glob("layout-*.json")))
    spec = next(spec for spec in map_specs(layout, 1) if spec.name == "leases")
    key = layout.packer("lease_key", "slot", "address")
    with closing(Map(obj_get(next(daemon.pins.glob("maps*")) / spec.name), spec)) as pinned:
        leases = [key.unpack(raw) for raw in pinned.keys()]  # noqa: SIM118 - a Map is no dict
    return {str(ip_address(packed_address(address))) for owner, address in leases if owner == slot}
