"""The domain rules of a policy: which rule decides about a name (semantics.md 12 and 13).

Owns the text form of a rule and the matching. Names are lower-case ASCII A-labels without final dot, the root is "".
A name from the wire must be given so that a dot inside a label cannot pass for a separator: refuse such names before.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

import idna

from netfence.errors import ExhaustedError
from netfence.policy.limits import MAX_DOMAIN_RULES, MAX_DOMAIN_TEXT, MAX_LABEL, MAX_NAME
from netfence.policy.pmap import Builder, PersistentMap, empty_map
from netfence.policy.prefix import shown

# Letters, digits, hyphen (RFC 952, RFC 1123) and the underscore of service names (RFC 8552).
_NAME: Final = re.compile(r"(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}", re.ASCII)


class RuleKind(enum.IntEnum):
    """Which names a rule matches; the number is its bit in the table's store."""

    EXACT = 1
    """Only the name."""
    SUBTREE = 2
    """The name and everything below."""
    BELOW = 4
    """Everything below, at any depth, not the name itself: the text form `*.d`."""


class DomainRule(NamedTuple):
    """One rule. The rule `*` is SUBTREE of the root "", with which every name is below or equal."""

    name: str
    kind: RuleKind
    allow: bool

    @property
    def domain(self) -> str:
        """The name as the API and the policy file write it: `d`, `*.d` or `*`."""
        if not self.name:
            return "*"
        return f"*.{self.name}" if self.kind is RuleKind.BELOW else self.name

    @property
    def include_subdomains(self) -> bool:
        """The flag that goes with `domain`; a `*` says all by itself, so its flag is False."""
        return self.kind is RuleKind.SUBTREE and bool(self.name)

    @property
    def text(self) -> str:
        """The rule for humans: `deny *.d`, `allow d`, `allow d and below`."""
        return f"{'allow' if self.allow else 'deny'} {self.domain}{' and below' if self.include_subdomains else ''}"

    @property
    def hash_line(self) -> str:
        """The rule's line in the canonical text that `policy_hash` is made of (wire.md behaviour 7)."""
        return f"{'allow' if self.allow else 'deny'}_domain {self.domain} {int(self.include_subdomains)}"


def parse_domain(text: str) -> tuple[str, bool]:
    """Return (name, below_only) of a domain as written: `d` → (d, False), `*.d` → (d, True), `*` → ("", True).

    Case and one final dot do not matter; U-labels are converted (IDNA 2008 with the mapping of UTS 46). Raises
    ValueError with the reason.
    """
    if text == "*":
        return "", True
    below_only = text.startswith("*.")
    name = text[2:] if below_only else text
    if not name.isascii():
        name = _to_ascii(text, name)
    name = name.lower().removesuffix(".")
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise ValueError(f"{shown(text)} is not a domain: {_why_not_a_name(name)}")
    return name, below_only


def _to_ascii(text: str, name: str) -> str:
    """Convert the labels that are not ASCII to A-labels."""
    if len(name) > MAX_DOMAIN_TEXT:
        raise ValueError(f"{shown(text)} is not a domain: longer than {MAX_NAME} characters")
    try:
        mapped = idna.uts46_remap(name, std3_rules=False, transitional=False)
        return ".".join(label if label.isascii() else idna.alabel(label).decode("ascii") for label in mapped.split("."))
    except (idna.IDNAError, UnicodeError) as error:
        raise ValueError(f"{shown(text)} is not a domain: {error}") from None


def _why_not_a_name(name: str) -> str:
    if not name:
        return "the name is empty (for all names write *)"
    if len(name) > MAX_NAME:
        return f"longer than {MAX_NAME} characters"
    if "*" in name:
        return "a * may only stand alone or as the whole first label (*.example.com)"
    labels = name.split(".")
    if "" in labels:
        return "it has an empty label"
    if any(len(label) > MAX_LABEL for label in labels):
        return f"a label is longer than {MAX_LABEL} characters"
    return "only letters, digits, hyphens and underscores can be in a label"


def kind_of(name: str, *, below_only: bool, include_subdomains: bool) -> RuleKind:
    """Return the kind of a rule from what `parse_domain` said and the API's flag (which `*.d` and `*` do not need)."""
    if not name:
        return RuleKind.SUBTREE
    if below_only:
        return RuleKind.BELOW
    return RuleKind.SUBTREE if include_subdomains else RuleKind.EXACT


# A name's rules are one small integer: the allow kinds in the low three bits, the deny kinds above them.
_DENY_SHIFT: Final = 3
_KINDS: Final = (RuleKind.EXACT, RuleKind.SUBTREE, RuleKind.BELOW)
_EXACT_AND_SUBTREE: Final = (RuleKind.EXACT | RuleKind.SUBTREE) * (1 | 1 << _DENY_SHIFT)
_BELOW: Final = RuleKind.BELOW * (1 | 1 << _DENY_SHIFT)


def _bit(rule: DomainRule) -> int:
    return rule.kind if rule.allow else rule.kind << _DENY_SHIFT


def _decisions(*tiers: tuple[RuleKind, ...]) -> tuple[tuple[RuleKind, bool] | None, ...]:
    """Tabulate which rule decides, for every set of rules at a name; kinds of one tier are equal: deny wins."""
    table: list[tuple[RuleKind, bool] | None] = []
    for bits in range(1 << 2 * _DENY_SHIFT):
        found = None
        for tier in tiers:
            denied = [kind for kind in tier if bits & (kind << _DENY_SHIFT)]
            allowed = [kind for kind in tier if bits & kind]
            if denied or allowed:
                found = (denied or allowed)[0], not denied
                break
        table.append(found)
    return tuple(table)


_AT_NAME: Final = _decisions((RuleKind.EXACT,), (RuleKind.SUBTREE,))
# `d with below` and `*.d` are as specific as each other for a name below d, so between them too deny wins.
_AT_PARENT: Final = _decisions((RuleKind.SUBTREE, RuleKind.BELOW))


class DomainTable:
    """An immutable table of domain rules. `DomainTable()` is empty."""

    __slots__ = ("_bits", "_len", "_max_labels")

    def __init__(self, bits: PersistentMap[str, int] | None = None, length: int = 0, max_labels: int = 0) -> None:
        """Take over the store, its number of rules, and the most labels that a rule has (or more)."""
        self._bits: PersistentMap[str, int] = empty_map() if bits is None else bits
        self._len = length
        self._max_labels = max_labels  # what matching a hostile name of 127 labels can cost

    @classmethod
    def build(cls, rules: Iterable[DomainRule], *, expected: int = 0) -> DomainTable:
        """Make a table. `expected` is about how many there are (only for speed). ExhaustedError on too many."""
        builder: Builder[str, int] = Builder(expected)
        max_labels = 0
        for rule in rules:
            name = rule.name
            shard = builder.shard(name)
            shard[name] = shard.get(name, 0) | _bit(rule)
            if name.count(".") >= max_labels and name:
                max_labels = name.count(".") + 1
        bits = builder.build()
        length = sum(value.bit_count() for _, value in bits.pairs())
        if length > MAX_DOMAIN_RULES:
            raise ExhaustedError(f"{length} domain rules, and an attachment may have {MAX_DOMAIN_RULES}")
        return cls(bits, length, max_labels)

    def __len__(self) -> int:
        return self._len

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DomainTable):
            return NotImplemented
        return self._bits == other._bits

    __hash__ = None  # type: ignore[assignment]  # compared by content, too big to be a key

    def __repr__(self) -> str:
        return f"<DomainTable of {len(self)} rules>"

    def match(self, name: str) -> DomainRule | None:
        """Return the most specific rule that matches the name; None when none does.

        More labels win; at the same name exact over subtree; allow and deny equal: deny.
        """
        get = self._bits.get
        best = None
        best_name = ""
        bits = get("")
        if bits is not None:
            best = (_AT_PARENT if name else _AT_NAME)[bits]
        end = len(name)
        # From the root down, as deep as there are rules: a deeper match replaces a shallower one.
        for _ in range(self._max_labels):
            end = name.rfind(".", 0, end)
            if end < 0:
                bits = get(name) if name else None
                if bits is not None and _AT_NAME[bits] is not None:
                    best, best_name = _AT_NAME[bits], name
                break
            suffix = name[end + 1 :]
            bits = get(suffix)
            if bits is not None and _AT_PARENT[bits] is not None:
                best, best_name = _AT_PARENT[bits], suffix
        return None if best is None else DomainRule(best_name, best[0], best[1])

    def with_(self, rule: DomainRule) -> DomainTable:
        """Return the table with the rule added. ExhaustedError when the table is full."""
        old = self._bits.get(rule.name, 0) or 0
        new = old | _bit(rule)
        if new == old:
            return self
        if self._len >= MAX_DOMAIN_RULES:
            raise ExhaustedError(f"{rule.domain}: the attachment has {MAX_DOMAIN_RULES} domain rules already")
        labels = rule.name.count(".") + 1 if rule.name else 0
        return DomainTable(self._bits.changed({rule.name: new}), self._len + 1, max(self._max_labels, labels))

    def without(self, name: str, *, below_only: bool) -> DomainTable:
        """Return the table without the rules, in both lists, that this text names: itself when there are none.

        `d` (below_only False) means the exact and subtree rules of d, `*.d` the below rules, `*` ("", True) the rule
        for all names.
        """
        old = self._bits.get(name, 0) or 0
        new = old & ~(_BELOW if below_only and name else _EXACT_AND_SUBTREE)
        if new == old:
            return self
        changes: Mapping[str, int | None] = {name: new or None}
        return DomainTable(self._bits.changed(changes), self._len - (old ^ new).bit_count(), self._max_labels)

    def rules(self) -> Iterator[DomainRule]:
        """Yield every rule; order not defined."""
        for name, bits in self._bits.pairs():
            for kind in _KINDS:
                if bits & kind:
                    yield DomainRule(name, kind, allow=True)
                if bits & (kind << _DENY_SHIFT):
                    yield DomainRule(name, kind, allow=False)
