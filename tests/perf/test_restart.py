"""`restart-*`: how long nobody can talk to the daemon, and until it has taken over all that was attached."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench_daemon import idle_interfaces
from harness.daemon import Netfenced
from harness.deadline import wait_for
from harness.topology import Topology
from measure import CPU, FULL, SLOW_ROUNDS, Series, compare, report

ATTACHMENTS = (1, 10, 100) if FULL else (1, 10)
LIMIT_S = 20
POLICY = {"default": {"mode": "allowlist", "allow_cidrs": [f"10.{n}.0.0/16" for n in range(20)]}}


@pytest.fixture(scope="module")
def interfaces(topology: Topology) -> list[str]:
    return idle_interfaces(topology.host, max(ATTACHMENTS))


@pytest.fixture(scope="module")
def daemon(
    topology: Topology, interfaces: list[str], pinned_module: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Netfenced]:
    directory = tmp_path_factory.mktemp("netfenced")
    with Netfenced(topology.host, directory, policy=POLICY, config={"log_level": "warning"}) as one:
        yield one


def _fences(daemon: Netfenced) -> list[str]:
    """List the pinned links that enforce; those that note connections from outside come a little later."""
    return [pin for pin in daemon.link_pins() if pin.endswith("-main")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("attachments", ATTACHMENTS)
def test_restart(daemon: Netfenced, interfaces: list[str], attachments: int) -> None:
    """From the signal to the first answer, and to every attachment's policy in force; the fence stays meanwhile."""
    for name in interfaces[len(daemon.attachments()) : attachments]:
        daemon.attach(interface=name)
    before = sorted(info.id for info in daemon.attachments())
    fences = _fences(daemon)
    assert len(fences) == attachments
    taken_over: defaultdict[str, list[float]] = defaultdict(list)

    def restart(how: str, end: Callable[[], object]) -> float:
        start = time.perf_counter()
        end()
        assert _fences(daemon) == fences, "the fence went with the daemon"
        daemon.start()
        open_again = time.perf_counter() - start
        wait_for(daemon.policy_in_force, "every policy to be in force")
        taken_over[how].append(time.perf_counter() - start)
        assert sorted(info.id for info in daemon.attachments()) == before
        return open_again

    ways = {"sigterm": daemon.stop, "kill-9": daemon.kill}
    series = compare("s", {how: lambda how=how, end=end: restart(how, end) for how, end in ways.items()}, SLOW_ROUNDS)  # type: ignore[misc]
    report("restart-api-open", series, attachments=attachments, cpu_pinned=CPU)
    whole = {how: Series("s", values[-SLOW_ROUNDS:]) for how, values in taken_over.items()}
    report("restart-all-in-force", whole, attachments=attachments, cpu_pinned=CPU)
    assert series["kill-9"].median < LIMIT_S


@pytest.mark.timeout(300)
def test_first_start(topology: Topology, pinned_module: int, tmp_path: Path) -> None:
    """After a boot: nothing is loaded, and the programs are compiled and verified; then once more, without."""
    second: list[float] = []

    def start(number: int) -> float:
        daemon = Netfenced(topology.host, tmp_path / str(number), policy=POLICY, cold=True)
        began = time.perf_counter()
        with daemon:
            elapsed = time.perf_counter() - began
            daemon.stop()
            began = time.perf_counter()
            daemon.start()
            second.append(time.perf_counter() - began)
        return elapsed

    compiling = Series("s", [start(number) for number in range(SLOW_ROUNDS)])
    told = {"compiling": compiling, "programs-there": Series("s", second)}
    report("restart-first-start", told, base="compiling", attachments=0, cpu_pinned=CPU)
    assert compiling.median < LIMIT_S
