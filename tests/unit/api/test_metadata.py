"""The bounds of metadata, each at its limit and one beyond."""

from __future__ import annotations

import pytest

from netfence.api.metadata import metadata_errors
from netfence.policy.limits import MAX_METADATA_KEY_BYTES, MAX_METADATA_KEYS, MAX_METADATA_VALUE_BYTES

GOOD = {
    "none": {},
    "empty-value": {"a": ""},
    "most-keys": {f"k{n}": "" for n in range(MAX_METADATA_KEYS)},
    "longest": {"k" * MAX_METADATA_KEY_BYTES: "v" * MAX_METADATA_VALUE_BYTES},
    "longest-utf8": {"ü" * (MAX_METADATA_KEY_BYTES // 2): "ü" * (MAX_METADATA_VALUE_BYTES // 2)},
    "value-with-separators": {"a": "b=c,d"},
    "unicode": {"città": "東京 🐳"},
}


@pytest.mark.parametrize("metadata", GOOD.values(), ids=GOOD)
def test_good(metadata: dict[str, str]) -> None:
    assert metadata_errors(metadata) == []


BAD = {
    "too-many": ({f"k{n}": "" for n in range(MAX_METADATA_KEYS + 1)}, ["65 keys"]),
    "empty-key": ({"": "x"}, ["empty key"]),
    "long-key": ({"k" * (MAX_METADATA_KEY_BYTES + 1): ""}, ["64 bytes"]),
    "long-key-utf8": ({"ü" * (MAX_METADATA_KEY_BYTES // 2 + 1): ""}, ["64 bytes"]),
    "long-value": ({"a": "v" * (MAX_METADATA_VALUE_BYTES + 1)}, ["1025 bytes"]),
    "equals-in-key": ({"a=b": ""}, ["character that is not allowed"]),
    "comma-in-key": ({"a,b": ""}, ["character that is not allowed"]),
    "newline-in-key": ({"a\nb": ""}, ["'a\\nb'"]),
    "escape-in-value": ({"a": "\x1b[31m"}, ["'\\x1b[31m'"]),
    "bidi-in-value": ({"a": "\u202egnp"}, ["cannot be printed"]),
    "several": ({"": "\0", "=": "v" * 2000}, ["empty key", "cannot be printed", "not allowed", "2000 bytes"]),
}


@pytest.mark.parametrize(("metadata", "said"), BAD.values(), ids=BAD)
def test_bad(metadata: dict[str, str], said: list[str]) -> None:
    errors = metadata_errors(metadata)
    assert len(errors) == len(said)
    assert all(part in error for part, error in zip(said, errors, strict=True))
    assert all(error.isprintable() for error in errors)


def test_a_flood_of_faults_is_bounded() -> None:
    assert len(metadata_errors({f"={n}": "\0" for n in range(100_000)})) <= 2 * MAX_METADATA_KEYS
