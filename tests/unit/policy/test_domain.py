"""Domain rules: reading, and precedence against an oracle that compares label lists one rule at a time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netfence.errors import ExhaustedError
from netfence.policy import domain as domain_module
from netfence.policy.domain import DomainRule, DomainTable, RuleKind, kind_of, parse_domain

LONGEST_LABEL = "a" * 63
LONGEST_NAME = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])


def rule(text: str, *, allow: bool = True, below: bool = False) -> DomainRule:
    name, below_only = parse_domain(text)
    return DomainRule(name, kind_of(name, below_only=below_only, include_subdomains=below), allow)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("example.com", ("example.com", False), id="plain"),
        pytest.param("Example.COM.", ("example.com", False), id="case-and-dot"),
        pytest.param("*.example.com", ("example.com", True), id="below"),
        pytest.param("*.Example.com.", ("example.com", True), id="below-case-and-dot"),
        pytest.param("*", ("", True), id="all"),
        pytest.param("com", ("com", False), id="one-label"),
        pytest.param("_dmarc.example.com", ("_dmarc.example.com", False), id="underscore"),
        pytest.param("bücher.example", ("xn--bcher-kva.example", False), id="u-label"),
        pytest.param("*.BÜCHER.example", ("xn--bcher-kva.example", True), id="u-label-upper"),
        pytest.param(
            "bu\N{COMBINING DIAERESIS}cher.example", ("xn--bcher-kva.example", False), id="u-label-decomposed"
        ),
        pytest.param("_x.bücher.example", ("_x.xn--bcher-kva.example", False), id="u-label-beside-underscore"),
        pytest.param("faß.example", ("xn--fa-hia.example", False), id="idna2008-not-ss"),
        pytest.param("例え\N{IDEOGRAPHIC FULL STOP}jp", ("xn--r8jz45g.jp", False), id="ideographic-dot"),
        pytest.param("xn--bcher-kva.example", ("xn--bcher-kva.example", False), id="a-label"),
        pytest.param(LONGEST_LABEL, (LONGEST_LABEL, False), id="label-63"),
        pytest.param(LONGEST_NAME, (LONGEST_NAME, False), id="name-253"),
        pytest.param(LONGEST_NAME + ".", (LONGEST_NAME, False), id="name-253-and-dot"),
    ],
)
def test_parse_domain(text: str, expected: tuple[str, bool]) -> None:
    assert parse_domain(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("", "is empty", id="empty"),
        pytest.param(".", "is empty", id="root"),
        pytest.param("*.", "is empty", id="below-root"),
        pytest.param("example..com", "empty label", id="two-dots"),
        pytest.param(".example.com", "empty label", id="dot-first"),
        pytest.param("example.com..", "empty label", id="two-final-dots"),
        pytest.param("www.*.com", r"a \* may only", id="star-inside"),
        pytest.param("*example.com", r"a \* may only", id="star-in-label"),
        pytest.param("*.*.com", r"a \* may only", id="two-stars"),
        pytest.param("**", r"a \* may only", id="double-star"),
        pytest.param("example.*", r"a \* may only", id="star-last"),
        pytest.param("*.bücher.*", r"a \* may only", id="star-beside-u-label"),
        pytest.param("\N{FULLWIDTH ASTERISK}.bücher.example", r"a \* may only", id="star-by-mapping"),
        pytest.param("a" * 64 + ".com", "longer than 63", id="label-64"),
        pytest.param("a." + LONGEST_NAME, "longer than 253", id="name-255"),
        pytest.param("x" + LONGEST_NAME, "longer than 253", id="name-254"),
        pytest.param("ü" * 100_000, "longer than 253", id="u-label-huge"),
        pytest.param("ü" * 60 + ".com", "is not a domain", id="u-label-64-as-a-label"),
        pytest.param("exa mple.com", "only letters", id="space"),
        pytest.param("example.com\n", "only letters", id="newline"),
        pytest.param("exa\0mple.com", "only letters", id="nul"),
        pytest.param("http://example.com", "only letters", id="url"),
        pytest.param("example.com:443", "only letters", id="port"),
        pytest.param("a\\.b.com", "only letters", id="escape"),
        pytest.param("☃\N{ZERO WIDTH JOINER}.com", "is not a domain", id="idna-disallowed"),
        pytest.param("\ud800.com", "is not a domain", id="surrogate"),
        pytest.param("\N{RIGHT-TO-LEFT OVERRIDE}moc.elpmaxe", "is not a domain", id="bidi-control"),
    ],
)
def test_parse_domain_refuses(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_domain(text)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused_and_what_is_read_is_stable(text: str) -> None:
    try:
        name, below_only = parse_domain(text)
    except ValueError:
        return
    again = f"*.{name}" if below_only and name else name or "*"
    assert parse_domain(again) == (name, below_only)


# -- precedence -------------------------------------------------------------------------------------------------------

LABELS = st.sampled_from(["a", "b", "c"])
NAMES = st.lists(LABELS, max_size=4).map(".".join)
RULES = st.builds(
    lambda name, kind, allow: DomainRule(name, kind if name else RuleKind.SUBTREE, allow),
    NAMES, st.sampled_from(RuleKind), st.booleans(),
)  # fmt: skip


def oracle(rules: list[DomainRule], name: str) -> bool | None:
    """Judge by comparing lists of labels, rule by rule, and ranking those that match."""
    labels = [label for label in reversed(name.split(".")) if label]
    ranked = []
    for candidate in rules:
        own = [label for label in reversed(candidate.name.split(".")) if label]
        under = labels[: len(own)] == own
        matches = {
            RuleKind.EXACT: labels == own,
            RuleKind.SUBTREE: under,
            RuleKind.BELOW: under and len(labels) > len(own),
        }[candidate.kind]
        if matches:
            ranked.append((len(own), candidate.kind is RuleKind.EXACT, not candidate.allow))
    return not max(ranked)[2] if ranked else None


def verdict(table: DomainTable, name: str) -> bool | None:
    found = table.match(name)
    return None if found is None else found.allow


@given(st.lists(RULES, max_size=12), st.lists(NAMES, min_size=1, max_size=8))
def test_the_most_specific_rule_decides(rules: list[DomainRule], names: list[str]) -> None:
    table = DomainTable.build(rules)
    one_by_one = DomainTable()
    for each in rules:
        one_by_one = one_by_one.with_(each)
    assert one_by_one == table
    assert set(table.rules()) == set(rules)
    assert len(table) == len(one_by_one) == len(set(rules))
    for name in names:
        assert verdict(table, name) == verdict(one_by_one, name) == oracle(rules, name)
        found = table.match(name)
        assert found is None or found in rules


@given(st.lists(RULES, max_size=12), st.lists(st.tuples(NAMES, st.booleans()), max_size=4), NAMES)
def test_removing(rules: list[DomainRule], removals: list[tuple[str, bool]], name: str) -> None:
    table, left = DomainTable.build(rules), rules
    for removed, below_only in removals:
        kinds = {RuleKind.BELOW} if below_only and removed else {RuleKind.EXACT, RuleKind.SUBTREE}
        table = table.without(removed, below_only=below_only)
        left = [each for each in left if each.name != removed or each.kind not in kinds]
    assert set(table.rules()) == set(left)
    assert len(table) == len(set(left))
    assert verdict(table, name) == oracle(left, name)


PYPI = [rule("pypi.org"), rule("*.pypi.org"), rule("internal.pypi.org", allow=False)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pypi.org", True),
        ("files.pypi.org", True),
        ("a.b.pypi.org", True),
        ("internal.pypi.org", False),
        ("x.internal.pypi.org", True),
        ("notpypi.org", None),
        ("org", None),
        ("pypi.org.evil.example", None),
        ("", None),
    ],
)
def test_policy_file_example(name: str, expected: bool | None) -> None:
    assert verdict(DomainTable.build(PYPI), name) is expected


@pytest.mark.parametrize(
    ("rules", "name", "expected"),
    [
        pytest.param([rule("d"), rule("d", allow=False)], "d", False, id="equal-deny"),
        pytest.param([rule("d"), rule("d", allow=False, below=True)], "d", True, id="exact-over-subtree"),
        pytest.param([rule("d"), rule("d", allow=False, below=True)], "x.d", False, id="exact-does-not-reach-below"),
        pytest.param([rule("*.d"), rule("d", allow=False, below=True)], "x.d", False, id="below-and-subtree-deny"),
        pytest.param([rule("*.d"), rule("d", allow=False, below=True)], "d", False, id="below-is-not-the-name"),
        pytest.param([rule("x.d", below=True), rule("d", allow=False, below=True)], "y.x.d", True, id="more-labels"),
        pytest.param([rule("*"), rule("d", allow=False)], "d", False, id="all-is-least-specific"),
        pytest.param([rule("*")], "", True, id="all-matches-the-root"),
        pytest.param([rule("*"), rule("*", allow=False)], "d", False, id="all-equal-deny"),
        pytest.param([rule("d", below=True)], "xd", None, id="no-match-inside-a-label"),
    ],
)
def test_precedence(rules: list[DomainRule], name: str, expected: bool | None) -> None:
    for order in itertools.permutations(rules):
        assert verdict(DomainTable.build(order), name) is expected


def test_versions_do_not_change_one_another() -> None:
    old = DomainTable.build(PYPI)
    new = old.with_(rule("d")).without("pypi.org", below_only=False)
    assert verdict(old, "pypi.org") is True
    assert verdict(old, "d") is None
    assert verdict(new, "pypi.org") is None
    assert verdict(new, "d") is True


def test_removing_what_is_not_there_is_no_change() -> None:
    table = DomainTable.build(PYPI)
    assert table.without("d", below_only=False) is table
    assert table.without("internal.pypi.org", below_only=True) is table
    assert table.with_(PYPI[0]) is table


def test_a_long_name_costs_no_more_than_the_deepest_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A workload chooses the names; 127 labels must not mean 127 lookups."""
    table = DomainTable.build(PYPI)
    lookups = 0
    get = table._bits.get

    class Counting:
        def get(self, name: str) -> int | None:
            nonlocal lookups
            lookups += 1
            return get(name)

    monkeypatch.setattr(table, "_bits", Counting())
    assert verdict(table, ".".join(["a"] * 125 + ["pypi", "org"])) is True
    assert lookups <= 4


@pytest.mark.parametrize(
    ("made", "domain", "flag", "text", "line"),
    [
        (rule("d"), "d", False, "allow d", "allow_domain d 0"),
        (rule("d", below=True), "d", True, "allow d and below", "allow_domain d 1"),
        (rule("*.d", allow=False), "*.d", False, "deny *.d", "deny_domain *.d 0"),
        (rule("*.d", below=True), "*.d", False, "allow *.d", "allow_domain *.d 0"),
        (rule("*", below=True), "*", False, "allow *", "allow_domain * 0"),
    ],
)
def test_forms_of_a_rule(made: DomainRule, domain: str, flag: bool, text: str, line: str) -> None:
    assert (made.domain, made.include_subdomains, made.text, made.hash_line) == (domain, flag, text, line)
    assert rule(made.domain, allow=made.allow, below=made.include_subdomains) == made


def test_a_full_table_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain_module, "MAX_DOMAIN_RULES", 3)
    full = DomainTable.build(PYPI)
    assert full.with_(PYPI[1]) is full
    with pytest.raises(ExhaustedError, match="3 domain rules already"):
        full.with_(rule("d"))
    with pytest.raises(ExhaustedError, match="4 domain rules"):
        DomainTable.build([*PYPI, rule("d")])
    assert len(full.without("pypi.org", below_only=True).with_(rule("d"))) == 3
