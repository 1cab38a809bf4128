"""Bounds of an attachment's metadata and the check against them.

Metadata is opaque to us, but it is stored, sent to the control plane with every (re)connect, logged and printed: so it
is bounded, and may not move a terminal's cursor or forge a line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

MAX_KEYS: Final = 64
"""Keys of one attachment: orchestrators label with a dozen."""

MAX_KEY_BYTES: Final = 63
"""Bytes of a key in UTF-8: a label's length in the orchestrators that people use."""

MAX_VALUE_BYTES: Final = 1024
"""Bytes of a value in UTF-8: with `MAX_KEYS` about 70 KB an attachment, so 2047 of them still fit one SyncRequest's
limit of `control_plane.max_message_size` several times in practice."""

_SHOWN = 40
"""Characters of a bad key or value that a message repeats."""


def metadata_errors(metadata: Mapping[str, str]) -> list[str]:
    """Return every fault of `metadata`, in the order of its keys; empty if there is none."""
    errors = []
    if len(metadata) > MAX_KEYS:
        errors.append(f"metadata has {len(metadata)} keys; at most {MAX_KEYS} are allowed")
    for key, value in sorted(metadata.items()):
        what = f"metadata key {_shown(key)}"
        if not key:
            errors.append("metadata has an empty key; name it")
        elif len(key.encode()) > MAX_KEY_BYTES:
            errors.append(f"{what} is {len(key.encode())} bytes long; at most {MAX_KEY_BYTES} are allowed")
        elif not key.isprintable() or any(char in key for char in "=,"):
            errors.append(f'{what} has a character that is not allowed; use printable ones other than "=" and ","')
        if len(value.encode()) > MAX_VALUE_BYTES:
            errors.append(
                f"{what}: its value is {len(value.encode())} bytes long; at most {MAX_VALUE_BYTES} are allowed"
            )
        elif not value.isprintable():
            errors.append(f"{what}: its value {_shown(value)} has characters that cannot be printed; leave them out")
        if len(errors) > MAX_KEYS:  # a flood of bad keys needs no longer answer
            break
    return errors


def _shown(text: str) -> str:
    return ascii(text[:_SHOWN]) + ("…" if len(text) > _SHOWN else "")
