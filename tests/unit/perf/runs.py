"""Runs as the benchmarks would report them, made of numbers that a test chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from perfreport.model import Run

ROUNDS = 9


def rounds(median: float, spread: float = 0.02) -> list[float]:
    """Return values of nine rounds, evenly about a median, no two alike; the greatest is `spread` above the least."""
    return [median * (1 + spread * (number - ROUNDS // 2) / (ROUNDS - 1)) for number in range(ROUNDS)]


def result(
    name: str, series: Mapping[str, float | Sequence[float]], unit: str = "ns", base: str | None = None, **sizes: object
) -> dict[str, Any]:
    """Return one result of report.json; a number stands for rounds about it."""
    return {
        "name": name,
        "base": base,
        "sizes": sizes,
        "series": {
            who: {"unit": unit, "values": rounds(values) if isinstance(values, int | float) else list(values)}
            for who, values in series.items()
        },
    }


def run(*results: dict[str, Any], **changed: object) -> Run:
    """Return a run of these results on one and the same machine, unless told otherwise."""
    where = {"size": "full", "kernel": "6.18.0", "cpu": "Some CPU", "commit": "abc1234", "made": "2026-11-25T20:00:00"}
    return Run.model_validate({**where, "results": results, **changed})
