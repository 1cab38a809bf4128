"""YAML text to a small tree that remembers lines, for error messages as ``file:line: key: why``.

Built from the parser's events instead of `yaml.compose`, so that a file of 100,000 CIDRs never holds the interpreter
lock for long, duplicate keys are seen, and nothing is guessed: every scalar stays text (``on`` and ``1h`` are what the
file says), only an unquoted empty value, ``~`` or ``null`` is Null. Aliases are followed; a document that contains
itself is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml

from netfence.errors import InvalidError

MAX_DEPTH = 16  # the deepest valid policy file has 6 levels

NULLS = frozenset({"", "~", "null", "Null", "NULL"})


@dataclass(slots=True)
class Scalar:
    """A text value; `plain` when unquoted. `line` counts from 1."""

    text: str
    plain: bool
    line: int

    @property
    def null(self) -> bool:
        """Tell whether the file says nothing here."""
        return self.plain and self.text in NULLS


@dataclass(slots=True)
class Seq:
    """A list."""

    line: int
    items: list[Node] = field(default_factory=list)


@dataclass(slots=True)
class Map:
    """A mapping; keys are unique text."""

    line: int
    items: dict[str, tuple[int, Node]] = field(default_factory=dict)  # key → (line of the key, value)


Node = Scalar | Seq | Map


def parse(data: bytes, name: str) -> Node | None:
    """Return the tree of one YAML document, None for an empty file. Raises InvalidError with every fault found."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    builder = _Builder(iter(yaml.parse(data, Loader=loader)), name)
    try:
        tree = builder.document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise InvalidError([*builder.errors, f"{name}:{line}: YAML: {error.problem or error.context}"]) from error
    except yaml.YAMLError as error:  # the reader's, which has no line
        raise InvalidError([*builder.errors, f"{name}:1: YAML: not UTF-8 text, or control characters in it"]) from error
    if builder.errors:
        raise InvalidError(builder.errors)
    return tree


class _Builder:
    def __init__(self, events: Iterator[yaml.Event], name: str) -> None:
        self._events = events
        self._name = name
        self._anchors: dict[str, Node] = {}
        self.errors: list[str] = []

    def document(self) -> Node | None:
        tree: Node | None = None
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self._error(event, "YAML", "a second document begins here; keep one document per file")
            elif isinstance(event, yaml.NodeEvent):
                node = self._node(event, depth=1)
                tree = tree or node
        return None if isinstance(tree, Scalar) and tree.null else tree

    def _node(self, event: yaml.Event, depth: int) -> Node:
        line = _line(event)
        node: Node
        if isinstance(event, yaml.AliasEvent):
            if (known := self._anchors.get(str(event.anchor))) is None:
                self._error(event, "YAML", f"alias *{event.anchor}: no such anchor before this line")
                return Scalar("", plain=True, line=line)
            return known
        if depth > MAX_DEPTH:
            raise InvalidError([*self.errors, f"{self._name}:{line}: YAML: nested deeper than {MAX_DEPTH}"])
        if isinstance(event, yaml.ScalarEvent):
            node = Scalar(event.value, plain=event.style is None or event.style == "", line=line)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = Seq(line)
            while not isinstance(item := next(self._events), yaml.SequenceEndEvent):
                node.items.append(self._node(item, depth + 1))
        else:
            node = self._mapping(line, depth)
        if anchor := getattr(event, "anchor", None):
            self._anchors[anchor] = node  # known only now: an alias inside itself is not found
        return node

    def _mapping(self, line: int, depth: int) -> Map:
        node = Map(line)
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._node(event, depth + 1)
            value = self._node(next(self._events), depth + 1)
            if not isinstance(key, Scalar):
                self._error(event, "YAML", "a key must be text")
            elif key.text in node.items:
                first = node.items[key.text][0]
                self._error(event, key.text, f"given twice (first in line {first}); keep one")
            else:
                node.items[key.text] = (_line(event), value)
        return node

    def _error(self, event: yaml.Event, key: str, message: str) -> None:
        self.errors.append(f"{self._name}:{_line(event)}: {key}: {message}")


def _line(event: yaml.Event) -> int:
    """Return the line an event begins in, counted from 1."""
    return event.start_mark.line + 1 if event.start_mark else 1
