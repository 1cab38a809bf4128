"""choose_direction over every link kind that semantics.md 1 names, and what overrides it."""

from __future__ import annotations

import dataclasses

import pytest

from netfence.dataplane.hooks.chain import Side
from netfence.dataplane.target import (
    ARPHRD_ETHER,
    ARPHRD_NONE,
    ARPHRD_TUNNEL,
    PHYSICAL,
    Direction,
    Hook,
    InterfaceTarget,
    LinkLayer,
    choose_direction,
    side_of,
)
from netfence.errors import PreconditionError

WORKLOAD_KINDS = ["tun", "tap", "veth", "netkit"]
HOST_KINDS = ["macvtap", "ipvtap", PHYSICAL, "dummy", "vlan", "bond", "wireguard"]
UNTELLING_KINDS = ["bridge", "macvlan", "ipvlan", "vrf", "ifb", "vxlan", "gre", "team", "some-kind-of-2031"]


def interface(kind: str, arphrd: int = ARPHRD_ETHER) -> InterfaceTarget:
    layer = LinkLayer.L2 if arphrd == ARPHRD_ETHER else LinkLayer.L3
    return InterfaceTarget("if0", 7, kind, arphrd, layer, 0, 0, False, False, ())


@pytest.mark.parametrize("kind", WORKLOAD_KINDS)
def test_host_sides_of_workloads_are_judged_on_ingress(kind: str) -> None:
    direction = choose_direction(interface(kind), None)
    assert direction is Direction.WORKLOAD
    assert side_of(direction) is Side.INGRESS


@pytest.mark.parametrize("kind", HOST_KINDS)
def test_ways_out_are_judged_on_egress(kind: str) -> None:
    direction = choose_direction(interface(kind, ARPHRD_NONE if kind == "wireguard" else ARPHRD_ETHER), None)
    assert direction is Direction.HOST
    assert side_of(direction) is Side.EGRESS


@pytest.mark.parametrize("kind", UNTELLING_KINDS)
def test_auto_is_refused_where_the_kind_cannot_tell(kind: str) -> None:
    with pytest.raises(PreconditionError, match=rf"if0: a {kind} interface .*--direction workload .*--direction host"):
        choose_direction(interface(kind), None)


@pytest.mark.parametrize("kind", WORKLOAD_KINDS)
def test_auto_is_refused_inside_the_workload(kind: str) -> None:
    target = dataclasses.replace(interface(kind), has_default_route=True)
    with pytest.raises(PreconditionError, match=r"carries the default route.*--direction"):
        choose_direction(target, None)


@pytest.mark.parametrize("kind", [PHYSICAL, "veth", "dummy"])
def test_auto_is_refused_on_a_bond_member(kind: str) -> None:
    target = dataclasses.replace(interface(kind), is_bond_member=True, master=3)
    with pytest.raises(PreconditionError, match=r"member of a bond.*--direction"):
        choose_direction(target, None)


@pytest.mark.parametrize("requested", list(Direction))
@pytest.mark.parametrize("kind", WORKLOAD_KINDS + HOST_KINDS + UNTELLING_KINDS)
def test_a_request_overrides_the_kind(kind: str, requested: Direction) -> None:
    target = dataclasses.replace(interface(kind), has_default_route=True, is_bond_member=True)
    assert choose_direction(target, requested) is requested
    assert choose_direction(target, requested, Hook.TC) is requested


def test_xdp_exists_only_on_ingress() -> None:
    assert choose_direction(interface("veth"), None, Hook.XDP) is Direction.WORKLOAD
    assert choose_direction(interface(PHYSICAL), Direction.WORKLOAD, Hook.XDP) is Direction.WORKLOAD
    for target, requested in ((interface(PHYSICAL), None), (interface("veth"), Direction.HOST)):
        with pytest.raises(PreconditionError, match=r"XDP exists only on ingress.*--hook tc"):
            choose_direction(target, requested, Hook.XDP)


@pytest.mark.parametrize("kind", ["tun", "netkit", *sorted({*HOST_KINDS, *UNTELLING_KINDS} - {PHYSICAL})])
def test_xdp_is_refused_where_it_is_not_what_tc_is(kind: str) -> None:
    assert choose_direction(interface(kind), Direction.WORKLOAD, Hook.TC) is Direction.WORKLOAD
    with pytest.raises(PreconditionError, match=rf"attach to if0: XDP cannot judge a {kind} interface.*--hook tc"):
        choose_direction(interface(kind), Direction.WORKLOAD, Hook.XDP)


@pytest.mark.parametrize("kind", ["veth", "tap", PHYSICAL])
def test_xdp_wants_an_ethernet_header_and_no_bond(kind: str) -> None:
    with pytest.raises(PreconditionError, match=r"XDP cannot judge .*without Ethernet header.*--hook tc"):
        choose_direction(interface(kind, ARPHRD_NONE), Direction.WORKLOAD, Hook.XDP)
    member = dataclasses.replace(interface(kind), is_bond_member=True, master=3)
    with pytest.raises(PreconditionError, match=r"member of a bond takes no XDP.*--hook tc"):
        choose_direction(member, Direction.WORKLOAD, Hook.XDP)


def test_a_tunnel_is_judged_only_on_its_way_out() -> None:
    assert choose_direction(interface("ipip", ARPHRD_TUNNEL), Direction.HOST) is Direction.HOST
    with pytest.raises(PreconditionError, match="--direction host"):
        choose_direction(interface("ipip", ARPHRD_TUNNEL), Direction.WORKLOAD)


def test_numbers_are_those_of_the_wire() -> None:
    assert (Direction.WORKLOAD, Direction.HOST) == (1, 2)
    assert (Hook.AUTO, Hook.TC, Hook.XDP) == (0, 1, 2)
