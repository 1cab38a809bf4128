"""Fixtures of the kernel tests. See `harness/__init__.py` for what they are made of.

| fixture | scope | gives |
|---|---|---|
| `topology` | module | namespaces, empty of workloads: tests add theirs |
| `names` | module | unbound in the topology's internet, without records: `names.replace([...])` |
| `daemon` | module | netfenced in the topology's host, with a policy file that blocks all |
| `workload` | module | a veth workload of the topology, not attached |
| `agent` | module | a process in the workload's namespace |
| `cgroups` | function | makes cgroups, removes them |
| `fresh` | function | makes topologies and daemons of a test's own |
| `start` | function | makes daemons that a test tries the lives of (daemons.py) |
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from daemons import Start, starting
from harness import cgroup, sandbox
from harness.agent import Agent
from harness.cgroup import Cgroup
from harness.covers import covers
from harness.daemon import Netfenced
from harness.deadline import SLOWNESS
from harness.fresh import Fresh
from harness.needs import FIRST_KERNEL, earned, needs, version
from harness.parts import parted
from harness.topology import NAMESERVER4, NAMESERVER6, Topology, Workload
from harness.unbound import Unbound
from netfence.dataplane import probe


@pytest.fixture(scope="session", autouse=True)
def _sandbox() -> Iterator[None]:
    """Run the whole process inside the sandbox and leave no cgroup behind; sweep those of runs that were killed."""
    sandbox.enter()
    cgroup.sweep()
    yield
    cgroup.remove_ours()


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """Give a topology that lives as long as the test module."""
    made = Topology()
    yield made
    made.close()


@pytest.fixture(scope="module")
def names(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unbound]:
    """Give the internet's name server, at NAMESERVER4 and NAMESERVER6, port 53."""
    with Unbound(topology.internet, tmp_path_factory.mktemp("unbound"), [NAMESERVER4, NAMESERVER6]) as server:
        yield server


@pytest.fixture(scope="module")
def daemon(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Netfenced]:
    """Give a daemon that lives as long as the test module; a test detaches what it attached."""
    with Netfenced(topology.host, tmp_path_factory.mktemp("netfenced")) as running:
        yield running


@pytest.fixture(scope="module")
def workload(topology: Topology) -> Workload:
    """Give a workload behind a veth."""
    return topology.add_veth()


@pytest.fixture(scope="module")
def agent(workload: Workload) -> Iterator[Agent]:
    """Give a process in the workload's namespace."""
    with Agent(netns=workload.netns) as running:
        yield running


@pytest.fixture
def cgroups() -> Iterator[Callable[[str], Cgroup]]:
    """Give a maker of cgroups, which are removed, with what runs in them, when the test ends."""
    with ExitStack() as stack:

        def make(name: str) -> Cgroup:
            made = Cgroup(name)
            stack.callback(made.remove)
            return made

        yield make


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Fresh]:
    """Give a maker of things of a test's own."""
    with ExitStack() as stack:
        yield Fresh(stack, tmp_path)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Give a function that starts daemons of a test's own."""
    with starting(tmp_path) as start:
        yield start


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let each test say in the JUnit file what it covers, and let those of tcx wait for a kernel that has it.

    `NETFENCE_PART=2/4` leaves out what is for the other three parts, which are other kernels (ci/vm_tests.py).
    """
    if told := os.environ.get("NETFENCE_PART"):
        part, _, parts = told.partition("/")
        items[:], left = parted(items, int(part), int(parts))
        config.hook.pytest_deselected(items=left)
    # It takes the programs off the shelf (harness/warm.py): whoever came behind it would compile them once more.
    items.sort(key=lambda item: item.path.stem == "test_takeover")
    has_tcx = probe.kernel_version() >= version(FIRST_KERNEL["tcx"])
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        if SLOWNESS > 1:
            limit = item.get_closest_marker("timeout")
            seconds = limit.args[0] if limit else float(item.config.getini("timeout"))
            item.add_marker(pytest.mark.timeout(seconds * SLOWNESS), append=False)
        called = getattr(item, "callspec", None)
        test = item.originalname if item.cls is None else f"{item.cls.__name__}::{item.originalname}"
        id_and_values = (called.id, called.params.values()) if called else ()
        covered = covers(item.path.stem, test, *id_and_values)
        item.user_properties += covered.properties(has_tcx=has_tcx)
        if "tcx" in covered.hooks:
            item.add_marker(needs("tcx"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Fail a test whose skip is not earned (style.md 17), and show what running daemons logged when one fails."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if not earned(reason):
            report.outcome, report.longrepr = "failed", f"a skip that is not earned (harness/needs.py): {reason}"
    if report.failed:
        for running in Netfenced.running:
            report.sections.append((f"netfenced {running.pid}", running.log_tail()))
