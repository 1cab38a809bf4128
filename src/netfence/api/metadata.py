"""The check of an attachment's metadata against its bounds.

Metadata is opaque to us, but it is stored, sent to the control plane with every (re)connect, logged and printed: so it
is bounded, and may not move a terminal's cursor or forge a line.
"""

from __future__ import annotations

from collections.abc import Mapping

from netfence.policy.limits import MAX_METADATA_KEY_BYTES, MAX_METADATA_KEYS, MAX_METADATA_VALUE_BYTES

_SHOWN = 40
"""Characters of a bad key or value that a message repeats."""


def metadata_errors(metadata: Mapping[str, str]) -> list[str]:
    """Return every fault of `metadata`, in the order of its keys; empty if there is none."""
    errors = []
    if len(metadata) > MAX_METADATA_KEYS:
        errors.append(f"metadata has {len(metadata)} keys; at most {MAX_METADATA_KEYS} are allowed")
    for key, value in sorted(metadata.items()):
        what = f"metadata key {_shown(key)}"
        if not key:
            errors.append("metadata has an empty key; name it")
        elif len(key.encode()) > MAX_METADATA_KEY_BYTES:
            errors.append(f"{what} is {len(key.encode())} bytes long; at most {MAX_METADATA_KEY_BYTES} are allowed")
        elif not key.isprintable() or any(char in key for char in "=,"):
            errors.append(f'{what} has a character that is not allowed; use printable ones other than "=" and ","')
        if len(value.encode()) > MAX_METADATA_VALUE_BYTES:
            errors.append(
                f"{what}: its value is {len(value.encode())} bytes long; at most {MAX_METADATA_VALUE_BYTES} are allowed"
            )
        elif not value.isprintable():
            errors.append(f"{what}: its value {_shown(value)} has characters that cannot be printed; leave them out")
        if len(errors) > MAX_METADATA_KEYS:  # a flood of bad keys needs no longer answer
            break
    return errors


def _shown(text: str) -> str:
    return ascii(text[:_SHOWN]) + ("…" if len(text) > _SHOWN else "")
