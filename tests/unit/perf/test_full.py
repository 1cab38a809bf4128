"""What `nox -s perf` measures, and against whom: the sizes, contestants and rounds of bench.md and the README.

Sizes are chosen when the benchmarks are imported, so that those of a full run are asked of another process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bulk_bench
import dns_bench
import path_bench
import verdict_bench

ROOT = Path(__file__).resolve().parents[3]
PERF = ROOT / "tests/perf"
LEAST_ROUNDS = 8  # bench.md wants 7; with fewer than 8 one regression alone is not seen (README)
VERDICT_RULES = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
IDS = {
    *(f"test_verdict.py::test_rules[ipv{family}-{rules}]" for family in (4, 6) for rules in VERDICT_RULES),
    *(f"test_verdict.py::test_attachments[{attachments}]" for attachments in (1, 10, 100, 1_000)),
    *(f"test_path.py::test_udp[{rules}]" for rules in (10, 10_000, 100_000)),
    *(f"test_path.py::test_tcp[{rules}]" for rules in (10, 100_000)),
    *(f"test_xdp.py::test_udp[{kind}-{fate}]" for kind in ("veth", "tap", "tap-waiting") for fate in ("pass", "drop")),
    "test_xdp.py::test_tcp[veth]",
    *(
        f"test_dns.py::test_{what}[{state}-{transport}]"
        for what in ("rate", "latency")
        for state in ("cached", "uncached", "refused")
        for transport in ("udp", "tcp")
    ),
    *(f"test_restart.py::test_restart[{attachments}]" for attachments in (1, 10, 100)),
    *(f"test_memory.py::test_rules[{rules}]" for rules in (10_000, 100_000)),
}
SIZES = {
    "bulk_bench": {"RULES": 100_000},
    "test_attach": {"MANY": 100},
    "test_bulk": {"DOMAINS": 100_000},
    "test_control": {"SINGLES": 1_000, "RULES": 100_000},
    "test_dns": {"MANY": 100},
    "test_fleet": {"DAEMONS": 1_000, "ATTACHMENTS": 20},
}
TELL = """
import importlib, json, pathlib
names = [path.stem for path in pathlib.Path(PERF).glob("*.py")]
each = {name: vars(importlib.import_module(name)).items() for name in names}
plain = {name: {what: value for what, value in there if isinstance(value, int | list)} for name, there in each.items()}
print(json.dumps(plain, default=repr))
"""


def full(*argv: str) -> str:
    """Run Python as a full run would be, return what it prints."""
    env = {**os.environ, "NETFENCE_PERF": "full", "PYTHONPATH": f"{PERF}:{ROOT / 'tests/kernel'}"}
    command = [sys.executable, *argv]
    return subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.fixture(scope="module")
def constants() -> dict[str, dict[str, Any]]:
    """Return the numbers and lists that stand in each module of the benchmarks."""
    told: dict[str, dict[str, Any]] = json.loads(full("-c", f"PERF = {str(PERF)!r}\n{TELL}"))
    return told


def test_every_size_is_run() -> None:
    out = full("-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "tests/perf")
    assert {f"tests/perf/{one}" for one in IDS} - set(out.splitlines()) == set()


def test_sizes_inside_a_benchmark_are_those_of_a_full_run(constants: dict[str, dict[str, Any]]) -> None:
    assert {module: {name: constants[module][name] for name in sizes} for module, sizes in SIZES.items()} == SIZES


def test_a_full_run_has_enough_rounds(constants: dict[str, dict[str, Any]]) -> None:
    rounds = {
        f"{module}.{name}": value
        for module, each in constants.items()
        for name, value in each.items()
        if name.endswith("ROUNDS") or name == "RUNS"
    }
    assert {"measure.ROUNDS", "measure.SLOW_ROUNDS", "test_path.TCP_ROUNDS", "test_verdict.RUNS"} <= set(rounds)
    assert {name: value for name, value in rounds.items() if value < LEAST_ROUNDS} == {}
    assert constants["test_fleet"]["UPDATES"] == 5  # the exception that the README names


def test_the_path_is_compared_with_what_a_user_would_pick_instead() -> None:
    assert list(path_bench.FILTERS.items()) == [
        ("none", path_bench.Nothing),
        ("netfence-tcx", path_bench.Fence),
        ("netfence-clsact", path_bench.FenceClsact),
        ("nft-hash", path_bench.Nft),
        ("nft-interval", path_bench.NftInterval),
        ("ipset-ip", path_bench.Ipset),
        ("ipset-net", path_bench.IpsetNet),
    ]


def test_bulk_changes_are_compared_with_nft() -> None:
    assert list(bulk_bench.CONTESTANTS.items()) == [
        ("netfence", bulk_bench.BulkFence),
        ("nft-hash", bulk_bench.BulkNftHash),
        ("nft-interval", bulk_bench.BulkNftInterval),
    ]


def test_dns_is_compared_with_dnsmasq_and_unbound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[int, Sequence[str]] = {}

    @contextlib.contextmanager
    def running(_: object, port: int, argv: Sequence[str], *__: object) -> Iterator[dns_bench.Server]:
        started[port] = argv
        yield dns_bench.Server("127.0.0.1", port)

    monkeypatch.setattr(dns_bench, "_running", running)
    host: Any = SimpleNamespace(sysctl=lambda *_: None, run=lambda *_: None)
    with dns_bench.peers(host, tmp_path) as there:
        programs = {name: started[server.port] for name, server in there.items()}
    assert {name: argv[0] for name, argv in programs.items()} == {"dnsmasq-nftset": "dnsmasq", "unbound": "unbound"}
    assert any(argument.startswith("--nftset=") for argument in programs["dnsmasq-nftset"])


def test_every_hook_and_every_outcome_is_measured(constants: dict[str, dict[str, Any]]) -> None:
    assert set(verdict_bench.HOOKS) == {"tc", "xdp", "cgroup"}
    assert set(verdict_bench.STATES) == {"allow-hit", "lease-hit", "miss"}
    assert constants["test_xdp"]["HOOKS"] == ["none", "tc", "xdp-native", "xdp-generic"]
