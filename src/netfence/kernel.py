"""The data plane as the daemon uses it: `DataPlane`, and what a restart needs of it.

Owns nothing of its own; it looks at what the kernel and `bpffs_dir` hold for all attachments together.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

from netfence.dataplane import links
from netfence.dataplane.config import Fixed
from netfence.dataplane.explain import Explainer, Judged
from netfence.dataplane.failure import explain
from netfence.dataplane.plane import DataPlane
from netfence.dataplane.slotword import SlotWord
from netfence.dataplane.target import InterfaceTarget
from netfence.policy.modes import DnsMode
from netfence.policy.policy import DnsPolicy, Policy

_ALL = (-1, -1, (1 << 64) - 1)  # idle, longest, now: at the end of time every lease is over


@dataclass(frozen=True, slots=True)
class Remembered:
    """What the kernel knows of an attachment that nobody else knows: all but its metadata and its names.

    `identity`: index of the interface or id of the cgroup, 0 if it is gone; `mechanism`: what fences it now; `since`:
    seconds since the epoch. Of names the policy allows none.
    """

    slot: int
    fixed: Fixed
    identity: int
    xdp: bool
    mechanism: str
    since: float
    policy: Policy


class Kernel(DataPlane):
    """See the module. Make one with `open`, as a `DataPlane`."""

    def judge_address(self, slot: int, address: bytes) -> Judged:
        """Tell what the kernel would do now with a connection to a packed address; changes nothing.

        Raises NetfenceError when its tables cannot be read.
        """
        try:
            return Explainer(self._loaded.maps, self._loaded.layout, self.clock).judge(slot, address)
        except OSError as error:
            raise explain("read the tables of the kernel", error) from error

    @property
    def build(self) -> str:
        """Return the build id of the programs and maps in use; see `loader`."""
        return self._loaded.build

    def pinned(self) -> set[str]:
        """Return the names of all attachments that have pins; after a restart those of the last daemon.

        A directory pins nothing: it notes that a qdisc is ours to remove, and older versions left it behind.
        """
        pins = (self._bpffs_dir / "links").glob("*-*")
        return {pin.name.rpartition("-")[0] for pin in pins if not pin.is_dir()}

    async def mechanism(self, target: InterfaceTarget, name: str) -> str:
        """Tell what fences an interface now: ``xdp-native`` or ``xdp-generic`` where XDP is in force, or TC's."""
        return await self._run(lambda: self._hooks.mechanism(target.ifindex, name))

    async def leases(self) -> dict[int, dict[bytes, float]]:
        """Return every lease: slot → packed address → expiry (monotonic seconds, past ones too)."""

        def work() -> dict[int, dict[bytes, float]]:
            expiry = self._leases.expiry
            found = self._leases.scan(*_ALL)
            return {slot: {one: expiry(slot, one) or 0.0 for one in addresses} for slot, addresses in found.items()}

        return await self._run(work)

    async def remembered(self) -> dict[str, Remembered]:
        """Return what the kernel knows of each pinned attachment, by name."""

        def work() -> dict[str, Remembered]:
            pinned, found = self.pinned(), {}
            for slot in range(1, self._loaded.layout.constants["SLOTS"]):
                fixed = self.config.read(slot)
                if fixed is not None and fixed.attachment in pinned:
                    found[fixed.attachment] = self._remember(slot, fixed)
            return found

        return await self._run(work)

    def _remember(self, slot: int, fixed: Fixed) -> Remembered:
        word = SlotWord.decode(self.config.word(slot), self._loaded.layout)
        names = DnsPolicy(mode=DnsMode.ALLOWLIST)
        policy = Policy(mode=word.mode, audit=word.audit, cidrs=self._rules.read(word.index), dns=names)
        directory = self._bpffs_dir / "links"
        since = min(pin.stat().st_mtime for pin in directory.glob(f"{fixed.attachment}-*"))
        xdp = (directory / f"{fixed.attachment}-xdp").exists()
        identity = self._identity(slot, fixed)
        mechanism = self._hooks.CGROUP if fixed.cgroup else self._hooks.mechanism(identity, fixed.attachment)
        return Remembered(slot, fixed, identity, xdp, mechanism, since, policy)

    def _identity(self, slot: int, fixed: Fixed) -> int:
        if fixed.cgroup or self.tc_mechanism == "tcx":
            hook = "egress" if fixed.cgroup else "main"
            info = links.pinned_link_info(self._bpffs_dir / "links" / f"{fixed.attachment}-{hook}")
            return info.target if info is not None else 0
        there = (index for index, _ in socket.if_nameindex())
        return next((index for index in there if self._interface_slot(index) == slot), 0)
