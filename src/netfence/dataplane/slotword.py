"""The word of a slot: one u64 that says which policy is in force and how; bits as in bpf/layout.h."""

from __future__ import annotations

from dataclasses import dataclass

from netfence.dataplane.layout import Layout
from netfence.policy.modes import Mode

UNSTORED = 1 << 63
"""The one bit that is ours alone, at which no program looks: at the other end of the word than those of layout.h."""


@dataclass(slots=True)
class SlotWord:
    """What the kernel's word of a slot says now; the default is a slot without a policy."""

    index: int = 0  # policy index; 0: no rules
    mode: Mode = Mode.BLOCK_ALL
    audit: bool = False
    start: bool = True
    rules4: bool = False
    rules6: bool = False
    leases: bool = False
    unstored: bool = False  # the policy is switched and not stored yet

    def encode(self, layout: Layout) -> int:
        """Return the word."""
        bit = layout.constants
        word = self.index | self.mode << bit["ACTIVE_MODE_SHIFT"] | UNSTORED * self.unstored
        word |= bit["ACTIVE_RULES4"] * self.rules4 | bit["ACTIVE_RULES6"] * self.rules6
        return word | (
            bit["ACTIVE_LEASES"] * self.leases | bit["ACTIVE_AUDIT"] * self.audit | bit["ACTIVE_START"] * self.start
        )

    @classmethod
    def decode(cls, word: int, layout: Layout) -> SlotWord:
        """Read a word found in the kernel; a mode that we do not know is read as block_all."""
        bit = layout.constants
        mode = word >> bit["ACTIVE_MODE_SHIFT"] & 0xFF
        return cls(
            index=word & 0xFFFF,
            mode=Mode(mode) if mode in set(Mode) else Mode.BLOCK_ALL,
            audit=bool(word & bit["ACTIVE_AUDIT"]),
            start=bool(word & bit["ACTIVE_START"]),
            rules4=bool(word & bit["ACTIVE_RULES4"]),
            rules6=bool(word & bit["ACTIVE_RULES6"]),
            leases=bool(word & bit["ACTIVE_LEASES"]),
            unstored=bool(word & UNSTORED),
        )
