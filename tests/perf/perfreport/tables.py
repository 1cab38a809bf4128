"""The tables of a family: contestants side by side, or the sizes of one contestant."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from measure import differs, ratio
from perfreport import figures
from perfreport.model import Result
from perfreport.plots import AXES

Behind = dict[tuple[int, str], list[str]]
"""By the id of a result and a contestant of ours: the peers that are better."""


@dataclass(frozen=True)
class Cell:
    """What one contestant measured at one size; `note` relates it to the base, `behind` names peers that are better."""

    median: str
    spread: str
    note: str = ""
    significant: bool = True
    behind: str = ""


@dataclass(frozen=True)
class Row:
    """A benchmark, its sizes in words, and a cell per column, None where it was not measured."""

    name: str
    sizes: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Table:
    """Rows that have the same columns."""

    columns: tuple[str, ...]
    rows: list[Row]


def tables(results: list[Result], behind: Behind) -> list[Table]:
    """Lay out the results; where there is one contestant, the columns are the sizes of the first axis that varies."""
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    by_name: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for result in results:
        by_name[result.name, *result.series].append(result)
    for (name, *contestants), same in by_name.items():
        axis = next((axis for axis in AXES if len({result.sizes.get(axis) for result in same}) > 1), None)
        if len(contestants) > 1 or axis is None:
            found[tuple(contestants)] += [
                Row(name, figures.sizes(one.sizes), [_cell(one, who, behind) for who in contestants]) for one in same
            ]
        else:
            columns, rows = _along(axis, same, behind)
            found[columns] += rows
    return [Table(columns, rows) for columns, rows in found.items()]


def _along(axis: str, results: list[Result], behind: Behind) -> tuple[tuple[str, ...], list[Row]]:
    """Return the sizes of an axis, and a row for every combination of the other sizes."""
    rows: dict[str, dict[str, Cell]] = defaultdict(dict)
    for result in results:
        others = figures.sizes({name: value for name, value in result.sizes.items() if name != axis})
        (who,) = result.series
        rows[others][_column(axis, result)] = _cell(result, who, behind)
    columns = tuple(dict.fromkeys(_column(axis, result) for result in results))
    name = results[0].name
    return columns, [Row(name, others, [cells.get(column) for column in columns]) for others, cells in rows.items()]


def _column(axis: str, result: Result) -> str:
    return figures.sizes({axis: result.sizes.get(axis)})


def _cell(result: Result, who: str, behind: Behind) -> Cell:
    series = result.series[who]
    better = ", ".join(behind.get((id(result), who), []))
    cell = Cell(figures.with_unit(series), figures.middle_half(series), behind=better)
    if result.base is None or who == result.base:
        return cell
    to_base = ratio(series, result.series[result.base])
    return replace(cell, note=f"{figures.figure(to_base.median)} of {result.base}", significant=differs(to_base))
