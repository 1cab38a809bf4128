"""Attach to an interface's XDP hook through a pinned link (kernel >= 5.9): what comes in, before it is a packet.

Native (in the driver) where the driver has it, else generic (in the stack, after the packet is made). One program per
device: whoever is there before us keeps its place, and we say who it is. Nothing runs before XDP.
Our program takes whole frames only (no `frags`): drivers refuse it on devices whose MTU is too large for that.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from netfence.dataplane import links, rtnl
from netfence.dataplane.failure import explain, why
from netfence.dataplane.hooks.chain import prog_name
from netfence.dataplane.hooks.tcx import detach, replace
from netfence.dataplane.rtnl import Rtnl
from netfence.errors import NetfenceError, PreconditionError

__all__ = ["MECHANISMS", "attach", "attached", "detach", "in_force", "replace"]

GENERIC, NATIVE = rtnl.XDP_SKB, rtnl.XDP_DRV
MECHANISMS = {NATIVE: "xdp-native", GENERIC: "xdp-generic"}
"""Tried in this order."""

_OTHERWISE = "or use --hook tc"
_REMEDIES = {
    errno.ERANGE: f"the MTU is too large for XDP: lower it at both ends (a veth takes some 3500 bytes), {_OTHERWISE}",
    errno.EINVAL: f"the driver refuses: see the kernel log; mostly a large MTU or LRO; change that, {_OTHERWISE}",
    errno.ENOSPC: f"it has fewer receive queues than its other end has send queues: see `ethtool -L`, {_OTHERWISE}",
    errno.ENOTCONN: f"its other end is gone: make the pair anew, {_OTHERWISE}",
    errno.EOPNOTSUPP: f"the device is not made for XDP; {_OTHERWISE[3:]}",
}


def attach(prog_fd: int, ifindex: int, name: str, pin: Path) -> str:
    """Attach a loaded XDP program and pin the link at `pin`; return which of MECHANISMS it is.

    `name` is the interface's, for messages. Raises NotFoundError (interface gone), ExistsError (pin taken),
    PermissionDeniedError, PreconditionError (somebody else's program is there, or the driver refuses). On failure
    nothing is attached.
    """
    what = f"attach xdp on {name}"
    modes = list(MECHANISMS)
    for mode in modes:
        try:
            link_fd = links.link_create_xdp(prog_fd, ifindex, mode)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP and mode != modes[-1]:
                continue
            raise _explain(what, ifindex, error) from error
        try:
            links.obj_pin(link_fd, pin)
        except OSError as error:
            raise explain(f"pin the xdp link of {name} at {pin}", error, "bpffs_dir must be on a bpf mount") from error
        finally:
            os.close(link_fd)  # without a pin this was the last reference, and the program is off again
        return MECHANISMS[mode]
    raise AssertionError("no way to attach XDP is known")


def attached(pin: Path, ifindex: int) -> bool:
    """Tell whether the pinned link is in force on this very device, as `tcx.attached` does."""
    return in_force(pin, ifindex) is not None


def in_force(pin: Path, ifindex: int) -> str | None:
    """Return which of MECHANISMS the pinned link is on this very device; None where it is not in force."""
    try:
        info = links.pinned_link_info(pin)
        if info is None or info.target != ifindex:
            return None
        with Rtnl() as netlink:
            modes = rtnl.get_xdp_modes(netlink, ifindex)
        return next((MECHANISMS[mode] for mode, there in modes.items() if there == info.prog_id), None)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise explain(f"read the link pinned at {pin}", error) from error


def _explain(what: str, ifindex: int, error: OSError) -> NetfenceError:
    """Make the error; the kernel's own words (extack) do not reach the callers of BPF_LINK_CREATE."""
    if error.errno in (errno.EBUSY, errno.EEXIST):
        try:
            with Rtnl() as netlink:
                there = rtnl.get_xdp_programs(netlink, ifindex)
        except OSError as second:
            return explain(what, second)
        if not there:
            return PreconditionError(f"{what}: a device on top of it has an XDP program; detach that, {_OTHERWISE}")
        told = ", ".join(f"{each} ({prog_name(each) or 'name not known'})" for each in there)
        return PreconditionError(f"{what}: it has XDP program {told}, and takes only one; detach that, {_OTHERWISE}")
    if error.errno in _REMEDIES:
        return PreconditionError(f"{what}: {why(error)}; {_REMEDIES[error.errno]}")
    return explain(what, error)
