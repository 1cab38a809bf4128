"""`dns-*`: the DNS benchmark, `dns_bench.py`, which runs by itself in a namespace of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from measure import FULL, REPORT

BENCH = Path(__file__).with_name("dns_bench.py")


@pytest.mark.timeout(900)
def test_dns(tmp_path: Path) -> None:
    lines = tmp_path / "dns.jsonl"
    size = [] if FULL else ["--smoke"]
    subprocess.run([sys.executable, str(BENCH), *size, "--json", str(lines)], check=True)
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert written, "the benchmark measured nothing"
    with REPORT.open("a", encoding="utf-8") as report:
        report.writelines(json.dumps(line) + "\n" for line in written)
