"""How one configuration value is read: text (of the file, the environment, a flag) or a ready value to the typed one.

Every function takes an object, returns the typed value and raises ValueError saying what is allowed; a caller adds key,
value and place. Values of the file are texts too: nothing is guessed from YAML's idea of `off` or `1:20`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from netfence.policy.domain import parse_domain
from netfence.policy.limits import (
    MAX_METADATA_KEY_BYTES,
    MAX_METADATA_KEYS,
    MAX_METADATA_VALUE_BYTES,
    MAX_TTL_S,
    MAX_UPSTREAMS,
)
from netfence.policy.prefix import address_text, bits_of, cidr_text, parse_address, parse_cidr
from netfence.policy.upstream import canonical_upstream

MAX_URLS: Final = 16
"""Control-plane addresses: each is tried before the first is tried again."""

MAX_SOCKET_PATH: Final = 107
"""Bytes of a unix socket's path (sun_path, unix(7))."""

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)", re.ASCII)
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_SIZE: Final = re.compile(r"(\d+)\s*(|B|KiB|MiB|GiB)", re.ASCII)
_BYTES: Final = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_TRUE: Final = frozenset({"true", "yes", "on", "1"})
_FALSE: Final = frozenset({"false", "no", "off", "0"})
_HOST: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})", re.ASCII)
_GROUP: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}", re.ASCII)


def _text(value: object) -> str:
    if isinstance(value, str | int | float | Path) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{'nothing' if value is None else type(value).__name__} is given where a text is wanted")


def duration(least_s: float, most_s: float = MAX_TTL_S) -> Callable[[object], float]:
    """Return the reader of a duration within bounds: `300`, `300s`, `5m`, `2h`, `1d`, in seconds."""

    def read(value: object) -> float:
        match = _DURATION.fullmatch(_text(value))
        seconds = float(match[1]) * _SECONDS[match[2]] if match else math.nan
        if not least_s <= seconds <= most_s:
            raise ValueError(f"allowed is a duration such as 300, 300s, 5m, 2h or 1d, from {least_s:g}s to {most_s:g}s")
        return seconds

    return read


def size(least: int, most: int) -> Callable[[object], int]:
    """Return the reader of a size in bytes within bounds: `4194304`, `64 MiB`."""

    def read(value: object) -> int:
        match = _SIZE.fullmatch(_text(value))
        count = int(match[1]) * _BYTES[match[2]] if match else -1
        if not least <= count <= most:
            raise ValueError(f"allowed is a size such as 512 KiB or 64 MiB, from {least} to {most} bytes")
        return count

    return read


def integer(least: int, most: int) -> Callable[[object], int]:
    """Return the reader of a decimal number within bounds."""

    def read(value: object) -> int:
        text = _text(value)
        if not (text.isascii() and text.isdigit() and len(text) <= 20 and least <= int(text) <= most):
            raise ValueError(f"allowed is a number from {least} to {most}")
        return int(text)

    return read


def choice(*allowed: str) -> Callable[[object], str]:
    """Return the reader of one of a few words."""

    def read(value: object) -> str:
        if value not in allowed:
            raise ValueError(f"allowed are {', '.join(allowed)}")
        return str(value)

    return read


def boolean(value: object) -> bool:
    """Read true or false."""
    if isinstance(value, bool):
        return value
    text = _text(value).lower()
    if text not in _TRUE | _FALSE:
        raise ValueError("allowed are true and false")
    return text in _TRUE


def absolute_path(value: object) -> Path:
    """Read an absolute path."""
    text = _text(value)
    if not text.startswith("/") or "\0" in text:
        raise ValueError("allowed is an absolute path")
    return Path(text)


def socket_path(value: object) -> Path:
    """Read the path of a unix socket."""
    path = absolute_path(value)
    if len(str(path).encode(errors="surrogateescape")) > MAX_SOCKET_PATH:
        raise ValueError(f"allowed is an absolute path of at most {MAX_SOCKET_PATH} bytes")
    return path


def group(value: object) -> str:
    """Read the name or number of a group; whether it exists is seen when it is used."""
    if not _GROUP.fullmatch(_text(value)):
        raise ValueError("allowed is the name or number of a group")
    return _text(value)


def identifier(value: object) -> str:
    """Read an id: printable, without spaces, at most 128 characters."""
    text = _text(value)
    if not 1 <= len(text) <= 128 or not text.isprintable() or " " in text:
        raise ValueError("allowed are 1 to 128 printable characters without spaces")
    return text


def optional(read: Callable[[object], object]) -> Callable[[object], object]:
    """Return the reader that also takes nothing (null, an empty variable)."""
    return lambda value: None if value is None else read(value)


def _items(value: object) -> list[object]:
    """Return the items of a list; a text is a list separated by commas, nothing is the empty list."""
    if value is None:
        return []
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")] if value.strip() else []
    if isinstance(value, list | tuple):
        return list(value)
    raise ValueError("allowed is a list")


def list_of(read: Callable[[object], str], most: int) -> Callable[[object], tuple[str, ...]]:
    """Return the reader of a list of at most so many; every bad item is told."""

    def read_all(value: object) -> tuple[str, ...]:
        items = _items(value)
        faults: list[str] = []
        result: list[str] = []
        if len(items) > most:
            faults.append(f"{len(items)} given, allowed are at most {most}")
        for item in items:
            try:
                result.append(read(item))
            except ValueError as fault:
                faults.append(f"item {item!r}: {fault}")
        if faults:
            raise ValueError("; ".join(faults))
        return tuple(result)

    return read_all


def cidr(value: object) -> str:
    """Read a CIDR; canonical."""
    return cidr_text(parse_cidr(_text(value)))


def domain(value: object) -> str:
    """Read a plain domain, without wildcard; an A-label name in lower case."""
    name, below_only = parse_domain(_text(value))
    if below_only:
        raise ValueError("allowed is a domain without *")
    return name


def upstreams(value: object) -> tuple[str, ...] | None:
    """Read the DNS upstreams; nothing means those of the system."""
    if value is None:
        return None
    found = list_of(lambda item: canonical_upstream(_text(item)), MAX_UPSTREAMS)(value)
    if not found:
        raise ValueError("allowed are 1 or more servers; leave the key out to use those of /etc/resolv.conf")
    return found


def metadata(value: object) -> dict[str, str]:
    """Read a map of texts: a mapping, or `key=value,key=value`. Its bounds are those of an attachment's metadata."""
    if isinstance(value, str) or value is None:
        pairs = [str(item).partition("=") for item in _items(value)]
        if any(not equals for _, equals, _ in pairs):
            raise ValueError("allowed is key=value,key=value or a mapping")
        found: Mapping[object, object] = {key.strip(): text.strip() for key, _, text in pairs}
    elif isinstance(value, Mapping):
        found = value
    else:
        raise ValueError("allowed is a mapping of texts")
    faults = [fault for key, text in found.items() for fault in _metadata_faults(key, text)]
    if len(found) > MAX_METADATA_KEYS:
        faults.append(f"{len(found)} keys, allowed are at most {MAX_METADATA_KEYS}")
    if faults:
        raise ValueError("; ".join(faults))
    return {_text(key): _text(text) for key, text in found.items()}


def _metadata_faults(key: object, text: object) -> list[str]:
    faults = []
    try:
        name = _text(key)
        if not 1 <= len(name.encode()) <= MAX_METADATA_KEY_BYTES or not name.isprintable() or set("=,") & set(name):
            faults.append(f"key {name!r}: allowed are 1 to {MAX_METADATA_KEY_BYTES} printable bytes but = and ,")
        content = _text(text)
        if len(content.encode()) > MAX_METADATA_VALUE_BYTES or not content.isprintable():
            faults.append(f"value of {name!r}: allowed are up to {MAX_METADATA_VALUE_BYTES} printable bytes")
    except ValueError as fault:  # not a text, or not UTF-8
        faults.append(f"key {key!r}: {fault}")
    return faults


def listen_addr(value: object) -> str:
    """Read where the DNS servers listen: an address, or a CIDR with two usable addresses or more; canonical."""
    text = _text(value)
    is_cidr = "/" in text
    key = parse_cidr(text) if is_cidr else parse_address(text) + b"\xff"
    address, host_bits = key[:-1], bits_of(len(key) - 1) - key[-1]
    if not any(address):
        raise ValueError("a wildcard; allowed is one address of this host that the workloads reach, or a CIDR")
    if len(address) == 4 and (address[0] == 0 or address[0] >= 224):
        raise ValueError("not an address of a host; allowed is an address that the workloads reach, or a CIDR")
    if len(address) == 16 and (address[0] == 0xFF or (address[0] == 0xFE and address[1] & 0xC0 == 0x80)):
        raise ValueError("multicast or link-local; allowed is an address that the workloads reach, or a CIDR")
    if not is_cidr:
        return address_text(address)
    if host_bits < 2:
        raise ValueError(
            f"allowed is a CIDR of /{bits_of(len(address)) - 2} or shorter (2 usable addresses), or one address alone"
        )
    return cidr_text(key)


def host_port(value: object) -> str:
    """Read `host:port`, IPv6 in brackets."""
    host, _, port = _text(value).rpartition(":")
    try:
        return f"{_host(host)}:{integer(1, 65_535)(port)}"
    except ValueError:
        raise ValueError("allowed is host:port, such as 127.0.0.1:9100 or [::1]:9100") from None


def _host(text: str) -> str:
    if text.startswith("[") and text.endswith("]") and ":" in text:
        return f"[{address_text(parse_address(text[1:-1]))}]"
    if not _HOST.fullmatch(text):
        raise ValueError("not a host")
    return text


def url(value: object) -> str:
    """Read the address of a control plane: `host:port` or `unix:/path`."""
    text = _text(value)
    if text.startswith("unix:/"):
        return f"unix:{socket_path(text[5:])}"
    if "://" in text:
        raise ValueError("allowed is host:port or unix:/path, without a scheme (TLS is what control_plane.tls.ca asks)")
    try:
        return host_port(text)
    except ValueError:
        raise ValueError("allowed is host:port (IPv6 in brackets) or unix:/path") from None
