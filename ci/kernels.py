#!/usr/bin/env python3
"""The kernels that the tests run on: the list, the cache and what fills it.

    .venv/bin/python ci/kernels.py list            what is in the list and in the cache
    .venv/bin/python ci/kernels.py fetch [6.1 …]   fetch what is missing (default: all); --update: look for newer ones
    .venv/bin/python ci/kernels.py path 6.1        print the path of vmlinuz, fetched already

`load()` reads ci/kernels.toml, `ensure(kernel)` returns where a kernel lies, fetching it only if it is not there: no
network is needed once it is, and a run keeps its kernels until someone says `--update`. Exit status 3 and a message
that begins `infrastructure:` is what cannot be had, never a failed test.

kernellist.py has the list, kernelcache.py the cache and how it is laid out, debfetch.py gets packages through apt.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import rich.console
import rich.progress
import rich.table

from infrastructure import EXIT_STATUS, InfrastructureError
from kernelcache import Installed, cache_directory, cached, ensure
from kernellist import HOST, Kernel, load

__all__ = ["HOST", "Installed", "Kernel", "cache_directory", "cached", "ensure", "fetch_all", "load"]


def fetch_all(kernels: list[Kernel], *, update: bool = False) -> list[InfrastructureError]:
    """Fetch kernels at the same time, showing how far they are; return what went wrong."""
    terminal = rich.console.Console(stderr=True)
    bars = rich.progress.Progress(
        "Linux {task.fields[series]:5}", rich.progress.BarColumn(), "{task.description}",
        rich.progress.TimeElapsedColumn(), console=terminal, disable=not terminal.is_terminal,
    )  # fmt: skip

    def fetch(kernel: Kernel) -> InfrastructureError | None:
        task = bars.add_task("waiting", series=kernel.series, total=None)
        last = ""

        def report(what: str, fraction: float | None) -> None:
            nonlocal last
            bars.update(task, description=what, total=None if fraction is None else 1.0, completed=fraction or 0.0)
            if bars.disable and what != last:
                print(f"kernels: Linux {kernel.series}: {what}", file=sys.stderr, flush=True)
            last = what

        try:
            ensure(kernel, report, update=update)
        except InfrastructureError as error:
            report("not to be had", 0.0)
            return error
        return None

    with bars, ThreadPoolExecutor(max_workers=len(kernels)) as pool:
        return [error for error in pool.map(fetch, kernels) if error is not None]


def table(kernels: list[Kernel], cache: Path) -> rich.table.Table:
    """Make the table that `list` prints."""
    shown = rich.table.Table("series", "from", "in the cache", "lacks", "why")
    for kernel in kernels:
        found = None if kernel.is_host else cached(kernel, cache)
        here = os.uname().release if kernel.is_host else found.release if found else "no: ci/kernels.py fetch"
        shown.add_row(kernel.series, kernel.suite or "-", here, ", ".join(sorted(kernel.lacks)) or "-", kernel.why)
    return shown


def main() -> int:
    """Run as the docstring of the module says; return the exit status."""
    kernels = {kernel.series: kernel for kernel in load()}
    fetchable = [series for series in kernels if series != HOST]
    parser = argparse.ArgumentParser(description="The kernels that the tests run on.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show the list and what is in the cache")
    fetch = commands.add_parser("fetch", help="fetch kernels that are not in the cache")
    fetch.add_argument("series", nargs="*", help=f"of {', '.join(fetchable)}; default: all")
    fetch.add_argument("--update", action="store_true", help="replace them with newer ones; no VM may be running")
    commands.add_parser("path", help="print where a kernel's image is").add_argument("series", choices=fetchable)
    arguments = parser.parse_args()
    if arguments.command == "list":
        rich.console.Console().print(table(list(kernels.values()), cache_directory()))
        return 0
    if arguments.command == "path":
        found = cached(kernels[arguments.series], cache_directory())
        errors = [] if found else [InfrastructureError(f"Linux {arguments.series} is not in the cache; fetch it first")]
        if found:
            print(found.vmlinuz)
    else:
        unknown = sorted(set(arguments.series) - set(fetchable))
        if unknown:
            parser.error(f"no such kernel: {', '.join(unknown)}; there are {', '.join(fetchable)}")
        errors = fetch_all([kernels[series] for series in arguments.series or fetchable], update=arguments.update)
    for error in errors:
        print(error, file=sys.stderr)
    return EXIT_STATUS if errors else 0


if __name__ == "__main__":
    sys.exit(main())
