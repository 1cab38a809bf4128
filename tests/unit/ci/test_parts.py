"""harness/parts.py on what pytest itself collects: all parts together are the whole, and each has a share of all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import harness

HOOKS, CASES = ["tc", "xdp", "cgroup"], [f"case{number}" for number in range(20)]
FILES = {
    "conftest.py": """
import os
from harness.parts import parted

def pytest_collection_modifyitems(config, items):
    items[:], left = parted(items, int(os.environ["PART"]), 4)
    config.hook.pytest_deselected(items=left)
""",
    "test_it.py": f"""
import pytest

@pytest.fixture
def hook(request):
    return request.param

@pytest.mark.parametrize("case", {CASES})
@pytest.mark.parametrize("hook", {HOOKS}, indirect=True)
def test_many(hook, case): ...

@pytest.mark.parametrize("how", [[1], dict(a=2)], ids=["one", "two"])
def test_few(how): ...

def test_one(): ...

@pytest.mark.parametrize("size", [pytest.param(0, marks=pytest.mark.everywhere), 1, 2, 3])
def test_sizes(size): ...

@pytest.mark.dealt
@pytest.mark.parametrize("how", [1, 2])
def test_dealt(how): ...

@pytest.mark.dealt
def test_dealt_too(): ...
""",
}


def collected(directory: Path, part: int) -> list[str]:
    for name, text in FILES.items():
        (directory / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "--rootdir=.", "."]
    path = str(Path(harness.__file__).parent.parent)
    env = {**os.environ, "PART": str(part), "PYTHONPATH": path}
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, check=True)
    return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]


def test_each_case_is_in_one_part_and_each_part_has_its_share_of_everything(tmp_path: Path) -> None:
    parts = [collected(tmp_path, part) for part in range(4)]
    few = {"test_few[one]", "test_few[two]", "test_one", "test_sizes[0]"}
    many = {f"test_sizes[{size}]" for size in (1, 2, 3)} | {
        f"test_many[{hook}-{case}]" for hook, case in product(HOOKS, CASES)
    }
    dealt = {"test_dealt[1]", "test_dealt[2]", "test_dealt_too"}
    assert Counter(name for part in parts for name in part) == Counter(
        {**dict.fromkeys(few, 4), **dict.fromkeys(many | dealt, 1)}
    )
    assert [sum(name in dealt for name in part) for part in parts] == [0, 1, 1, 1]
    for part in parts:
        by_hook = Counter(name.partition("[")[2].partition("-")[0] for name in part if name.startswith("test_many"))
        assert by_hook == dict.fromkeys(HOOKS, 5)
        assert len({name.partition("-")[2] for name in part if name.startswith("test_many")}) == 15
