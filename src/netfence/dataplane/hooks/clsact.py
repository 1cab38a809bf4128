"""Attach to an interface through the clsact qdisc and a direct-action `bpf` filter (kernels before 6.6, or on request).

The filter stays when the daemon dies, but anyone's `tc qdisc del` removes it: `watch` reports that (HookGone) and the
daemon puts it back. Ours is known by handle and name; priority 1 wherever that is free or holds `bpf` filters, else the
lowest that is. Within one priority the kernel runs the newest filter first: who comes later stands before us, until
`move_ahead` (decision 0021). We pass with TC_ACT_UNSPEC (-1).

The qdisc may belong to others: it is removed only when we made it (`marker`, a directory on the bpffs: it lives exactly
as long as pins do) and no filter is left in it. One that others use when the attachment ends is theirs from then on
(`forget`): nobody would come back for it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from netfence.dataplane import links, rtnl
from netfence.dataplane.failure import explain
from netfence.dataplane.hooks.chain import Foreign, Side, before, prog_name
from netfence.dataplane.links import AttachType
from netfence.dataplane.rtnl import Rtnl
from netfence.errors import PreconditionError

MECHANISM = "clsact"
HANDLE = 0x6E66  # "nf": ours among the filters of one priority
_STAND_IN = HANDLE + 1  # ours as well, while the other moves
NAME = "netfence"

_TCMSG = struct.Struct("=BxxxiIII")  # family, ifindex, handle, parent, info (priority << 16 | protocol)
QDISC_PARENT = 0xFFFFFFF1  # TC_H_CLSACT
_QDISC_HANDLE = 0xFFFF0000
PARENT = {Side.INGRESS: 0xFFFFFFF2, Side.EGRESS: 0xFFFFFFF3}  # TC_H_CLSACT major, minors TC_H_MIN_{INGRESS,EGRESS}
_TCX_TYPE = {Side.INGRESS: AttachType.TCX_INGRESS, Side.EGRESS: AttachType.TCX_EGRESS}
_TCA_KIND, _TCA_OPTIONS, _TCA_CHAIN = 1, 2, 11
_BPF_FD, _BPF_NAME, _BPF_FLAGS, _BPF_FLAGS_GEN, _BPF_ID = 6, 7, 8, 9, 11
_FLAG_DIRECT_ACTION = 1  # TCA_BPF_FLAG_ACT_DIRECT
_FLAG_SKIP_HW = 1  # TCA_CLS_FLAGS_SKIP_HW: never offered to a NIC, whose idea of our maps would differ
_PROTOCOL_ALL = socket.htons(0x0003)  # ETH_P_ALL, in network order
_PRIORITY_MAX = 0xFFFF


@dataclass(frozen=True, slots=True)
class _Filter:
    priority: int
    protocol: int
    handle: int
    kind: str
    chain: int
    name: str
    prog_id: int

    @property
    def ours(self) -> bool:
        return self.kind == "bpf" and self.handle in (HANDLE, _STAND_IN) and self.name == NAME


def attach(prog_fd: int, ifindex: int, name: str, side: Side, marker: Path) -> None:
    """Attach a loaded SCHED_CLS program, or replace ours by it atomically when it is attached already.

    `name` is the interface's, for messages; `marker` is created when the qdisc had to be. Raises NotFoundError,
    PermissionDeniedError, PreconditionError (an `ingress` qdisc, a shared block). On failure all is as it was.
    """
    what = f"attach clsact {side} on {name}"
    made = False
    try:
        with Rtnl() as netlink:
            made = _ensure_qdisc(netlink, ifindex, name, side, what)
            try:
                if made:
                    marker.mkdir(mode=0o700, exist_ok=True)
                filters = _filters(netlink, ifindex, side)
                _put_filter(netlink, ifindex, side, _choose_priority(filters), prog_fd)
                for left in filters:
                    if left.ours and left.handle == _STAND_IN:  # of a daemon that was killed while it moved
                        _delete_filter(netlink, ifindex, side, left)
            except OSError:
                if made:
                    _remove_qdisc(netlink, ifindex, marker)
                raise
    except OSError as error:
        raise explain(what, error) from error


def move_ahead(prog_fd: int, ifindex: int, name: str, side: Side) -> None:
    """Put our filter, which is attached, in front of all that it can pass; every packet meets it, some twice.

    It cannot pass filters of other kinds that have a lower priority, nor tcx programs. Raises what `attach` raises.
    """
    try:
        with Rtnl() as netlink:
            filters = _filters(netlink, ifindex, side)
            priority = _choose_priority([found for found in filters if not found.ours])
            if not any(found.priority >= priority for found in _before_ours(filters)):
                return
            _put_filter(netlink, ifindex, side, priority, prog_fd, _STAND_IN)
            for found in filters:
                if found.ours and (found.handle, found.priority) != (_STAND_IN, priority):
                    _delete_filter(netlink, ifindex, side, found)
            _put_filter(netlink, ifindex, side, priority, prog_fd)
            for found in _filters(netlink, ifindex, side):
                if found.ours and found.handle == _STAND_IN:
                    _delete_filter(netlink, ifindex, side, found)
    except OSError as error:
        raise explain(f"move clsact {side} on {name} ahead", error) from error


def _before_ours(filters: list[_Filter]) -> list[_Filter]:
    chain = [found for found in filters if found.chain == 0]
    return chain[: next((at for at, found in enumerate(chain) if found.ours), len(chain))]


def detach(ifindex: int, side: Side, marker: Path) -> bool:
    """Remove our filter, and the qdisc when we made it and nobody uses it; False when our filter was not there."""
    try:
        with Rtnl() as netlink:
            ours = [found for found in _filters(netlink, ifindex, side) if found.ours]
            for found in ours:
                _delete_filter(netlink, ifindex, side, found)
            if marker.is_dir() and not any(_filters(netlink, ifindex, each) for each in Side):
                _remove_qdisc(netlink, ifindex, marker)
    except OSError as error:
        if error.errno == errno.ENODEV:
            forget(marker)
            return False
        raise explain(f"detach clsact {side} of interface {ifindex}", error) from error
    return bool(ours)


def forget(marker: Path) -> None:
    """Leave the qdisc to those who use it, at the end of an attachment; idempotent."""
    if marker.is_dir():  # a read-only bpffs refuses to remove what is not there, too
        marker.rmdir()


def attached(ifindex: int, side: Side) -> int | None:
    """Tell the program id of our filter on this side; None when it is not there."""
    try:
        with Rtnl() as netlink:
            return next((found.prog_id for found in _filters(netlink, ifindex, side) if found.ours), None)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise explain(f"read the clsact {side} filters of interface {ifindex}", error) from error


def in_front(ifindex: int, side: Side, prog_id: int) -> tuple[Foreign, ...]:
    """Name what sees packets before our filter (`prog_id`): tcx programs, lower priorities, newer filters of ours."""
    try:
        with Rtnl() as netlink:
            chain = [found for found in _filters(netlink, ifindex, side) if found.chain == 0]
    except OSError as error:
        raise explain(f"read the clsact {side} filters of interface {ifindex}", error) from error
    position = next((at for at, found in enumerate(chain) if found.ours and found.prog_id == prog_id), len(chain))
    filters = tuple(
        Foreign(
            f"{MECHANISM} prio {found.priority} handle {found.handle:#x}",
            found.prog_id,
            prog_name(found.prog_id) or found.name or found.kind if found.prog_id else found.kind,
        )
        for found in chain[:position]
    )
    try:
        return before(links.prog_query_tcx(ifindex, _TCX_TYPE[side]), 0, "tcx") + filters
    except OSError:  # before 6.6 there is no tcx
        return filters


def _ensure_qdisc(netlink: Rtnl, ifindex: int, name: str, side: Side, what: str) -> bool:
    """Make the clsact qdisc; False when it is there already."""
    payload = _TCMSG.pack(0, ifindex, _QDISC_HANDLE, QDISC_PARENT, 0) + rtnl.attribute(_TCA_KIND, b"clsact\0")
    try:
        netlink.request(rtnl.RTM_NEWQDISC, payload, rtnl.NLM_F_CREATE | rtnl.NLM_F_EXCL)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
    else:
        return True
    # An old `ingress` qdisc takes the same place and would accept an egress filter, but run it on ingress.
    if side is Side.EGRESS and _qdisc_kind(netlink, ifindex) != "clsact":
        raise PreconditionError(
            f"{what}: the interface has an `ingress` qdisc, which has no egress side; "
            f"`tc qdisc del dev {name} ingress`, then attach again"
        )
    return False


def _qdisc_kind(netlink: Rtnl, ifindex: int) -> str:
    # Without the echo flag the answer goes to the multicast group only (seen on 6.18).
    found = netlink.request(rtnl.RTM_GETQDISC, _TCMSG.pack(0, ifindex, 0, QDISC_PARENT, 0), rtnl.NLM_F_ECHO)
    return rtnl.text(rtnl.attributes(found[0].payload[_TCMSG.size :]).get(_TCA_KIND, b"")) if found else ""


def _remove_qdisc(netlink: Rtnl, ifindex: int, marker: Path) -> None:
    try:
        netlink.request(rtnl.RTM_DELQDISC, _TCMSG.pack(0, ifindex, _QDISC_HANDLE, QDISC_PARENT, 0))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINVAL):  # gone already, or replaced by another kind
            raise
    forget(marker)


def _choose_priority(filters: list[_Filter]) -> int:
    """Keep our priority; else the lowest that a bpf filter for all protocols may share or have."""
    taken: dict[int, bool] = {}
    for found in filters:
        if found.chain != 0:
            continue
        if found.ours:
            return found.priority
        shareable = found.kind == "bpf" and found.protocol == _PROTOCOL_ALL
        taken[found.priority] = taken.get(found.priority, True) and shareable
    for priority in range(1, _PRIORITY_MAX + 1):
        if taken.get(priority, True):
            return priority
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _put_filter(netlink: Rtnl, ifindex: int, side: Side, priority: int, prog_fd: int, handle: int = HANDLE) -> None:
    options = rtnl.nested(
        _TCA_OPTIONS,
        rtnl.attribute(_BPF_FD, struct.pack("=I", prog_fd)),
        rtnl.attribute(_BPF_NAME, NAME.encode() + b"\0"),
        rtnl.attribute(_BPF_FLAGS, struct.pack("=I", _FLAG_DIRECT_ACTION)),
        rtnl.attribute(_BPF_FLAGS_GEN, struct.pack("=I", _FLAG_SKIP_HW)),
    )
    head = _TCMSG.pack(0, ifindex, handle, PARENT[side], priority << 16 | _PROTOCOL_ALL)
    kind = rtnl.attribute(_TCA_KIND, b"bpf\0")
    netlink.request(rtnl.RTM_NEWTFILTER, head + kind + options, rtnl.NLM_F_CREATE)


def _delete_filter(netlink: Rtnl, ifindex: int, side: Side, found: _Filter) -> None:
    head = _TCMSG.pack(0, ifindex, found.handle, PARENT[side], found.priority << 16 | found.protocol)
    try:
        netlink.request(rtnl.RTM_DELTFILTER, head + rtnl.attribute(_TCA_KIND, b"bpf\0"))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def _filters(netlink: Rtnl, ifindex: int, side: Side) -> list[_Filter]:
    """Read the filters of one side in running order; none without a qdisc."""
    try:
        found = netlink.dump(rtnl.RTM_GETTFILTER, _TCMSG.pack(0, ifindex, 0, PARENT[side], 0))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return []
        raise
    parsed = [_parse_filter(message.payload) for message in found]
    return sorted((entry for entry in parsed if entry.handle), key=lambda entry: (entry.chain, entry.priority))


def _parse_filter(payload: bytes) -> _Filter:
    """Decode a RTM_NEWTFILTER; handle 0 is the head of a priority, not a filter."""
    _, _, handle, _, info = _TCMSG.unpack_from(payload)
    found = rtnl.attributes(payload[_TCMSG.size :])
    kind = rtnl.text(found.get(_TCA_KIND, b""))
    options = rtnl.attributes(found.get(_TCA_OPTIONS, b"")) if kind == "bpf" else {}
    return _Filter(
        priority=info >> 16,
        protocol=info & 0xFFFF,
        handle=handle,
        kind=kind,
        chain=_u32(found.get(_TCA_CHAIN)),
        name=rtnl.text(options.get(_BPF_NAME, b"")),
        prog_id=_u32(options.get(_BPF_ID)),
    )


def _u32(value: bytes | None) -> int:
    return int(struct.unpack("=I", value)[0]) if value else 0
