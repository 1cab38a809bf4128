"""What the kernel's maps say of one slot, in words: the word, both tries of its policy, its leases.

Reads the maps by themselves, by the layout that the compile wrote, and nothing that the data plane remembers. Expiries
stay in the kernel's jiffies: `NEVER` for ever, 0 for "not in that list".
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Final, NamedTuple

from netfence.dataplane.clock import NEVER_JIFFIES
from netfence.dataplane.leases import packed_address
from netfence.dataplane.maps import Map
from netfence.dataplane.plane import DataPlane
from netfence.dataplane.rules import FENCE_INDEX
from netfence.dataplane.slotword import SlotWord
from netfence.policy.cidr import cidr_text

NEVER: Final = NEVER_JIFFIES
FAMILIES: Final = ("rules4", "rules6")


class Rule(NamedTuple):
    """One entry of a trie: expiries in both lists, and the prefix length to be passed over when both are over."""

    allow: int
    deny: int
    length: int

    def live(self, now: int) -> Rule | None:
        """Return what of it counts at `now` (jiffies); None: nothing."""
        allow, deny = (expiry if expiry > now else 0 for expiry in (self.allow, self.deny))
        return Rule(allow, deny, self.length) if allow or deny else None


class Slot(NamedTuple):
    """All that decides about a slot's packets. `rules` by CIDR, `leases` by address."""

    word: SlotWord
    rules: Mapping[str, Rule]
    leases: Mapping[str, int]

    def says(self, now: int) -> dict[str, object]:
        """Return what a packet at `now` (jiffies) can tell of it: no index, nothing over, nothing not looked up."""
        word = self.word
        looked_up = {cidr: rule for cidr, rule in self.rules.items() if (word.rules6 if ":" in cidr else word.rules4)}
        live = {cidr: rule.live(now) for cidr, rule in looked_up.items()}
        return {
            "mode": word.mode.name,
            "audit": word.audit,
            "start": word.start,
            "rules": {cidr: rule for cidr, rule in live.items() if rule is not None},
        }


def dump(plane: DataPlane, slot: int) -> Slot:
    """Read everything of a slot."""
    word = SlotWord.decode(plane.config.word(slot), plane._loaded.layout)
    return Slot(word, rules_of(plane, word.index), leases_of(plane, slot))


def rules_of(plane: DataPlane, index: int) -> dict[str, Rule]:
    """Read both tries under a policy index; one that was never used has none, nor has that of no policy."""
    if index == FENCE_INDEX:  # always empty, and replaced at any moment
        return {}
    value = plane._loaded.layout.packer("rule", "allow", "deny", "length")
    found: dict[str, Rule] = {}
    for family in FAMILIES:
        inner = plane._loaded.maps[family].inner(_word(index))
        if inner is not None:
            for key, raw in _items(inner):
                length = int.from_bytes(key[:4], sys.byteorder)
                cidr = cidr_text(key[4:] + bytes((length,)))
                assert cidr not in found, f"{cidr} is twice in {family}"
                found[cidr] = Rule(*value.unpack(raw))
    return found


def leases_of(plane: DataPlane, slot: int) -> dict[str, int]:
    """Read the slot's leases: address → expiry."""
    layout = plane._loaded.layout
    lease_key, lease = layout.packer("lease_key", "slot", "address"), layout.packer("lease", "expiry")
    found = {}
    for key, raw in _items(plane._loaded.maps["leases"]):
        owner, address = lease_key.unpack(key)
        if owner == slot:
            found[str(ip_address(packed_address(address)))] = lease.unpack(raw)[0]
    return found


def filled_indices(plane: DataPlane) -> set[int]:
    """Find the policy indices whose tries are not empty."""
    return {index for index in range(plane._loaded.layout.constants["POLICIES"]) if rules_of(plane, index)}


def _items(table: Map) -> list[tuple[bytes, bytes]]:
    found = []
    for key in table.keys():  # noqa: SIM118 - a Map is no dict
        value = table.lookup(key)
        assert value is not None, "nobody but the test changes the map"
        found.append((key, value))
    return found


def _word(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)
