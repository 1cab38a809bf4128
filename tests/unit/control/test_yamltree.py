"""YAML to a tree with lines: what is text stays text, what is doubtful is an error with its line."""

from __future__ import annotations

import time

import pytest

from netfence.control.yamltree import MAX_DEPTH, Map, Node, Scalar, Seq, parse
from netfence.errors import InvalidError


def plain(node: Node | None) -> object:
    """Return the tree without lines."""
    if isinstance(node, Seq):
        return [plain(item) for item in node.items]
    if isinstance(node, Map):
        return {key: plain(value) for key, (_, value) in node.items.items()}
    return None if node is None or node.null else node.text


def errors(data: bytes) -> tuple[str, ...]:
    with pytest.raises(InvalidError) as raised:
        parse(data, "f")
    return raised.value.errors


def test_scalars_are_the_text_of_the_file() -> None:
    tree = parse(b'a: on\nb: 0x10\nc: 1h\nd: "null"\ne:\nf: ~\ng: [1.10, 010, "x y"]\n', "f")
    assert plain(tree) == {
        "a": "on", "b": "0x10", "c": "1h", "d": "null", "e": None, "f": None, "g": ["1.10", "010", "x y"],
    }  # fmt: skip


def test_everything_knows_its_line() -> None:
    tree = parse(b"# comment\na:\n  - x\n  -\n    k: v\n", "f")
    assert isinstance(tree, Map)
    line, items = tree.items["a"]
    assert line == 2
    assert isinstance(items, Seq)
    assert [item.line for item in items.items] == [3, 5]


@pytest.mark.parametrize(
    "data", [b"", b"\n# only a comment\n", b"---\n", b"~\n"], ids=["", "comment", "marker", "null"]
)
def test_nothing_is_none(data: bytes) -> None:
    assert parse(data, "f") is None


def test_aliases_stand_for_what_they_name() -> None:
    assert plain(parse(b"a: &x [1, 2]\nb: *x\n", "f")) == {"a": ["1", "2"], "b": ["1", "2"]}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a: 1\nb: 2\na: 3\n", ("f:3: a: given twice (first in line 1); keep one",)),
        (b"a: [1\nb: 2\n", ("f:2: YAML: did not find expected ',' or ']'",)),
        (b"a: 1\n---\nb: 2\n", ("f:2: YAML: a second document begins here; keep one document per file",)),
        (b"a: &x [*x]\n", ("f:1: YAML: alias *x: no such anchor before this line",)),
        (b"? [1]\n: 2\n", ("f:1: YAML: a key must be text",)),
        (b"\xff\xfe\x00", ("f:1: YAML: not UTF-8 text, or control characters in it",)),
        (b"a: 1\na: 2\nb: [\n", ("f:2: a: given twice (first in line 1); keep one",)),
    ],
    ids=["twice", "syntax", "documents", "alias-in-itself", "key", "bytes", "all-that-was-found"],
)
def test_faults_name_their_line(data: bytes, expected: tuple[str, ...]) -> None:
    assert errors(data)[: len(expected)] == expected


def test_endless_nesting_is_refused_without_a_crash() -> None:
    (fault,) = errors(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1))
    assert fault == f"f:1: YAML: nested deeper than {MAX_DEPTH}"
    (fault,) = errors(b"[" * 100_000)
    # Since 6.0.4 the parser has a limit of its own and may be the first to complain.
    assert fault in (f"f:1: YAML: nested deeper than {MAX_DEPTH}", "f:1: YAML: exceeded maximum nesting depth")


def test_a_billion_laughs_cost_nothing() -> None:
    lines = [b"a0: &a0 [x, x]"] + [
        b"a%d: &a%d [%s]" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 14)
    ]
    began = time.monotonic()
    tree = parse(b"\n".join(lines), "f")
    assert time.monotonic() - began < 1
    assert isinstance(tree, Map)
    assert isinstance(tree.items["a13"][1], Seq)


def test_a_scalar_alone_is_a_tree() -> None:
    tree = parse(b"word", "f")
    assert isinstance(tree, Scalar)
    assert (tree.text, tree.plain, tree.line) == ("word", True, 1)
