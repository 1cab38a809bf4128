"""What the fence must say about a packet, written a second time: plainly, from a description, not from bytes.

Follows semantics.md 2–7 sentence by sentence with `ipaddress` and linear scans. Knows no BPF, maps or CidrTable.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Literal

from frames import Frame
from netfence.policy.modes import Mode, Reason

METADATA = (ipaddress.ip_address("169.254.169.254"), ipaddress.ip_address("fd00:ec2::254"))
LINK_LOCAL = (ipaddress.ip_network("169.254.0.0/16"), ipaddress.ip_network("fe80::/10"))
SOLICITED = ipaddress.ip_network("ff02::1:ff00:0/104")
ALL_NODES_AND_ROUTERS = (ipaddress.ip_address("ff02::1"), ipaddress.ip_address("ff02::2"))
MAX_EXTENSIONS = 6

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass
class OracleRule:
    network: Network
    allow: bool
    live: bool


@dataclass
class OracleLease:
    live: bool
    used: bool  # by TCP while it was live


@dataclass
class World:
    """One attachment as the workload's packets meet it."""

    mode: Mode
    audit: bool
    rules: list[OracleRule]
    leases: dict[Address, OracleLease]
    own_dns: tuple[Address, int]
    foreign_dns: tuple[Address, int]
    own_addresses: list[Address]
    allow_dhcp: bool
    allow_link_local: bool
    replies: Literal["off", "host"]
    inbound: set[tuple[Address, Address, int, int]] = field(default_factory=set)  # peer, own, peer port, own port
    hook: Literal["tc", "xdp", "cgroup"] = "tc"

    @property
    def cgroup(self) -> bool:
        return self.hook == "cgroup"


def unmapped(address: Address) -> Address:
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


# The sentences of semantics.md one by one; shorter would be further from them.
# ruff: noqa: C901, PLR0911, PLR0912


def decide(world: World, frame: Frame) -> Reason:
    """Return the reason under which the packet is counted (as would-drop where audit lets it pass)."""
    if world.mode is Mode.DISABLED:
        return Reason.DISABLED
    malformed = _malformed(world, frame)
    if malformed is not None:
        return malformed
    if frame.ethertype == "arp":
        return Reason.ARP
    to = unmapped(frame.destination)
    ports = frame.protocol in ("tcp", "udp") and frame.fragment != "later"
    if ports and (to, frame.destination_port) == world.foreign_dns:
        return Reason.FOREIGN_DNS
    if ports and not frame.fragment and (to, frame.destination_port) == world.own_dns:
        return Reason.DNS
    free_loopback = to.is_loopback and not frame.fragment and not (ports and frame.destination_port == 53)
    if world.cgroup and world.mode is not Mode.BLOCK_ALL and free_loopback:
        return Reason.LOOPBACK
    if _neighbour(world, frame):
        return Reason.NEIGHBOUR
    if not world.cgroup and world.allow_dhcp and _dhcp(frame, to):
        return Reason.DHCP
    if world.mode is Mode.BLOCK_ALL:
        return Reason.BLOCK_ALL
    return _policy(world, frame, to)


def _policy(world: World, frame: Frame, to: Address) -> Reason:
    matching = [rule for rule in world.rules if rule.live and to in rule.network]
    longest = max((rule.network.prefixlen for rule in matching), default=None)
    deciding = [rule for rule in matching if rule.network.prefixlen == longest]
    allowed = bool(deciding) and all(rule.allow for rule in deciding)
    if deciding and not allowed:
        return Reason.DENY_RULE
    if to in METADATA:
        enough = 16 if to.version == 4 else 64
        return Reason.ALLOW_RULE if allowed and longest is not None and longest >= enough else Reason.METADATA
    if allowed:
        return Reason.ALLOW_RULE
    lease = world.leases.get(to)
    tcp = frame.protocol == "tcp" and not frame.fragment
    if lease is not None and lease.live:
        return Reason.LEASE
    if lease is not None and lease.used and tcp and "S" not in frame.flags:
        return Reason.ESTABLISHED
    if world.allow_link_local and any(to in network for network in LINK_LOCAL if network.version == to.version):
        return Reason.LINK_LOCAL
    if world.mode is Mode.DENYLIST:
        return Reason.DEFAULT_PASS
    connection = (to, unmapped(frame.source), frame.destination_port, frame.source_port)
    if world.replies != "off" and tcp and set(frame.flags) & set("AR") and connection in world.inbound:
        return Reason.REPLY
    return Reason.DEFAULT_DROP


def _malformed(world: World, frame: Frame) -> Reason | None:
    """Say why the packet is never guessed at (semantics.md 7), None where all of it that we need can be read."""
    if not world.cgroup:
        if len(frame.tags) > 2:
            return Reason.TRUNCATED if frame.cut_in("vlan", 2) else Reason.VLAN_DEPTH
        if frame.cut_in("vlan", len(frame.tags)):
            return Reason.TRUNCATED
    if frame.ethertype == "other":
        return Reason.NOT_IP
    if frame.ethertype == "arp":
        return Reason.NOT_IP if world.cgroup else None
    if frame.cut_in("ip"):
        return Reason.TRUNCATED
    if frame.bad_version:
        return Reason.NOT_IP
    if frame.version == 4:
        if frame.cut_in("options"):
            return Reason.TRUNCATED
        if any(kind in (131, 137) for kind, _ in frame.options):
            return Reason.SOURCE_ROUTE
    else:
        for index, (kind, source_route) in enumerate(frame.extensions):
            if index >= MAX_EXTENSIONS:
                return Reason.EXT_HEADERS
            if frame.cut_in("extension", index, first=8):
                return Reason.TRUNCATED
            if kind == "routing" and source_route:
                return Reason.SOURCE_ROUTE
            if frame.cut_in("extension", index):
                return Reason.TRUNCATED
            if kind == "fragment" and frame.fragment == "later":
                return None
    if frame.fragment != "later" and frame.cut_in("upper"):
        return Reason.TRUNCATED
    return None


def _neighbour(world: World, frame: Frame) -> bool:
    if frame.version != 6 or frame.protocol != "icmpv6" or frame.fragment:
        return False
    to = frame.destination
    if frame.icmp_type in (131, 132, 143):
        return frame.hop_limit == 1 and to in ipaddress.ip_network("ff02::/16")
    if frame.icmp_type not in (133, 135, 136) or frame.icmp_code != 0 or frame.hop_limit != 255 or frame.extensions:
        return False
    return to in LINK_LOCAL[1] or to in ALL_NODES_AND_ROUTERS or to in SOLICITED or to in world.own_addresses


def _dhcp(frame: Frame, to: Address) -> bool:
    if frame.protocol != "udp" or frame.fragment:
        return False
    where = (str(to), frame.source_port, frame.destination_port)
    if frame.version == 4:
        return where == ("255.255.255.255", 68, 67)
    return where == ("ff02::1:2", 546, 547)
