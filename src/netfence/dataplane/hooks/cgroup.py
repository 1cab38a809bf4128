"""Attach to a cgroup (v2) through pinned links (kernel >= 5.7).

Links mean BPF_F_ALLOW_MULTI: programs of ancestors and descendants run beside ours, each may drop, none can pass what
another dropped; so being first matters only to `connect`/`sendmsg` programs, which may rewrite the address.
One call attaches one program, because the order counts: `connect4` first, then the slot is written into the cgroup
storage, then `cgroup_skb` (design.md, "Switching a policy"); at detach the slot is cleared before the links go.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from netfence.dataplane import links, probe
from netfence.dataplane.failure import explain
from netfence.dataplane.hooks.chain import Foreign, before
from netfence.dataplane.hooks.tcx import detach, replace
from netfence.dataplane.links import AttachType
from netfence.errors import PreconditionError

__all__ = ["ATTACH_TYPES", "MECHANISM", "attach", "attached", "detach", "in_front", "program", "replace"]

MECHANISM = "cgroup-link"

# The name of each hook, which is also its section name, and the attach type a program must be loaded with.
ATTACH_TYPES = {
    "connect4": AttachType.CGROUP_INET4_CONNECT,
    "connect6": AttachType.CGROUP_INET6_CONNECT,
    "sendmsg4": AttachType.CGROUP_UDP4_SENDMSG,
    "sendmsg6": AttachType.CGROUP_UDP6_SENDMSG,
    "egress": AttachType.CGROUP_INET_EGRESS,
    "ingress": AttachType.CGROUP_INET_INGRESS,
}


def attach(prog_fd: int, cgroup_fd: int, path: str, attach_type: AttachType, pin: Path) -> None:
    """Attach a loaded program to the cgroup and pin the link at `pin`; `path` is the cgroup's, for messages.

    Raises NotFoundError (cgroup removed), ExistsError (pin taken), PermissionDeniedError, PreconditionError (kernel
    before 5.7, or an ancestor forbids programs below it). On failure nothing is attached.
    """
    what = f"attach {_name(attach_type)} on cgroup {path}"
    try:
        link_fd = links.link_create_cgroup(prog_fd, cgroup_fd, attach_type)
    except OSError as error:
        if error.errno == errno.EPERM and not probe.missing_capabilities():
            raise PreconditionError(
                f"{what}: an ancestor cgroup holds a program that was attached without BPF_F_ALLOW_MULTI and forbids "
                "others below it; see `bpftool cgroup tree` and detach it"
            ) from error
        raise explain(what, error, "cgroup links need Linux 5.7") from error
    try:
        links.obj_pin(link_fd, pin)
    except OSError as error:
        tried = f"pin the {_name(attach_type)} link of cgroup {path} at {pin}"
        raise explain(tried, error, "bpffs_dir must be on a bpf mount") from error
    finally:
        os.close(link_fd)


def attached(pin: Path, cgroup_id: int) -> bool:
    """Tell whether the pinned link is in force on this very cgroup (False once it was removed)."""
    return program(pin, cgroup_id) != 0


def program(pin: Path, cgroup_id: int) -> int:
    """Return the id of the program that the pinned link runs on this very cgroup; 0 where it is not in force."""
    try:
        info = links.pinned_link_info(pin)
    except OSError as error:
        raise explain(f"read the link pinned at {pin}", error) from error
    return info.prog_id if info is not None and info.target == cgroup_id else 0


def in_front(cgroup_fd: int, attach_type: AttachType, prog_id: int) -> tuple[Foreign, ...]:
    """Name the programs that run before ours for this cgroup's own processes, inherited ones included."""
    try:
        chain = links.prog_query_cgroup(cgroup_fd, attach_type, effective=True)
    except OSError as error:
        raise explain(f"read the {_name(attach_type)} programs of a cgroup", error) from error
    return before(chain, prog_id, "cgroup")


def _name(attach_type: AttachType) -> str:
    return next(name for name, value in ATTACH_TYPES.items() if value == attach_type)
