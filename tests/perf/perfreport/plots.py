"""Plots of cost against the number of rules and of attachments, as SVG to stand inside the page.

matplotlib draws with stand-in colours, which become the page's CSS variables: a plot follows dark mode and print. Lines
differ by marker and dash too. To plot against another size, add it to AXES.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from measure import Series
from perfreport.figures import figure, short
from perfreport.model import LIMITS, Result, size_words

AXES = {"rules": "rules", "attachments": "attachments"}
LINES = 8
"""As many lines can be told apart in one plot: the page has so many colours, and there are so many markers."""
TITLE_WORDS = 3
"""So many words of the names that go into one plot are the same: verdict-tc-ipv4."""
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")
WIDE_RANGE = 10
"""From this factor between the least and the most on, the upright axis is logarithmic too."""
HALF_A_LINE = 26
"""With longer names, the legend has one column; longer than twice this they are broken."""
WIDTH, HEIGHT = 5.4, 3.5  # inches of 72 units
INK, FAINT = "#010203", "#010204"
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "netfence",  # the same figures give the same file
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Point:
    """What one size cost."""

    at: float
    series: Series


class _Line(NamedTuple):
    """What tells a line from others of its plot: the rest of the benchmark's name, other sizes, the contestant."""

    rest: str
    others: str
    who: str


@dataclass(frozen=True)
class Plot:
    """Lines over one axis; `lines` are points by ascending size, by name."""

    title: str
    axis: str
    unit: str
    lines: dict[str, list[Point]]

    @property
    def description(self) -> str:
        """What the plot says, for those who do not see it."""
        told = (
            f"{name}: " + ", ".join(f"{figure(point.series.median)} at {short(point.at)}" for point in points)
            for name, points in self.lines.items()
        )
        return f"{self.title}. " + "; ".join(told)


def plots(results: Sequence[Result]) -> list[Plot]:
    """Return a plot per benchmark, unit and axis that was measured at two sizes or more."""
    return [plot for axis in AXES for plot in _over(axis, results)]


def _over(axis: str, results: Sequence[Result]) -> Iterator[Plot]:
    groups: dict[tuple[str, str], dict[_Line, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        at = result.sizes.get(axis)
        if not isinstance(at, int | float) or isinstance(at, bool) or at <= 0:
            continue
        words = result.name.split("-")
        others = " ".join(size_words({name: value for name, value in result.sizes.items() if name != axis}))
        for who, series in result.series.items():
            if who not in LIMITS or result.base in LIMITS:  # else the others' values lie over it already
                line = _Line("-".join(words[TITLE_WORDS:]), others, who)
                groups["-".join(words[:TITLE_WORDS]), series.unit][line].append(Point(at, series))
    for (title, unit), found in groups.items():
        lines = {
            line: sorted(points, key=lambda point: point.at)
            for line, points in found.items()
            if len({point.at for point in points}) > 1
        }
        for told, part in _split(title, lines, _Line._fields[:-1]):
            yield Plot(f"{told}: {unit} by {AXES[axis]}", axis, unit, part)


def _split(
    title: str, lines: dict[_Line, list[Point]], parts: Sequence[str]
) -> Iterator[tuple[str, dict[str, list[Point]]]]:
    """Give what is too much for one plot a plot for each value of the first of `parts`, then of the next."""
    if len(lines) > LINES and parts:
        for value in dict.fromkeys(getattr(line, parts[0]) for line in lines):
            some = {line: points for line, points in lines.items() if getattr(line, parts[0]) == value}
            yield from _split(f"{title} {value}".rstrip(), some, parts[1:])
        return
    words = [[word for word in (line.rest, *line.others.split(), line.who) if word] for line in lines]
    shared = set.intersection(*map(set, words)) if len(words) > 1 else set()
    named = [
        (", ".join(word for word in of if word not in shared) or line.who, points)
        for of, (line, points) in zip(words, lines.items(), strict=True)
    ]
    for start in range(0, len(named), LINES):
        yield title, dict(named[start : start + LINES])


def svg(plot: Plot, number: int) -> str:
    """Draw a plot; `number` is its own on the page, so that no two share an id."""
    with mpl.rc_context(_SETTINGS):
        drawing = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = drawing.add_subplot()
        for place, (name, points) in enumerate(plot.lines.items()):
            _draw(axes, place, name, points)
        _scale(axes, plot)
        columns = 1 if max(map(len, plot.lines)) > HALF_A_LINE else 2
        drawing.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        file = io.StringIO()
        drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(file.getvalue(), plot, number)


def _draw(axes: Axes, place: int, name: str, points: list[Point]) -> None:
    at = [point.at for point in points]
    colour = _stand_in(place)
    spreads = [point.series.spread for point in points]
    axes.vlines(at, [low for low, _ in spreads], [high for _, high in spreads], colors=colour, linewidth=1)
    (line,) = axes.plot(
        at,
        [point.series.median for point in points],
        color=colour,
        marker=MARKERS[place],
        linestyle=DASHES[place % len(DASHES)],
        markersize=5,
        linewidth=1.5,
        label=textwrap.fill(name, 2 * HALF_A_LINE),
    )
    line.set_gid(f"line{place}")


def _scale(axes: Axes, plot: Plot) -> None:
    values = [point.series.median for points in plot.lines.values() for point in points]
    sizes = sorted({point.at for points in plot.lines.values() for point in points})
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if min(values) > 0 and max(values) / min(values) >= WIDE_RANGE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=min(0.0, *values))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.grid(axis="y", alpha=0.5, linewidth=0.5)
    axes.set_xlabel(AXES[plot.axis])
    axes.set_ylabel(plot.unit)


def _stand_in(place: int) -> str:
    return f"#0102{0x10 + place:02x}"


def _for_page(drawn: str, plot: Plot, number: int) -> str:
    """Make a document of its own part of the page: no prolog, no fixed size, ids of its own, the page's colours."""
    inner = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    inner = re.sub(r'\bid="', f'id="plot{number}-', inner)
    inner = re.sub(r'(url\(|href=")#', rf"\1#plot{number}-", inner)
    colours = {INK: "--ink", FAINT: "--faint"} | {_stand_in(place): f"--line{place}" for place in range(LINES)}
    for stand_in, variable in colours.items():
        inner = inner.replace(stand_in, f"var({variable})")
    label = html.escape(plot.description, quote=True)
    box = f"0 0 {WIDTH * 72:g} {HEIGHT * 72:g}"
    return f'<svg class="plot" role="img" aria-label="{label}" viewBox="{box}">{inner}'
