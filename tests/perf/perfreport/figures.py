"""How figures are written, the same on the terminal, in tables and beside plots."""

from __future__ import annotations

from collections.abc import Mapping

from measure import Series
from perfreport.model import SizeValue, size_words

POWERS = ((1_000_000, "M"), (1_000, "k"))


def figure(value: float) -> str:
    """Write three digits or more, and never an exponent: 0.963, 45.2, 219,600."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100 or value == round(value):
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.2g}"


def short(value: float) -> str:
    """Write a count for an axis: 10, 4k, 1M."""
    for power, letter in POWERS:
        if value >= power and value % (power / 10) == 0:
            return f"{value / power:g}{letter}"
    return f"{value:g}"


def with_unit(series: Series) -> str:
    """Write a median with its unit."""
    return f"{figure(series.median)} {series.unit}".rstrip()


def middle_half(series: Series) -> str:
    """Write both quartiles."""
    low, high = series.spread
    return f"{figure(low)}–{figure(high)}"


def sizes(of: Mapping[str, SizeValue]) -> str:
    """Write sizes as `rules 1,000, pick hot`."""
    return ", ".join(
        word.replace("=", " ", 1) for word in size_words({name: _size(value) for name, value in of.items()})
    )


def percent(change: float | None) -> str:
    """Write a change with its sign."""
    return "" if change is None else f"{change:+.1f} %"


def _size(value: SizeValue) -> SizeValue:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
