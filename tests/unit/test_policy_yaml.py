"""Policy files as they are written: whatever text comes in, YAML reads it back, and a comment stays one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from netfence.control.policyfile import parse_policy_file
from netfence.control.port import AttachmentView
from netfence.policy.domain import DomainRule, RuleKind
from netfence.policy_yaml import Item, cidr_item, domain_item, items, match_lines, quoted

HOSTILE = st.one_of(st.text(), st.text(alphabet="\n\r\x85\u2028\u2029\"'\\#:-{}[],&*!|>%@` \t\x00\x1ba"))


@given(HOSTILE)
def test_any_text_is_one_scalar_on_one_line(text: str) -> None:
    written = quoted(text)
    assert written.isascii()
    assert written.isprintable()
    assert yaml.safe_load(f"key: {written}  # {quoted(text)}\nnext: 1") == {"key": text, "next": 1}


@given(HOSTILE)
def test_a_comment_cannot_be_left(text: str) -> None:
    entries = [Item(quoted("a"), quoted(text)), Item(quoted(text), quoted(text), proposed=True)]
    lines = list(items("allow", entries, 2))
    assert len(lines) == 3
    assert yaml.safe_load("\n".join(lines)) == {"allow": ["a"]}


@given(st.dictionaries(st.text(min_size=1), st.text(), max_size=3), st.text(alphabet="ab*?[]!-\\\"'", min_size=1))
def test_a_match_holds_for_exactly_what_it_was_made_of(metadata: dict[str, str], name: str) -> None:
    entry = ["attachments:", "  -", *match_lines(metadata, name, None, 4), "    mode: denylist"]
    file = parse_policy_file("\n".join(entry).encode(), Path("p.yaml"))
    view = AttachmentView("id", name, "interface", metadata)
    assert file.decide(view) is file.rules[0]
    assert file.decide(AttachmentView("id", name + "x", "interface", metadata)) is not file.rules[0]
    assert file.decide(AttachmentView("id", "x" + name, "interface", metadata)) is not file.rules[0]


def test_entries() -> None:
    def read(item: Item) -> Any:
        return yaml.safe_load("\n".join(items("k", [item], 0)))["k"][0]

    assert read(cidr_item("10.0.0.0/8")) == "10.0.0.0/8"
    assert read(cidr_item("10.0.0.0/8", 59.2)) == {"cidr": "10.0.0.0/8", "ttl": "60s"}
    assert read(domain_item(DomainRule("a.test", RuleKind.EXACT, allow=True))) == "a.test"
    assert read(domain_item(DomainRule("a.test", RuleKind.BELOW, allow=True))) == "*.a.test"
    assert read(domain_item(DomainRule("", RuleKind.SUBTREE, allow=True))) == "*"
    subtree = {"domain": "a.test", "include_subdomains": True}
    assert read(domain_item(DomainRule("a.test", RuleKind.SUBTREE, allow=True))) == subtree
    assert list(items("k", [], 0)) == []
