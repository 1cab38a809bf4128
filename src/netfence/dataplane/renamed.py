"""Tells an interface that was renamed from another that has its index by now (semantics.md 23).

Hooks die with their device, so what carries one of an attachment's is the very device that was attached, whatever its
name. The other way round nothing follows: somebody may have taken them off. Everything here blocks.
"""

from __future__ import annotations

from pathlib import Path

from netfence.dataplane.hooking import INBOUND, MAIN, XDP
from netfence.dataplane.hooks import clsact, tcx, xdp
from netfence.dataplane.hooks.chain import Side


def carries(links_dir: Path, name: str, ifindex: int, tc_mechanism: str) -> bool:
    """Tell whether a hook of attachment `name` is in force on the device; pins are in `links_dir`.

    Raises what reading them raises (`netfence.errors`); a device or a pin that is not there is no error.
    """
    if xdp.attached(links_dir / f"{name}-{XDP}", ifindex):
        return True
    if tc_mechanism == clsact.MECHANISM:
        return any(clsact.attached(ifindex, side) is not None for side in Side)
    return any(tcx.attached(links_dir / f"{name}-{hook}", ifindex, side) for hook in (MAIN, INBOUND) for side in Side)
