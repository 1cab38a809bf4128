"""A data plane in a topology's host, driven directly: no daemon, no DNS server, no storage in between.

fence = Fence(topology, tmp_path)
attachment = fence.interface("veth0")
attachment.replace(Mode.ALLOWLIST, allow=["203.0.113.0/24"])
with attachment.counts(Reason.ALLOW_RULE, 3):
    assert topology.arrived(workload, packets.UDP4, "203.0.113.80") == 3

`counts` is exact in both directions: the named reason moved by the number sent, and nothing else moved.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import time
from collections.abc import Collection, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from harness import warm
from harness.cgroup import Cgroup
from harness.deadline import wait_for
from harness.topology import Topology
from netfence.config import Dns
from netfence.dataplane.cgroups import CgroupTarget, resolve_cgroup
from netfence.dataplane.plane import Counters, DataPlane, Static
from netfence.dataplane.target import Direction, InterfaceTarget, LinkLayer, host_addresses, resolve_interface
from netfence.policy.commands import AllowCidr, BulkUpdate, CidrSpec, Command, DenyCidr, RemoveCidr, SetMode, apply
from netfence.policy.modes import Mode, Reason
from netfence.policy.policy import EMPTY, Policy

OWN_DNS = ("198.51.100.254", 11000)
"""Where the (absent) DNS server of an attachment listens unless a test says otherwise; each next one a port higher."""

BACKGROUND = frozenset({Reason.ARP, Reason.NEIGHBOUR})
"""What namespaces send by themselves, and the harness as sentinel: counted against a test only where it names them."""

MAX_LEASES = Dns().max_leases_total  # as the daemon's: what one of them compiled, the other takes over

T = TypeVar("T")


def packed(address: str) -> bytes:
    """Turn text into the packed form that the data plane speaks, an IPv4-mapped address into IPv4."""
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).packed


def moved(before: Counters, after: Counters) -> dict[str, tuple[int, int]]:
    """Tell which counters moved, by how many packets and bytes; audited ones as ``would REASON``."""
    found = {}
    for reason in Reason:
        for word, packets, octets in (("", "packets", "bytes"), ("would ", "would_packets", "would_bytes")):
            delta = tuple(getattr(after, name)[reason] - getattr(before, name)[reason] for name in (packets, octets))
            if delta != (0, 0):
                found[word + reason.name] = (delta[0], delta[1])
    return found


@dataclass(eq=False)
class Attachment:
    """One fenced target: its policy, leases and counters."""

    fence: Fence
    slot: int
    name: str
    target: InterfaceTarget | CgroupTarget
    direction: Direction | None
    static: Static
    mechanism: str = ""
    policy: Policy | None = None
    attached: bool = field(default=True)

    def apply(self, *commands: Command) -> None:
        """Apply policy commands one after the other, each switched in when this returns."""
        for command in commands:
            self.switch(apply(self.policy or EMPTY, command, time.monotonic()))

    def switch(self, policy: Policy) -> None:
        """Switch to a policy made elsewhere."""
        self.fence.run(self.fence.plane.apply(self.slot, policy, self.policy))
        self.policy = policy

    def replace(
        self,
        mode: Mode,
        allow: Sequence[CidrSpec | str] = (),
        deny: Sequence[CidrSpec | str] = (),
        *,
        audit: bool = False,
    ) -> None:
        """Replace the whole policy, as one."""
        self.apply(BulkUpdate(mode=int(mode), allow_cidrs=allow, deny_cidrs=deny, audit=audit))

    def mode(self, mode: Mode) -> None:
        """Change the mode only."""
        self.apply(SetMode(int(mode)))

    def allow(self, cidr: str, ttl_s: float = 0.0) -> None:
        """Add to the allow list."""
        self.apply(AllowCidr(cidr, ttl_s))

    def deny(self, cidr: str, ttl_s: float = 0.0) -> None:
        """Add to the deny list."""
        self.apply(DenyCidr(cidr, ttl_s))

    def remove(self, cidr: str) -> None:
        """Remove a prefix from both lists."""
        self.apply(RemoveCidr(cidr))

    def lease(self, *addresses: str, ttl_s: float = 3600.0) -> float:
        """Open leases and return their expiry (monotonic seconds)."""
        expiry = time.monotonic() + ttl_s
        self.fence.plane.open_leases(self.slot, [packed(address) for address in addresses], expiry)
        return expiry

    def revoke(self, *addresses: str) -> None:
        """Close leases."""
        self.fence.plane.close_leases(self.slot, [packed(address) for address in addresses])

    def counters(self) -> Counters:
        """Read the counters."""
        return self.fence.plane.counters(self.slot)

    @contextlib.contextmanager
    def counts(
        self,
        reason: Reason,
        packets: int,
        octets: int | None = None,
        *,
        would: bool = False,
        besides: Collection[Reason] = (),
    ) -> Iterator[None]:
        """Assert that inside the block this reason counted so many packets (and bytes), and no other reason any.

        `would`: as audit mode counts. `besides`: reasons that may move too.
        """
        before = self.counters()
        yield
        found = moved(before, self.counters())
        name = ("would " if would else "") + reason.name
        for other in {*BACKGROUND, *besides} - {reason}:
            found.pop(other.name, None)
        seen = {key: count for key, (count, _) in found.items()}
        assert seen == ({name: packets} if packets else {}), f"moved: {found}"
        if octets is not None and packets:
            counted = found[name][1]
            assert counted == octets, f"bytes of {name}: {counted}, not {octets}"

    def detach(self) -> None:
        """Take the fence off; idempotent."""
        if self.attached:
            self.attached = False
            self.fence.take_off(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


class Fence:
    """A loaded data plane whose threads live in the topology's host. Close it before the topology."""

    def __init__(
        self, topology: Topology, directory: Path, *, tcx: bool | None = None, start_mode: Mode = Mode.BLOCK_ALL
    ) -> None:
        """Load into a bpffs of its own below `directory`; `tcx` as for `DataPlane.open`."""
        self.topology = topology
        self._numbers = itertools.count()
        self._attachments: list[Attachment] = []
        self._stack = contextlib.ExitStack()
        data_dir = directory / "data"
        mounted = self._stack.enter_context(warm.bpffs(directory / "bpffs", data_dir, MAX_LEASES))
        self._runner = self._stack.enter_context(asyncio.Runner())
        self.plane: DataPlane = self.run(
            DataPlane.open(mounted / warm.PINS, data_dir, start_mode, max_leases_total=MAX_LEASES, tcx=tcx)
        )

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the data plane; threads it starts are born in the topology's host."""
        with self.topology.host.inside():
            return self._runner.run(work)

    def interface(self, name: str, direction: Direction = Direction.WORKLOAD, **static: Any) -> Attachment:
        """Fence an interface of the host; keywords as for `Static`. Waits for the hook that notes connections too."""
        with self.topology.host.inside():
            target = resolve_interface(name)
        fixed = {
            "l3": target.layer is LinkLayer.L3,
            "host_direction": direction is Direction.HOST,
            "own_addresses": target.own_addresses,
        }
        return self._attach(target, direction, {**fixed, **static})

    def cgroup(self, group: Cgroup, **static: Any) -> Attachment:
        """Fence a cgroup; keywords as for `Static`."""
        return self._attach(resolve_cgroup(str(group.path)), None, {"cgroup": True, **static})

    def _attach(
        self, target: InterfaceTarget | CgroupTarget, direction: Direction | None, fixed: dict[str, Any]
    ) -> Attachment:
        slot = self.plane.allocate_slot()
        defaults = {"dns_address": packed(OWN_DNS[0]), "dns_port": OWN_DNS[1] + slot - 1}
        static = replace(Static(packed(OWN_DNS[0]), OWN_DNS[1]), **{**defaults, **fixed})
        with self.topology.host.inside():
            self.plane.set_host_addresses(host_addresses())  # the daemon does so whenever they change
        made = Attachment(self, slot, f"t{next(self._numbers)}", target, direction, static)
        try:
            made.mechanism = self.run(self.plane.attach(slot, target, static, direction, made.name))
        except BaseException:
            self.plane.free_slot(slot)
            raise
        self._attachments.append(made)
        self.settle()
        return made

    def settle(self) -> None:
        """Wait until what the data plane does in the background is done."""

        async def wait() -> None:
            while self.plane._tasks:
                await asyncio.wait(list(self.plane._tasks))

        self.run(wait())

    def take_off(self, attachment: Attachment) -> None:
        """Detach (called by `Attachment.detach`)."""
        self._attachments.remove(attachment)
        self.run(self.plane.detach(attachment.slot, attachment.target, attachment.name))
        self.plane.free_slot(attachment.slot)
        if isinstance(attachment.target, CgroupTarget):
            attachment.target.close()

    def wait_until(self, at: float) -> None:
        """Wait until the kernel's clock is past a monotonic time (seconds) for certain: two ticks more."""
        ticks_s = 2 / self.plane.clock.hz
        wait_for(lambda: time.monotonic() > at + ticks_s, "the kernel's clock")

    def close(self) -> None:
        """Detach everything; the programs stay loaded for the next."""
        for attachment in reversed(list(self._attachments)):
            attachment.detach()
        self.run(self.plane.close(detach=False))
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
