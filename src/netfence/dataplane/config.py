"""The `config` map, shared memory with the kernel: each slot's word that switches its policy, and the rest.

Owns `struct config`. The word is written in one aligned 8-byte store, so that a packet meets the old or the new policy,
never a mixture; everything else changes with an attach only, or (own addresses) may be read half-written without harm.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from netfence.dataplane.clock import Clock
from netfence.dataplane.layout import Layout
from netfence.dataplane.leases import kernel_address, packed_address
from netfence.dataplane.maps import Map

HANDSHAKE_IDLE_S = 60.0
"""How long an inbound connection that is not answered, or being closed, keeps its place."""


@dataclass(frozen=True, slots=True)
class Static:
    """What the kernel knows of an attachment beside its policy. Addresses packed, times in seconds."""

    dns_address: bytes
    dns_port: int
    l3: bool = False  # no Ethernet header
    cgroup: bool = False
    xdp: bool = False  # nf_xdp stands in front of nf_tc
    host_direction: bool = False
    daemon_cgroup: int = 0  # id; with host_direction
    allow_dhcp: bool = True
    replies: Literal["off", "host", "any"] = "host"
    allow_link_local: bool = False
    established_idle_s: float = 7200.0
    established_max_s: float = 86400.0
    dns_ports: tuple[int, int] = (11000, 15999)  # where DNS servers of attachments may listen, beside 53
    own_addresses: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Fixed:
    """What the kernel has of an attachment beside its policy, read back; enough to know it again without any state."""

    attachment: str
    dns_address: bytes
    dns_port: int
    cgroup: bool
    host_direction: bool


def network_port(port: int) -> int:
    """Return the number a native 16-bit field must hold for the port to lie there in network order."""
    return int(struct.unpack("=H", struct.pack("!H", port))[0])


class ConfigMap:
    """One `struct config` per slot."""

    def __init__(self, config: Map, layout: Layout, clock: Clock) -> None:
        self._memory = memoryview(config.memory())
        self._words = self._memory.cast("Q")
        self._size = layout.sizes["config"]
        self._stride = (self._size + 7) // 8 * 8
        self._clock = clock
        self._constants = layout.constants
        fields = layout.fields["config"]
        if fields["active"].offset % 8:
            message = "struct config: `active` is not aligned, so its store would not be atomic"
            raise ValueError(message)
        self._active = fields["active"].offset // 8
        self._own = fields["own"].offset
        self._own_count = fields["own_count"].offset
        self._static = layout.packer(
            "config",
            "established_idle",
            "established_max",
            "handshake_idle",
            "daemon_cgroup",
            "dns_address",
            "dns_port",
            "dns_port_low",
            "dns_port_high",
            "own_count",
            "flags",
            "own",
            "attachment",
        )
        self._fixed = layout.packer("config", "dns_address", "dns_port", "flags", "attachment")
        self._static_from = fields["established_idle"].offset
        self._flags = fields["flags"].offset
        # Those that a daemon before us watched, whatever became of it: nobody watches now.
        self._watched: frozenset[int] = frozenset(range(layout.constants["SLOTS"]))
        self.watch(())
        self.handshake_idle = clock.span(HANDSHAKE_IDLE_S)

    def word(self, slot: int) -> int:
        """Read the word that says which policy is in force."""
        return self._words[slot * self._stride // 8 + self._active]

    def switch(self, slot: int, word: int) -> None:
        """Write that word: one 8-byte store."""
        self._words[slot * self._stride // 8 + self._active] = word

    def write(self, slot: int, static: Static, attachment: str) -> None:
        """Write all but the word; `attachment` is the id."""
        bit = self._constants
        flags = (
            bit["FLAG_L3"] * static.l3
            | bit["FLAG_CGROUP"] * static.cgroup
            | bit["FLAG_HOST"] * static.host_direction
            | bit["FLAG_DHCP"] * static.allow_dhcp
            | bit["FLAG_LINK_LOCAL"] * static.allow_link_local
            | bit["FLAG_REPLIES"] * (static.replies != "off")
            | bit["FLAG_REPLIES_ANY"] * (static.replies == "any")
            | bit["FLAG_WATCH"] * (slot in self._watched)
        )
        own = self._own_bytes(static.own_addresses)
        at = slot * self._stride
        packed = self._static.pack(
            self._clock.span(static.established_idle_s),
            self._clock.span(static.established_max_s),
            self.handshake_idle,
            static.daemon_cgroup,
            kernel_address(static.dns_address),
            network_port(static.dns_port),
            *static.dns_ports,
            len(own) // 16,
            flags,
            own,
            attachment.encode(),
        )
        self._memory[at + self._static_from : at + self._size] = packed[self._static_from :]

    def read(self, slot: int) -> Fixed | None:
        """Read back what was written; None where nothing is."""
        at, bit = slot * self._stride, self._constants
        address, port, flags, attachment = self._fixed.unpack(self._memory[at : at + self._size])
        name = attachment.rstrip(b"\0").decode("ascii", "replace")
        if not name:
            return None
        cgroup, host = bool(flags & bit["FLAG_CGROUP"]), bool(flags & bit["FLAG_HOST"])
        return Fixed(name, packed_address(address), network_port(port), cgroup, host)

    def write_own(self, slot: int, addresses: Sequence[bytes]) -> None:
        """Replace the addresses neighbour discovery may ask of this interface; those beyond the limit are left out."""
        own = self._own_bytes(addresses)
        at = slot * self._stride
        self._memory[at + self._own : at + self._own + len(own)] = own
        self._memory[at + self._own_count : at + self._own_count + 2] = struct.pack("=H", len(own) // 16)

    def watch(self, slots: Collection[int]) -> None:
        """Have the kernel report the drops of these slots, and of no other."""
        wanted = frozenset(slots)
        changed, self._watched = wanted ^ self._watched, wanted
        bit = self._constants["FLAG_WATCH"]
        for slot in changed:
            at = slot * self._stride + self._flags
            flags = int.from_bytes(self._memory[at : at + 4], sys.byteorder)
            changed_flags = flags | bit if slot in wanted else flags & ~bit
            if changed_flags != flags:
                self._memory[at : at + 4] = changed_flags.to_bytes(4, sys.byteorder)

    def clear(self, slot: int) -> None:
        """Forget all but the word."""
        at = slot * self._stride
        self._memory[at + self._static_from : at + self._size] = bytes(self._size - self._static_from)

    def _own_bytes(self, addresses: Sequence[bytes]) -> bytes:
        return b"".join(kernel_address(address) for address in addresses[: self._constants["OWN_ADDRESSES"]])
