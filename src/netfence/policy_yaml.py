"""Policy files, written: lines of YAML in the format that `control.policyfile` reads, with comments.

Whatever text comes from outside (names that a workload asked for, metadata, paths) is written as a double-quoted scalar
in ASCII, in comments too: it can end neither a scalar nor a comment, whatever is in it.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from netfence.policy.domain import DomainRule

_PLAIN = frozenset(chr(code) for code in range(0x20, 0x7F)) - {'"', "\\"}


def quoted(text: str) -> str:
    """Return text as a double-quoted YAML scalar of printable ASCII (YAML 1.1 and 1.2 read it alike)."""
    return '"' + "".join(char if char in _PLAIN else f"\\U{ord(char):08x}" for char in text) + '"'


@dataclass(frozen=True, slots=True)
class Item:
    """An entry of a list of rules: its YAML, what to say of it, and whether it is only proposed, as a comment."""

    text: str
    note: str = ""
    proposed: bool = False


def cidr_item(cidr: str, ttl_s: float = math.inf, note: str = "", *, proposed: bool = False) -> Item:
    """Return the entry of a CIDR rule; `ttl_s` is written in whole seconds, rounded up."""
    if ttl_s == math.inf:
        return Item(quoted(cidr), note, proposed)
    return Item(f"{{cidr: {quoted(cidr)}, ttl: {math.ceil(ttl_s)}s}}", note, proposed)


def domain_item(rule: DomainRule, note: str = "", *, proposed: bool = False) -> Item:
    """Return the entry of a domain rule; whether it allows is said by the list that it is put into."""
    if not rule.include_subdomains:
        return Item(quoted(rule.domain), note, proposed)
    return Item(f"{{domain: {quoted(rule.domain)}, include_subdomains: true}}", note, proposed)


def items(key: str, entries: Iterable[Item], indent: int) -> Iterator[str]:
    """Yield the lines of a list, nothing for an empty one. Proposed entries come last, commented out."""
    ordered = sorted(entries, key=lambda item: item.proposed)
    margin = " " * indent
    if ordered:
        yield f"{margin}{key}:"
    for item in ordered:
        note = f"  # {item.note}" if item.note else ""
        yield f"{margin}  {'# ' if item.proposed else ''}- {item.text}{note}"


def match_lines(metadata: Mapping[str, str], interface: str | None, cgroup: str | None, indent: int) -> Iterator[str]:
    """Yield the lines of a `match` that holds for exactly these: globs in the names are escaped."""
    margin = " " * indent
    yield f"{margin}match:"
    if metadata:
        yield f"{margin}  metadata:"
        for key, value in sorted(metadata.items()):
            yield f"{margin}    {quoted(key)}: {quoted(value)}"
    for kind, name in (("interface", interface), ("cgroup", cgroup)):
        if name is not None:
            yield f"{margin}  {kind}: {quoted(glob.escape(name))}"
