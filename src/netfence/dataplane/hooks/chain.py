"""What all interface hooks share: the side of the device, and how a foreign program in front of us is told.

Side is named as the kernel names it, seen from the device. What a workload sends through its veth or tap *enters* the
host there (ingress); what leaves the host by a NIC is egress. `target.side_of` turns a direction into a side.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass

from netfence.dataplane import links


class Side(enum.StrEnum):
    """Which packets of a device a program sees, in the kernel's words."""

    INGRESS = "ingress"
    EGRESS = "egress"

    @property
    def opposite(self) -> Side:
        """The other side."""
        return Side.EGRESS if self is Side.INGRESS else Side.INGRESS


@dataclass(frozen=True, slots=True)
class Foreign:
    """A program or filter that sees packets before we do and may pass them around us."""

    where: str  # "tcx", "clsact prio 1 handle 0x1", "cgroup"
    prog_id: int  # 0: not a BPF program
    name: str  # the program's or filter kind's name, "" when it may not be asked

    def __str__(self) -> str:
        """Tell it for a log line: ``tcx: program 42 (cil_from_netdev)``."""
        what = f"program {self.prog_id}" if self.prog_id else "filter"
        return f"{self.where}: {what}" + (f" ({self.name})" if self.name else "")


def prog_name(prog_id: int) -> str:
    """Look up a program's name; "" when it is gone or we may not ask (needs CAP_SYS_ADMIN)."""
    try:
        prog_fd = links.prog_fd_by_id(prog_id)
    except OSError:
        return ""
    try:
        return links.prog_info(prog_fd).name
    finally:
        os.close(prog_fd)


def before(prog_ids: list[int], ours: int, where: str) -> tuple[Foreign, ...]:
    """Of programs in running order name those before ours; all of them when ours is not there."""
    position = prog_ids.index(ours) if ours in prog_ids else len(prog_ids)
    return tuple(Foreign(where, prog_id, prog_name(prog_id)) for prog_id in prog_ids[:position])
