"""How everything here is measured: contestants alternate, medians with spread and ratio, one JSON line per result.

Machines are shared and noisy, so only ratios taken in one run count (bench.md). `compare` runs A B A B … for a number
of rounds; `report` says "not significant" where the middle half of the per-round ratios holds 1. Lines go to the
terminal and to ``report.jsonl``; `perfreport` makes report.json and report.html of them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

FULL = os.environ.get("NETFENCE_PERF", "smoke") == "full"
ROUNDS = 9 if FULL else 7
SLOW_ROUNDS = 8 if FULL else 1
"""Of what takes seconds a round: the fewest with which one regression alone is seen among all that a run tests
(gate.py): eight that lie all apart from eight others are p = 1/12,870, and a run tests 350."""
ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "report.jsonl"
CPU = max(os.sched_getaffinity(0))
"""The CPU that everything measured is pinned to."""


@contextlib.contextmanager
def pin() -> Iterator[int]:
    """Pin this process, and what it starts, to one CPU until the block ends."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CPU})
    try:
        yield CPU
    finally:
        os.sched_setaffinity(0, before)


@dataclass
class Series:
    """What one contestant measured, a value per round."""

    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """Lower and upper quartile."""
        low, _, high = statistics.quantiles(self.values, n=4) if len(self.values) > 1 else [self.values[0]] * 3
        return low, high


def ratio(one: Series, base: Series) -> Series:
    """Divide round by round: a machine that gets slower half way slows both contestants of a round."""
    return Series("", [value / other for value, other in zip(one.values, base.values, strict=True)])


def differs(to_base: Series) -> bool:
    """Whether ratios are significantly not 1: their middle half does not hold it."""
    low, high = to_base.spread
    return not low <= 1 <= high


def compare(unit: str, contestants: Mapping[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, Series]:
    """Run the contestants in turn, `rounds` times each, after one unmeasured round."""
    series = {name: Series(unit) for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(rounds):
        for name, run in contestants.items():
            series[name].values.append(run())
    return series


def entries(series: Mapping[str, Series], base: str | None) -> dict[str, dict[str, object]]:
    """Return the series as JSON has them: every round's value, median, quartiles and, with a base, the ratio to it."""
    out: dict[str, dict[str, object]] = {}
    for who, values in series.items():
        out[who] = {**asdict(values), "median": values.median, "quartiles": list(values.spread)}
        if base is not None and who != base:
            to_base = ratio(values, series[base])
            out[who] |= {"ratio": to_base.median, "ratio_quartiles": list(to_base.spread)}
            out[who]["significant"] = differs(to_base)
    return out


def report(name: str, series: Mapping[str, Series], base: str | None = None, **sizes: object) -> None:
    """Print a line per contestant and append one JSON line; `base` names whom the ratios are to.

    Where `cpu_pinned` is among the sizes, this process must be pinned to that CPU.
    """
    if "cpu_pinned" in sizes:
        assert os.sched_getaffinity(0) == {sizes["cpu_pinned"]}, f"{name} is not pinned to CPU {sizes['cpu_pinned']}"
    line = {"name": name, **_where(), "base": base, "sizes": sizes, "series": entries(series, base)}
    told = []
    for who, values in series.items():
        low, high = values.spread
        text = f"{who} {values.median:.4g} {values.unit} ({low:.4g}–{high:.4g})"
        if base is not None and who != base:
            to_base = ratio(values, series[base])
            low, high = to_base.spread
            text += f", {to_base.median:.3f} ({low:.3f}–{high:.3f}) of {base}"
            text += "" if differs(to_base) else ", not significant"
        told.append(text)
    extra = " ".join(f"{key}={value}" for key, value in sizes.items())
    print(f"\n{name} {extra}: " + "; ".join(told))  # noqa: T201 - the report
    with REPORT.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@functools.cache
def _where() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "?")
    # As root in a tree of somebody else, git wants to be told that this is meant.
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    head = subprocess.run(
        [*git, "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=False
    )
    return {
        "size": "full" if FULL else "smoke",
        "kernel": platform.release(),
        "cpu": model,
        "commit": head.stdout.strip() or "?",
    }
