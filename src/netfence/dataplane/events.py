"""What the watchers tell the daemon: one small value per thing that happened to a target or to this host."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinkGone:
    """A watched interface was deleted or moved to another namespace; it is watched no more."""

    ifindex: int


@dataclass(frozen=True, slots=True)
class LinkRenamed:
    """A watched interface has another name; the attachment stays."""

    ifindex: int
    name: str


@dataclass(frozen=True, slots=True)
class LinkNew:
    """An interface appeared, by creation or from another namespace: never one that was here before."""

    ifindex: int
    name: str


@dataclass(frozen=True, slots=True)
class AddressesChanged:
    """Addresses of a watched interface or of its bridge changed, or its bridge did: ask `target.own_addresses`."""

    ifindex: int


@dataclass(frozen=True, slots=True)
class HostAddressesChanged:
    """Some address of this host came or went (or was renewed): ask `target.host_addresses`."""


@dataclass(frozen=True, slots=True)
class HookGone:
    """Somebody removed clsact filters of a watched interface, perhaps ours: ask `clsact.attached`, put it back."""

    ifindex: int


@dataclass(frozen=True, slots=True)
class Resync:
    """Events were lost. Watched targets that vanished or were renamed are told by the events that follow.

    Hooks (`attached`) and addresses must be looked at by the receiver.
    """


@dataclass(frozen=True, slots=True)
class CgroupGone:
    """A watched cgroup was removed; it is watched no more."""

    cgroup_id: int
    path: str


Event = LinkGone | LinkRenamed | LinkNew | AddressesChanged | HostAddressesChanged | HookGone | Resync | CgroupGone
