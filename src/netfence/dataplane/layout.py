"""What the compile child wrote down of bpf/layout.h: struct sizes, field offsets, NF_ constants.

Owns packing and unpacking of map keys and values. Refuses to restate any C struct: formats come from layout.json.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

_INTEGERS = {1: "B", 2: "H", 4: "I", 8: "Q"}


@dataclass(frozen=True, slots=True)
class Field:
    """One member of a C struct; `integer` is False for arrays and nested structs (packed as raw bytes)."""

    offset: int
    size: int
    integer: bool


@dataclass(frozen=True)
class Layout:
    """Sizes in bytes by struct name, fields by struct and name, constants by name without the NF_ prefix."""

    sizes: dict[str, int]
    fields: dict[str, dict[str, Field]]
    constants: dict[str, int]

    @classmethod
    def load(cls, path: Path) -> Layout:
        """Read layout.json; raises OSError, ValueError (the child writes it whole or not at all)."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls.from_json(raw)

    @classmethod
    def from_json(cls, raw: dict[str, dict[str, dict[str, object]]]) -> Layout:
        """Make it from the parsed JSON document."""
        structs = raw["structs"]
        sizes: dict[str, int] = {}
        fields: dict[str, dict[str, Field]] = {}
        for name, entry in structs.items():
            sizes[name] = int(str(entry["size"]))
            members = entry["fields"]
            if not isinstance(members, dict):
                message = f"layout of struct {name}: no fields"
                raise TypeError(message)
            fields[name] = {
                member: Field(int(at), int(size), bool(integer)) for member, (at, size, integer) in members.items()
            }
        constants = {name: int(str(value)) for name, value in raw["constants"].items()}
        return cls(sizes, fields, constants)

    def packer(self, name: str, *members: str) -> struct.Struct:
        """Return a native-endian Struct over exactly these members in offset order; the gaps are zeros.

        Integers pack as ints, arrays and nested structs as bytes.
        """
        chosen = [self.fields[name][member] for member in members]
        if chosen != sorted(chosen, key=lambda field: field.offset):
            message = f"members of struct {name} not in offset order: {members}"
            raise ValueError(message)
        text, at = "=", 0
        for field in chosen:
            text += f"{field.offset - at}x" + (_INTEGERS[field.size] if field.integer else f"{field.size}s")
            at = field.offset + field.size
        return struct.Struct(text + f"{self.sizes[name] - at}x")
