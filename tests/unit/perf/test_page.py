"""report.html: one file that needs nothing else; escaped; for dark mode, paper, and those who do not see it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from tests.unit.perf.runs import result, run

from perfreport.gate import compare_runs
from perfreport.model import Run
from perfreport.page import page

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = '<script src="http://evil.example/x.js">&'


class Document(HTMLParser):
    """Checks that tags nest, and keeps what is asked about below."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def whole(factor: float = 1) -> Run:
    """Return a run of several families, with plots, peers, and what nobody has heard of."""
    return run(
        *(result("verdict-tc-ipv4-hit", {"netfence": 50 + rules / 1000}, rules=rules) for rules in (10, 1000, 100_000)),
        *(
            result("verdict-tc-ipv4-miss", {"netfence": 40 + rules / 1000}, rules=rules)
            for rules in (10, 1000, 100_000)
        ),
        result("path-udp", {"none": 100, "netfence": 90 / factor, "nft-hash": 95}, "packets/s", base="none", rules=10),
        *(result("memory-x", {"netfence": 60 + n}, "MB", attachments=n) for n in (1, 100)),
        result("attach-x", {"netfence": 5 * factor}, "ms"),
        result("zebra-x", {"netfence": 5}, "ms"),
    )


@pytest.fixture(scope="module")
def text() -> str:
    return page(whole(2), compare_runs(whole(), whole(2)))


@pytest.fixture(scope="module")
def document(text: str) -> Document:
    return Document(text)


def test_it_needs_no_network(text: str, document: Document) -> None:
    for _, attributes in document.tags:
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "action", "data", "poster", "srcset"}:
                assert (value or "").startswith("#")
    assert document.all("script") == document.all("link") == document.all("img") == []
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []


def test_links_and_references_lead_somewhere_and_ids_are_unique(text: str, document: Document) -> None:
    ids = [attributes["id"] for _, attributes in document.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="|url\()#([^")]+)', text)
    assert used
    assert set(used) <= set(ids)


def test_families_come_in_their_order_and_unknown_ones_last(document: Document) -> None:
    sections = [attributes["id"] for attributes in document.all("section")]
    assert sections == ["baseline", "peers", "verdict", "path", "attach", "memory", "zebra"]


def test_without_a_baseline_or_peers_there_is_no_such_section() -> None:
    document = Document(page(run(result("attach-x", {"netfence": 5}, "ms"))))
    assert [attributes["id"] for attributes in document.all("section")] == ["attach"]


def test_figures_stand_in_tables_with_their_units(document: Document) -> None:
    for words in ("150 ns", "100 packets/s", "0.450 of none", "10 ms", "rules 100,000"):
        assert words in document.text


def test_tables_have_headers_and_can_be_scrolled_by_keyboard(document: Document) -> None:
    assert all(attributes.get("scope") in {"col", "row"} for attributes in document.all("th"))
    regions = [attributes for attributes in document.all("div") if attributes.get("role") == "region"]
    assert len(regions) == len(document.all("table")) > 0
    assert all(region["tabindex"] == "0" and region["aria-label"] for region in regions)


def test_plots_say_in_words_what_they_show(document: Document) -> None:
    (rules, attachments) = [attributes["aria-label"] or "" for attributes in document.all("svg")]
    assert "hit: 50.0 at 10, 51 at 1k, 150 at 100k" in rules
    assert "61 at 1, 160 at 100" in attachments
    assert all(attributes["role"] == "img" for attributes in document.all("svg"))


def test_what_is_behind_or_worse_is_said_in_words(document: Document) -> None:
    assert "Behind a peer in 1 of" in document.text
    assert "behind nft-hash" in document.text
    assert "Regression." in document.text
    assert "+100.0 %" in document.text
    assert "not significant" in document.text


def test_dark_mode_paper_and_phones_are_provided_for(text: str) -> None:
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert 'name="viewport"' in text


def test_plots_take_their_colours_from_the_page(text: str) -> None:
    plot = text[text.index("<svg") : text.rindex("</svg>")]
    assert "var(--line0)" in plot
    assert "var(--ink)" in plot
    assert re.findall(r"#[0-9a-f]{6}\b", plot) == []
    defined = set(re.findall(r"(--\w+):", text))
    assert set(re.findall(r"var\((--\w+)\)", text)) <= defined


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("where", [0, 1, 2], ids=["light", "dark", "paper"])
def test_words_and_lines_stand_out_from_what_they_stand_on(text: str, where: int) -> None:
    """4.5 for text, 3 for lines (WCAG 2.2, 1.4.3 and 1.4.11); every other row of a table is a band."""
    roots = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    assert len(roots) == 3
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", roots[where]))
    assert {name for name in colours if name.startswith("line")} == {f"line{number}" for number in range(8)}
    wanted = {("paper", name): 3.0 for name in colours if name.startswith("line")}
    wanted |= {(on, name): 4.5 for on in ("paper", "band") for name in ("ink", "soft", "good", "bad", "link")}
    wanted |= {(on, "ink"): 4.5 for on in ("warn", "fine")}
    got = {(on, name): contrast(colours[on], colours[name]) for on, name in wanted}
    assert {pair: ratio for pair, ratio in got.items() if ratio < wanted[pair]} == {}


def test_smoke_sizes_are_warned_of() -> None:
    assert "not for quoting" in page(run(result("attach-x", {"netfence": 5}, "ms"), size="smoke"))
    assert "not for quoting" not in page(whole())


def test_names_from_data_are_escaped_everywhere() -> None:
    evil = [
        result(f"attach-x-y-{EVIL}", {f"netfence{EVIL}": 5 + n, "none": 4}, f"ms{EVIL}", rules=n, how=EVIL)
        for n in (10, 20)
    ]
    there = run(*evil, commit=EVIL, kernel=EVIL, cpu=EVIL, selection=["-k", EVIL])
    text = page(there, compare_runs(there, there))
    assert "<script" not in text.lower()
    document = Document(text)
    assert document.text.count(EVIL) > 10
