"""What tests measured is told: of files that pytest itself wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TESTS = """
def test_quiet(): pass
def test_start(record_property):
    record_property("start_s", [0.5, 0.25])
    record_property("memory_kb", 90.5)
class TestOf:
    def test_packets(self, record_property, request):
        request.node.user_properties.append(("hook", "tcx"))
        record_property("packets", {"ALLOW_RULE": 3})
        assert False
"""


def test_each_test_that_measured_something_has_a_line(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    results = tmp_path / "host.xml"
    python = [sys.executable, "-m"]
    places = ["--rootdir", ".", "-c", str(ROOT / "pyproject.toml"), f"--junitxml={results}"]
    command = [*python, "pytest", "-p", "no:cacheprovider", *places, "test_some.py"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert made.returncode == 1, made.stdout
    command = [sys.executable, str(ROOT / "ci/measured.py"), str(results)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == [
        "test_some::test_start: start_s=[0.5, 0.25], memory_kb=90.5",
        "test_some.TestOf::test_packets: packets={'ALLOW_RULE': 3}",
    ]
