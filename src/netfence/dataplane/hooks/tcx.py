"""Attach to an interface through a pinned tcx link (kernel >= 6.6).

Our program stands first in the chain (BPF_F_BEFORE) and passes with TCX_NEXT (-1), so that others behind us still run.
Whoever comes later with BPF_F_BEFORE stands before us; `move_ahead` passes them (decision 0021).
The link is pinned before `attach` returns: it outlives the daemon; an unpinned one would open the fence at a crash.
Attach and detach wait for RCU, about 16 ms each.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from netfence.dataplane import links
from netfence.dataplane.failure import explain
from netfence.dataplane.hooks.chain import Foreign, Side, before
from netfence.dataplane.hooks.standin import stand_ins
from netfence.dataplane.links import AttachType

MECHANISM = "tcx"
_ATTACH_TYPE = {Side.INGRESS: AttachType.TCX_INGRESS, Side.EGRESS: AttachType.TCX_EGRESS}


def attach(prog_fd: int, ifindex: int, name: str, side: Side, pin: Path) -> None:
    """Attach a loaded SCHED_CLS program in front of all others and pin the link at `pin`.

    `name` is the interface's, for messages. Raises NotFoundError (interface gone), ExistsError (pin taken),
    PermissionDeniedError, ExhaustedError (the chain is full: 63 programs), PreconditionError (kernel before 6.6). On
    failure nothing is attached.
    """
    try:
        link_fd = links.link_create_tcx(prog_fd, ifindex, _ATTACH_TYPE[side], before=True)
    except OSError as error:
        raise explain(f"attach tcx {side} on {name}", error, "tcx needs Linux 6.6") from error
    try:
        links.obj_pin(link_fd, pin)
    except OSError as error:
        raise explain(
            f"pin the tcx {side} link of {name} at {pin}", error, "bpffs_dir must be on a bpf mount"
        ) from error
    finally:
        os.close(link_fd)  # without a pin this was the last reference, and the program is off again


def replace(pin: Path, new_prog_fd: int) -> None:
    """Put another program into the pinned link between two packets; raises NotFoundError without such a link."""
    try:
        link_fd = links.obj_get(pin)
    except OSError as error:
        raise explain(f"open the link pinned at {pin}", error) from error
    try:
        links.link_update(link_fd, new_prog_fd)
    except OSError as error:
        raise explain(f"replace the program of the link pinned at {pin}", error) from error
    finally:
        os.close(link_fd)


def move_ahead(prog_fd: int, ifindex: int, name: str, side: Side, pin: Path, fresh: Path) -> None:
    """Put our attached program in front of all others again; every packet meets it meanwhile, some twice.

    `fresh` is where the new link is pinned before it takes the place of `pin`. A chain takes a program only once, and
    a link never moves: so stand-ins hold the new place and then the old one. On failure all is as it was; of a daemon
    that is killed in between both pins may be left, and what stands in for ours drops: whoever finds that (`attached`,
    another program than ours) detaches `fresh`, then replaces.
    """
    what = f"move tcx {side} on {name} ahead"
    try:
        with contextlib.ExitStack() as stack:
            first, last = stack.enter_context(stand_ins(prog_fd, 2))
            old = links.obj_get(pin)
            stack.callback(os.close, old)
            new = links.link_create_tcx(first, ifindex, _ATTACH_TYPE[side], before=True)
            stack.callback(os.close, new)
            links.link_update(old, last)
            try:
                links.link_update(new, prog_fd)
                links.obj_pin(new, fresh)
                fresh.rename(pin)
            except OSError:
                if fresh.exists():
                    fresh.unlink()
                links.link_detach(new)
                links.link_update(old, prog_fd)
                raise
            links.link_detach(old)
    except OSError as error:
        raise explain(what, error) from error


def detach(pin: Path) -> bool:
    """Detach and remove the pin, waiting until no packet meets the program; False when there was no pin."""
    try:
        return links.release_pin(pin)
    except OSError as error:
        raise explain(f"detach the link pinned at {pin}", error) from error


def attached(pin: Path, ifindex: int, side: Side) -> bool:
    """Tell whether the pinned link is in force on this very device; False once that is gone, index reused or not.

    A device that was moved to another namespace keeps its index, and another may have it here. The link tells no more
    than the index; the chain of the device that has it here tells whether our program is in it.
    """
    attach_type = _ATTACH_TYPE[side]
    try:
        info = links.pinned_link_info(pin)
        if info is None or (info.target, info.attach_type) != (ifindex, attach_type):
            return False
        return info.prog_id in links.prog_query_tcx(ifindex, attach_type)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return False
        raise explain(f"read the link pinned at {pin}", error) from error


def in_front(ifindex: int, side: Side, prog_id: int) -> tuple[Foreign, ...]:
    """Name the programs that run before ours (`prog_id`) on this side; all of the chain when ours is not in it."""
    try:
        chain = links.prog_query_tcx(ifindex, _ATTACH_TYPE[side])
    except OSError as error:
        raise explain(f"read the tcx {side} chain of interface {ifindex}", error, "tcx needs Linux 6.6") from error
    return before(chain, prog_id, MECHANISM)
