"""Resolve the interface that shall be fenced, and decide on which side of it the workload is (semantics.md 1).

Owns the facts of an interface, as rtnetlink tells them, and the pure `choose_direction`; cgroups are in `cgroups`.
Refuses to know about slots and policies. To teach it another link kind: `_KIND_DIRECTION` and `_LINK_TYPE`.
Everything but `choose_direction` and `side_of` makes system calls, together well under a millisecond.
"""

from __future__ import annotations

import enum
import errno
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from netfence.dataplane import rtnl
from netfence.dataplane.failure import explain
from netfence.dataplane.hooks.chain import Side
from netfence.dataplane.rtnl import LinkRecord, Rtnl
from netfence.errors import InvalidError, NotFoundError, PreconditionError

PHYSICAL = "physical"  # our word for an interface without IFLA_INFO_KIND
_NAME_MAX = 127  # ALTIFNAMSIZ - 1; real names end at 15 bytes

ARPHRD_ETHER, ARPHRD_LOOPBACK, ARPHRD_RAWIP, ARPHRD_PPP, ARPHRD_NONE = 1, 772, 519, 512, 65534
_LOOPBACK_IFINDEX = 1  # in every network namespace
ARPHRD_TUNNEL, ARPHRD_TUNNEL6, ARPHRD_SIT = 768, 769, 776

_RTMSG = struct.Struct("=BBBBBBBBI")
_RTNEXTHOP = struct.Struct("=HBBi")
_RTA_OIF, _RTA_MULTIPATH, _RTN_UNICAST = 4, 9, 1
_TUN_TYPE, _IFF_TAP = 3, 2  # IFLA_TUN_TYPE and its value for a tap


class Direction(enum.IntEnum):
    """Which way the workload is, seen from the interface; numbers of proto Direction, 0 there is auto."""

    WORKLOAD = 1  # the host side of a workload: what it sends comes in here
    HOST = 2  # a way out of the host: what leaves is judged


class Hook(enum.IntEnum):
    """What the caller asked for; numbers of proto Hook, 0 is auto."""

    AUTO = 0
    TC = 1
    XDP = 2


class LinkLayer(enum.IntEnum):
    """What a packet on the device begins with."""

    L2 = 2  # an Ethernet header
    L3 = 3  # the IP header


@dataclass(frozen=True, slots=True)
class InterfaceTarget:
    """An interface as it was when resolved; (name, ifindex, kind) tells it from a later one of the same name."""

    name: str
    ifindex: int
    kind: str  # IFLA_INFO_KIND ("tap" for a tun device in tap mode), or PHYSICAL
    arphrd: int
    layer: LinkLayer
    master: int  # ifindex of its bridge, bond or VRF; 0 none
    bridge: int  # master when that is a bridge, else 0
    is_bond_member: bool  # of a bond or team
    has_default_route: bool  # asked only where it decides: veth, tap, tun, netkit
    own_addresses: tuple[bytes, ...]  # IPv6, packed: its own and its bridge's (neighbour discovery)


_KIND_DIRECTION = {
    "tun": Direction.WORKLOAD,
    "tap": Direction.WORKLOAD,
    "veth": Direction.WORKLOAD,
    "netkit": Direction.WORKLOAD,
    "macvtap": Direction.HOST,
    "ipvtap": Direction.HOST,
    PHYSICAL: Direction.HOST,
    "dummy": Direction.HOST,
    "vlan": Direction.HOST,
    "bond": Direction.HOST,
    "wireguard": Direction.HOST,
}
# Kinds whose end in the workload looks like the one on the host: the default route gives it away.
_TWO_ENDED = frozenset({"veth", "tap", "tun", "netkit"})

_LINK_TYPE = {
    ARPHRD_ETHER: LinkLayer.L2,
    ARPHRD_NONE: LinkLayer.L3,
    ARPHRD_RAWIP: LinkLayer.L3,
    ARPHRD_PPP: LinkLayer.L3,
    ARPHRD_TUNNEL: LinkLayer.L3,
    ARPHRD_TUNNEL6: LinkLayer.L3,
    ARPHRD_SIT: LinkLayer.L3,
}
# Before 5.14 these hand the *outer* IP header to an ingress hook, so only what they send can be judged.
_EGRESS_ONLY = frozenset({ARPHRD_TUNNEL, ARPHRD_TUNNEL6, ARPHRD_SIT})
# XDP sees there what TC ingress sees, an Ethernet header included; others have another idea of their frames, or of whom
# they belong to (a bond runs the program in its members, with their index), or no native XDP, for which alone it pays.
_XDP_KINDS = frozenset({"veth", "tap", PHYSICAL})
_SLAVE_KINDS = frozenset({"bond", "team"})


def choose_direction(target: InterfaceTarget, requested: Direction | None, hook: Hook = Hook.AUTO) -> Direction:
    """Decide the direction (pure); `requested` None is `auto`.

    Raises PreconditionError, naming `--direction`, where the kind cannot tell; also where XDP cannot be what TC is.
    """
    direction = requested or _direction_by_kind(target)
    what = f"attach to {target.name}"
    if hook is Hook.XDP:
        _require_xdp(target, direction, what)
    if direction is Direction.WORKLOAD and target.arphrd in _EGRESS_ONLY:
        raise PreconditionError(
            f"{what}: what arrives through a {target.kind} tunnel cannot be judged reliably; use --direction host, "
            "or attach to the interface behind the tunnel"
        )
    return direction


def _require_xdp(target: InterfaceTarget, direction: Direction, what: str) -> None:
    if direction is Direction.HOST:
        raise PreconditionError(
            f"{what}: XDP exists only on ingress and cannot judge what leaves by a {target.kind} interface; "
            "use --hook tc, or --direction workload if the workload is behind it"
        )
    if target.is_bond_member:
        raise PreconditionError(f"{what}: a member of a bond takes no XDP program; use --hook tc")
    if target.kind not in _XDP_KINDS or target.layer is not LinkLayer.L2:
        kind = f"{target.kind} interface" + ("" if target.layer is LinkLayer.L2 else " (without Ethernet header)")
        raise PreconditionError(
            f"{what}: XDP cannot judge a {kind} as TC does; use --hook tc (XDP is for veth, tap and the host's NICs)"
        )


def _direction_by_kind(target: InterfaceTarget) -> Direction:
    if target.is_bond_member:
        doubt = "it is a member of a bond: attach to the bond"
    elif target.has_default_route:
        doubt = f"it is a {target.kind} that carries the default route, so it may be the end inside the workload"
    elif target.kind in _KIND_DIRECTION:
        return _KIND_DIRECTION[target.kind]
    else:
        doubt = f"a {target.kind} interface does not tell on which side of it the workload is"
    raise PreconditionError(
        f"choose the direction for {target.name}: {doubt}; "
        "say --direction workload (what comes in is judged) or --direction host (what goes out is judged)"
    )


def side_of(direction: Direction) -> Side:
    """Translate to the kernel's word: what a workload sends enters the host, what the host sends leaves it."""
    return Side.INGRESS if direction is Direction.WORKLOAD else Side.EGRESS


def arrival_device(target: InterfaceTarget, direction: Direction) -> int:
    """Return the index of the device by which the workload's packets reach sockets of this host; 0: cannot be told.

    A bridge hands up what its ports receive; with VLAN devices on top of it there are several, and any may be the one.
    """
    if direction is Direction.HOST:
        return _LOOPBACK_IFINDEX
    if target.bridge:
        try:
            bridge = socket.if_indextoname(target.bridge)
            stacked = any(Path("/sys/class/net", bridge).glob("upper_*"))
        except OSError:
            return 0
        return 0 if stacked else target.bridge
    return 0 if target.master else target.ifindex


def resolve_interface(name: str) -> InterfaceTarget:
    """Look an interface up in this network namespace.

    Raises InvalidError (bad name, loopback, a link type without Ethernet or IP), NotFoundError.
    """
    what = f"attach to interface {name!r}"
    if not name or len(os.fsencode(name)) > _NAME_MAX or "/" in name or "\0" in name or name.split() != [name]:
        raise InvalidError(f"{what}: not an interface name; 1 to {_NAME_MAX} bytes without blanks and slashes")
    try:
        with Rtnl() as netlink:
            return _describe(netlink, rtnl.get_link(netlink, name), what)
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise NotFoundError(f"{what}: no such interface in this network namespace") from error
        raise explain(what, error) from error


def _describe(netlink: Rtnl, record: LinkRecord, what: str) -> InterfaceTarget:
    if record.arphrd == ARPHRD_LOOPBACK:
        raise InvalidError(f"{what}: nothing leaves the host by the loopback; attach to the workload's own interface")
    if record.arphrd not in _LINK_TYPE:
        raise InvalidError(
            f"{what}: link type {record.arphrd} (ARPHRD) carries neither Ethernet nor plain IP; "
            "attach to an Ethernet, tun or wireguard interface"
        )
    kind = record.kind or PHYSICAL
    if kind == "tun" and _is_tap(record):
        kind = "tap"
    bridge = record.master if record.master and rtnl.get_link(netlink, record.master).kind == "bridge" else 0
    return InterfaceTarget(
        name=record.name,
        ifindex=record.ifindex,
        kind=kind,
        arphrd=record.arphrd,
        layer=_LINK_TYPE[record.arphrd],
        master=record.master,
        bridge=bridge,
        is_bond_member=record.slave_kind in _SLAVE_KINDS,
        has_default_route=kind in _TWO_ENDED and _has_default_route(netlink, record.ifindex),
        own_addresses=_ipv6_addresses(netlink, record.ifindex, bridge),
    )


def _is_tap(record: LinkRecord) -> bool:
    mode = rtnl.attributes(record.info_data).get(_TUN_TYPE)
    return mode[0] == _IFF_TAP if mode else record.arphrd == ARPHRD_ETHER


def _ipv6_addresses(netlink: Rtnl, *interfaces: int) -> tuple[bytes, ...]:
    wanted = [index for index in interfaces if index]
    return tuple(
        sorted({each.address for index in wanted for each in rtnl.get_addresses(netlink, socket.AF_INET6, index)})
    )


def own_addresses(ifindex: int) -> tuple[bytes, ...]:
    """Read again what `InterfaceTarget.own_addresses` holds, after an AddressesChanged; () once it is gone."""
    try:
        with Rtnl() as netlink:
            master = rtnl.get_link(netlink, ifindex).master
            bridge = master if master and rtnl.get_link(netlink, master).kind == "bridge" else 0
            return _ipv6_addresses(netlink, ifindex, bridge)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return ()
        raise explain(f"read the addresses of interface {ifindex}", error) from error


def _has_default_route(netlink: Rtnl, ifindex: int) -> bool:
    """Tell whether a unicast default route of any table leaves by the interface; the kernel filters by interface."""
    wanted = rtnl.attribute(_RTA_OIF, struct.pack("=I", ifindex))
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            routes = netlink.dump(rtnl.RTM_GETROUTE, _RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0) + wanted)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP):  # no such family in this kernel
                continue
            raise
        if any(_is_default_by(message.payload, ifindex) for message in routes if message.type == rtnl.RTM_NEWROUTE):
            return True
    return False


def _is_default_by(payload: bytes, ifindex: int) -> bool:
    _, prefix_length, _, _, _, _, _, kind, _ = _RTMSG.unpack_from(payload)
    if prefix_length != 0 or kind != _RTN_UNICAST:
        return False
    found = rtnl.attributes(payload[_RTMSG.size :])
    if _RTA_OIF in found and struct.unpack("=I", found[_RTA_OIF])[0] == ifindex:
        return True
    hops = found.get(_RTA_MULTIPATH, b"")
    offset = 0
    while offset + _RTNEXTHOP.size <= len(hops):
        length, _, _, hop_ifindex = _RTNEXTHOP.unpack_from(hops, offset)
        if hop_ifindex == ifindex:
            return True
        offset += max(length, _RTNEXTHOP.size) + 3 & ~3
    return False


def host_addresses() -> frozenset[bytes]:
    """Read every address of this host (this network namespace), packed, both families."""
    try:
        with Rtnl() as netlink:
            return frozenset(each.address for each in rtnl.get_addresses(netlink))
    except OSError as error:
        raise explain("read the addresses of this host", error) from error
