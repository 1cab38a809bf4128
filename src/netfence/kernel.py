"""The data plane as the daemon uses it: `DataPlane`, and what a restart needs of it.

Owns nothing of its own; it looks at what the kernel and `bpffs_dir` hold for all attachments together.
"""

from __future__ import annotations

from netfence.dataplane.plane import DataPlane

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
