"""Which plots there are, and that each has a line per contestant and a point per size."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest
from tests.unit.perf.runs import result, run

from perfreport.plots import LINES, Plot, plots, svg

SIZES = (10, 1_000, 100_000)


def over_rules(
    name: str, *who: str, base: str | None = None, unit: str = "ns", **sizes: object
) -> list[dict[str, object]]:
    return [
        result(name, {one: 50.0 + place for place, one in enumerate(who)}, unit, base, rules=rules, **sizes)
        for rules in SIZES
    ]


def of(*results: list[dict[str, object]]) -> list[Plot]:
    return plots(run(*(one for several in results for one in several)).results)


def drawn(plot: Plot) -> ET.Element:
    """Draw and parse. xlink is bound where HTML would know it."""
    return ET.fromstring(svg(plot, 1).replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))


def test_a_plot_has_a_line_per_contestant_and_a_point_per_size() -> None:
    (plot,) = of(over_rules("path-udp-veth", "none", "netfence", "nft-hash", base="none", unit="pps"))
    assert list(plot.lines) == ["none", "netfence", "nft-hash"]
    assert [[point.at for point in points] for points in plot.lines.values()] == [[*SIZES]] * 3
    svg_element = drawn(plot)
    for place in range(3):
        (line,) = [one for one in svg_element.iter() if one.get("id") == f"plot1-line{place}"]
        assert len([one for one in line.iter() if one.tag.endswith("use")]) == len(SIZES)


def test_sizes_and_names_are_told() -> None:
    (plot,) = of(over_rules("path-udp-veth", "netfence", "nft-hash"))
    words = {(one.text or "").strip() for one in drawn(plot).iter()}
    assert {"10", "1k", "100k", "rules", "ns", "netfence", "nft-hash"} <= words


def test_names_that_begin_alike_share_a_plot() -> None:
    (plot,) = of(over_rules("verdict-tc-ipv4-hit", "netfence"), over_rules("verdict-tc-ipv4-miss", "netfence"))
    assert (plot.title, list(plot.lines)) == ("verdict-tc-ipv4: ns by rules", ["hit", "miss"])


def test_units_and_axes_do_not_mix() -> None:
    by_attachments = [result("dns-udp-rate", {"netfence": 5}, "qps", attachments=n) for n in (1, 100)]
    latency = [result("dns-udp-p50", {"netfence": 5}, "µs", attachments=n) for n in (1, 100)]
    titles = [plot.title for plot in of(by_attachments, latency, over_rules("dns-udp-match", "netfence"))]
    assert titles == [
        "dns-udp-match: ns by rules",
        "dns-udp-rate: qps by attachments",
        "dns-udp-p50: µs by attachments",
    ]


def test_other_sizes_make_other_lines() -> None:
    (plot,) = of(over_rules("bulk-a-b", "netfence", how="once"), over_rules("bulk-a-b", "netfence", how="twice"))
    assert list(plot.lines) == ["how=once", "how=twice"]


def test_too_many_lines_make_several_plots() -> None:
    several = of(*(over_rules(f"verdict-tc-ipv4-{state}", *"abcdef") for state in ("hit", "miss")))
    assert [(plot.title, list(plot.lines)) for plot in several] == [
        ("verdict-tc-ipv4 hit: ns by rules", list("abcdef")),
        ("verdict-tc-ipv4 miss: ns by rules", list("abcdef")),
    ]
    many = of(over_rules("path-udp-veth", *(f"contestant {n}" for n in range(2 * LINES))))
    assert [len(plot.lines) for plot in many] == [LINES, LINES]


def test_one_size_makes_no_plot_and_neither_does_what_is_no_number() -> None:
    assert of([result("bulk-x", {"netfence": 5}, rules=100)]) == []
    assert of([result("bulk-x", {"netfence": 5}, rules=rules) for rules in ("few", "many")]) == []


def test_an_empty_program_is_not_drawn_beside_what_lies_over_it() -> None:
    (plot,) = of(over_rules("verdict-tc-ipv4", "empty", "netfence"))
    assert list(plot.lines) == ["netfence"]


@pytest.mark.parametrize(("greatest", "zero"), [(5, True), (500, False)])
def test_a_wide_range_is_logarithmic_and_a_narrow_one_begins_at_zero(greatest: float, zero: bool) -> None:
    (plot,) = of([result("bulk-x", {"netfence": value}, rules=rules) for value, rules in ((1, 10), (greatest, 100))])
    words = {(one.text or "").strip() for one in drawn(plot).iter()}
    assert ("0" in words) is zero


def test_the_same_figures_give_the_same_file() -> None:
    (plot,) = of(over_rules("path-udp-veth", "netfence"))
    assert svg(plot, 1) == svg(plot, 1)
    ids = [set(re.findall(r'\bid="([^"]+)"', svg(plot, number))) for number in (1, 2)]
    assert not ids[0] & ids[1]
