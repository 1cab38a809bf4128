"""The data plane as the daemon uses it: `DataPlane`, and what a restart and lost hooks need of it.

Owns nothing of its own; it looks at what the kernel and `bpffs_dir` hold for all attachments together.
"""

from __future__ import annotations

from netfence.dataplane.cgroups import CgroupTarget
from netfence.dataplane.plane import DataPlane, Target
from netfence.dataplane.target import Direction

_ALL = (-1, -1, (1 << 64) - 1)  # idle, longest, now: at the end of time every lease is over


class Kernel(DataPlane):
    """See the module. Make one with `open`, as a `DataPlane`."""

    def pinned(self) -> set[str]:
        """Return the names of all attachments that have pins; after a restart those of the last daemon."""
        return {pin.name.rpartition("-")[0] for pin in (self._bpffs_dir / "links").glob("*-*")}

    async def leases(self) -> dict[int, dict[bytes, float]]:
        """Return every lease: slot → packed address → expiry (monotonic seconds, past ones too)."""

        def work() -> dict[int, dict[bytes, float]]:
            expiry = self._leases.expiry
            found = self._leases.scan(*_ALL)
            return {slot: {one: expiry(slot, one) or 0.0 for one in addresses} for slot, addresses in found.items()}

        return await self._run(work)

    async def put_back(self, slot: int, target: Target, direction: Direction | None, name: str) -> bool:
        """Attach what somebody took away of a live attachment's hooks; False when something had to be put back."""
        if isinstance(target, CgroupTarget):
            whole = await self._run(lambda: self._hooks.cgroup_attached(target, name))
            if not whole:
                await self._run(lambda: self._attach_cgroup(slot, target, name))
            return whole
        side = direction or Direction.WORKLOAD
        whole = await self._run(lambda: self._hooks.interface_attached(target, side, name))
        if not whole:
            await self._run(lambda: self._hooks.attach_interface(target, side, name))
        return whole
