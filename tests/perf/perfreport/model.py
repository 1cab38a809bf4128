"""The documents: report.jsonl as the benchmarks write it, report.json as it is kept and compared.

Everything that comes from a file is checked here, with pydantic; the rest of the package trusts it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from measure import Series, entries

SCHEMA = 1
LIMITS = ("none", "empty")
"""Contestants that do nothing: what nobody can be better than."""
PEERS = ("nft", "ipset", "iptables", "dnsmasq", "unbound", "loop", "kernel")
"""How the names of contestants that are neither ours nor a limit begin."""
NOT_SIZES = ("cpu_pinned",)
"""What is told with a result and does not make it another benchmark."""

SizeValue = str | int | float | bool | None


class BadReportError(Exception):
    """A report cannot be read, or two cannot be compared; the message says which and why."""


class Result(BaseModel):
    """One benchmark at one size: a series per contestant."""

    model_config = ConfigDict(frozen=True)

    name: Annotated[str, Field(min_length=1)]
    base: str | None
    sizes: dict[str, SizeValue]
    series: Annotated[dict[str, Series], Field(min_length=1)]

    @model_validator(mode="after")
    def _can_be_computed_with(self) -> Self:
        for who, one in self.series.items():
            if not one.values or not all(math.isfinite(value) for value in one.values):
                raise ValueError(f"{self.name}: {who} has no values or such as are no numbers")
        if self.base is not None and self.base not in self.series:
            raise ValueError(f"{self.name}: the base {self.base!r} is not among the contestants")
        return self

    @property
    def family(self) -> str:
        """The first word of the name: verdict, path and so on."""
        return self.name.partition("-")[0]

    @property
    def key(self) -> tuple[str, str]:
        """What makes two results the same benchmark at the same size, whatever the order of the sizes."""
        return self.name, " ".join(sorted(size_words(self.sizes)))

    def control(self, who: str) -> str | None:
        """Return the contestant to relate `who` to when runs are compared, None where there is none.

        Code that is not ours is the same in both runs and suffers from the same machine: what does nothing, else the
        base, else any peer.
        """
        others = [one for one in self.series if not is_ours(one)]
        first = sorted(others, key=lambda one: (one not in LIMITS, one != self.base))[:1]
        return next((one for one in first if one != who), None)


class Run(BaseModel):
    """All results of one run on one machine."""

    model_config = ConfigDict(frozen=True)

    size: Literal["full", "smoke"]
    kernel: str
    cpu: str
    commit: str
    made: str
    selection: list[str] = []  # what pytest was told to run: empty for all
    results: list[Result]

    def machine(self) -> tuple[str, str]:
        """Return what must be the same for absolute values to be comparable at all."""
        return self.cpu, self.kernel


class _Line(Result):
    """A line of report.jsonl: a result and where it was measured."""

    size: Literal["full", "smoke"]
    kernel: str
    cpu: str
    commit: str


def size_words(sizes: Mapping[str, SizeValue]) -> list[str]:
    """Return the sizes as `rules=10`, without what is no size."""
    return [f"{name}={value}" for name, value in sizes.items() if name not in NOT_SIZES]


def is_ours(who: str) -> bool:
    """Tell our contestants from limits and peers."""
    return who not in LIMITS and not who.startswith(PEERS)


def higher_is_better(unit: str) -> bool:
    """Rates are better high; times, sizes and counts are better low."""
    return unit.endswith("/s") or unit in {"pps", "qps"}


def read_lines(path: Path, selection: list[str] | None = None) -> Run:
    """Read report.jsonl; of a benchmark that ran twice, the later counts. Raises BadReportError."""
    lines = []
    for number, text in enumerate(_text(path).splitlines(), start=1):
        try:
            lines.append(_Line.model_validate_json(text))
        except ValidationError as error:
            raise BadReportError(f"{path} line {number}: {_first(error)}") from error
    if not lines:
        raise BadReportError(f"{path} is empty: nothing was measured")
    if len({(line.size, line.kernel, line.cpu) for line in lines}) > 1:
        raise BadReportError(f"{path} holds more than one run (sizes or machines differ): remove it and run again")
    last = lines[-1]
    made = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    return Run(
        **last.model_dump(include={"size", "kernel", "cpu", "commit"}),
        made=made,
        selection=selection or [],
        results=list({line.key: line for line in lines}.values()),
    )


def save(run: Run, path: Path) -> None:
    """Write report.json, readable by `load` and by whoever wants the figures."""
    path.write_text(json.dumps(document(run), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def document(run: Run) -> dict[str, Any]:
    """Return what report.json holds."""
    results = [
        {"name": one.name, "base": one.base, "sizes": one.sizes, "series": entries(one.series, one.base)}
        for one in run.results
    ]
    return {"schema": SCHEMA, **run.model_dump(exclude={"results"}), "results": results}


def load(path: Path) -> Run:
    """Read report.json. Raises BadReportError for a missing file, one that is not JSON, or another schema."""
    try:
        read = json.loads(_text(path))
    except ValueError as error:
        raise BadReportError(f"{path} is not JSON: {error}") from error
    if not isinstance(read, dict) or "schema" not in read:
        raise BadReportError(f"{path} is not a report of these benchmarks: it has no schema version")
    if read["schema"] != SCHEMA:
        raise BadReportError(
            f"{path} has schema {read['schema']!r}, this program reads {SCHEMA}: measure the base again"
        )
    try:
        return Run.model_validate(read)
    except ValidationError as error:
        raise BadReportError(f"{path} is not a report of these benchmarks: {_first(error)}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadReportError(f"cannot read {path}: {error}") from error


def _first(error: ValidationError) -> str:
    one = error.errors()[0]
    where = ".".join(str(part) for part in one["loc"])
    return f"{where}: {one['msg']}" if where else str(one["msg"])
