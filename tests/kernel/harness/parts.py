"""Deals the cases of tests that have many out to several runs, for where one run of all takes too long (emulation)."""

from __future__ import annotations

from typing import Any

import pytest

MANY_CASES = 4


def parted(items: list[pytest.Item], part: int, parts: int) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Divide tests into those of one of `parts` parts and the others.

    A test with many cases is shared out between the parts by the sum of its parameters' positions: each part has every
    value of every parameter, of two parameters' pairs its share, and all parts together have all cases. A test with few
    cases is in every part, and so are tests marked `everywhere`; but those marked `dealt`, which take long, are shared
    out one by one in each file.
    """
    cases: dict[str, list[pytest.Item]] = {}
    dealt: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("dealt"):
            dealt.setdefault(item.nodeid.partition("::")[0], []).append(item)
            continue
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    # The last part takes the first test: where fewer are left than there are parts, the oldest kernel, which is the
    # slowest, goes without.
    kept = {item for of_one_file in dealt.values() for item in of_one_file[parts - 1 - part :: parts]}
    for of_one_test in cases.values():
        known: dict[str, list[Any]] = {}
        for item in of_one_test:
            positions = []
            for name, value in item.callspec.params.items() if hasattr(item, "callspec") else ():
                values = known.setdefault(name, [])
                if value not in values:
                    values.append(value)
                positions.append(values.index(value))
            always = len(of_one_test) < MANY_CASES or item.get_closest_marker("everywhere")
            if always or sum(positions) % parts == part:
                kept.add(item)
    return [item for item in items if item in kept], [item for item in items if item not in kept]
