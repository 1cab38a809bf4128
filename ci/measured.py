"""What tests measured beside their verdict (`record_property`): packets, times, memory, out of pytest's JUnit files.

    python ci/measured.py build/junit-chosen/host.xml

Prints a line for each test that measured something, in the order they ran. What a test covers is no figure: the matrix
tells that (`matrix_results`).
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

COVERED = ("hook", "mode", "family")  # as tests/kernel/harness/covers.py


def figures(path: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield each test that measured something, and what: names and values as the test gave them."""
    for case in ET.parse(path).iter("testcase"):  # noqa: S314 - our own pytest's
        told = [(each.get("name", ""), each.get("value", "")) for each in case.iter("property")]
        measured = [(name, value) for name, value in told if name not in COVERED]
        if measured:
            where = case.get("classname", "").removeprefix("tests.kernel.")
            yield "::".join(filter(None, (where, case.get("name", "")))), measured


def main() -> None:
    """Print what the files named on the command line have."""
    for path in sys.argv[1:]:
        for test, measured in figures(Path(path)):
            print(f"{test}: {', '.join(f'{name}={value}' for name, value in measured)}")


if __name__ == "__main__":
    main()
